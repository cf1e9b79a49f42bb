"""The entry of the fork server: run by path with `python -I -S`, so that no site-packages are looked at."""

import os
import sys

# -I keeps the script's folder out of sys.path; appended, so that nothing beside our packages shadows the library.
sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # noqa: PTH100, PTH120

from oci.monitor import forkserver

if __name__ == "__main__":
    forkserver.main(sys.argv[1:])
