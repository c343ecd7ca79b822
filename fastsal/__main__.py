"""`python -m fastsal`, the same as `fastsal`."""

import sys

from fastsal.cli import main

if __name__ == "__main__":
    sys.exit(main())
