"""The end-to-end suite by its name; :mod:`quantization.demo.suite` has what it does."""

import sys

from quantization.demo.suite import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
