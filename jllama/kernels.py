"""The one door to `pallas_kernels`: the folder beside this package, whatever else on the path has its name.

A script's own ``pallas_kernels.py`` comes first on the path and would be imported in its place. Where that is so, the
folder is loaded under a private name, and the script keeps its module. For this its files import one
another relatively.
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
