"""Only for ``python -m jllama.generate``; the command itself is `jllama.cli.generate`.

Do not import this module: as an attribute of the package, ``jllama.generate`` is the library's function.
"""

import sys

from jllama.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
