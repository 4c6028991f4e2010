"""`python -m quantization`: the end-to-end suite."""

import sys

from quantization.main import main

if __name__ == "__main__":
    sys.exit(main())
