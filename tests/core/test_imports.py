"""Rules for the source tree: allowed imports, lazy imports, the length of files, and what they may not name."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
KERNEL_BASE = (
    "arch",
    "dispatch",
    "formats",
    "layer_view",
    "quantized",
    "split_rows",
    "step_weights",
)  # the modules of the op layer that a kernel may use
OURS = ("pallas_kernels", "jllama", "convert", "bench", "tests", "examples")
SOURCES = sorted(path for folder in OURS for path in (ROOT / folder).rglob("*.py"))

# The forward and what it is made of: no files, no terminals, nothing that has state.
PURE = tuple(
    f"jllama.{name}"
    for name in [
        "cache",
        "config",
        "decode",
        "errors",
        "kernels",
        "mesh",
        "model",
        "paged",
        "params",
        "rope",
        "sampling",
        "step",
        "ways",
    ]
)
CORE = (*PURE, *(f"jllama.{name}" for name in ["backends", "compilation", "demo_model", "device", "stream"]))

# Which of our own modules the files of a folder may import. The first matching pattern counts.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    # A kernel may use the op layer's contract, but no op.
    ("pallas_kernels/hopper/**", (*(f"pallas_kernels.{name}" for name in KERNEL_BASE), "pallas_kernels.hopper")),
    ("pallas_kernels/**", ("pallas_kernels",)),
    # The only module that imports the kernels.
    ("jllama/kernels.py", ("pallas_kernels",)),
    ("jllama/errors.py", ()),
    ("jllama/config.py", ("jllama.errors",)),
    ("jllama/ways.py", ()),
    ("jllama/rope.py", ("jllama.config", "jllama.errors")),
    # The names that the package offers, and the module that is a command only.
    ("jllama/__init__.py", ("jllama",)),
    ("jllama/__main__.py", ("jllama.cli",)),
    ("jllama/generate.py", ("jllama.cli",)),
    # From the core outwards.
    ("jllama/formats/*", (*CORE, "jllama.formats")),
    ("jllama/text/*", (*CORE, "jllama.formats", "jllama.engine", "jllama.text")),
    # The scheduler and the page tables know no tensors.
    ("jllama/engine/pages.py", ("jllama.errors",)),
    ("jllama/engine/scheduler.py", ("jllama.errors", "jllama.engine.pages")),
    ("jllama/engine/*", (*CORE, "jllama.engine")),
    ("jllama/evaluation.py", (*CORE, "jllama.engine", "jllama.text", "jllama.formats")),
    (
        "jllama/serve/**",
        (*CORE, "jllama.engine", "jllama.text", "jllama.formats", "jllama.serve", "jllama.__version__"),
    ),
    ("jllama/cli/*", ("jllama",)),
    *((f"{name.replace('.', '/')}.py", PURE) for name in PURE),
    ("jllama/mesh/*", PURE),
    ("jllama/*", CORE),
    ("convert/*", ("convert", "jllama")),
    ("bench/**", ("bench", "pallas_kernels", "jllama", "convert", "examples")),
    ("examples/*", ("jllama", "pallas_kernels", "convert", "examples")),
    ("tests/**", OURS),
)
# Packages that a folder may import at once, as nothing imports the folder before its extra is known to be there.
EXTRAS = {"jllama/serve/": {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance", "h11"}}
TORCH_FOLDERS = ("bench/peers", "tests", "examples")
MAX_LINES = 400


@dataclass(frozen=True)
class Import:
    name: str  # "jllama.config"
    lazy: bool  # inside a function
    line: int


def imports(tree: ast.AST, package: str = "", lazy: bool = False) -> Iterator[Import]:
    """Every import of a file, with ``from a import b`` as both a and a.b."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield Import(module, lazy, node.lineno)
            yield from (Import(f"{module}.{alias.name}", lazy, node.lineno) for alias in node.names)
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, package, lazy or function)


def imports_of(path: Path) -> list[Import]:
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    return list(imports(ast.parse(path.read_text()), package))


def allowed_for(path: str) -> tuple[str, ...]:
    return next(allowed for pattern, allowed in RULES if fits(path, pattern))


def fits(path: str, pattern: str) -> bool:
    """Whether a path matches a pattern: ``folder/*`` is the folder's files, ``folder/**`` also those below it."""
    if pattern.endswith("/**"):
        return path.startswith(pattern.removesuffix("**"))
    return PurePosixPath(path).match(pattern) and path.count("/") == pattern.count("/")


def inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def forbidden(path: str, found: list[Import]) -> list[str]:
    """The forbidden imports of a file. ``from jllama import config`` also counts as an import of jllama. That is
    allowed if jllama is only the parent package of an allowed module."""
    allowed = allowed_for(path)
    parents = {i.name.rpartition(".")[0] for i in found if inside(i.name, allowed)}
    breaches = [i for i in found if inside(i.name, OURS) and not inside(i.name, allowed) and i.name not in parents]
    return [f"{path}:{i.line}: {i.name}" for i in breaches]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_file_imports_only_what_its_folder_may() -> None:
    assert [line for path in SOURCES for line in forbidden(relative(path), imports_of(path))] == []


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("pallas_kernels/matmul.py", "from jllama.config import LlamaConfig"),
        ("jllama/model.py", "def f():\n    import jllama.formats.checkpoint"),
        ("jllama/model.py", "from jllama import formats"),
        ("jllama/model.py", "from pallas_kernels import matmul"),
        ("jllama/formats/hf.py", "from jllama.text import tokenizer"),
        ("pallas_kernels/hopper/common/ring.py", "from ...matmul import matmul"),
        ("jllama/device.py", "from jllama.formats import open_source"),
        ("jllama/cli/chat.py", "import convert.quantize"),
        ("jllama/generate.py", "import bench.measure"),
        ("convert/check.py", "from bench import record"),
        ("bench/peers/ours.py", "from tests import tiny"),
        ("jllama/decode.py", "from . import stream"),
        ("jllama/engine/engine.py", "from jllama.serve import bridge"),
        ("jllama/serve/routes.py", "from jllama.cli import options"),
    ],
)
def test_the_rules_notice_a_breach(path: str, code: str) -> None:
    package = ".".join(Path(path).parts[:-1])
    assert forbidden(path, list(imports(ast.parse(code), package)))


def test_kernels_need_jax_and_what_comes_with_it_only() -> None:
    others = [
        f"{relative(path)}:{i.line}: {i.name}"
        for path in (ROOT / "pallas_kernels").rglob("*.py")
        for i in imports_of(path)
        if i.name.split(".")[0] not in {"jax", "jaxlib", "numpy", "pallas_kernels", *sys.stdlib_module_names}
    ]
    assert others == []


def test_what_is_no_base_dependency_is_imported_where_it_is_used() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {re.split(r"[<>=\[]", requirement)[0] for requirement in project["dependencies"]}
    eager = [
        f"{relative(path)}:{i.line}: {i.name}"
        for folder in ("jllama", "convert")
        for path in (ROOT / folder).rglob("*.py")
        for i in imports_of(path)
        if not i.lazy and i.name.split(".")[0] not in {*base, *OURS, *sys.stdlib_module_names, *_extra(relative(path))}
    ]
    assert eager == []
    listed = " ".join(project["optional-dependencies"]["serve"])
    assert all(name.replace("_", "-") in listed for name in ("fastapi", "uvicorn", "prometheus_client", "llguidance"))


def _extra(path: str) -> set[str]:
    return next((names for folder, names in EXTRAS.items() if path.startswith(folder)), set())


def test_only_the_command_imports_the_server_and_late() -> None:
    found = [
        (relative(path), i)
        for path in SOURCES
        for i in imports_of(path)
        if inside(i.name, ("jllama.serve",)) and not relative(path).startswith(("jllama/serve/", "tests/"))
    ]
    assert {path for path, _ in found} == {"jllama/cli/serve.py", "bench/http_cost.py"}
    assert [f"{path}:{i.line}" for path, i in found if not i.lazy] == []


def test_torch_and_transformers_are_for_peers_and_tests() -> None:
    found = [
        (relative(path), i) for path in SOURCES for i in imports_of(path) if inside(i.name, ("torch", "transformers"))
    ]
    assert [f"{path}:{i.line}" for path, i in found if not path.startswith(TORCH_FOLDERS)] == []
    assert [f"{path}:{i.line}" for path, i in found if path.startswith("tests") and not i.lazy] == []
    assert any(path == "tests/make_golden.py" for path, _ in found)


def test_importing_jllama_imports_nothing_heavy() -> None:
    heavy = ("jax", "numpy", "flax", "pallas_kernels", "convert")
    code = f"import sys, jllama; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["jllama.generate", "jllama.cli.chat", "jllama.cli.serve", "jllama", "convert"])
def test_help_waits_for_nothing_heavy(module: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert module.split(".")[0] in imported
    assert imported & {"jax", "flax", "sentencepiece"} == set()
    assert "usage:" in done.stdout


def texts() -> Iterator[tuple[str, str]]:
    """Every text file of the project: the files that git tracks, or all files without git."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        paths = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        paths = [path for path in ROOT.rglob("*") if not path.relative_to(ROOT).parts[0].startswith(".")]
    for path in paths:
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            yield relative(path), content.decode(errors="replace")


def test_no_source_file_is_longer_than_a_sitting() -> None:
    long = {name: text.count("\n") for name, text in texts() if name.endswith(".py")}
    assert {name: lines for name, lines in long.items() if lines > MAX_LINES} == {}
    assert len(long) > 50


def test_no_file_names_a_place_of_the_machine_it_was_written_on() -> None:
    place = re.compile(r"(?<![\w.])/(?:work|root|home)/")
    assert place.search("cd /" + "work/main")
    assert [name for name, text in texts() if place.search(text)] == []
