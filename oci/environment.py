"""The environment that others' programs get from us: ours, which an administrator may have set for them."""

import os

# What systemd tells this daemon about itself; a program that believed it would notify or listen in our place.
PRIVATE = ("NOTIFY_SOCKET", "WATCHDOG_", "LISTEN_", "INVOCATION_ID", "JOURNAL_STREAM", "PYTHON")


def inherited() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(PRIVATE)}
