"""``python -m triptych``; see ``python -m triptych --help``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
