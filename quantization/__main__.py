"""`python -m quantization`: the command line; without a command the end-to-end suite."""

import sys

from quantization.cli import main

if __name__ == "__main__":
    sys.exit(main())
