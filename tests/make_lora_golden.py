"""Makes ``tests/data/lora`` and ``tests/golden/lora/logits.npz``: adapters that peft wrote, and logits with them.

Run with transformers, torch and peft (``make peers``)::

    .venv-peers/bin/python tests/make_lora_golden.py
"""

import json
import tempfile
from pathlib import Path

import make_golden
import numpy as np

CASE = "gqa"
HERE = Path(__file__).parent
ADAPTERS = {
    "attention": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "all": dict(
        r=3,
        lora_alpha=16,
        use_rslora=True,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
    ),
    "one-layer": dict(r=2, lora_alpha=2, target_modules=["down_proj"], layers_to_transform=[1]),
}


def main() -> None:
    """Write the files."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer

    out = {}
    ids = torch.from_numpy(make_golden.prompts(CASE))
    with tempfile.TemporaryDirectory() as scratch:
        for seed, (name, options) in enumerate(ADAPTERS.items()):
            torch.manual_seed(seed)
            model = get_peft_model(
                make_golden.hf_model(CASE, Path(scratch)),
                LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, lora_dropout=0.0, **options),
            )
            folder = HERE / "data" / "lora" / name
            model.save_pretrained(folder)
            (folder / "README.md").unlink(missing_ok=True)
            config = json.loads((folder / "adapter_config.json").read_text())
            config["base_model_name_or_path"] = "tests/make_golden.py"
            config["target_modules"] = sorted(config["target_modules"])
            (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
            fresh = PeftModel.from_pretrained(make_golden.read_hf(Path(scratch)), folder).eval()
            with torch.no_grad():
                out[name] = fresh(ids).logits[:, ::5].numpy().astype(np.float32)
        both = PeftModel.from_pretrained(make_golden.read_hf(Path(scratch)), HERE / "data" / "lora" / "attention")
        both.load_adapter(HERE / "data" / "lora" / "one-layer", adapter_name="second")
        both.base_model.set_adapter(["default", "second"])
        for adapter, weight in (("default", 0.5), ("second", 2.0)):
            for module in both.modules():
                if isinstance(module, LoraLayer) and adapter in module.scaling:
                    module.set_scale(adapter, weight)
        with torch.no_grad():
            out["two"] = both.eval()(ids).logits[:, ::5].numpy().astype(np.float32)
    (HERE / "golden" / "lora").mkdir(exist_ok=True)
    np.savez_compressed(HERE / "golden" / "lora" / "logits.npz", **out)


if __name__ == "__main__":
    main()
