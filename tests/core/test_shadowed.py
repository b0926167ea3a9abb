"""Files beside a user's script that are named like our packages do not break ``import jllama``."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import jllama
params = jllama.load(jllama.DEMO)
tokenizer = jllama.load_tokenizer(jllama.DEMO / "tokenizer.model")
import jax.numpy as jnp
out = jllama.generate(params, jnp.asarray([tokenizer.encode("Once upon a time")]), max_new_tokens=4)
print("generated", out.tokens.shape, jllama.__version__)
"""


def test_a_script_beside_modules_of_our_names(tmp_path: Path) -> None:
    for name in ("convert", "bench", "pallas_kernels"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name}.py of the user was imported')\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    # The script's folder comes first on the path, ours after it, as with an installed package.
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("generated (1, 4)")
