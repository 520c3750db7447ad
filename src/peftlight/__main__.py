"""`python -m peftlight` is the same as `peftlight`."""

import sys

from peftlight.cli import main

if __name__ == "__main__":
    sys.exit(main())
