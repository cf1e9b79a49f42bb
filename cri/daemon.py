"""The daemon: builds its parts in order, recovers, serves, and stops without touching what runs.

Directories, below `root` and `run_dir` of the configuration:

    root/state.db            pods, containers (oci/state.py)
         images/             the image store
         containers/<id>/    writable layers
         checkpoints/<id>/   a checkpoint while it is made
         cni/                what CNI plugins were asked for
    run_dir/crito.lock       held by the one daemon of this run_dir
            forkserver.sock  forkserver.log  orphans/
            streaming.sock  streaming.log
            containers/<id>/ bundle, monitor socket, exit record, root filesystem
            sandboxes/<id>/  the pod's files and pinned namespaces
"""

import asyncio
import contextlib
import fcntl
import gc
import json
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from cri import metrics, recovery, systemd
from cri.api.runtime.v1 import api_pb2_grpc
from cri.changes import Changes
from cri.config import Config
from cri.image_service.images import Images, ImageSettings
from cri.image_service.limits import RegistryLimit
from cri.image_service.service import ImageService
from cri.node_service import NodeService
from cri.runtime_service.checkpoints import ContainerCheckpoints
from cri.runtime_service.events import ContainerEvents
from cri.runtime_service.exec import Streaming, start_early
from cri.runtime_service.metrics import PodMetrics
from cri.runtime_service.service import RuntimeService
from cri.runtime_service.stats import Stats
from cri.runtime_service.status import Health, RuntimeStatus, disk_health
from cri.runtimes import runtime_of
from cri.server import Server
from cri.streaming.client import Streams
from cri.streaming.settings import StreamSettings
from cri.streaming.tls import TlsSettings
from cri.tracing import tracing
from oci.bundle import Bundles
from oci.checkpoint import Checkpoints
from oci.clock import Clock
from oci.container import ContainerRecord
from oci.containers import Containers, ContainerSettings
from oci.errors import Error, FailedPrecondition, InvalidArgument, Unavailable
from oci.events import Bus, Event, EventKind
from oci.fork_server import ForkServer
from oci.handlers import Handler, Handlers
from oci.hook_files import HookFiles
from oci.image_volumes import ImageVolumes
from oci.linux import cgroup, lsm, node
from oci.linux.systemd import Systemd
from oci.rootfs import Rootfs
from oci.runtime import Runtime
from oci.sandbox_container import SandboxContainers
from oci.spec import Defaults
from oci.state import Database, Records
from oci.status import REASON_OOM_KILLED
from oci.version import VERSION
from oci.writable_layers import WritableLayers
from sandbox.cgroup import PodCgroups
from sandbox.network.pod_network import PodNetwork
from sandbox.sandbox import SandboxRecord
from sandbox.sandboxes import Sandboxes, SandboxSettings

_log = logging.getLogger(__name__)

STOP_GRACE_S = 2.0  # for calls under way; the changes that they asked for get FINISH_S more
FINISH_S = 10.0
MOUNT_THREADS = 8
STATS_THREADS = 2
CANARY_RETRY_S = 30.0
HOOKS_LOOK_S = 5.0


async def run(config: Config, ready: Callable[[], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT; `ready` is called once the socket answers. Pods go on after the return.

    Raises FailedPrecondition when another daemon uses the same directories, and whatever kind of error keeps a part
    from being built.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        daemon = await _build(config, stack)
        await daemon.recover()
        await daemon.serve(stack)
        if ready is not None:
            ready()
        systemd.ready(f"serving on {config.api.listen}")
        await stop.wait()
        systemd.stopping("letting go of pods and containers")
        await daemon.stop()


class Daemon:
    """The parts, built; what they do together."""

    def __init__(
        self,
        config: Config,
        database: Database,
        fork_server: ForkServer,
        handlers: Handlers,
        images: Images,
        network: PodNetwork,
        bundles: Bundles,
        rootfs: Rootfs,
        containers: Containers,
        sandboxes: Sandboxes,
        layers: WritableLayers,
        stats: Stats,
        pod_metrics: PodMetrics,
        events: Bus[Event],
        clock: Clock,
        counts: metrics.Metrics,
        mounts: ThreadPoolExecutor,
    ) -> None:
        self._config = config
        self._database = database
        self._fork_server = fork_server
        self._streams = Streams(config.crito.run_dir, _stream_settings(config))
        self._handlers = handlers
        self._images = images
        self._network = network
        self._bundles = bundles
        self._rootfs = rootfs
        self._containers = containers
        self._sandboxes = sandboxes
        self._layers = layers
        self._stats = stats
        self._pod_metrics = pod_metrics
        self._events = events
        self._clock = clock
        self._counts = counts
        self._mounts = mounts
        self._checkpoints = Checkpoints(
            config.crito.root / "checkpoints", containers, bundles, rootfs, handlers, images.layer_paths, mounts
        )
        self._changes = Changes()
        self._runtime_health = Health()
        self._hooks_health = Health()
        self._started_at = time.time()
        self._server: Server | None = None

    async def recover(self) -> None:
        """Take over what an earlier daemon has left."""
        await recovery.restore(self._database, self._containers, self._sandboxes)
        await asyncio.get_running_loop().run_in_executor(
            self._mounts,
            recovery.sweep,
            self._containers.known_ids(),
            self._sandboxes.known_ids(),
            self._bundles,
            self._rootfs,
            self._config.crito.root / "containers",
            self._config.crito.run_dir / "sandboxes",
        )
        await self._images.sweep()
        await self._checkpoints.recover()

    async def serve(self, stack: contextlib.AsyncExitStack) -> None:
        """Answer on the socket, and start what goes on beside it."""
        self._runtime_health = await self._canary()
        early = start_early(self._streams)
        bundle = self._images.load_bundle(self._config.image.bundle_dir)
        keep_alive = systemd.keep_alive(self._is_well)
        for work in (early, bundle, self._follow_events(), self._watch_runtime(), self._watch_hooks(), keep_alive):
            stack.push_async_callback(_cancelled, asyncio.create_task(work))
        self._layers.start()
        stack.push_async_callback(self._layers.close)
        self._stats.start()
        stack.push_async_callback(self._stats.close)
        self._register_gauges()
        await self._counts.start()
        stack.push_async_callback(self._counts.close)
        api = self._config.api
        if self._config.nri.enable:
            await self._start_nri(stack)
        traces = tracing(self._config.tracing.endpoint, self._config.tracing.sampling_rate_per_million)
        stack.push_async_callback(traces.close)
        self._server = Server(api.listen, self._counts, traces, api.grpc_max_recv_msg_size, api.grpc_max_send_msg_size)
        self._add_services(self._server)
        gc.collect()
        gc.freeze()  # what is here stays: to look through it in each full collection would stop the loop for 10 ms
        await self._server.start()
        _log.info("crito %s serves the CRI on %s", VERSION, api.listen)

    async def _start_nri(self, stack: contextlib.AsyncExitStack) -> None:
        from cri.nri.service import Nri  # noqa: PLC0415  who does not use it does not load it

        here = await asyncio.to_thread(node.detect)
        nri = Nri(self._config.nri, self._containers, self._sandboxes, self._handlers, here)
        stack.push_async_callback(nri.close)
        await nri.start()

    def _add_services(self, server: Server) -> None:
        events = ContainerEvents(self._events, self._sandboxes, self._containers, self._clock)
        status = RuntimeStatus(
            self._handlers, self._network, _driver(self._config), self._health, self._config_for_status
        )
        runtime_service = RuntimeService(
            self._changes,
            self._sandboxes,
            self._containers,
            self._images,
            self._handlers,
            events,
            self._stats,
            self._pod_metrics,
            status,
            Streaming(self._containers, self._sandboxes, self._streams, self._config.crito.run_dir / "containers"),
            ContainerCheckpoints(self._checkpoints, self._sandboxes, self._containers, self._images, self._handlers),
        )
        api_pb2_grpc.add_RuntimeServiceServicer_to_server(runtime_service, server.grpc)
        image_service = ImageService(self._images, self._changes, self._layers)
        api_pb2_grpc.add_ImageServiceServicer_to_server(image_service, server.grpc)
        node_service = NodeService(self._images, self._changes, self._inspect)
        server.grpc.add_generic_rpc_handlers((node_service.handler(),))

    async def stop(self) -> None:
        """Stop serving; let the changes under way end, or leave them to the next start."""
        self._events.close()
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
        unfinished = await self._changes.finish(FINISH_S)
        if unfinished:
            _log.warning("left to the next start: %s", ", ".join(unfinished))
        await self._sandboxes.close()
        await self._containers.close()
        if self._containers.known_ids() or self._sandboxes.known_ids():
            self._fork_server.close()
            self._streams.close()
        else:  # nothing of ours runs: nothing of ours stays
            await self._fork_server.shutdown()
            await self._streams.retire()
            await asyncio.get_running_loop().run_in_executor(self._mounts, self._rootfs.release)

    # Health

    def _health(self) -> Health:
        if not self._runtime_health.is_ready:
            return self._runtime_health
        if not self._hooks_health.is_ready:
            return self._hooks_health
        crito = self._config.crito
        return disk_health({"crito.root": crito.root, "crito.run_dir": crito.run_dir})

    async def _canary(self) -> Health:
        """Whether the default runtime handler can run a container here and now."""
        handler = self._handlers.find("")
        if handler is None:
            return Health("NoRuntime", "no OCI runtime is installed or configured: `crito check` tells more")
        result = await run_canary(handler.runtime, self._config.crito.root)
        return Health() if result.ok else Health("RuntimeFails", result.reason)

    async def _watch_runtime(self) -> None:
        """A runtime that could not run a container is tried again until it can."""
        while True:
            await asyncio.sleep(CANARY_RETRY_S)
            if not self._runtime_health.is_ready:
                self._runtime_health = await self._canary()

    async def _watch_hooks(self) -> None:
        """No container is made beside a file of OCI hooks that is wrong: the node says so until it is mended."""
        files = HookFiles(self._config.runtime.hooks_dir)
        while True:
            wrong = await asyncio.to_thread(files.unusable)
            message = "; ".join(f"OCI hook {path}: {why}" for path, why in wrong.items())
            if message and message != self._hooks_health.message:
                _log.error("no container can be made: %s", message)
            self._hooks_health = Health("HooksUnusable", message) if wrong else Health()
            await asyncio.sleep(HOOKS_LOOK_S)

    async def _is_well(self) -> bool:
        return True  # that this runs shows that the event loop does

    # Events and numbers

    async def _follow_events(self) -> None:
        """Count OOM kills, and what containers have written when they end; forget what is gone."""
        async for event in self._events.listen():
            if not isinstance(event.record, ContainerRecord):
                continue
            if event.kind is EventKind.DELETED:
                self._layers.forget(event.record.id)
            elif event.kind is EventKind.STOPPED:
                self._layers.ended(event.record.id)
                if event.record.status.reason == REASON_OOM_KILLED:
                    self._counts.container_oom()

    def _register_gauges(self) -> None:
        gauge = self._counts.gauge
        gauge("pod_sandboxes", "Pod sandboxes that lists show.", lambda: len(self._sandboxes.all()))
        gauge("containers", "Containers that lists show.", lambda: len(self._containers.all()))
        gauge("images", "Images in the store.", lambda: len(self._images.list()))
        totals = self._images.totals
        gauge("image_pulls", "Pulls and loads of images under way.", lambda: len(self._images.pulls()))
        gauge("image_layers_waiting", "Image layers that wait for their turn.", lambda: self._images.waiting)
        gauge("image_layers_unverified", "Image layers to verify before use.", lambda: self._images.suspects)
        gauge("image_layers_pulled", "Image layers fetched and unpacked since the start.", lambda: totals.layers)
        gauge(
            "image_layers_failed", "Image layers that could not be had since the start.", lambda: totals.failed_layers
        )
        gauge("image_layers_damaged", "Image layers found damaged since the start.", lambda: totals.damaged_layers)
        gauge("image_fetched_bytes", "Bytes of layers fetched since the start.", lambda: totals.fetched_bytes)
        gauge("changes_running", "Changes of state under way.", lambda: len(self._changes.running()))

    def _inspect(self) -> Mapping[str, Any]:
        return {
            "pid": os.getpid(),
            "uptime_seconds": round(time.time() - self._started_at),
            "root": str(self._config.crito.root),
            "run_dir": str(self._config.crito.run_dir),
            "fork_server_pid": self._fork_server.pid,
            "stream_server_pid": self._streams.pid,
            "changes": [f"{each.key}: {each.seconds:.1f} s" for each in self._changes.running()],
        }

    def _config_for_status(self) -> Mapping[str, Any]:
        runtime = self._config.runtime
        return {
            "version": VERSION,
            "root": str(self._config.crito.root),
            "runDir": str(self._config.crito.run_dir),
            "cgroupDriver": str(runtime.cgroup_driver),
            "defaultRuntimeHandler": self._handlers.default,
            "runtimeHandlers": {handler.name: str(handler.runtime.path) for handler in self._handlers.all()},
            "cniConfDir": str(self._config.network.conf_dir),
            "additionalImageStores": {
                str(each.path): each.trouble or f"{each.images} images" for each in self._images.additional_stores
            },
        }


async def _load_apparmor_profile() -> None:
    """Bring the default profile into the kernel where there is AppArmor; without it pods run unconfined."""
    if not lsm.has_apparmor():
        return
    try:
        await lsm.load_apparmor_default()
    except Unavailable as error:
        _log.warning("containers without an AppArmor profile of their own run unconfined: %s", error)


async def run_canary(runtime: Runtime, root: Path) -> Any:
    """Let `runtime` run a container of one tiny program; `root` is on a file system where programs may run."""
    parent = cgroup.check_parent(runtime.driver, "")
    return await runtime.canary(root, parent)


async def default_handler(config: Config, handlers: Mapping[str, Runtime]) -> str:
    """The configured default, else the first of crun and runc that can run a container, else the first at all."""
    if config.runtime.default_handler or not handlers:
        return config.runtime.default_handler
    preferred = sorted(handlers, key=lambda name: (name != "crun", name != "runc", name))
    for name in preferred:
        result = await run_canary(handlers[name], config.crito.root)
        if result.ok:
            return name
        _log.warning("runtime handler %s is not the default: %s", name, result.reason)
    return preferred[0]


# Building


async def _build(config: Config, stack: contextlib.AsyncExitStack) -> Daemon:
    """Every part in the order in which they need each other; `stack` takes what closes them."""
    root, run_dir = config.crito.root, config.crito.run_dir
    await stack.enter_async_context(locked(root, run_dir))
    driver = _driver(config)
    await _load_apparmor_profile()
    here = node.detect()
    mounts = ThreadPoolExecutor(MOUNT_THREADS, "mounts")
    stack.callback(mounts.shutdown, wait=False, cancel_futures=True)
    database = Database(root / "state.db")
    stack.callback(database.close)
    clock, events = Clock(), Bus[Event]()
    images = await Images.open(image_settings(config))
    stack.push_async_callback(images.close)
    fork_server = await ForkServer.ensure(run_dir)
    network = PodNetwork(
        config.network.conf_dir,
        config.network.plugin_dirs,
        config.network.default_network,
        state_dir=root / "cni",
        timeout_s=config.network.timeout,
        max_conf_num=config.network.max_conf_num,
    )
    await network.start()
    stack.push_async_callback(network.close)
    handlers = await _handlers(config, here)
    bundles = Bundles(run_dir / "containers")
    rootfs = Rootfs(root / "containers", run_dir / "containers")
    await asyncio.get_running_loop().run_in_executor(mounts, rootfs.prepare)
    containers = Containers(
        ContainerSettings(
            run_dir=run_dir / "containers",
            cgroup_driver=driver,
            create_timeout_s=config.runtime.container_create_timeout,
            log_max_bytes=config.runtime.log_size_max,
            cdi_spec_dirs=config.runtime.cdi_spec_dirs,
            hooks_dirs=config.runtime.hooks_dir,
            defaults=_defaults(config),
            criu_path=config.runtime.criu_path,
        ),
        Records(database, "containers", ContainerRecord),
        handlers,
        fork_server,
        bundles,
        rootfs,
        ImageVolumes(run_dir / "containers"),
        here,
        images,
        events,
        clock,
        mounts,
    )
    systemd_bus = Systemd()
    sandboxes = Sandboxes(
        SandboxSettings(
            run_dir=run_dir / "sandboxes",
            drop_pause=config.runtime.drop_pause,
            pause_path=str(config.runtime.pause_path or ""),
            default_sysctls=config.runtime.default_sysctls,
        ),
        Records(database, "sandboxes", SandboxRecord),
        containers,
        fork_server,
        network,
        PodCgroups(driver, here.cgroups, systemd_bus, mounts),
        SandboxContainers(driver, here.cgroups, handlers, fork_server, config.runtime.container_create_timeout, mounts),
        events,
        clock,
        mounts,
    )
    layers = WritableLayers(
        root / "containers", rootfs, lambda: [each.id for each in containers.all() if each.is_alive]
    )
    reads = ThreadPoolExecutor(STATS_THREADS, "stats")
    stack.callback(reads.shutdown, wait=False, cancel_futures=True)
    stats = Stats(here.cgroups, sandboxes, containers, layers, reads)
    pod_metrics = PodMetrics(here.cgroups, sandboxes, containers, layers, stats, reads)
    return Daemon(
        config, database, fork_server, handlers, images, network, bundles, rootfs, containers, sandboxes, layers, stats,
        pod_metrics, events, clock, metrics.metrics(config.metrics.listen), mounts,
    )  # fmt: skip


@contextlib.asynccontextmanager
async def locked(root: Path, run_dir: Path) -> AsyncIterator[None]:
    """Make both directories and hold each for this daemon alone. Raises FailedPrecondition when another has one."""
    with contextlib.ExitStack() as stack:
        for directory, mode in ((root, 0o711), (run_dir, 0o711)):
            directory.mkdir(mode=mode, parents=True, exist_ok=True)
            lock = stack.enter_context((directory / "crito.lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FailedPrecondition(f"{directory} is in use by another crito daemon") from error
        yield


async def _handlers(config: Config, here: node.Node) -> Handlers:
    driver = _driver(config)
    runtimes = {
        name: runtime_of(name, settings, settings.root, driver) for name, settings in config.runtime.handlers.items()
    }
    built, unusable = [], {}
    for name, runtime in runtimes.items():
        settings = config.runtime.handlers[name]
        procs: tuple[str, ...] = ()
        if settings.monitor_cgroup:
            here.cgroups.make(settings.monitor_cgroup)
            procs = tuple(str(file) for file in here.cgroups.procs_files(settings.monitor_cgroup))
        try:
            features = await runtime.features()
        except Error as error:
            _log.warning("runtime handler %s does not tell its features: %s", name, error)
            unusable[name] = str(error)
            continue
        if settings.container_min_memory:
            features = replace(features, min_memory_bytes=settings.container_min_memory)
        built.append(
            Handler(
                name,
                runtime,
                features,
                settings.allowed_annotations,
                settings.privileged_without_host_devices,
                procs,
                dict(settings.default_annotations),
                settings.container_create_timeout,
                _seccomp(settings.seccomp_profile, f"runtime.handlers.{name}.seccomp_profile"),
            )
        )
    usable = {handler.name: handler.runtime for handler in built}
    return Handlers(built, await default_handler(config, usable), unusable)


def _seccomp(profile: Path | None, key: str) -> Mapping[str, Any] | None:
    """A seccomp profile by its file. Raises InvalidArgument for one that cannot be read."""
    if profile is None:
        return None
    try:
        said = json.loads(profile.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{key} {profile}: {error}") from error
    if not isinstance(said, dict):
        raise InvalidArgument(f"{key} {profile}: not a JSON object")
    return said


def _defaults(config: Config) -> Defaults:
    """What containers get by configuration. Raises InvalidArgument for a seccomp profile that cannot be read."""
    runtime = config.runtime
    seccomp = _seccomp(runtime.seccomp_profile, "runtime.seccomp_profile")
    try:
        limits = [
            node.permitted(node.Rlimit(f"RLIMIT_{limit.name.upper()}", limit.soft, limit.hard))
            for limit in runtime.default_ulimits
        ]
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"runtime.default_ulimits: {error}") from error
    return Defaults(runtime.default_capabilities, runtime.default_env, tuple(limits), seccomp)


def _driver(config: Config) -> cgroup.Driver:
    return cgroup.Driver(str(config.runtime.cgroup_driver))


def _stream_settings(config: Config) -> StreamSettings:
    streaming = config.streaming
    tls = None
    if streaming.tls_cert and streaming.tls_key:
        tls = TlsSettings(
            str(streaming.tls_cert),
            str(streaming.tls_key),
            str(streaming.tls_ca or ""),
            str(streaming.tls_min_version),
            streaming.tls_cipher_suites,
        )
    return StreamSettings(streaming.address, streaming.port, streaming.idle_timeout, tls)


def image_settings(config: Config) -> ImageSettings:
    image = config.image
    return ImageSettings(
        root=config.crito.root / "images",
        registries_conf=image.registries_conf,
        registries_conf_dir=image.registries_conf_dir,
        policy=image.policy,
        policy_dir=image.policy_dir,
        registries_d=image.registries_d,
        auth_file=image.auth_file,
        namespaced_auth_dir=image.namespaced_auth_dir,
        additional_stores=image.additional_image_stores,
        certs_dir=image.certs_dir,
        pinned_images=image.pinned_images,
        decryption_keys_path=image.decryption_keys_path,
        max_parallel_layers=image.max_parallel_layers,
        registry_limits={each.host: RegistryLimit(each.layers, each.rate) for each in image.registry_limits},
        connect_timeout_s=image.pull_connect_timeout,
        progress_timeout_s=image.pull_progress_timeout,
    )


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
