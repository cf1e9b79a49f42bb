"""The settings of the daemon: one frozen section per part, each key with its kind, default and description.

Where the values come from (files, drop-ins, flags, the host) is `cri/config_reader.py`; how they are printed is
`cri/config_text.py`. Durations are seconds, sizes are bytes. Keys bear CRI-O's names where the thing is the same.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from dataclasses import fields as dataclass_fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from cri import config_kinds as kinds
from cri.config_kinds import Kind, RegistryLimit, Ulimit
from oci.linux import caps

MIB = 1 << 20


class CgroupDriver(StrEnum):
    SYSTEMD = "systemd"
    CGROUPFS = "cgroupfs"


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


class TlsVersion(StrEnum):
    """By the names that Go gives them, as kubelet's and CRI-O's settings have them."""

    TLS_1_2 = "VersionTLS12"
    TLS_1_3 = "VersionTLS13"


def setting(kind: Kind[Any], default: Any, doc: str, *, shown: str = "") -> Any:
    """A dataclass field that is a key of the file; `shown` tells what the default is where the host decides it."""
    return field(default=default, metadata={"kind": kind, "doc": doc, "shown": shown})


@dataclass(frozen=True, slots=True)
class CritoSection:
    """Where everything of this daemon lies. Two daemons on one machine need nothing but two of each."""

    root: Path = setting(
        kinds.PATH,
        Path("/var/lib/crito"),
        "Directory of what outlives a reboot: the state database, images, writable layers.",
    )
    run_dir: Path = setting(
        kinds.PATH,
        Path("/run/crito"),
        "Directory of what a reboot ends: sockets, pinned namespaces, bundles, exit records. Put it on a tmpfs: there"
        " a full disk cannot lose an exit code.",
    )


@dataclass(frozen=True, slots=True)
class ApiSection:
    """The socket on which kubelet and crictl are answered."""

    listen: Path = setting(
        kinds.SOCKET_PATH,
        Path("/run/crito/crito.sock"),
        "UNIX socket of the CRI, made with mode 0660.",
        shown="crito.sock in crito.run_dir",
    )
    grpc_max_recv_msg_size: int = setting(kinds.GRPC_SIZE, 80 * MIB, "Largest message that is taken, in bytes.")
    grpc_max_send_msg_size: int = setting(kinds.GRPC_SIZE, 80 * MIB, "Largest message that is sent, in bytes.")


@dataclass(frozen=True, slots=True)
class StreamingSection:
    """The server to which Exec, Attach and PortForward send their callers (see streaming.md)."""

    address: str = setting(
        kinds.ADDRESS, "127.0.0.1", "IP address to listen on; also the host of the URLs that are returned."
    )
    port: int = setting(kinds.PORT, 0, "TCP port; 0 takes a free one.")
    tls_cert: Path | None = setting(
        kinds.OPTIONAL_PATH, None, "Certificate (PEM) of the server; empty serves plain HTTP."
    )
    tls_key: Path | None = setting(kinds.OPTIONAL_PATH, None, "Private key (PEM) of tls_cert.")
    tls_ca: Path | None = setting(
        kinds.OPTIONAL_PATH, None, "CA (PEM) that must have signed the callers' certificates; empty asks for none."
    )
    tls_min_version: TlsVersion = setting(
        kinds.choice(TlsVersion), TlsVersion.TLS_1_2, "Least version of TLS that callers may use."
    )
    tls_cipher_suites: tuple[str, ...] = setting(
        kinds.TEXTS,
        (),
        "Cipher suites of TLS 1.2 by their IANA names, such as TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256; empty: OpenSSL's"
        " defaults. Those of TLS 1.3 are all good, and not for choice.",
    )
    idle_timeout: float = setting(
        kinds.DURATION, 4 * 3600.0, "A session on which nothing moves for this long is closed; 0 closes none."
    )


@dataclass(frozen=True, slots=True)
class RuntimeHandler:
    """One OCI runtime, by the name that a RuntimeClass gives as its handler."""

    path: Path = setting(
        kinds.PATH,
        MISSING,
        "The OCI runtime's executable.",
        shown="the executable of the handler's name in /usr/local/{s,}bin, /usr/{s,}bin, /{s,}bin",
    )
    root: Path = setting(
        kinds.PATH,
        MISSING,
        "The OCI runtime's own state directory (its --root).",
        shown="runtimes/NAME in crito.run_dir",
    )
    monitor_cgroup: str = setting(
        kinds.CGROUP,
        "",
        "Cgroup of the monitors: an absolute path below the cgroup root. Empty leaves them in the daemon's. Never"
        " a pod's, because kubelet kills what it finds there.",
    )
    allowed_annotations: tuple[str, ...] = setting(
        kinds.TEXTS,
        (),
        "Annotations of pods and containers that the OCI runtime gets: exact names, or prefixes that end in *.",
    )
    default_annotations: tuple[tuple[str, str], ...] = setting(
        kinds.ENVIRONMENT,
        (),
        'Annotations, as "NAME=VALUE", that the OCI runtime gets with every container; allowed ones of the pod win.',
    )
    runtime_args: tuple[str, ...] = setting(
        kinds.TEXTS,
        (),
        'Options of the OCI runtime that precede each of its commands, such as "--config=/etc/kata/qemu.toml".',
    )
    sandbox_by_runtime: bool = setting(
        kinds.FLAG,
        False,
        "The OCI runtime makes pod sandboxes itself, and all containers of a pod live in its one process: gVisor's"
        " runsc, or one with its command line.",
    )
    no_pivot: bool = setting(
        kinds.FLAG,
        False,
        "Have the OCI runtime move the root file system instead of pivoting it, for hosts whose root is a ramdisk. Less"
        " safe: what the host has mounted can be laid bare.",
    )
    seccomp_profile: Path | None = setting(
        kinds.OPTIONAL_PATH,
        None,
        "JSON file of this handler's seccomp profile RuntimeDefault; empty: as runtime.seccomp_profile.",
    )
    container_create_timeout: float = setting(
        kinds.DURATION,
        0.0,
        "As runtime.container_create_timeout, for this handler: one that boots a machine needs more; 0: as there.",
    )
    privileged_without_host_devices: bool = setting(
        kinds.FLAG, False, "A privileged container sees the usual devices only, not all of the host's."
    )
    container_min_memory: int = setting(
        kinds.SIZE,
        0,
        "Memory limits below this are refused with a clear error, because the OCI runtime could not start the container"
        " under them; 0 refuses none.",
    )


@dataclass(frozen=True, slots=True)
class RuntimeSection:
    """How pods and containers are run where the CRI leaves the choice to the runtime."""

    default_handler: str = setting(
        kinds.TEXT,
        "",
        "Runtime handler of pods that name none.",
        shown="crun if it can run a container on this host, else runc; `crito check` says why",
    )
    cgroup_driver: CgroupDriver = setting(
        kinds.choice(CgroupDriver),
        CgroupDriver.CGROUPFS,
        "Who makes cgroups; kubelet asks for it and follows.",
        shown='"systemd" where /run/systemd/system exists, else "cgroupfs"',
    )
    drop_pause: bool = setting(
        kinds.FLAG, False, "Keep no pause process for pods whose containers share no PID namespace."
    )
    pause_path: Path | None = setting(
        kinds.OPTIONAL_PATH,
        None,
        "Static program that becomes the pause process, run as `PROGRAM -P`; empty uses the built-in one.",
        shown="catatonit where it is installed, else the built-in one",
    )
    default_capabilities: tuple[str, ...] = setting(
        kinds.CAPABILITIES, caps.DEFAULT, "Capabilities of containers that ask for nothing else."
    )
    default_env: tuple[tuple[str, str], ...] = setting(
        kinds.ENVIRONMENT, (), 'Environment of every container, as "NAME=VALUE"; the image and the pod win.'
    )
    default_sysctls: tuple[tuple[str, str], ...] = setting(
        kinds.SYSCTLS, (), 'Sysctls of every pod that has the namespace for them, as "NAME=VALUE"; the pod wins.'
    )
    default_ulimits: tuple[Ulimit, ...] = setting(
        kinds.ULIMITS,
        (Ulimit("nofile", 1024, 524288),),
        'Resource limits of every container, as "NAME=SOFT:HARD" (prlimit names; -1 is unlimited).',
    )
    seccomp_profile: Path | None = setting(
        kinds.OPTIONAL_PATH, None, "JSON file of the seccomp profile RuntimeDefault; empty uses the built-in one."
    )
    cdi_spec_dirs: tuple[Path, ...] = setting(
        kinds.PATHS,
        (Path("/etc/cdi"), Path("/var/run/cdi")),
        "Directories of CDI descriptions of devices (*.json, *.yaml); where two have the same one, the later counts.",
    )
    hooks_dir: tuple[Path, ...] = setting(
        kinds.PATHS,
        (Path("/usr/share/containers/oci/hooks.d"), Path("/etc/containers/oci/hooks.d")),
        "Directories of OCI hooks (oci-hooks(5)); a file in a later one masks that of its name in an earlier one.",
    )
    container_create_timeout: float = setting(
        kinds.TIMEOUT, 240.0, "An OCI runtime that has not created or started a container by then is killed."
    )
    criu_path: Path | None = setting(
        kinds.OPTIONAL_PATH,
        None,
        "CRIU's executable, for checkpoint and restore; its file name is `criu`.",
        shown="criu in /usr/local/{s,}bin, /usr/{s,}bin",
    )
    log_size_max: int = setting(
        kinds.LOG_SIZE,
        0,
        "Size at which a container's log stops growing until it is rotated; 0 is unlimited, else 8192 or more.",
    )
    handlers: Mapping[str, RuntimeHandler] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImageSection:
    """Where images come from and how they are pulled."""

    registries_conf: Path = setting(
        kinds.PATH,
        Path("/etc/containers/registries.conf"),
        "Mirrors, rewrites, blocks (containers-registries.conf(5)).",
    )
    registries_conf_dir: Path = setting(
        kinds.PATH, Path("/etc/containers/registries.conf.d"), "Drop-ins of registries_conf."
    )
    policy: Path = setting(
        kinds.PATH,
        Path("/etc/containers/policy.json"),
        "Which images may be pulled and run (containers-policy.json(5)); none: all.",
    )
    policy_dir: Path = setting(
        kinds.PATH,
        Path("/etc/crito/policies"),
        "Directory of NAMESPACE.json: the policy of a namespace's pods, instead of `policy`.",
    )
    registries_d: Path = setting(
        kinds.PATH,
        Path("/etc/containers/registries.d"),
        "Where the signatures of images lie (containers-registries.d(5)).",
    )
    auth_file: Path | None = setting(
        kinds.OPTIONAL_PATH, None, "Registry credentials for pulls that bring none (containers-auth.json(5))."
    )
    namespaced_auth_dir: Path | None = setting(
        kinds.OPTIONAL_PATH,
        None,
        "Directory of auth files for one pull each, NAMESPACE-<SHA-256 of the image's name>.json, as CRI-O's credential"
        " provider for kubelet writes them (to /etc/crio/auth); empty: none. Used instead of auth_file, then gone.",
    )
    certs_dir: Path = setting(
        kinds.PATH, Path("/etc/containers/certs.d"), "Directories HOST[:PORT] with ca.crt, client.cert and client.key."
    )
    decryption_keys_path: Path | None = setting(
        kinds.OPTIONAL_PATH,
        Path("/etc/crito/keys"),
        "Directory of private keys (PEM, DER or JWK) for encrypted images; read at each pull, it may be missing. Empty:"
        " none is decrypted.",
    )
    pinned_images: tuple[str, ...] = setting(
        kinds.TEXTS, (), 'Images that kubelet must not collect: exact names, "prefix*" or "*word*".'
    )
    max_parallel_layers: int = setting(kinds.COUNT, 4, "Layers that are fetched and unpacked at once, over all pulls.")
    registry_limits: tuple[RegistryLimit, ...] = setting(
        kinds.REGISTRY_LIMITS,
        (),
        'Layers of one registry that are fetched at once, and their bytes per second: "HOST layers=2 rate=10MiB".',
    )
    additional_image_stores: tuple[Path, ...] = setting(
        kinds.PATHS,
        (),
        "Image stores to be used and never changed: the `images` directories of other roots, such as one that is baked"
        " into the node's image. What is wrong with one is logged, and does not stop the daemon.",
    )
    bundle_dir: Path | None = setting(
        kinds.OPTIONAL_PATH,
        None,
        "Directory of OCI layouts and archives (also of docker save) whose images are loaded and pinned at each start.",
    )
    pull_connect_timeout: float = setting(
        kinds.DURATION, 30.0, "A registry that has not answered by then counts as gone."
    )
    pull_progress_timeout: float = setting(
        kinds.TIMEOUT,
        300.0,
        "A layer of which no byte has been fetched, unpacked or synced for this long is given up.",
    )


@dataclass(frozen=True, slots=True)
class NetworkSection:
    """How pods get their network: CNI."""

    conf_dir: Path = setting(
        kinds.PATH, Path("/etc/cni/net.d"), "Directory of CNI configurations, watched for changes."
    )
    plugin_dirs: tuple[Path, ...] = setting(
        kinds.PATHS,
        (Path("/opt/cni/bin"), Path("/usr/lib/cni"), Path("/usr/libexec/cni")),
        "Directories in which CNI plugins are looked for, in order.",
    )
    default_network: str = setting(
        kinds.TEXT,
        "",
        "Name of the network that pods join.",
        shown="that of the first valid file in conf_dir, in lexical order",
    )
    max_conf_num: int = setting(
        kinds.COUNT_OR_ALL, 1, "How many of the networks in conf_dir a pod joins, the default one first; 0 is all."
    )
    timeout: float = setting(kinds.TIMEOUT, 90.0, "A CNI plugin that has not finished by then is killed.")


@dataclass(frozen=True, slots=True)
class NriSection:
    """The Node Resource Interface: plugins that take part in the life of pods and containers (see nri.md)."""

    enable: bool = setting(kinds.FLAG, False, "Let plugins take part.")
    listen: Path = setting(
        kinds.SOCKET_PATH,
        Path("/run/crito/nri.sock"),
        "UNIX socket on which plugins connect, made with mode 0600. What most plugins try by themselves is"
        " /var/run/nri/nri.sock.",
        shown="nri.sock in crito.run_dir",
    )
    disable_connections: bool = setting(kinds.FLAG, False, "Run the plugins of plugin_path only; listen on no socket.")
    plugin_path: Path = setting(
        kinds.PATH, Path("/opt/nri/plugins"), "Directory of plugins that the daemon starts: executables named NN-NAME."
    )
    plugin_config_path: Path = setting(
        kinds.PATH,
        Path("/etc/nri/conf.d"),
        "Directory of what is handed to the plugins of plugin_path: NN-NAME.conf, else NAME.conf.",
    )
    plugin_registration_timeout: float = setting(
        kinds.TIMEOUT,
        5.0,
        "A plugin that has not registered by then is dropped, and so is one that takes longer to be synchronised.",
    )
    plugin_request_timeout: float = setting(
        kinds.TIMEOUT, 2.0, "A plugin that has not answered a request by then is dropped, and the request goes on."
    )
    default_validator: bool = setting(
        kinds.FLAG, False, "Refuse containers whose adjustments the validator_ keys forbid."
    )
    validator_reject_oci_hook_adjustment: bool = setting(kinds.FLAG, False, "Refuse OCI hooks that plugins add.")
    validator_reject_runtime_default_seccomp_adjustment: bool = setting(
        kinds.FLAG, False, "Refuse a plugin's seccomp policy where the pod has RuntimeDefault."
    )
    validator_reject_unconfined_seccomp_adjustment: bool = setting(
        kinds.FLAG, False, "Refuse a plugin's seccomp policy where the pod has none."
    )
    validator_reject_custom_seccomp_adjustment: bool = setting(
        kinds.FLAG, False, "Refuse a plugin's seccomp policy where the pod has a Localhost profile."
    )
    validator_reject_namespace_adjustment: bool = setting(kinds.FLAG, False, "Refuse changes of Linux namespaces.")
    validator_reject_sysctl_adjustment: bool = setting(kinds.FLAG, False, "Refuse changes of sysctls.")
    validator_required_plugins: tuple[str, ...] = setting(
        kinds.TEXTS,
        (),
        "Plugins, by NAME or NN-NAME, without which no container is made. Static pods need them too, unless annotated.",
    )
    validator_tolerate_missing_plugins_annotation: str = setting(
        kinds.TEXT,
        "",
        "Annotation of a pod by which it does without the required plugins (value true); empty lets none do so.",
    )


@dataclass(frozen=True, slots=True)
class MetricsSection:
    """Prometheus metrics over HTTP."""

    listen: str = setting(
        kinds.LISTEN,
        "",
        'Where /metrics is served: "IP:PORT", or the absolute path of a UNIX socket; empty serves none.',
    )


@dataclass(frozen=True, slots=True)
class TracingSection:
    """Traces of requests, in OpenTelemetry's protocol."""

    endpoint: str = setting(
        kinds.HTTP_URL,
        "",
        'Collector that takes OTLP over gRPC, as "http://HOST:4317", or https for TLS; empty traces nothing.',
    )
    sampling_rate_per_million: int = setting(
        kinds.PER_MILLION,
        1_000_000,
        "How many of a million requests are traced. A caller who sends a trace context decides for its own requests.",
    )


@dataclass(frozen=True, slots=True)
class LogSection:
    """The daemon's own log, on standard error."""

    level: LogLevel = setting(kinds.choice(LogLevel), LogLevel.INFO, "Least level that is written.")
    format: LogFormat = setting(
        kinds.choice(LogFormat), LogFormat.TEXT, 'Shape of a line: "text" is key=value, "json" one object a line.'
    )


@dataclass(frozen=True, slots=True)
class Config:
    """All settings; `origins` tells for each key, by its dotted name, where its value comes from."""

    crito: CritoSection = CritoSection()
    api: ApiSection = ApiSection()
    streaming: StreamingSection = StreamingSection()
    runtime: RuntimeSection = RuntimeSection()
    image: ImageSection = ImageSection()
    network: NetworkSection = NetworkSection()
    nri: NriSection = NriSection()
    metrics: MetricsSection = MetricsSection()
    tracing: TracingSection = TracingSection()
    log: LogSection = LogSection()
    origins: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a section, as files, flags and documentation need to know it."""

    name: str
    kind: Kind[Any]
    default: Any
    doc: str
    shown: str


SECTIONS: Mapping[str, type[Any]] = {
    "crito": CritoSection,
    "api": ApiSection,
    "streaming": StreamingSection,
    "runtime": RuntimeSection,
    "image": ImageSection,
    "network": NetworkSection,
    "nri": NriSection,
    "metrics": MetricsSection,
    "tracing": TracingSection,
    "log": LogSection,
}


def keys(section: type[Any]) -> dict[str, Key]:
    """The keys of one section in the order of its declaration."""
    return {
        each.name: Key(each.name, each.metadata["kind"], each.default, each.metadata["doc"], each.metadata["shown"])
        for each in dataclass_fields(section)
        if "kind" in each.metadata
    }
