"""``python -m jllama.generate``; the command itself is `jllama.cli.generate`.

As an attribute of the package, ``jllama.generate`` is the library's function, also where this module was imported.
"""

import sys

from jllama.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
