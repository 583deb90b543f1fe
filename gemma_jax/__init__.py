"""gemma-jax: fast quantized Gemma 4, callable inside `jax.jit`.

Text in, text out:

>>> import gemma_jax
>>> lm = gemma_jax.load("tiny-dense", format="q4k")
>>> [done] = lm.generate("The captain", max_new_tokens=8)
>>> done.prompt_tokens > 0
True

Pure functions for JAX code:

>>> import jax, jax.numpy as jnp
>>> tokens = jnp.asarray([lm.tokenizer.encode("The captain")])
>>> lengths = jnp.asarray([tokens.shape[1]])
>>> sampling = gemma_jax.stack_sampling(
...     [gemma_jax.Sampling()], max_new_tokens=8, vocab_size=lm.config.vocab_size)
>>> @jax.jit
... def continuation(params, tokens):
...     return gemma_jax.generate(
...         params, tokens, lengths, sampling, model=lm.model, max_new_tokens=8).tokens
>>> tuple(continuation(lm.params, tokens)[0].tolist()) == done.tokens
True
"""

from gemma_jax import xla_flags
from gemma_jax.cache import KVCache, cache_bytes, init_cache
from gemma_jax.config import Gemma4Config
from gemma_jax.constraints import Constraint
from gemma_jax.engine import Engine
from gemma_jax.generation import (
    DecodeState,
    FinishReason,
    GenerateResult,
    advance,
    choose,
    continue_generation,
    decode_step,
    force,
    generate,
    greedy_step,
    prefill,
    start,
)
from gemma_jax.lm import Completion, LanguageModel, load
from gemma_jax.model import Gemma4
from gemma_jax.requests import Request, Result
from gemma_jax.sampling import Sampling, SamplingParams, stack_sampling
from gemma_jax.tokenizer import Tokenizer

__all__ = [
    "Completion",
    "Constraint",
    "DecodeState",
    "Engine",
    "FinishReason",
    "Gemma4",
    "Gemma4Config",
    "GenerateResult",
    "KVCache",
    "LanguageModel",
    "Request",
    "Result",
    "Sampling",
    "SamplingParams",
    "Tokenizer",
    "advance",
    "cache_bytes",
    "choose",
    "continue_generation",
    "decode_step",
    "force",
    "generate",
    "greedy_step",
    "init_cache",
    "load",
    "prefill",
    "stack_sampling",
    "start",
]

xla_flags.enable()
