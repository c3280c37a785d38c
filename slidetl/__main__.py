"""``python -m slidetl``: the same command line as the ``slidetl`` script."""

import sys

from slidetl.cli import main

if __name__ == "__main__":
    sys.exit(main())
