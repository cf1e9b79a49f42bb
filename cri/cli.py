"""The command `crito`: reads the command line and hands each subcommand to whoever does it.

Imports stay light until a subcommand is known: `crito version` loads no gRPC.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oci.errors import Error
from oci.version import VERSION

EXIT_FAILED = 1
EXIT_USAGE = 2

Arguments = argparse.Namespace


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 done, 1 failed, 2 wrong use or wrong configuration."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except Error as error:
        return _failed(error)
    except PermissionError as error:
        return _denied(error)
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stderr.close()
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130


def _failed(error: Error) -> int:
    from cri.config_reader import ConfigError  # noqa: PLC0415  the light start

    print(f"crito: {error}", file=sys.stderr)
    return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED


def _denied(error: PermissionError) -> int:
    """Mostly: not root. What the daemon is denied as root it should show whole."""
    import os  # noqa: PLC0415

    if os.geteuid() == 0:
        raise error
    print(f"crito: {error.filename}: {error.strerror}: this command needs root", file=sys.stderr)
    return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="crito", description="A Kubernetes container runtime (CRI v1).", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"crito {VERSION}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    serve = _command(commands, "serve", _serve, "run the daemon")
    _settings(serve)

    config = _command(commands, "config", _config, "print the effective configuration and where each value is from")
    config.add_argument("--default", action="store_true", help="print the commented defaults instead")
    config.add_argument("--json", action="store_true", help="print JSON")
    _settings(config)

    check = _command(commands, "check", _check, "say what this host has and lacks")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument("--images", action="store_true", help="verify all image layers instead; reads every byte")
    check.add_argument("--repair", action="store_true", help="with --images: fetch damaged layers again")
    _settings(check)

    wipe = _command(commands, "wipe", _wipe, "remove all pods, containers and images of this node")
    wipe.add_argument("--force", action="store_true", help="also while containers run")
    _configuration(wipe)

    status = _command(commands, "status", _status, "say how the running daemon is")
    status.add_argument("--json", action="store_true", help="print JSON")
    _connection(status)

    version = _command(commands, "version", _version, "print the version")
    version.add_argument("--json", action="store_true", help="print JSON")

    images = commands.add_parser("images", help="list, pull, load, save, inspect and remove images", allow_abbrev=False)
    _image_commands(images.add_subparsers(metavar="COMMAND", required=True))
    return parser


def _image_commands(commands: Any) -> None:
    listing = _command(commands, "list", _images("list_images"), "list the images")
    listing.add_argument("--json", action="store_true", help="print JSON")

    pull = _command(commands, "pull", _images("pull"), "pull an image")
    pull.add_argument("reference")
    pull.add_argument("--creds", metavar="USER:PASSWORD", default="", help="credentials for the registry")
    pull.add_argument("--json", action="store_true", help="print JSON, one progress object a line")

    load = _command(commands, "load", _images("load"), "load images from an OCI layout, OCI archive or docker-archive")
    load.add_argument("path", type=Path, help="a directory or a tar file, as the daemon sees it")
    load.add_argument("--reference", default="", help="name to give the image, where the archive has none")
    load.add_argument("--json", action="store_true", help="print JSON, one progress object a line")

    save = _command(commands, "save", _images("save"), "save images to an OCI archive, OCI layout or docker-archive")
    save.add_argument("references", nargs="+", metavar="reference")
    save.add_argument(
        "-o", "--output", type=Path, metavar="PATH", required=True, help="the file or directory, as the daemon sees it"
    )
    save.add_argument(
        "--format", choices=("oci-archive", "oci-layout", "docker-archive"), default="oci-archive", help="what to write"
    )
    save.add_argument("--creds", metavar="USER:PASSWORD", default="", help="credentials to fetch layers again with")
    save.add_argument("--json", action="store_true", help="print JSON, one progress object a line")

    inspect = _command(commands, "inspect", _images("inspect"), "print all that is known of an image, as JSON")
    inspect.add_argument("reference")

    remove = _command(commands, "remove", _images("remove"), "remove images and all their names")
    remove.add_argument("references", nargs="+", metavar="reference")
    remove.add_argument("--json", action="store_true", help="print JSON, one object a line")

    pulls = _command(commands, "pulls", _images("pulls"), "show the pulls under way: layers, rate, time left")
    pulls.add_argument("--watch", action="store_true", help="until there are none")
    pulls.add_argument("--json", action="store_true", help="print JSON, one list a line")

    cancel = _command(commands, "cancel", _images("cancel"), "end the pulls of an image; the next goes on from there")
    cancel.add_argument("reference")

    pin = _command(commands, "pin", _images("pin"), "keep images from kubelet's garbage collection")
    unpin = _command(commands, "unpin", _images("unpin"), "leave images to kubelet's garbage collection")
    for command in (pin, unpin):
        command.add_argument("references", nargs="+", metavar="reference")
        command.add_argument("--json", action="store_true", help="print JSON, one object a line")

    for command in (listing, pull, load, save, inspect, remove, pulls, cancel, pin, unpin):
        _connection(command)


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(run=run)
    return command


def _configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="instead of /etc/crito/crito.toml")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="drop-ins; instead of FILE.d")


def _settings(parser: argparse.ArgumentParser) -> None:
    """The flags that set what the configuration files set."""
    from cri.config import SECTIONS, keys  # noqa: PLC0415

    _configuration(parser)
    for section, declared in SECTIONS.items():
        group = parser.add_argument_group(f"[{section}]", declared.__doc__)
        for key in keys(declared).values():
            is_flag = isinstance(key.default, bool)
            group.add_argument(
                f"--{section}-{key.name}".replace("_", "-"),
                dest=f"set.{section}.{key.name}",
                action="append",
                nargs="?" if is_flag else None,
                const="true" if is_flag else None,  # `--runtime-drop-pause` alone means true
                metavar="TRUE|FALSE" if is_flag else "VALUE",
                help=_help(key.doc + (f" Default: {key.shown}." if key.shown else "")),
            )
        if section == "runtime":
            group.add_argument(
                "--runtime-handler",
                dest="handlers",
                action="append",
                default=[],
                metavar="NAME.KEY=VALUE",
                help="A key of [runtime.handlers.NAME]; a list's once per element.",
            )


def _help(text: str) -> str:
    return text.replace("%", "%%")


def _connection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--socket", type=Path, metavar="PATH", help="the daemon's; instead of api.listen")
    _configuration(parser)


def _load(arguments: Arguments) -> Any:
    from cri.config_reader import load  # noqa: PLC0415

    return load(arguments.config, arguments.config_dir, _flags(arguments))


def _flags(arguments: Arguments) -> dict[str, str | list[str]]:
    """The settings given as flags, by dotted key."""
    from cri.config_reader import ConfigError  # noqa: PLC0415

    flags: dict[str, str | list[str]] = {
        name.removeprefix("set."): value for name, value in vars(arguments).items() if name.startswith("set.") and value
    }
    handlers: dict[str, list[str]] = {}
    for text in getattr(arguments, "handlers", []):
        dotted, equals, value = text.partition("=")
        if not equals or dotted.count(".") != 1:
            raise ConfigError(f"--runtime-handler {text}: expected NAME.KEY=VALUE, such as crun.path=/usr/bin/crun")
        handlers.setdefault(f"runtime.handlers.{dotted}", []).append(value)
    return flags | handlers


def _socket(arguments: Arguments) -> Path:
    if arguments.socket:
        return Path(arguments.socket)
    from cri.config_reader import load  # noqa: PLC0415

    return load(arguments.config, arguments.config_dir).api.listen


def _serve(arguments: Arguments) -> int:
    from cri import log  # noqa: PLC0415

    config = _load(arguments)
    log.configure(config.log.level, config.log.format)
    import asyncio  # noqa: PLC0415

    from cri import daemon  # noqa: PLC0415

    asyncio.run(daemon.run(config))
    return 0


def _config(arguments: Arguments) -> int:
    from cri import config_text  # noqa: PLC0415

    if arguments.default:
        print(config_text.default_toml(), end="")
    elif arguments.json:
        print(config_text.effective_json(_load(arguments)))
    else:
        print(config_text.effective_toml(_load(arguments)), end="")
    return 0


def _check(arguments: Arguments) -> int:
    if arguments.images or arguments.repair:
        from cri import cli_check_images  # noqa: PLC0415

        return cli_check_images.main(_load(arguments), repair=arguments.repair, as_json=arguments.json)
    from cri import check  # noqa: PLC0415

    return check.main(_load(arguments), as_json=arguments.json)


def _wipe(arguments: Arguments) -> int:
    from cri import cli_wipe  # noqa: PLC0415

    return cli_wipe.main(_load(arguments), _configuration_flags(arguments), force=arguments.force)


def _configuration_flags(arguments: Arguments) -> list[str]:
    """The same configuration for another `crito`."""
    flags = (("--config", arguments.config), ("--config-dir", arguments.config_dir))
    return [text for flag, value in flags if value is not None for text in (flag, str(value))]


def _status(arguments: Arguments) -> int:
    from cri import cli_status  # noqa: PLC0415

    return cli_status.main(_socket(arguments), as_json=arguments.json)


def _version(arguments: Arguments) -> int:
    print(json.dumps({"version": VERSION, "python": sys.version.split()[0]}) if arguments.json else f"crito {VERSION}")
    return 0


def _images(name: str) -> Any:
    def run(arguments: Arguments) -> int:
        from cri import cli_images  # noqa: PLC0415

        return int(getattr(cli_images, name)(_socket(arguments), arguments))

    return run
