"""The entry of the fork server: run by path with `python -I -S`, so that no site-packages are looked at."""

import os
import sys

# -I keeps the script's folder out of sys.path; appended, so that nothing beside our packages shadows the library.
sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # noqa: PTH100, PTH120

# ruff: noqa: E402, F401
import array
import ctypes
import fcntl
import heapq
import json
import select
import signal
import struct
import termios

from oci.monitor import arena

arena.fill_holes()  # so that what is ours lies together, apart from the library's

from oci.monitor import forkserver

if __name__ == "__main__":
    forkserver.main(sys.argv[1:])
