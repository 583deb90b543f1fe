"""Measure the finished checkpoints with stock transformers and write their model card.

    python -m bench.small_models.report --work W --checkpoints gemma_jax/checkpoints \\
        --held-out tests/data/held_out.txt --results bench/results/small_models.json

`--work` is the folder of `bench.small_models.train`. Losses are of the saved bfloat16 weights,
computed in float32, in nats per token and per UTF-8 byte of the held-out file.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import corpus, models

SHARES = {
    "State of the Union": 28_000,
    "Moby-Dick": 16_000,
    "Shakespeare": 18_000,
    "Milton": 6_000,
    "World English Bible": 9_000,
    "Treasury of David": 8_000,
}
PROMPTS = ("The people of the United States", "The whale", "KING HENRY.\n")
QUESTION = "Continue: The captain looked out over the dark water."
CARD = Path(__file__).with_name("MODEL_CARD.template.md")


def held_out_loss(model, tokenizer, passages: list[str]) -> tuple[float, int]:
    """(sum of nats, number of predicted tokens): every passage alone, after <bos>."""
    rows = [tokenizer(p).input_ids for p in passages]
    nats, count = 0.0, 0
    for ids in rows:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
        nats, count = nats + float(loss), count + len(ids) - 1
    return nats, count


def expert_usage(model, tokenizer, passages: list[str]) -> list[list[float]]:
    """Share of the router's choices that went to each expert, per layer."""
    chosen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.router.register_forward_hook(
            lambda m, a, out, i=i: chosen[i].append(out[2].flatten())
        )
        for i, layer in enumerate(model.model.layers)
    ]
    held_out_loss(model, tokenizer, passages)
    for hook in hooks:
        hook.remove()
    count = model.config.num_experts
    totals = [torch.cat(c).bincount(minlength=count).double() for c in chosen]
    return [[round(float(x), 3) for x in t / t.sum()] for t in totals]


def sample(model, tokenizer, text: str, special: bool, seed: int = 0) -> str:
    """A sampled continuation of at most 100 tokens; `special` says `text` is a rendered chat."""
    torch.manual_seed(seed)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not special)
    out = model.generate(**inputs, max_new_tokens=100)
    return tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def measure(folder: Path, work: Path, text: str) -> dict:
    """All figures of one checkpoint folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    passages = [p.strip("\n") for p in text.split("\n\n\n")]
    nats, count = held_out_loss(model, tokenizer, passages)
    size = sum(len(p.encode()) for p in passages)
    run = json.loads((work / f"{folder.name}.json").read_text())
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
    )
    result = run | {
        "held_out_nats_per_token": round(nats / count, 4),
        "held_out_bits_per_byte": round(nats / size / math.log(2), 4),
        "held_out_nats_per_byte": round(nats / size, 4),
        "held_out_tokens": count,
        "held_out_bytes": size,
        "samples": {p: sample(model, tokenizer, p, special=False) for p in PROMPTS},
        "chat": {QUESTION: sample(model, tokenizer, chat, special=True)},
    }
    if model.config.enable_moe_block:
        result["expert_usage"] = expert_usage(model, tokenizer, passages[::6])
    return result


def card(results: dict) -> str:
    """The model card: the template with a table, the samples and the expert shares filled in."""
    rows = [("parameters", "{parameters:,}"), ("training steps", "{steps:,}")]
    rows += [("training tokens", "{tokens:,}")]
    rows += [("held-out loss, nats per token", "{held_out_nats_per_token:.3f}")]
    rows += [("held-out loss, nats per byte", "{held_out_nats_per_byte:.3f}")]
    rows += [("held-out loss, bits per byte", "{held_out_bits_per_byte:.3f}")]
    names = list(results)
    lines = [f"| | {' | '.join(f'`{n}`' for n in names)} |", "|---" * (len(names) + 1) + "|"]
    for label, form in rows:
        lines.append(f"| {label} | {' | '.join(form.format(**results[n]) for n in names)} |")
    samples = [
        f"`{name}`, after {json.dumps(prompt)}:\n\n```text\n{text.strip()}\n```"
        for name in names
        for prompt, text in (results[name]["samples"] | results[name]["chat"]).items()
    ]
    usage = [
        f"layer {i}: {', '.join(f'{x:.2f}' for x in shares)}"
        for name in names
        for i, shares in enumerate(results[name].get("expert_usage", []))
    ]
    filled = CARD.read_text()
    for key, value in (("TABLE", lines), ("USAGE", usage), ("SAMPLES", samples)):
        filled = filled.replace(f"@{key}@", ("\n\n" if key == "SAMPLES" else "\n").join(value))
    return filled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True, help="written when absent")
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    if not args.held_out.exists():
        args.held_out.parent.mkdir(parents=True, exist_ok=True)
        args.held_out.write_text(corpus.held_out_text(corpus.load(args.work / "raw"), SHARES))
    text = args.held_out.read_text()
    results = {}
    for name in models.CONFIGS:
        results[name] = measure(args.checkpoints / name, args.work, text)
        print(json.dumps({name: results[name]}, indent=1), flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    content = {"device": "cpu", "versions": versions, "models": results}
    args.results.write_text(json.dumps(content, indent=1) + "\n")
    (args.checkpoints / "MODEL_CARD.md").write_text(card(results))


if __name__ == "__main__":
    main()
