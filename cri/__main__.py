"""`python -I -m cri` is `crito`."""

import sys

from cri.cli import main

if __name__ == "__main__":
    sys.exit(main())
