"""The end-to-end suite by its name; :mod:`quantization.demo.suite` has what it does.

``python -m quantization.main`` runs it from anywhere, ``python quantization/main.py`` and, inside
the folder, ``python main.py`` from a checkout.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file, which knows its own folder and not the package
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quantization.demo.suite import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
