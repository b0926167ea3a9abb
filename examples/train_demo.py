"""Train the embedded demo model, or one like it, through the same `forward` that generates.

    python examples/train_demo.py --text stories.txt --held-out valid.txt --out my_model

Any text will do; ``<|endoftext|>`` separates documents. ``--lowercase-text`` adds text that was published without
capitals: its case is restored from the words of ``--text``. What comes out is a directory that `jllama.load` and
transformers read. The embedded model took a few minutes on one GPU; a CPU does the same in about an hour.
"""

import argparse
import functools
import math
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece

import jllama
from jllama.config import preset
from jllama.formats.checkpoint import save
from jllama.params import Params, init

SEPARATOR = "<|endoftext|>"


def documents(text: str) -> list[str]:
    """The documents of a text, without the blank lines between paragraphs."""
    parts = (re.sub(r"\n\s*\n", "\n", part.strip()) for part in text.split(SEPARATOR))
    return [part for part in parts if len(part) > 50]


def lowercase_documents(text: str, known: list[str]) -> list[str]:
    """Documents one after another, a single newline between them, that are not among ``known``; case restored."""
    parts = re.split(r"(?<!\n)\n(?!\n)", text)
    seen = {_letters(doc) for doc in known}
    restore = case_restorer("\n".join(known))
    return [restore(doc) for doc in documents(SEPARATOR.join(parts)) if _letters(doc) not in seen]


def _letters(doc: str) -> str:
    return re.sub(r"[^a-z]", "", doc[:200].lower())[:80]


def case_restorer(reference: str):
    """A function that gives a lower-case text the capitals of sentence starts and of the names in ``reference``."""
    inside = re.findall(r"(?<=[a-z,] )[A-Za-z']+", reference)  # words that do not begin a sentence
    forms: dict[str, Counter[str]] = {}
    for word in inside:
        forms.setdefault(word.lower(), Counter())[word] += 1
    usual = {low: counts.most_common(1)[0][0] for low, counts in forms.items()}

    def restore(text: str) -> str:
        text = re.sub(r"[a-z']+", lambda m: usual.get(m[0], m[0]), text)
        return re.sub(r"(^|[.!?]\s+|\n|(?:^|\s)\")([a-z])", lambda m: m[1] + m[2].upper(), text)

    return restore


def train_tokenizer(docs: list[str], vocab_size: int, path: Path) -> sentencepiece.SentencePieceProcessor:
    """A sentencepiece model like Llama's: BPE, bytes for what it does not know, digits apart."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines.txt"
        lines.write_text("\n".join(docs))
        sentencepiece.SentencePieceTrainer.train(
            input=str(lines),
            model_prefix=str(path.with_suffix("")),
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=0.9999,
            minloglevel=2,
        )
    path.with_suffix(".vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def encode(tokenizer: sentencepiece.SentencePieceProcessor, docs: list[str]) -> np.ndarray:
    """All documents as one row of ids, each between its begin and end tokens."""
    ids: list[int] = []
    for doc in tokenizer.encode(docs):
        ids += [tokenizer.bos_id(), *doc, tokenizer.eos_id()]
    return np.asarray(ids, np.int32)


def loss(params: Params, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of ``targets`` [B, T] after ``tokens`` [B, T]."""
    logits, _ = jllama.forward(params, tokens, backend="xla")
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def make_step(optimizer: optax.GradientTransformation, noise: float):
    """One compiled training step. A share ``noise`` of the inputs is replaced by random tokens: the text is small,
    and this keeps the model from learning it by heart."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, opt_state: optax.OptState, batch: jax.Array, key: jax.Array):
        inputs, targets = batch[:, :-1], batch[:, 1:]
        where, what = jax.random.split(key)
        random = jax.random.randint(what, inputs.shape, 0, params.config.vocab_size)
        inputs = jnp.where(jax.random.bernoulli(where, noise, inputs.shape), random, inputs)
        value, grads = jax.value_and_grad(loss)(params, inputs, targets)
        updates, opt_state = optimizer.update(grads, opt_state, params)  # pyright: ignore[reportArgumentType]
        return optax.apply_updates(params, updates), opt_state, value  # pyright: ignore[reportArgumentType]

    return step


def held_out_nll(params: Params, ids: np.ndarray, window: int) -> float:
    """Mean negative log-likelihood over non-overlapping windows, each begun with the begin-of-sequence token."""
    window = min(window, len(ids) + 1)
    rows = ids[: len(ids) // (window - 1) * (window - 1)].reshape(-1, window - 1)
    rows = np.concatenate([np.full((len(rows), 1), params.config.bos_id, np.int32), rows], axis=1)
    compiled = jax.jit(loss)
    losses = [compiled(params, rows[i : i + 1, :-1], rows[i : i + 1, 1:]) for i in range(len(rows))]
    return float(np.mean([float(value) for value in losses]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="training text")
    parser.add_argument("--lowercase-text", type=Path, help="more training text, published in lower case")
    parser.add_argument(
        "--held-out", type=Path, required=True, help="text to report the perplexity of, never trained on"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--preset", default="demo", help="the model's shape")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--noise", type=float, default=0.1, help="share of input tokens replaced at random")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out: expected a new directory, found {args.out}")

    config = preset(args.preset)
    seq = config.max_seq_len  # trained on the whole context: positions that were never seen would give nonsense
    docs = documents(args.text.read_text())
    rng = np.random.default_rng(args.seed)
    rng.shuffle(docs)
    n_validation = max(1, len(docs) // 50)
    validation, docs = docs[:n_validation], docs[n_validation:]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_file = Path(folder) / "tokenizer.model"
        tokenizer = train_tokenizer(docs, config.vocab_size, tokenizer_file)
        if args.lowercase_text:
            docs += lowercase_documents(args.lowercase_text.read_text(), docs + validation)
        ids, validation_ids = encode(tokenizer, docs), encode(tokenizer, validation)
        held_out_text = args.held_out.read_text()
        held_out = np.asarray(tokenizer.encode(held_out_text), np.int32)
        print(f"{len(docs)} documents, {len(ids)} tokens; {config.n_params} parameters", flush=True)

        warmup = min(200, args.steps // 10)
        schedule = optax.warmup_cosine_decay_schedule(0, args.lr, warmup, args.steps, args.lr / 20)
        decayed = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)  # norms are left alone
        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.2, mask=decayed)
        )
        params = init(config, jax.random.key(args.seed))
        step, opt_state = make_step(optimizer, args.noise), optimizer.init(params)  # pyright: ignore[reportArgumentType]
        best, best_nll, began = params, math.inf, time.time()
        for i in range(args.steps):
            starts = rng.integers(0, len(ids) - seq - 1, args.batch)
            batch = jnp.asarray(ids[starts[:, None] + np.arange(seq + 1)])
            key = jax.random.fold_in(jax.random.key(args.seed), i)
            params, opt_state, value = step(params, opt_state, batch, key)
            if (i + 1) % max(1, args.steps // 20) == 0:
                nll = held_out_nll(params, validation_ids, seq)
                print(f"step {i + 1}: train {value:.3f}, validation {nll:.3f}, {time.time() - began:.0f} s", flush=True)
                if nll < best_nll:
                    best, best_nll = jax.tree.map(jnp.copy, params), nll

        best = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), best)
        save(best, args.out, tokenizer=tokenizer_file)
        rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), best)
        nll = held_out_nll(rounded, held_out, seq)
        bits = nll / math.log(2) * len(held_out) / len(held_out_text.encode())
        print(f"held out: perplexity {math.exp(nll):.3f} a token, {bits:.4f} bits a byte", flush=True)
        facts = {"parameters": config.n_params, "tokens": len(ids), "seq": seq}
        quality = {"held_out": math.exp(nll), "bits": bits, "validation": math.exp(best_nll)}
        (args.out / "README.md").write_text(model_card(args, facts, quality))


def model_card(args: argparse.Namespace, facts: dict[str, int], quality: dict[str, float]) -> str:
    """What the model is, and how good."""
    text = args.text.name + (f", {args.lowercase_text.name}" if args.lowercase_text else "")
    return f"""# {args.preset}: a tiny storyteller

A Llama with {facts["parameters"]:,} parameters (bfloat16), trained by `examples/train_demo.py` through
`jllama.forward`, with a sentencepiece tokenizer of its own. It writes short English stories for children and
nothing else.

| | |
|---|---|
| training text | {text}: {facts["tokens"]:,} tokens |
| steps | {args.steps} of {args.batch} x {facts["seq"]} tokens; the step with the best validation loss was kept |
| held-out perplexity | {quality["held_out"]:.3f} a token, {quality["bits"]:.4f} bits a byte, on {args.held_out.name} |
| validation perplexity | {quality["validation"]:.3f} a token, on documents kept out of the training text |

The text is from TinyStories (Eldan and Li, 2023), published under CDLA-Sharing-1.0.
"""


if __name__ == "__main__":
    main()
