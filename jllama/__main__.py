"""``python -m jllama``, which does the same as the console script."""

import sys

from jllama.cli import main

if __name__ == "__main__":
    sys.exit(main())
