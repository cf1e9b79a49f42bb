"""kubectl, the last client: sessions with pods of a node that an API server knows, across restarts of the daemon."""

import contextlib
import fcntl
import hashlib
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import termios
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import cgroups, leftovers
from tests.e2e.harness.cluster import Cluster, Kubectl, missing, running_cluster
from tests.e2e.harness.daemon import Daemon
from tests.e2e.harness.kubelet import Kubelet, running_kubelet, text_of_log
from tests.e2e.harness.ports import wait_until
from tests.e2e.harness.sessions import forwarded, read_until

MakeDaemon = Callable[..., Daemon]

NODE = "e2e-node"
COMMANDS = ("apply", "attach", "cp", "debug", "delete", "exec", "get", "logs", "port-forward", "wait")
BIG_BYTES = 100 * 1000 * 1000
ROTATE_AT_BYTES = 64 << 10

ECHO_PORT = 8081
CONNECTIONS = 20

SERVE = f"nc -ll -p {ECHO_PORT} -e cat & mkdir /www; echo served > /www/index.html; exec httpd -f -p 8080 -h /www"
REPEAT = "while read line; do echo heard $line; done"


@dataclass(frozen=True)
class Node:
    daemon: Daemon
    kubelet: Kubelet
    kubectl: Kubectl


@pytest.fixture(scope="module")
def cluster(directory: Path) -> Iterator[Cluster]:
    if reason := missing(COMMANDS):
        pytest.skip(reason)
    with running_cluster(directory / "cluster") as running:
        yield running


@pytest.fixture(scope="module")
def node(cluster: Cluster, make_daemon: MakeDaemon) -> Iterator[Node]:
    """What the pods of the tests have made of the daemon must be gone when its kubelet has ended."""
    daemon = make_daemon()
    before = daemon.traces()
    settings = {
        "containerLogMaxSize": str(ROTATE_AT_BYTES),
        "containerLogMaxFiles": 5,
        "containerLogMonitorInterval": "3s",
    }
    # The bridge's own address is no loopback address, and nothing that is sent there leaves the machine.
    membership = cluster.member(NODE, daemon.network.gateway)
    with running_kubelet(daemon, membership=membership, settings=settings) as kubelet:
        cluster.wait_for_node(NODE)
        yield Node(daemon, kubelet, cluster.kubectl)
        cluster.kubectl("delete", "pods", "--all", "--timeout=60s")
    client = daemon.client()
    client.remove_everything()
    client.close()
    remove_pod_cgroups(daemon, before)
    daemon.nothing_added(before)


def remove_pod_cgroups(daemon: Daemon, before: leftovers.Traces) -> None:
    """kubelet leaves the cgroups of its classes of pods, as it would use them again; only empty ones can be removed."""
    if cgroups.HAS_SYSTEMD:
        return
    for folder in sorted(set(leftovers.cgroups(daemon.owned)) - before["cgroups"], key=len, reverse=True):
        Path(folder).rmdir()


@pytest.fixture(params=["websocket", "spdy"])
def kubectl(node: Node, request: pytest.FixtureRequest) -> Kubectl:
    """With both protocols that there are kubectls for."""
    return node.kubectl if request.param == "websocket" else node.kubectl.with_spdy()


def manifest(name: str, *containers: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {"nodeName": NODE, "containers": list(containers), "terminationGracePeriodSeconds": 1, **spec},
    }


def container(name: str, image: str, script: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "image": image, "command": ["sh", "-c", script], **fields}


@pytest.fixture(scope="module")
def pod(node: Node, busybox: str) -> str:
    """`main` serves HTTP, echoes and is probed, `repeats` answers what it reads, `echoes` returns it."""
    data = {"name": "data", "mountPath": "/data"}
    main = container(
        "main",
        busybox,
        SERVE,
        volumeMounts=[data],
        readinessProbe={"httpGet": {"path": "/index.html", "port": 8080}, "periodSeconds": 1},
        livenessProbe={"exec": {"command": ["test", "-e", "/www/index.html"]}, "periodSeconds": 1},
    )
    repeats = container("repeats", busybox, REPEAT, stdin=True)
    echoes = container("echoes", busybox, "exec cat", stdin=True)
    node.kubectl.apply(manifest("tools", main, repeats, echoes, volumes=[{"name": "data", "emptyDir": {}}]))
    try:
        node.kubectl.wait_ready("tools")
    except RuntimeError as error:
        raise AssertionError(f"{error}\nkubelet:\n{text_of_log(node.kubelet)}") from None
    return "tools"


def talks(session: subprocess.Popen[bytes], text: bytes, answer: bytes = b"") -> None:
    assert session.stdin is not None and session.stdout is not None
    session.stdin.write(text + b"\n")
    read_until(session.stdout.fileno(), answer or text + b"\n")


# exec


def test_exec_carries_stdin_both_outputs_and_the_exit_code(kubectl: Kubectl, pod: str) -> None:
    script = "cat; echo told on stderr >&2; exit 7"

    done = kubectl.run("exec", "-i", pod, "-c", "main", "--", "sh", "-c", script, input=b"some\0bytes\n")

    assert done.stdout == b"some\0bytes\n"
    assert done.stderr.splitlines()[0] == b"told on stderr"
    assert done.returncode == 7


def test_exec_of_a_command_that_is_not_there_says_so(kubectl: Kubectl, pod: str) -> None:
    done = kubectl.run("exec", pod, "-c", "main", "--", "no-such-command")

    assert done.returncode != 0
    assert b"no-such-command" in done.stderr


def test_exec_with_a_terminal_has_its_size_follows_it_and_ends_with_the_exit_code(kubectl: Kubectl, pod: str) -> None:
    with Terminal.opened(33, 111) as terminal:
        fds = {"stdin": terminal.theirs, "stdout": terminal.theirs, "stderr": terminal.theirs}
        command = ("exec", "-it", pod, "-c", "main", "--", "sh")
        with kubectl.session(*command, start_new_session=True, **fds) as session:
            assert b"/dev/pts/" in terminal.answer(b"tty")
            wait_until(lambda: b"33 111" in terminal.answer(b"stty size"), "the size is there")

            terminal.set_size(44, 122)
            session.send_signal(signal.SIGWINCH)
            wait_until(lambda: b"44 122" in terminal.answer(b"stty size"), "the new size is there")

            terminal.write(b"/bin/sleep 12345\n")
            processes = ("exec", pod, "-c", "main", "--", "ps", "-o", "args")
            wait_until(lambda: "/bin/sleep 12345" in kubectl(*processes), "the command runs")
            terminal.write(b"\x03")
            wait_until(lambda: "/bin/sleep 12345" not in kubectl(*processes), "Ctrl-C has ended it")

            terminal.write(b"exit 9\n")
            assert terminal.read_to_the_end_of(session) == 9


@dataclass
class Terminal:
    """A pseudo-terminal: `theirs` is a session's stdio, and what it writes there is read by `ours`."""

    ours: int
    theirs: int
    _rest: bytes = b""

    @classmethod
    @contextlib.contextmanager
    def opened(cls, rows: int, columns: int) -> Iterator["Terminal"]:
        terminal = cls(*pty.openpty())
        try:
            terminal.set_size(rows, columns)
            yield terminal
        finally:
            os.close(terminal.ours)
            os.close(terminal.theirs)

    def set_size(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def write(self, data: bytes) -> None:
        os.write(self.ours, data)

    def answer(self, command: bytes) -> bytes:
        self.write(b"echo be''gin; " + command + b"; echo e''nd\n")  # the echo of the command is another text
        self.until(b"begin\r\n")
        return self.until(b"end\r\n")

    def until(self, expected: bytes) -> bytes:
        read = self._rest if expected in self._rest else self._rest + read_until(self.ours, expected)
        end = read.index(expected) + len(expected)
        self._rest = read[end:]
        return read[:end]

    def read_to_the_end_of(self, session: subprocess.Popen[bytes], timeout_s: float = 20) -> int:
        """Its exit status; what it says until then is read, as a terminal that is not read blocks its writers."""

        def has_ended() -> bool:
            while select.select([self.ours], [], [], 0)[0]:
                os.read(self.ours, 1 << 16)
            return session.poll() is not None

        wait_until(has_ended, "the session ends", timeout_s)
        assert session.returncode is not None
        return session.returncode


# attach


def test_attach_reads_and_writes_the_container_s_own_stdio(kubectl: Kubectl, pod: str) -> None:
    with kubectl.session("attach", "-i", pod, "-c", "repeats") as session:
        time.sleep(1)  # what comes before it is attached goes to the log only
        talks(session, b"through attach", b"heard through attach\n")

    wait_until(lambda: "heard through attach" in kubectl("logs", pod, "-c", "repeats"), "it is in the log too")


def test_attach_carries_100_mb_in_and_out_intact(kubectl: Kubectl, pod: str, big_file: Path) -> None:
    with kubectl.session("attach", "-i", pod, "-c", "echoes") as session:
        assert session.stdin is not None and session.stdout is not None

        returned = sha256_of_echo(session.stdin.fileno(), session.stdout.fileno(), big_file)

    assert returned == sha256(big_file)


def sha256_of_echo(to_fd: int, from_fd: int, sent: Path) -> str:
    """Of as many bytes as are sent, both ways at the same time. Less may come back, and no more is waited for."""
    left = sent.stat().st_size
    digest = hashlib.sha256()
    with subprocess.Popen(["cat", sent], stdin=subprocess.DEVNULL, stdout=to_fd) as sender:
        while left and select.select([from_fd], [], [], 60)[0] and (data := os.read(from_fd, min(left, 1 << 20))):
            digest.update(data)
            left -= len(data)
        sender.kill()
    return digest.hexdigest()


# logs


def test_logs_are_followed_across_rotations_without_a_line_lost(node: Node, busybox: str) -> None:
    node.kubectl.apply(manifest("writes", container("main", busybox, "exec sleep 100000")))
    node.kubectl.wait_ready("writes")
    padding = "x" * 200
    burst = ROTATE_AT_BYTES // len(padding)

    def write(number: int) -> None:
        first, last = number * burst, (number + 1) * burst - 1
        script = f"for i in $(seq {first} {last}); do echo line $i {padding}; done > /proc/1/fd/1"
        node.kubectl("exec", "writes", "--", "sh", "-c", script)

    seen = b""
    with node.kubectl.session("logs", "-f", "writes") as session:
        assert session.stdout is not None
        for number in range(3):
            write(number)
            last = f"line {(number + 1) * burst - 1} ".encode()
            seen += read_until(session.stdout.fileno(), last)
            wait_until(lambda n=number: rotated(node, "writes") > n, "kubelet has rotated the log", 30)  # type: ignore[misc]
        node.kubectl("exec", "writes", "--", "sh", "-c", "echo the end > /proc/1/fd/1")
        seen += read_until(session.stdout.fileno(), b"the end\n")

    numbers = [int(each) for each in re.findall(rb"^line (\d+) ", seen, re.MULTILINE)]
    assert numbers == list(range(3 * burst))


def rotated(node: Node, pod: str) -> int:
    """How often: an older log is there twice, and with a temporary file, while kubelet compresses it."""
    logs = (node.kubelet.directory / "pod-logs").glob(f"*_{pod}_*/main/0.log.*")
    return len({log.name.split(".")[2] for log in logs})


# port-forward


def page(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/index.html", timeout=20) as answer:
        body: bytes = answer.read()
        return body


def test_port_forward_serves_http_connection_after_connection(kubectl: Kubectl, pod: str) -> None:
    with forwarded(kubectl, pod, 8080) as (port,):
        assert [page(port) for _ in range(5)] == [b"served\n"] * 5


def test_port_forward_carries_100_mb_in_and_out_intact(kubectl: Kubectl, pod: str, big_file: Path) -> None:
    with (
        forwarded(kubectl, pod, ECHO_PORT) as (port,),
        socket.create_connection(("127.0.0.1", port)) as connection,
    ):
        returned = sha256_of_echo(connection.fileno(), connection.fileno(), big_file)

    assert returned == sha256(big_file)


def test_a_reset_of_one_forwarded_connection_leaves_many_others_alone(kubectl: Kubectl, pod: str) -> None:
    with forwarded(kubectl, pod, ECHO_PORT) as (port,), contextlib.ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", port), 20))

        def answers(connection: socket.socket, text: bytes) -> bool:
            connection.sendall(text)
            return read_until(connection.fileno(), text) == text

        victim, *others = [connect() for _ in range(CONNECTIONS)]
        assert all(answers(each, b"first of %d" % number) for number, each in enumerate([victim, *others]))

        victim.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        victim.close()

        assert all(answers(each, b"second of %d" % number) for number, each in enumerate(others))
        assert answers(connect(), b"a new one")


# Copies


@pytest.fixture(scope="module")
def big_file(directory: Path) -> Path:
    path = directory / "big"
    with path.open("wb") as file:
        for _ in range(BIG_BYTES // 1_000_000):
            file.write(os.urandom(1_000_000))
    return path


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_in(kubectl: Kubectl, pod: str, path: str) -> str:
    return kubectl("exec", pod, "-c", "main", "--", "sha256sum", path).split()[0]


def test_exec_carries_100_mb_in_and_out_intact(kubectl: Kubectl, pod: str, big_file: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    with big_file.open("rb") as file:
        command = kubectl.command("exec", "-i", pod, "-c", "main", "--", "sh", "-c", "cat > /data/by-exec")
        subprocess.run(command, stdin=file, check=True, timeout=180, env=kubectl.environment)
    assert sha256_in(kubectl, pod, "/data/by-exec") == sha256(big_file)

    with back.open("wb") as file:
        command = kubectl.command("exec", pod, "-c", "main", "--", "cat", "/data/by-exec")
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, check=True, timeout=180, env=kubectl.environment)
    assert sha256(back) == sha256(big_file)


def test_cp_copies_100_mb_in_and_out_intact(kubectl: Kubectl, pod: str, big_file: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"

    kubectl("cp", str(big_file), f"{pod}:/data/by-cp", "-c", "main", timeout_s=180)
    assert sha256_in(kubectl, pod, "/data/by-cp") == sha256(big_file)

    kubectl("cp", f"{pod}:/data/by-cp", str(back), "-c", "main", timeout_s=180)
    assert sha256(back) == sha256(big_file)


def test_cp_copies_a_folder_with_what_is_in_it(node: Node, pod: str, tmp_path: Path) -> None:
    (tmp_path / "there/deep").mkdir(parents=True)
    (tmp_path / "there/deep/file").write_text("deep\n")
    (tmp_path / "there/program").write_text("#!/bin/sh\n")
    (tmp_path / "there/program").chmod(0o755)

    node.kubectl("cp", str(tmp_path / "there"), f"{pod}:/data/folder", "-c", "main")
    node.kubectl("cp", f"{pod}:/data/folder", str(tmp_path / "back"), "-c", "main")

    assert (tmp_path / "back/deep/file").read_text() == "deep\n"
    assert node.kubectl("exec", pod, "-c", "main", "--", "stat", "-c", "%a", "/data/folder/program") == "755\n"
    assert (tmp_path / "back/program").read_text() == "#!/bin/sh\n"


# debug


def test_debug_puts_a_container_into_the_pid_namespace_of_its_target(node: Node, pod: str, busybox: str) -> None:
    script = b"tr '\\0' ' ' < /proc/1/cmdline; echo; cat /proc/1/root/www/index.html; hostname; exit\n"
    command = ("debug", "-i", pod, f"--image={busybox}", "--target=main", "--container=looks", "--", "sh")

    with node.kubectl.session(*command) as session:
        assert session.stdin is not None and session.stdout is not None
        wait_until(lambda: "running" in ephemeral(node, pod, "looks"), "the ephemeral container runs", 60)
        session.stdin.write(script)
        told = read_until(session.stdout.fileno(), f"{pod}\n".encode())

    assert b"httpd -f -p 8080 -h /www" in told
    assert b"served\n" in told
    wait_until(lambda: "terminated" in ephemeral(node, pod, "looks"), "the ephemeral container has ended")
    assert ephemeral(node, pod, "looks")["terminated"]["exitCode"] == 0


def ephemeral(node: Node, pod: str, name: str) -> dict[str, Any]:
    statuses = node.kubectl.pod(pod)["status"].get("ephemeralContainerStatuses", [])
    return next((each["state"] for each in statuses if each["name"] == name), {})


# The daemon's life


def test_sessions_go_on_while_the_daemon_is_killed_and_started_again(kubectl: Kubectl, node: Node, pod: str) -> None:
    restarts = [each["restartCount"] for each in kubectl.pod(pod)["status"]["containerStatuses"]]
    with (
        kubectl.session("exec", "-i", pod, "-c", "main", "--", "cat") as command,
        kubectl.session("attach", "-i", pod, "-c", "repeats") as attached,
        kubectl.session("logs", "-f", "--tail=0", pod, "-c", "repeats") as logs,
        forwarded(kubectl, pod, 8080) as (port,),
    ):
        assert logs.stdout is not None
        talks(command, b"with the first daemon")
        time.sleep(1)  # attached and following: neither says so
        talks(attached, b"one", b"heard one\n")
        read_until(logs.stdout.fileno(), b"heard one\n")

        node.daemon.kill()
        talks(command, b"without a daemon")
        talks(attached, b"two", b"heard two\n")
        read_until(logs.stdout.fileno(), b"heard two\n")
        assert page(port) == b"served\n"
        node.daemon.start()

        talks(command, b"with the second daemon")
        talks(attached, b"three", b"heard three\n")
        read_until(logs.stdout.fileno(), b"heard three\n")
        assert page(port) == b"served\n"
        assert command.stdin is not None
        command.stdin.close()
        assert command.wait(20) == 0

    wait_until(lambda: kubectl.run("exec", pod, "-c", "main", "--", "true").returncode == 0, "kubelet is back", 30)
    assert [each["restartCount"] for each in kubectl.wait_ready(pod)["status"]["containerStatuses"]] == restarts
