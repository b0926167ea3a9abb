"""The only module of jllama that imports `pallas_kernels`. It re-exports the public names of that package.

A file ``pallas_kernels.py`` beside a user's script comes first on the path and hides the package. In that case the
package is loaded under a private name, and the script keeps its own module. This works because the package uses
relative imports only.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pallas_kernels import *  # noqa: F403

_PRIVATE = "_jllama_pallas_kernels"


def _package() -> ModuleType:
    file = Path(__file__).parents[1] / "pallas_kernels" / "__init__.py"
    found = importlib.util.find_spec("pallas_kernels")
    if found is not None and found.origin is not None and Path(found.origin).samefile(file):
        return importlib.import_module("pallas_kernels")
    spec = importlib.util.spec_from_file_location(_PRIVATE, file, submodule_search_locations=[str(file.parent)])
    assert spec is not None
    assert spec.loader is not None
    package = sys.modules[_PRIVATE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


_kernels = _package()
__all__ = list(_kernels.__all__)  # pyright: ignore[reportUnsupportedDunderAll]
globals().update({name: getattr(_kernels, name) for name in __all__})
