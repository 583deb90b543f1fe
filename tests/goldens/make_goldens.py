"""Writes the logits that `transformers` computes, for the tests to compare with.

Run with an environment that has torch (CPU) and transformers >= 5.23:

    python tests/goldens/make_goldens.py                 # the random checkpoints: tests/data/parity_*.npz
    python tests/goldens/make_goldens.py --bundled       # the bundled checkpoints: tests/data/bundled_*.npz
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma4ForCausalLM, Gemma4TextConfig

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
sys.path.insert(0, str(Path(__file__).parent))

from random_checkpoint import FAMILIES, random_checkpoint  # noqa: E402

LENGTH = 75  # more than six windows of the random checkpoints
PROMPT = "The old captain looked at the sea and said:"
BUNDLED_POSITIONS = 8  # of the bundled models, whose vocabulary makes each position 16 kB


def random_goldens() -> None:
    """Logits ``[LENGTH, V]`` of each family for random tokens in float32, and the RMS error of bfloat16."""
    for name, config in FAMILIES.items():
        model = Gemma4ForCausalLM(Gemma4TextConfig(**config)).eval()
        state = {k: torch.from_numpy(v) for k, v in random_checkpoint(config).items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert set(missing) <= {"lm_head.weight"}, missing
        assert not unexpected, unexpected
        model.tie_weights()
        model.set_attn_implementation("eager")
        tokens = np.random.default_rng(1).integers(3, config["vocab_size"], (1, LENGTH))
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)).logits[0].numpy()
            half = model.bfloat16()(torch.from_numpy(tokens)).logits[0].float().numpy()
        # What the reference itself loses in bf16.
        bf16_error = np.sqrt(np.mean((half - logits) ** 2))
        np.savez_compressed(
            DATA / f"parity_{name}.npz", tokens=tokens[0], logits=logits, bf16_error=bf16_error
        )
        print(f"{name}: logits {logits.shape}, range {logits.min():.2f} to {logits.max():.2f}")


def bundled_goldens() -> None:
    """Logits at the last positions of a held-out text, and a greedy continuation, of each bundled model in float32."""
    text = (DATA / "held_out.txt").read_text(encoding="utf-8")[:1500]
    for name in ("tiny-dense", "tiny-moe"):
        folder = ROOT / "gemma_jax" / "checkpoints" / name
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model.set_attn_implementation("eager")
        tokens = tokenizer(text, return_tensors="pt").input_ids
        prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(tokens).logits[0, -BUNDLED_POSITIONS:].float().numpy()
            greedy = model.generate(prompt, max_new_tokens=32, do_sample=False)
        np.savez_compressed(
            DATA / f"bundled_{name}.npz",
            tokens=tokens[0].numpy(),
            logits=logits,
            prompt=prompt[0].numpy(),
            greedy=greedy[0, prompt.shape[1] :].numpy(),
        )
        print(f"{name}: {tokens.shape[1]} tokens; {tokenizer.decode(greedy[0])!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundled", action="store_true", help="the bundled checkpoints instead")
    bundled_goldens() if parser.parse_args().bundled else random_goldens()
