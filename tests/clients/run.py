"""Drives a server with clients that need an environment of their own: ``make test-clients``.

    python tests/clients/run.py [NAME ...]

makes ``.venv-clients/NAME`` for each, starts ``jllama serve`` with the embedded model and a template that calls tools,
and runs ``with_NAME`` against it. The exit code is the number of clients that failed.
"""

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent / "support"))

from process import KEY, Process  # noqa: E402

# Three of lm_eval's own dependencies have no wheel. What is imported here does not need them.
LM_EVAL = "lm_eval==0.4.13"
FOR_LM_EVAL = (
    "datasets==5.2.0 evaluate==0.4.6 jsonlines==4.0.0 numexpr==2.14.2 pytablewriter==1.2.1 "
    "sacrebleu==2.6.0 scikit-learn==1.9.1 tqdm-multiprocess==0.0.11 zstandard==0.25.0 dill==0.4.1 "
    "more_itertools==11.2.1 jinja2==3.1.6 requests==2.34.2 aiohttp==3.14.5 tenacity==9.2.1 tqdm==4.70.1 "
    "tiktoken==0.14.0 transformers==5.24.0 sentencepiece==0.2.3 protobuf==7.36.2 "
)
PACKAGES = {
    "curl": [],
    "langchain": ["langchain-openai==1.7.4"],
    "litellm": ["litellm==1.110.2"],
    "lm_eval": FOR_LM_EVAL.split(),
}


def command(name: str) -> list[str]:
    """What runs a client; its environment is made where it is missing."""
    if not PACKAGES[name]:
        return ["bash", str(HERE / f"with_{name}.sh")]
    folder = ROOT / ".venv-clients" / name
    python = folder / "bin" / "python"
    done = folder / ".ready"
    wanted = " ".join(PACKAGES[name])
    if not done.exists() or done.read_text() != wanted:
        venv.create(folder, clear=True, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
        subprocess.run([*pip, *PACKAGES[name]], check=True)
        if name == "lm_eval":
            subprocess.run([*pip, "--no-deps", LM_EVAL], check=True)
        done.write_text(wanted)
    return [str(python), str(HERE / f"with_{name}.py")]


def main(names: list[str]) -> int:
    """Run clients. Returns how many failed."""
    commands = {name: command(name) for name in names or PACKAGES}
    template = HERE.parent / "data" / "chat" / "tools.jinja"
    failed = 0
    with tempfile.TemporaryDirectory() as cache:
        server = Process(cache, "--chat-template", str(template))
        try:
            env = os.environ | dict(URL=server.url, KEY=KEY, MODEL="demo", TOKENIZER=str(ROOT / "jllama" / "demo"))
            for name, one in commands.items():
                ended = subprocess.run(one, env=env, capture_output=True, text=True, timeout=300)
                well = ended.returncode == 0 and ended.stdout.rstrip().endswith("ok")
                failed += not well
                print(f"{name:10}{'ok' if well else ended.stdout[-2000:] + ended.stderr[-4000:]}", flush=True)
        finally:
            server.kill()
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
