"""Train `tiny-dense` or `tiny-moe` on a CPU and export it in Hugging Face layout.

    python -m bench.small_models.train --model tiny-dense --chat-template T.jinja --minutes 35

Runs on Python 3.11 or 3.12 with torch, transformers (with gemma4), tokenizers, safetensors and
numpy. The learning rate follows the clock (`--minutes`), so that a slower machine takes fewer
steps and still ends with a decayed rate. `--work` holds the downloads, the tokenizer and a
checkpoint from which an interrupted run resumes; `--out` receives the finished folder.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer

from . import corpus, models, tokenizer

LENGTH = 512
BATCH = 8
BOS, EOS = 2, 1
CHAT_SHARE = 0.06
MUON_RATE, ADAM_RATE, BALANCE = 0.02, 3e-3, 0.05


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised by five Newton-Schulz steps (Jordan 2024).

    Parameters are matrices or stacks of matrices (experts); decay is decoupled.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, decay: float = 0.05):
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                average = state.setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(average, group["momentum"]).bfloat16()
                tall = x.shape[-2] > x.shape[-1]
                x = x.mT if tall else x
                x = x / (x.float().norm(dim=(-2, -1), keepdim=True).bfloat16() + 1e-7)
                for _ in range(5):
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = (x.mT if tall else x).float()
                scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * group["decay"]).add_(x, alpha=-group["lr"] * scale)


def pack(documents: list[corpus.Document], encoder: Tokenizer) -> list[np.ndarray]:
    """Every passage as <bos> ids, the last passage of a document followed by <eos>."""
    pieces = [corpus.passages(document) for document in documents]
    flat = encoder.encode_batch_fast([p for document in pieces for p in document])
    out, rows = [], iter(flat)
    for document in pieces:
        for i in range(len(document)):
            end = [EOS] if i == len(document) - 1 else []
            out.append(np.array(next(rows).ids + end, np.int16))
    return out


def chats(texts: list[corpus.Text], folder: Path, tokens: int, seed: int) -> list[np.ndarray]:
    """About `tokens` tokens of conversations, rendered by the chat template of `folder`."""
    hf = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(seed)
    pool = [(text, text.split()[0]) for text in texts]
    rendered: list[str] = []
    size = 0
    while size < tokens * 3.5:
        text, documents = rng.choices(pool, [t.weight * len(t.documents) ** 0.5 for t in texts])[0]
        turns = corpus.chat(text, rng.choice(documents), rng)
        if turns is None:
            continue
        prompt = hf.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False)
        rendered.append(prompt + turns[-1]["content"] + "<turn|>")
        size += len(rendered[-1])
    rows = hf.backend_tokenizer.encode_batch_fast(rendered, add_special_tokens=False)
    return [np.array(row.ids, np.int16) for row in rows]


def mixture(texts: list[corpus.Text], folder: Path, encoder: Tokenizer, seed: int) -> np.ndarray:
    """One epoch of training tokens: every text at its weight, chats mixed in, passages shuffled."""
    rng = random.Random(seed)
    chosen: list[np.ndarray] = []
    for text in texts:
        rows = pack(text.split()[0], encoder)
        whole, part = divmod(text.weight, 1.0)
        chosen += rows * int(whole) + rng.sample(rows, int(part * len(rows)))
        print(f"  {text.name}: {sum(map(len, rows)) * text.weight / 1e6:.2f} M tokens", flush=True)
    chosen += chats(texts, folder, int(CHAT_SHARE * sum(map(len, chosen))), seed)
    rng.shuffle(chosen)
    return np.concatenate(chosen)


def batch(stream: np.ndarray, rows: range) -> tuple[Tensor, Tensor]:
    """(inputs, targets) [B, T] of the given rows of the stream; a <bos> is never a target."""
    index = np.array(rows)[:, None] * LENGTH + np.arange(LENGTH + 1)[None]
    tokens = torch.from_numpy(np.take(stream, index, mode="wrap").astype(np.int64))
    targets = tokens[:, 1:].masked_fill(tokens[:, 1:] == BOS, -100)
    return tokens[:, :-1].contiguous(), targets.contiguous()


def evaluate(forward, held: np.ndarray, batches: int | None = None) -> tuple[float, int]:
    """(nats per token, tokens) over the held-out stream, or `batches` spread evenly over it.

    Gradients stay on so that the compiled training graph is reused.
    """
    total = (len(held) - 1) // (LENGTH * BATCH)
    picked = np.linspace(0, total - 1, min(batches or total, total)).astype(int)
    nats, count = 0.0, 0
    for i in picked:
        inputs, targets = batch(held, range(i * BATCH, (i + 1) * BATCH))
        nats += float(forward(inputs, targets)[0].detach().sum())
        count += int((targets >= 0).sum())
    return nats / count, count


def prepare(args: argparse.Namespace) -> tuple[list[corpus.Text], Path, Tokenizer]:
    """Corpus and tokenizer, made on the first run and kept in `--work`."""
    corpus.download(args.work / "raw")
    texts = corpus.load(args.work / "raw")
    folder = args.work / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        rng = random.Random(0)
        rows = [p for t in texts for d in t.split()[0] for p in corpus.passages(d)]
        learned = tokenizer.train(rng.sample(rows, 8000))
        tokenizer.check(learned, rng.sample(rows, 500))
        tokenizer.save(learned, folder, args.chat_template)
    return texts, folder, Tokenizer.from_file(str(folder / "tokenizer.json"))


def export(model, args: argparse.Namespace, folder: Path, target: Path) -> int:
    """The whole checkpoint folder: weights, configs, tokenizer, chat template."""
    count = models.export(model, args.model, target)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (target / file).write_bytes((folder / file).read_bytes())
    return count


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    texts, folder, encoder = prepare(args)
    model = models.new_model(args.model, args.seed)
    difference = models.check_against_stock(model, LENGTH)
    print(f"training forward against stock transformers: {difference:.1e}", flush=True)
    if difference > 1e-3:
        raise ValueError(f"the training forward differs from stock transformers by {difference}")
    count = export(model, args, folder, args.out)
    print(f"{args.model}: {count / 1e6:.3f} M parameters, first export in {args.out}", flush=True)
    if args.untrained:
        return
    stream = mixture(texts, folder, encoder, args.seed)
    held = np.concatenate([row for t in texts for row in pack(t.split()[1], encoder)])
    print(f"{len(stream) / 1e6:.2f} M training tokens, {len(held)} held-out tokens", flush=True)

    for layer in model.model.layers:
        layer.compile(dynamic=False)
    loss = torch.compile(models.loss, dynamic=False)

    def forward(inputs: Tensor, targets: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.autocast("cpu", torch.bfloat16):
            hidden, routers = models.hidden_states(model, inputs)
            flat = hidden.reshape(-1, hidden.shape[-1])
            return loss(flat, model.lm_head.weight, targets.reshape(-1)), routers

    named = {n: p for n, p in model.named_parameters() if n != "lm_head.weight"}
    matrices = [
        p for n, p in named.items() if p.ndim > 1 and "embed" not in n and "router" not in n
    ]
    ids = {id(p) for p in matrices}
    others = [p for p in named.values() if id(p) not in ids]
    muon = Muon(matrices, lr=MUON_RATE)
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0, fused=True)
    step, spent, log = 0, 0.0, []
    saved = args.work / f"{args.model}.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=False)
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        step, spent, log = state["step"], state["spent"], state["log"]
        print(f"resumed at step {step}, {spent / 60:.1f} min", flush=True)
    begin, reported, smooth = time.time() - spent, time.time(), 0.0
    first_step, mark = step, (step, time.time())
    while spent < args.minutes * 60:
        done = spent / (args.minutes * 60)
        rate = min(1.0, (step + 1) / 50) * max(0.01, min(1.0, (1 - done) / 0.6))
        for optimizer, peak in ((muon, MUON_RATE), (adam, ADAM_RATE)):
            optimizer.param_groups[0]["lr"] = peak * rate
        inputs, targets = batch(stream, range(step * BATCH, (step + 1) * BATCH))
        nats, routers = forward(inputs, targets)
        nats = nats.sum() / (targets >= 0).sum()
        total = nats
        if routers:
            total = total + BALANCE * models.balance_loss(routers, model.config.top_k_experts)
        total.backward()
        torch.nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        smooth = float(nats) if step == first_step + 1 else 0.95 * smooth + 0.05 * float(nats)
        spent = time.time() - begin
        if step % 20 == 0 or step - first_step <= 3:
            speed = (step - mark[0]) * BATCH * LENGTH / (time.time() - mark[1])
            mark = step, time.time()
            message = f"step {step} {spent / 60:.1f} min loss {smooth:.3f} rate {rate:.3f}"
            print(f"{message} {speed:.0f} tok/s", flush=True)
        if time.time() - reported > args.report_minutes * 60 or spent >= args.minutes * 60:
            finished = spent >= args.minutes * 60
            value, _ = evaluate(forward, held, None if finished else 6)
            log.append({"step": step, "minutes": round(spent / 60, 1), "held_out": round(value, 4)})
            print(f"held-out {value:.4f} nats/token at step {step}", flush=True)
            parts = {"model": model.state_dict(), "muon": muon.state_dict()}
            state = parts | {"adam": adam.state_dict(), "step": step, "spent": spent, "log": log}
            torch.save(state, saved.with_suffix(".partial"))
            saved.with_suffix(".partial").rename(saved)
            export(model, args, folder, args.out)
            reported = time.time()
            spent = reported - begin
    summary = {"parameters": count, "steps": step, "tokens": step * BATCH * LENGTH, "log": log}
    (args.work / f"{args.model}.json").write_text(json.dumps(summary, indent=1))
    print(f"finished {args.model}: {json.dumps(summary)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(models.CONFIGS), required=True)
    parser.add_argument("--work", type=Path, required=True, help="downloads and checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder of the exported model")
    parser.add_argument("--chat-template", type=Path, required=True, help="Gemma's Jinja template")
    parser.add_argument("--minutes", type=float, default=35.0)
    parser.add_argument("--report-minutes", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--untrained", action="store_true", help="export random weights and stop")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
