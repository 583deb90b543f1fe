"""The two small architectures, their initial weights, a faster training forward and the export.

`tiny-dense` has every feature of E2B / E4B, `tiny-moe` every feature of 26B-A4B. Both are stock
`transformers` classes; only the attention is replaced while training. Needs torch 2.9 or newer,
transformers 5.23 or newer (with gemma4) and safetensors.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, Gemma4ForCausalLM, Gemma4TextConfig

SLIDING, FULL = "sliding_attention", "full_attention"
COMMON = {
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "dtype": "bfloat16",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": 30.0,
    "global_head_dim": 128,
    "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
    },
    "sliding_window": 128,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": None,
    "use_cache": True,
    "vocab_size": 4096,
    "vocab_size_per_layer_input": 4096,
}
CONFIGS = {
    "tiny-dense": COMMON
    | {
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "hidden_size_per_layer_input": 32,
        "intermediate_size": 256,
        "layer_types": [SLIDING] * 3 + [FULL] + [SLIDING] * 2 + [FULL],
        "moe_intermediate_size": None,
        "num_experts": None,
        "num_global_key_value_heads": None,
        "num_hidden_layers": 7,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 3,
        "top_k_experts": None,
        "use_double_wide_mlp": True,
    },
    "tiny-moe": COMMON
    | {
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": 320,
        "layer_types": [SLIDING] * 2 + [FULL],
        "moe_intermediate_size": 192,
        "num_experts": 8,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 0,
        "top_k_experts": 2,
        "use_double_wide_mlp": False,
    },
}
GENERATION = {
    "bos_token_id": 2,
    "do_sample": True,
    "eos_token_id": [1, 106],
    "pad_token_id": 0,
    "temperature": 0.7,
    "top_k": 64,
    "top_p": 0.95,
}
# Fixed, never trained; exact in bfloat16.
LAYER_SCALARS = (0.90625, 0.9375, 1.0, 0.96875)


def new_model(name: str, seed: int) -> Gemma4ForCausalLM:
    """A float32 model with random weights, on the CPU."""
    torch.manual_seed(seed)
    config = {k: v for k, v in CONFIGS[name].items() if k not in ("architectures", "dtype")}
    model = Gemma4ForCausalLM(Gemma4TextConfig(**config)).float()
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        layer.layer_scalar.fill_(LAYER_SCALARS[i % len(LAYER_SCALARS)])
        with torch.no_grad():
            # The logit scale is 1, so norms of head_dim ** -0.25 give logits of about unit size.
            for norm in ("q_norm", "k_norm"):
                if hasattr(attention, norm):
                    getattr(attention, norm).weight.fill_(attention.head_dim**-0.25)
            layer.post_attention_layernorm.weight.fill_(0.4)
            layer.post_feedforward_layernorm.weight.fill_(0.4)
    return model


def _blocked_attention(module, q: Tensor, k: Tensor, v: Tensor, mask, scaling=1.0, **kwargs):
    """Causal attention of whole sequences without padding: softmax(q k^T) v, [B, H, T, C].

    Sliding layers cut T into blocks of one window, which see themselves and the block before:
    2 W instead of T keys per query. T must then be a multiple of the window.
    """
    (b, h, t, c), n_kv = q.shape, k.shape[1]
    g, window = h // n_kv, kwargs.get("sliding_window")
    q, k = (q * scaling).to(v.dtype), k.to(v.dtype)
    w = window or t
    n, span = t // w, (2 if window else 1) * w
    q = q.reshape(b, n_kv, g, n, w, c).transpose(2, 3).reshape(b, n_kv, n, g * w, c)
    k, v = (x.reshape(b, n_kv, n, w, c) for x in (k, v))
    if window:
        before = [functional.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1] for x in (k, v)]
        k, v = (torch.cat([p, x], dim=3) for p, x in zip(before, (k, v), strict=True))
    at_q, at_k = torch.arange(w)[:, None] + span - w, torch.arange(span)[None]
    seen = (at_q >= at_k) & (at_q - at_k < w)
    first = (torch.arange(n) > 0)[:, None, None] | (at_k >= span - w)[None]
    seen = (seen[None] & first).repeat(1, g, 1)
    scores = torch.matmul(q, k.transpose(-1, -2)).float().masked_fill(~seen, -1e9)
    out = torch.matmul(torch.softmax(scores, dim=-1).to(v.dtype), v)
    out = out.view(b, n_kv, n, g, w, c).transpose(2, 3).reshape(b, h, t, c)
    return out.transpose(1, 2), None


AttentionInterface.register("blocked", _blocked_attention)


def hidden_states(model: Gemma4ForCausalLM, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(final hidden states, router probabilities per layer) of unpadded `tokens` [B, T]."""
    model.config._attn_implementation = "blocked"
    out = model.model(
        input_ids=tokens,
        use_cache=False,
        attention_mask={SLIDING: None, FULL: None},
        output_router_logits=bool(model.config.enable_moe_block),
    )
    return out.last_hidden_state, getattr(out, "router_logits", None) or ()


def loss(hidden: Tensor, embedding: Tensor, targets: Tensor, softcap: float = 30.0) -> Tensor:
    """Cross entropy in nats of each target (0 where the target is -100), through the soft cap."""
    logits = functional.linear(hidden, embedding).float()
    return functional.cross_entropy(
        softcap * torch.tanh(logits / softcap), targets, reduction="none"
    )


def balance_loss(router_probabilities: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Switch-style balance: E * sum_e(share of choices of e * mean probability of e); 1 is even."""
    total = torch.zeros(())
    for p in router_probabilities:
        p = p.reshape(-1, p.shape[-1]).float()
        chosen = functional.one_hot(p.topk(top_k, dim=-1).indices, p.shape[-1]).float().mean((0, 1))
        total = total + p.shape[-1] * (chosen.detach() * p.mean(0)).sum()
    return total / max(1, len(router_probabilities))


def check_against_stock(model: Gemma4ForCausalLM, length: int) -> float:
    """Largest logit difference between the training forward and stock transformers, float32."""
    tokens = torch.randint(3, model.config.vocab_size, (1, length))
    with torch.no_grad():
        hidden, _ = hidden_states(model, tokens)
        cap = model.config.final_logit_softcapping
        mine = cap * torch.tanh(model.lm_head(hidden) / cap)
        model.set_attn_implementation("eager")
        stock = model(tokens, use_cache=False).logits
    return float((mine - stock).abs().max())


def export(model: Gemma4ForCausalLM, name: str, folder: Path) -> int:
    """Writes config.json, generation_config.json and model.safetensors (bfloat16, tied head left
    out) into `folder`; returns the number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    state = {k: v.detach().to(torch.bfloat16).contiguous().clone() for k, v in state.items()}
    for file, content in (("config", CONFIGS[name]), ("generation_config", GENERATION)):
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (folder / f"{file}.json").write_text(text)
    partial = folder / "model.safetensors.partial"
    save_file(state, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.rename(folder / "model.safetensors")
    return sum(math.prod(v.shape) for v in state.values())
