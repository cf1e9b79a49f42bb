"""An OCI runtime with the contract of gVisor's runsc and without its kernel.

What it starts has no parent that would know: `wait` alone tells the ends, and the pid of each container is that of
<root>/sandbox, a process that a test has made. Run as `python -I -S THIS --root ROOT …`.

    <root>/<id>.json  .pid  .exit     a container: its process object, its pid, how it ended
           kills                      a line for each kill
           forgetful                  while it is there, the next `wait` takes it away and tells nothing
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

FLAGS = ("--detach", "--force", "--all")


def parsed(words: list[str]) -> tuple[dict[str, str], list[str]]:
    options: dict[str, str] = {}
    plain: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in FLAGS:
            options[word] = ""
        elif word.startswith("--"):
            options[word] = next(rest)
        else:
            plain.append(word)
    return options, plain


class Runtime:
    def __init__(self, root: Path) -> None:
        self.root = root

    def file(self, id: str, kind: str) -> Path:
        return self.root / f"{id}.{kind}"

    def sandbox(self) -> int:
        return int((self.root / "sandbox").read_text())

    def create(self, options: dict[str, str], id: str) -> None:
        config = json.loads((Path(options["--bundle"]) / "config.json").read_text())
        self.file(id, "json").write_text(json.dumps(config["process"]))
        Path(options["--pid-file"]).write_text(str(self.sandbox()))

    def start(self, _options: dict[str, str], id: str) -> None:
        args = json.loads(self.file(id, "json").read_text())["args"]
        if not Path(args[0]).exists():
            sys.exit(f"starting container: {args[0]}: no such file or directory")
        ready, told = os.pipe()
        if os.fork():
            os.close(told)
            os.read(ready, 1)
            return
        os.setsid()
        pid = os.posix_spawn(args[0], args, os.environ)
        self.file(id, "pid").write_text(str(pid))
        for fd in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), fd)
        os.close(told)
        os.close(ready)
        new = self.file(id, "new")
        new.write_text(str(code(os.waitpid(pid, 0)[1])))
        new.rename(self.file(id, "exit"))

    def wait(self, _options: dict[str, str], id: str) -> None:
        forgetful = self.root / "forgetful"
        if forgetful.exists():
            forgetful.unlink()
            sys.exit("waiting: told nothing")
        while not self.file(id, "exit").exists():
            if not alive(self.sandbox()):
                sys.exit("waiting: connection refused")
            time.sleep(0.02)
        print(json.dumps({"id": id, "exitStatus": int(self.file(id, "exit").read_text())}))

    def kill(self, options: dict[str, str], id: str, number: str) -> None:
        with (self.root / "kills").open("a") as kills:
            kills.write(f"{sorted(options)} {number}\n")
        pid = options.get("--pid") or self.file(id, "pid").read_text()
        os.kill(int(pid), int(number))

    def exec(self, options: dict[str, str], _id: str) -> None:
        args = json.loads(Path(options["--process"]).read_text())["args"]
        ready, told = os.pipe()
        stand_in = os.fork()
        if stand_in == 0:
            pid = os.posix_spawn(args[0], args, os.environ, setsid=True)
            Path(options["--internal-pid-file"]).write_text(str(pid))
            os.close(told)
            os.close(ready)
            os._exit(code(os.waitpid(pid, 0)[1]))
        os.close(told)
        os.read(ready, 1)
        Path(options["--pid-file"]).write_text(str(stand_in))

    def delete(self, _options: dict[str, str], id: str) -> None:
        for path in self.root.glob(f"{id}.*"):
            path.unlink()


def code(status: int) -> int:
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    options, (command, *plain) = parsed(sys.argv[1:])
    getattr(Runtime(Path(options["--root"])), command)(options, *plain)


if __name__ == "__main__":
    main()
