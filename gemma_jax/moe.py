"""The mixture of experts of 26B-A4B: a router and the experts it chooses, beside the dense FFN."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gemma_jax.config import Gemma4Config
from gemma_jax.norms import Stream, normed, plus
from gemma_jax.parameters import vector_param, weight_param
from pallas_kernels.dispatch import Implementation
from pallas_kernels.expert_down import expert_down
from pallas_kernels.expert_gate_up import expert_gate_up


class MixtureOfExperts(nn.Module):
    """The expert branch beside the dense FFN, and the sum of the two added to the residual.

    ``h + rms_norm(rms_norm(dense) + rms_norm(sum_e weight_e * expert_e(rms_norm(h))))`` over the top-k experts of the
    router, which reads the residual itself: ``softmax(rms_norm(h) * scale * D**-0.5 @ router.T)``, the top-k
    renormalised to sum 1, times the per-expert scale.
    """

    config: Gemma4Config
    dtype: Any
    implementation: Implementation

    @nn.compact
    def __call__(self, h: Stream, dense: jax.Array, outer_norm: jax.Array) -> Stream:
        c = self.config
        hidden, experts, width = c.hidden_size, c.num_experts, c.moe_intermediate_size
        normal = nn.initializers.normal(0.02)
        router = weight_param(self, "router", (experts, hidden), normal)
        router_scale = vector_param(self, "router_scale", hidden)
        per_expert_scale = vector_param(self, "per_expert_scale", experts)
        gate_up = weight_param(self, "gate_up", (experts, 2 * width, hidden), normal)
        down = weight_param(self, "down", (experts, hidden, width), normal)
        pre_norm = vector_param(self, "pre_norm", hidden)
        dense_post_norm = vector_param(self, "dense_post_norm", hidden)
        post_norm = vector_param(self, "post_norm", hidden)

        with jax.named_scope("router"):
            # float32 throughout: a router that rounds picks other experts.
            options = {"implementation": self.implementation}
            _, [r] = normed(h, (router_scale,), jnp.float32, c.rms_norm_eps, **options)
            scores = r.times(router, jnp.float32, self.implementation) * hidden**-0.5
            probabilities = jax.nn.softmax(scores, axis=-1)
            weights, chosen = top_k(probabilities, c.num_experts_per_token)
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
            weights = weights * per_expert_scale.astype(jnp.float32)[chosen]
        with jax.named_scope("experts"):
            _, [x] = normed(h, (pre_norm,), self.dtype, c.rms_norm_eps, **options)
            rows = x.x.reshape(-1, hidden).astype(self.dtype)
            ids = chosen.reshape(len(rows), -1)
            y = expert_gate_up(rows, gate_up, ids, x.factor.reshape(-1), **options)
            y = expert_down(y, down, ids, weights.reshape(ids.shape), **options)
            y = y.reshape(h.h.shape)
        branches = ((dense, dense_post_norm), (y, post_norm))
        return plus(h, branches, outer_norm, c.rms_norm_eps)


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of the last axis, largest first, and their indices, the lower first among equals.

    By counting, for each element, those before it: for the hundred or so experts of a router that is one pass over
    their pairs, where `jax.lax.top_k` is a sort.
    """
    at = jnp.arange(x.shape[-1])
    mine, other = x[..., :, None], x[..., None, :]
    is_before = (other > mine) | ((other == mine) & (at[None, :] < at[:, None]))
    rank = jnp.sum(is_before, axis=-1, dtype=jnp.int32)
    is_kth = rank[..., None, :] == jnp.arange(k)[:, None]
    values = jnp.sum(jnp.where(is_kth, x[..., None, :], 0), axis=-1)
    return values, jnp.sum(jnp.where(is_kth, at, 0), axis=-1)
