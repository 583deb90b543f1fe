"""The mixture of experts: which implementation runs makes no difference but rounding."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoint import FAMILIES

from gemma_jax.config import Gemma4Config
from gemma_jax.moe import MixtureOfExperts
from gemma_jax.norms import Residual
from pallas_kernels import lanes


@pytest.mark.parametrize("tokens", [2, 40])
def test_mosaic_kernels_compute_what_xla_does(tokens: int) -> None:
    """40 tokens have more than 64 experts between them: sorted, where 2 tokens' are read in place."""
    config = dataclasses.replace(
        Gemma4Config.from_hf(FAMILIES["moe"]), hidden_size=128, moe_intermediate_size=64
    )
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    def module(implementation) -> MixtureOfExperts:
        return MixtureOfExperts(config, jnp.bfloat16, implementation)

    h, dense = Residual.of(normal(1, tokens, 128)), normal(1, tokens, 128)
    norm = jnp.ones(128)
    variables = module("xla").init(jax.random.key(0), h, dense, norm)
    params = dict(variables["params"])
    for name in ("gate_up", "down"):
        params[name] = normal(*params[name].shape).astype(jnp.bfloat16)
    want = module("xla").apply({"params": params}, h, dense, norm).h
    with lanes.interpreted():
        # Not "mosaic" alone: the router is float32.
        run = jax.jit(module(("mosaic", "xla")).apply)
        traced = run.trace({"params": params}, h, dense, norm)
        have = run({"params": params}, h, dense, norm).h
    assert "name=expert_gate_up" in str(traced.jaxpr)
    # Hidden activations that lie between two bfloat16 may be rounded either way: half a unit each, of a sum of many.
    scale = float(jnp.max(jnp.abs(want - h.h)))
    np.testing.assert_allclose(have, want, rtol=0, atol=float(jnp.finfo(jnp.bfloat16).eps) * scale)
