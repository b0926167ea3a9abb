"""Models by name: from the hub through a fake of huggingface_hub's two functions, and from its cache."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import CONFIG, make, source

from jllama.errors import InputError
from jllama.formats import open_source
from jllama.formats.hub import needed, resolve
from jllama.text.tokenizer import load_tokenizer, tokenizer_for

hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
errors = pytest.importorskip("huggingface_hub.errors")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = [
    ".gitattributes",
    "README.md",
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "consolidated.safetensors",
    "original/consolidated.00.pth",
    "onnx/model.onnx",
    "tokenizer.json",
    "tokenizer_config.json",
    "tf_model.h5",
]


@pytest.mark.parametrize("name", ["SmolLM2", "SMOLLM2"])
def test_another_case_of_smollm2_is_told_the_name(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name}: no such file or directory .*'smollm2'"):
        open_source(name)


def test_only_what_is_read_is_wanted() -> None:
    assert sorted(needed(FILES, "a/b")) == sorted(
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
        + [name for name in FILES if name.startswith("model")]
    )
    torch = [name for name in FILES if "safetensors" not in name]
    assert "pytorch_model.bin" in needed(torch, "a/b")
    meta = ["params.json", "consolidated.00.pth", "consolidated.01.pth", "tokenizer.model"]
    assert needed([*meta, "USE_POLICY.md"], "a/b") == ["params.json", "tokenizer.model", *meta[1:3]]
    assert needed(["README.md", "m.Q4_0.gguf"], "a/b") == ["m.Q4_0.gguf"]
    assert needed(["m.Q4_0.gguf", "m.Q8_0.gguf"], "a/b", "m.Q8_0.gguf") == ["m.Q8_0.gguf"]


@pytest.mark.parametrize(
    ("files", "file", "message"),
    [
        (["m.Q4_0.gguf", "m.Q8_0.gguf"], None, r"a/b: expected one \.gguf file, found 2: .*m\.Q4_0\.gguf, m"),
        (["README.md"], None, r"a/b: expected config\.json with weights, or a \.gguf file, found neither"),
        (["config.json", "tf_model.h5"], None, r"a/b: expected config\.json with weights"),
        (["m.gguf"], "n.gguf", r"a/b: expected one of the repository's files, found no n\.gguf"),
    ],
)
def test_a_repository_without_a_model_says_what_is_missing(files: list[str], file: str | None, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        needed(files, "a/b", file)


def cached(home: Path, made: Path, repo: str = "org--tiny") -> Path:
    """A checkpoint in the layout of the hub's cache: blobs, and links to them in a snapshot."""
    folder = home / f"models--{repo}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for i, file in enumerate(sorted(made.iterdir()) if made.is_dir() else [made]):
        blob = folder / "blobs" / f"{i:040x}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


class Hub:
    """The two functions of huggingface_hub that are used, for a hub with one repository."""

    def __init__(self, cache: Path, made: Path) -> None:
        self.cache, self.made, self.asked = cache, made, list[Any]()

    def model_info(self, repo: str, *, revision: str | None, timeout: float) -> Any:
        assert 0 < timeout < 60
        self.asked.append((repo, revision))
        names = [*(file.name for file in self.made.iterdir()), "flax_model.msgpack", "README.md"]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def snapshot_download(self, repo: str, *, revision: str | None, allow_patterns: Sequence[str]) -> str:
        self.asked.append((repo, revision, sorted(allow_patterns)))
        return str(cached(self.cache, self.made) / "snapshots" / COMMIT)


def play(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    monkeypatch.setattr(hub, "HfApi", lambda: answer)
    monkeypatch.setattr(hub, "snapshot_download", getattr(answer, "snapshot_download", None))


def test_a_repository_is_downloaded_and_opened(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make("hf", source(CONFIG), tmp_path / "made")
    files = sorted(file.name for file in made.iterdir())
    server = Hub(home, made)
    play(monkeypatch, server)
    opened = open_source("org/tiny@v1.0")
    assert server.asked == [("org/tiny", "v1.0"), ("org/tiny", "v1.0", files)]
    assert opened.config == CONFIG
    assert tokenizer_for(opened).encode("the hat")


def test_a_cache_folder_is_a_model(home: Path, tmp_path: Path) -> None:
    folder = cached(home, make("hf", source(CONFIG), tmp_path / "made"))
    snapshot = folder / "snapshots" / COMMIT
    assert resolve(folder) == resolve(snapshot) == snapshot
    assert open_source(folder).config == CONFIG
    assert load_tokenizer(folder).encode("the hat") == load_tokenizer(snapshot / "tokenizer.model").encode("the hat")
    (folder / "refs" / "main").unlink()
    assert resolve(folder) == snapshot  # the only one
    (folder / "snapshots" / ("f" * 40)).mkdir()
    with pytest.raises(InputError, match=r"revision: expected one in .*, found no main"):
        resolve(folder)


def test_a_cache_folder_of_a_gguf_file(home: Path, tmp_path: Path) -> None:
    folder = cached(home, make("gguf", source(CONFIG), tmp_path / "made"))
    assert resolve(folder).name == "made.gguf"
    assert open_source(folder).config == CONFIG


def test_offline_the_cache_answers(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached(home, make("hf", source(CONFIG), tmp_path / "made"))
    assert open_source("org/tiny").config == CONFIG
    assert open_source(f"org/tiny@{COMMIT}").config == CONFIG
    with pytest.raises(InputError, match=r"org/other: no such file or directory, not in .*, and HF_HUB_OFFLINE is set"):
        open_source("org/other")
    with pytest.raises(InputError, match=r"org/tiny@v2: revision: expected one in .*, found no v2"):
        open_source("org/tiny@v2")


def raising(error: Exception) -> Any:
    def model_info(*_: Any, **__: Any) -> Any:
        raise error

    return SimpleNamespace(model_info=model_info)


def http_error(kind: str) -> Exception:
    made = getattr(errors, kind)
    error = made.__new__(made)  # its arguments, a response of the HTTP client, differ from version to version
    Exception.__init__(error, "x")
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error("GatedRepoError"), r"a gated repository: ask for access at \S+/org/none, then log in"),
        (http_error("RevisionNotFoundError"), r"revision: expected one of the repository's, found 'v9'"),
        (http_error("RepositoryNotFoundError"), r"no such file or directory, and no such repository"),
        (http_error("HfHubHTTPError"), r"no such file or directory, not in .*, and the hub cannot be reached"),
        (ConnectionError("x"), r"no such file or directory, not in .*, and the hub cannot be reached"),
        (errors.OfflineModeIsEnabled("x"), r"no such file or directory, not in .*, and the hub cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    play(monkeypatch, raising(error))
    with pytest.raises(InputError, match=rf"^org/none@v9: {message}"):
        open_source("org/none@v9")


def test_without_the_network_the_cache_answers(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(home, make("hf", source(CONFIG), tmp_path / "made"))
    play(monkeypatch, raising(errors.HTTPError("no route")))
    assert open_source("org/tiny").config == CONFIG


@pytest.mark.parametrize("name", ["weights/7b", "./7b", "../x/y", "/x/y", "a/b/c", "7b", "a b/c", "org/na me", "@x/y"])
def test_a_path_with_a_slip_does_not_go_to_the_network(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").mkdir()
    play(monkeypatch, raising(AssertionError("asked")))
    with pytest.raises(InputError, match=r"no such file or directory$"):
        open_source(name)


def test_without_the_library_it_says_what_to_install(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"^org/x: no such file or directory \(.*pip install 'jllama\[hub\]'\)$"):
        open_source("org/x")


def test_links_out_of_a_directory_are_followed_when_the_user_says_so(tmp_path: Path) -> None:
    made = make("hf", source(CONFIG), tmp_path / "made")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("model.safetensors", "tokenizer.model", "config.json"):
        (made / name).rename(elsewhere / name)
        (made / name).symlink_to(elsewhere / name)
    with pytest.raises(InputError, match=r"link: expected one inside the directory, found .*--follow-links"):
        open_source(made)
    opened = open_source(made, links=True)
    assert tokenizer_for(opened).encode("the hat")
    with pytest.raises(InputError, match="link: expected one inside"):
        load_tokenizer(made)
    assert load_tokenizer(made, links=True).encode("the hat")


def test_a_directory_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a tokenizer \(tokenizer\.model, .*\), found none"):
        load_tokenizer(tmp_path)
