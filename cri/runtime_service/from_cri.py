"""CRI messages → our values. Pure; a bad field raises InvalidArgument with its path and value."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePosixPath

from cri.api.runtime.v1 import api_pb2 as api
from oci.container_spec import (
    Capabilities,
    ContainerSpec,
    Device,
    IdMapping,
    Mount,
    NamespaceMode,
    Profile,
    ProfileKind,
    Propagation,
    Resources,
    SecurityContext,
    SELinuxLabel,
    UserNamespace,
)
from oci.errors import InvalidArgument
from sandbox.namespaces import HOSTNAME_LIMIT
from sandbox.spec import DnsConfig, PortMapping, Protocol, SandboxSecurity, SandboxSpec

MOUNT_OPTIONS = ("noexec", "nodev", "nosuid")


_PROTOCOLS = {api.TCP: Protocol.TCP, api.UDP: Protocol.UDP, api.SCTP: Protocol.SCTP}
_MODES = {
    api.POD: NamespaceMode.POD,
    api.CONTAINER: NamespaceMode.CONTAINER,
    api.NODE: NamespaceMode.NODE,
    api.TARGET: NamespaceMode.TARGET,
}
_PROPAGATIONS = {
    api.PROPAGATION_PRIVATE: Propagation.PRIVATE,
    api.PROPAGATION_HOST_TO_CONTAINER: Propagation.HOST_TO_CONTAINER,
    api.PROPAGATION_BIDIRECTIONAL: Propagation.BIDIRECTIONAL,
}
_PROFILES = {
    api.SecurityProfile.RuntimeDefault: ProfileKind.RUNTIME_DEFAULT,
    api.SecurityProfile.Unconfined: ProfileKind.UNCONFINED,
    api.SecurityProfile.Localhost: ProfileKind.LOCALHOST,
}


def sandbox_spec(config: api.PodSandboxConfig, runtime_handler: str) -> SandboxSpec:
    """The pod sandbox that RunPodSandbox asks for.

    Raises InvalidArgument where the metadata is missing or a field's value cannot be.
    """
    if not config.HasField("metadata"):
        raise InvalidArgument("config.metadata: missing")
    metadata = config.metadata
    for field in ("name", "uid", "namespace"):
        if not getattr(metadata, field):
            raise InvalidArgument(f"config.metadata.{field}: empty")
    if len(config.hostname) > HOSTNAME_LIMIT:
        raise InvalidArgument(f"config.hostname: {config.hostname!r} is longer than {HOSTNAME_LIMIT} characters")
    if config.log_directory and not config.log_directory.startswith("/"):
        raise InvalidArgument(f"config.log_directory: {config.log_directory!r} is not an absolute path")
    linux = config.linux
    return SandboxSpec(
        name=metadata.name,
        uid=metadata.uid,
        namespace=metadata.namespace,
        attempt=metadata.attempt,
        hostname=config.hostname,
        log_directory=config.log_directory,
        dns=_dns(config.dns_config) if config.HasField("dns_config") else None,
        port_mappings=tuple(_port_mapping(mapping, index) for index, mapping in enumerate(config.port_mappings)),
        labels=dict(config.labels),
        annotations=dict(config.annotations),
        cgroup_parent=linux.cgroup_parent,
        sysctls=dict(linux.sysctls),
        security=_sandbox_security(linux.security_context),
        overhead=resources(linux.overhead) if linux.HasField("overhead") else Resources(),
        resources=resources(linux.resources) if linux.HasField("resources") else Resources(),
        runtime_handler=runtime_handler,
    )


def container_spec(config: api.ContainerConfig) -> ContainerSpec:
    """The container that CreateContainer asks for.

    Raises InvalidArgument where the metadata or the image is missing or a field's value cannot be.
    """
    if not config.HasField("metadata"):
        raise InvalidArgument("config.metadata: missing")
    if not config.metadata.name:
        raise InvalidArgument("config.metadata.name: empty")
    if not config.image.image:
        raise InvalidArgument("config.image.image: empty")
    if config.working_dir and not config.working_dir.startswith("/"):
        raise InvalidArgument(f"config.working_dir: {config.working_dir!r} is not an absolute path")
    linux = config.linux
    return ContainerSpec(
        name=config.metadata.name,
        attempt=config.metadata.attempt,
        image=config.image.user_specified_image or config.image.image,
        image_annotations=dict(config.image.annotations),
        command=tuple(config.command),
        args=tuple(config.args),
        working_dir=config.working_dir,
        envs=tuple(_env(env, index) for index, env in enumerate(config.envs)),
        mounts=tuple(_mount(mount, index) for index, mount in enumerate(config.mounts)),
        devices=tuple(_device(device, index) for index, device in enumerate(config.devices)),
        cdi_devices=tuple(device.name for device in config.CDI_devices),
        labels=dict(config.labels),
        annotations=dict(config.annotations),
        log_path=_log_path(config.log_path),
        stdin=config.stdin,
        stdin_once=config.stdin_once,
        tty=config.tty,
        stop_signal=stop_signal(config.stop_signal),
        resources=resources(linux.resources) if linux.HasField("resources") else Resources(),
        security=_security(linux.security_context),
    )


def resources(message: api.LinuxContainerResources) -> Resources:
    """The resources of a message that is there; its oom_score_adj of 0 means 0."""
    for field in ("cpu_period", "cpu_shares", "memory_limit_in_bytes"):
        if getattr(message, field) < 0:
            raise InvalidArgument(f"linux.resources.{field}: {getattr(message, field)} is negative")
    if not -1000 <= message.oom_score_adj <= 1000:
        raise InvalidArgument(f"linux.resources.oom_score_adj: {message.oom_score_adj} is not within -1000 and 1000")
    return Resources(
        cpu_period=message.cpu_period,
        cpu_quota=message.cpu_quota,
        cpu_shares=message.cpu_shares,
        memory_limit_bytes=message.memory_limit_in_bytes,
        memory_swap_limit_bytes=message.memory_swap_limit_in_bytes,
        oom_score_adj=message.oom_score_adj,
        cpuset_cpus=message.cpuset_cpus,
        cpuset_mems=message.cpuset_mems,
        hugepage_limits=tuple((limit.page_size, limit.limit) for limit in message.hugepage_limits),
        unified=dict(message.unified),
    )


def resource_changes(message: api.LinuxContainerResources) -> Resources:
    """What UpdateContainerResources changes. An oom_score_adj of 0 changes nothing: the message cannot leave it out."""
    wanted = resources(message)
    return wanted if wanted.oom_score_adj else replace(wanted, oom_score_adj=None)


def stop_signal(value: "api.Signal.ValueType") -> str:
    """The signal's name as signal(7) writes it, "" for the image's own choice."""
    if value == api.SIGNAL_RUNTIME_DEFAULT:
        return ""
    try:
        name = api.Signal.Name(value)
    except ValueError:
        raise InvalidArgument(f"config.stop_signal: {value} is not a signal of the CRI") from None
    return name.removeprefix("SIGNAL_").replace("PLUS", "+").replace("MINUS", "-")


def _dns(message: api.DNSConfig) -> DnsConfig:
    return DnsConfig(tuple(message.servers), tuple(message.searches), tuple(message.options))


def _port_mapping(message: api.PortMapping, index: int) -> PortMapping:
    path = f"config.port_mappings[{index}]"
    for field in ("container_port", "host_port"):
        if not 0 <= getattr(message, field) <= 65535:
            raise InvalidArgument(f"{path}.{field}: {getattr(message, field)} is not a port number")
    if message.protocol not in _PROTOCOLS:
        raise InvalidArgument(f"{path}.protocol: {message.protocol} is not TCP, UDP or SCTP")
    return PortMapping(_PROTOCOLS[message.protocol], message.container_port, message.host_port, message.host_ip)


def _mode(options: api.NamespaceOption, field: str, allowed: Iterable[NamespaceMode]) -> NamespaceMode:
    value = getattr(options, field)
    mode = _MODES.get(value)
    if mode is None or mode not in allowed:
        names = ", ".join(allowed_mode.name for allowed_mode in allowed)
        raise InvalidArgument(f"namespace_options.{field}: {mode.name if mode else value} is not one of {names}")
    return mode


def _user_namespace(options: api.NamespaceOption) -> UserNamespace | None:
    if not options.HasField("userns_options"):
        return None
    message = options.userns_options
    if message.mode == api.NODE:
        if message.uids or message.gids:
            raise InvalidArgument("userns_options: mode NODE takes no id mappings")
        return None
    if message.mode != api.POD:
        raise InvalidArgument(f"userns_options.mode: {_MODES[message.mode].name} is neither POD nor NODE")
    for field in ("uids", "gids"):
        mappings = getattr(message, field)
        if len(mappings) != 1:
            raise InvalidArgument(f"userns_options.{field}: exactly one mapping is needed, {len(mappings)} were given")
        if mappings[0].container_id != 0:
            raise InvalidArgument(f"userns_options.{field}: id 0 of the container is not mapped")
        if not mappings[0].length:
            raise InvalidArgument(f"userns_options.{field}: the mapping's length is 0")
    return UserNamespace(_id_mappings(message.uids), _id_mappings(message.gids))


def _id_mappings(mappings: Iterable[api.IDMapping]) -> tuple[IdMapping, ...]:
    return tuple(IdMapping(mapping.container_id, mapping.host_id, mapping.length) for mapping in mappings)


def _sandbox_security(message: api.LinuxSandboxSecurityContext) -> SandboxSecurity:
    options = message.namespace_options
    if message.HasField("run_as_group") and not message.HasField("run_as_user"):
        raise InvalidArgument("linux.security_context.run_as_group: given without run_as_user")
    return SandboxSecurity(
        network=_mode(options, "network", (NamespaceMode.POD, NamespaceMode.NODE)),
        # TARGET is meant for a container; for the pod it says the same as CONTAINER: no PID namespace is shared.
        pid=_mode(options, "pid", NamespaceMode),
        ipc=_mode(options, "ipc", (NamespaceMode.POD, NamespaceMode.NODE)),
        user_namespace=_user_namespace(options),
        privileged=message.privileged,
        run_as_user=message.run_as_user.value if message.HasField("run_as_user") else None,
        run_as_group=message.run_as_group.value if message.HasField("run_as_group") else None,
        readonly_rootfs=message.readonly_rootfs,
        supplemental_groups=tuple(message.supplemental_groups),
        seccomp=_profile(message.seccomp, "seccomp") if message.HasField("seccomp") else None,
        apparmor=_profile(message.apparmor, "apparmor") if message.HasField("apparmor") else None,
        selinux=_selinux(message.selinux_options) if message.HasField("selinux_options") else None,
    )


def _security(message: api.LinuxContainerSecurityContext) -> SecurityContext:
    options = message.namespace_options
    pid = _mode(options, "pid", NamespaceMode)
    if pid is NamespaceMode.TARGET and not options.target_id:
        raise InvalidArgument("namespace_options.target_id: empty with pid mode TARGET")
    if message.HasField("run_as_group") and not (message.HasField("run_as_user") or message.run_as_username):
        raise InvalidArgument("linux.security_context.run_as_group: given without run_as_user or run_as_username")
    capabilities = message.capabilities
    return SecurityContext(
        privileged=message.privileged,
        capabilities=Capabilities(
            _capabilities(capabilities.add_capabilities),
            _capabilities(capabilities.drop_capabilities),
            _capabilities(capabilities.add_ambient_capabilities),
        ),
        network=_mode(options, "network", (NamespaceMode.POD, NamespaceMode.NODE)),
        pid=pid,
        ipc=_mode(options, "ipc", (NamespaceMode.POD, NamespaceMode.NODE)),
        target_id=options.target_id,
        user_namespace=_user_namespace(options),
        run_as_user=message.run_as_user.value if message.HasField("run_as_user") else None,
        run_as_username=message.run_as_username,
        run_as_group=message.run_as_group.value if message.HasField("run_as_group") else None,
        supplemental_groups=tuple(message.supplemental_groups),
        strict_supplemental_groups=message.supplemental_groups_policy == api.Strict,
        readonly_rootfs=message.readonly_rootfs,
        no_new_privs=message.no_new_privs,
        seccomp=_seccomp(message),
        apparmor=_apparmor(message),
        selinux=_selinux(message.selinux_options) if message.HasField("selinux_options") else None,
        masked_paths=tuple(message.masked_paths),
        readonly_paths=tuple(message.readonly_paths),
    )


def _seccomp(message: api.LinuxContainerSecurityContext) -> Profile | None:
    """The field, else the deprecated path, else None, which the CRI says is unconfined."""
    if message.HasField("seccomp"):
        return _profile(message.seccomp, "seccomp")
    return _deprecated_profile(message.seccomp_profile_path, "seccomp_profile_path")


def _apparmor(message: api.LinuxContainerSecurityContext) -> Profile | None:
    if message.HasField("apparmor"):
        return _profile(message.apparmor, "apparmor")
    return _deprecated_profile(message.apparmor_profile, "apparmor_profile")


def _profile(message: api.SecurityProfile, field: str) -> Profile:
    if message.profile_type not in _PROFILES:
        raise InvalidArgument(f"linux.security_context.{field}.profile_type: {message.profile_type} is unknown")
    kind = _PROFILES[message.profile_type]
    if kind is ProfileKind.LOCALHOST and not message.localhost_ref:
        raise InvalidArgument(f"linux.security_context.{field}.localhost_ref: empty with type Localhost")
    localhost = message.localhost_ref.removeprefix("localhost/") if kind is ProfileKind.LOCALHOST else ""
    return Profile(kind, localhost)


def _deprecated_profile(text: str, field: str) -> Profile | None:
    """A profile as the old text fields name it: "", "runtime/default", "unconfined" or "localhost/REF"."""
    if not text:
        return None
    if text in ("runtime/default", "docker/default"):
        return Profile(ProfileKind.RUNTIME_DEFAULT)
    if text == "unconfined":
        return Profile(ProfileKind.UNCONFINED)
    if text.startswith("localhost/"):
        return Profile(ProfileKind.LOCALHOST, text.removeprefix("localhost/"))
    raise InvalidArgument(f"linux.security_context.{field}: {text!r} is not a profile's name")


def _selinux(message: api.SELinuxOption) -> SELinuxLabel:
    return SELinuxLabel(message.user, message.role, message.type, message.level)


def _capabilities(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name.upper().removeprefix("CAP_") for name in names)


def _env(env: api.KeyValue, index: int) -> tuple[str, str]:
    if not env.key or "=" in env.key or "\0" in env.key:
        raise InvalidArgument(f"config.envs[{index}].key: {env.key!r} is not a variable's name")
    if b"\0" in env.value:
        raise InvalidArgument(f"config.envs[{index}].value: the value of {env.key} has a NUL byte")
    # The runtime's configuration is JSON: other bytes become U+FFFD, as with containerd and CRI-O, and the pod starts.
    return env.key, env.value.decode(errors="replace")


def _mount(message: api.Mount, index: int) -> Mount:
    path = f"config.mounts[{index}]"
    if not message.container_path:
        raise InvalidArgument(f"{path}.container_path: empty")
    image = message.image.image
    if image and message.host_path:
        raise InvalidArgument(f"{path}: has both an image ({image!r}) and a host_path ({message.host_path!r})")
    if not image and not message.host_path:
        raise InvalidArgument(f"{path}.host_path: empty for {message.container_path!r}")
    if image and not message.readonly:
        raise InvalidArgument(f"{path}.readonly: false for an image volume ({image!r}), which is always read-only")
    if message.image_sub_path and not image:
        raise InvalidArgument(f"{path}.image_sub_path: given without an image")
    if message.propagation not in _PROPAGATIONS:
        raise InvalidArgument(f"{path}.propagation: {message.propagation} is unknown")
    propagation = _PROPAGATIONS[message.propagation]
    if message.recursive_read_only and not message.readonly:
        raise InvalidArgument(f"{path}.recursive_read_only: true while readonly is false")
    if message.recursive_read_only and propagation is not Propagation.PRIVATE:
        raise InvalidArgument(f"{path}.recursive_read_only: true with propagation other than PRIVATE")
    for option in message.mount_options:
        if option not in MOUNT_OPTIONS:
            raise InvalidArgument(f"{path}.mount_options: {option!r} is not one of {', '.join(MOUNT_OPTIONS)}")
    return Mount(
        container_path=message.container_path,
        host_path=message.host_path,
        readonly=message.readonly,
        recursive_read_only=message.recursive_read_only,
        propagation=propagation,
        selinux_relabel=message.selinux_relabel,
        uid_mappings=_id_mappings(message.uidMappings),
        gid_mappings=_id_mappings(message.gidMappings),
        image=image,
        image_name=message.image.user_specified_image,
        image_sub_path=message.image_sub_path,
        options=tuple(message.mount_options),
    )


def _device(message: api.Device, index: int) -> Device:
    path = f"config.devices[{index}]"
    if not message.host_path.startswith("/"):
        raise InvalidArgument(f"{path}.host_path: {message.host_path!r} is not an absolute path")
    if not message.permissions or not set(message.permissions) <= set("rwm"):
        raise InvalidArgument(f"{path}.permissions: {message.permissions!r} is not made of r, w and m")
    return Device(message.container_path or message.host_path, message.host_path, message.permissions)


def _log_path(text: str) -> str:
    path = PurePosixPath(text)
    if text and (path.is_absolute() or ".." in path.parts):
        raise InvalidArgument(f"config.log_path: {text!r} is not a path below the pod's log directory")
    return text
