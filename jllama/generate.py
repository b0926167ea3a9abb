"""Entry point of ``python -m jllama.generate``. The command itself is in `jllama.cli.generate`.

The attribute ``jllama.generate`` is the function of the library, even after this module was imported.
"""

import sys

from jllama.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
