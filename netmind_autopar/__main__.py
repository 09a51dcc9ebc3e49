"""`python -m netmind_autopar` is the command `netmind-autopar`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
