"""Static executables of a few instructions, for containers that need a process and no image."""

import platform

from oci.errors import Unimplemented

# exit(0).
_EXIT = {
    "x86_64": (62, bytes.fromhex("31ff6a3c580f05")),  # xor edi,edi; push 60; pop rax; syscall
    "aarch64": (183, bytes.fromhex("000080d2a80b80d2010000d4")),  # mov x0,0; mov x8,93; svc 0
    "riscv64": (243, bytes.fromhex("130500009308d00573000000")),  # li a0,0; li a7,93; ecall
}
# rt_sigaction(SIGCHLD, {SIG_IGN}, NULL, 8), so that the kernel reaps; then pause() again and again: what ppoll() with
# nothing to wait for does where there is no pause().
_PAUSE = {
    "x86_64": (62, bytes.fromhex("6a006a006a006a014889e66a115f31d26a08415a6a0d580f056a22580f05ebf9")),
    "aarch64": (
        183,
        bytes.fromhex(
            "ff8300d1200080d2e00300f9ff0700f9ff0b00f9ff0f00f9200280d2e1030091020080d2030180d2c81080d2010000d4"
            "000080d2010080d2020080d2030080d2280980d2010000d4faffff17"
        ),
    ),
}


def that_exits(machine: str = "") -> bytes:
    """A program that exits with 0. Raises Unimplemented for a machine that it is not written for."""
    return _program(_EXIT, machine)


def that_pauses(machine: str = "") -> bytes:
    """A program that does nothing until it is killed, and leaves no zombies as process 1. Raises Unimplemented."""
    return _program(_PAUSE, machine)


def _program(codes: dict[str, tuple[int, bytes]], machine: str) -> bytes:
    """An ELF header, one loadable segment, the code."""
    name = machine or platform.machine()
    if name not in codes:
        raise Unimplemented(f"no tiny program is written for {name}")
    number, code = codes[name]
    base, header = 0x400000, 64 + 56
    words = [
        b"\x7fELF\x02\x01\x01".ljust(16, b"\0"),
        *(value.to_bytes(2, "little") for value in (2, number)),
        (1).to_bytes(4, "little"),
        *(value.to_bytes(8, "little") for value in (base + header, 64, 0)),
        (4 if number == 243 else 0).to_bytes(4, "little"),  # RISC-V: double-float ABI
        *(value.to_bytes(2, "little") for value in (64, 56, 1, 0, 0, 0)),
        *(value.to_bytes(4, "little") for value in (1, 5)),  # PT_LOAD, read and execute
        *(value.to_bytes(8, "little") for value in (0, base, base, header + len(code), header + len(code), 0x1000)),
        code,
    ]
    return b"".join(words)
