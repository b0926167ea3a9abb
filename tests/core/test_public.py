"""What `jllama` offers: one list of names, which the stub beside the package holds."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jllama

STUB = Path(jllama.__file__).with_suffix(".pyi")


def test_the_stub_is_the_list_and_every_name_is_where_it_says() -> None:
    imports = [node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ImportFrom)]
    listed = {alias.name: node.module for node in imports for alias in node.names}
    assert jllama.__all__ == [*listed] == sorted(listed, key=lambda name: (listed[name], jllama.__all__.index(name)))
    for name, module in listed.items():
        assert getattr(jllama, name) is getattr(sys.modules[module], name)
    assert all(alias.asname == alias.name for node in imports for alias in node.names)  # else no re-export
    assert set(listed) <= set(dir(jllama))


def test_a_name_that_is_not_there_says_so() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jllama.nothing


@pytest.mark.parametrize("name", ["generate", "backends"])
@pytest.mark.parametrize("before", ["", "jllama.{0}; "])
def test_importing_a_module_does_not_take_a_functions_place(name: str, before: str) -> None:
    code = f"import jllama; {before}import jllama.{{0}}; from jllama import {{0}} as f; print(f is jllama.{{0}}, f)"
    done = subprocess.run([sys.executable, "-c", code.format(name)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"True <function {name} ")


def test_the_package_says_that_it_is_typed() -> None:
    assert STUB.with_name("py.typed").exists()
    assert (STUB.parents[1] / "pallas_kernels" / "py.typed").exists()
