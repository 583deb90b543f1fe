"""The Gemma 4 text decoder as a Flax module: a pure function of parameters, tokens, positions and cache.

`Gemma4.__call__` runs every layer over every position. Prefill, which wants the logits of the last position only,
runs `Gemma4.encode` over the prompt (the layers with K/V of their own) and `Gemma4.decode` over its last position
(the KV-shared layers and the head). The matmuls go to `pallas_kernels.quantized_matmul`, attention to
`pallas_kernels.attention`.

The residual stream, the norms and the soft-maxes are float32; `dtype` is the type of the activations that enter a
matmul and of the KV cache.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gemma_jax.cache import (
    Context,
    KeysAndValues,
    KVCache,
    extend,
    extended_context,
    init_cache,
    stored_context,
)
from gemma_jax.config import Gemma4Config
from gemma_jax.moe import MixtureOfExperts
from gemma_jax.norms import NormedInput, Stream, normed, plus, rms_norm, start, times_scalar
from gemma_jax.parameters import vector_param, weight_param
from gemma_jax.rope import rope_table
from pallas_kernels.argmax_matmul import argmax_matmul
from pallas_kernels.attention import attention
from pallas_kernels.attention_decode import attention_decode, has_kernel
from pallas_kernels.attention_decode.xla import prepare
from pallas_kernels.dispatch import Implementation
from pallas_kernels.embedding_lookup import embedding_lookup
from pallas_kernels.gated_matmul import gated_matmul
from pallas_kernels.gelu_matmul import gelu_matmul
from pallas_kernels.quantized_matmul import quantized_matmul

Params = dict[str, Any]
RopeTables = dict[bool, tuple[jax.Array, jax.Array]]
# A layer's keys and values, how many positions of each row they hold, and the rows' pages, if it has any.
Stored = tuple[KeysAndValues, jax.Array, jax.Array | None]


class Gemma4(nn.Module):
    """A Gemma 4 decoder.

    Attributes:
      config: sizes and switches.
      dtype: type of the activations in matmuls and of the cache.
      implementation: which implementation of the ops to use, or several in order of preference ("mosaic", "xla");
        None picks the best for the device.
    """

    config: Gemma4Config
    dtype: Any = jnp.float32
    implementation: Implementation = None

    def setup(self) -> None:
        c = self.config
        self.embed = Embedding(c.vocab_size, c.hidden_size, self.implementation)
        if c.ple_size:
            self.ple = PerLayerEmbedding(c, self.dtype, self.implementation)
        self.layers = [
            Layer(c, c.first_like(i), self.dtype, self.implementation) for i in range(c.num_layers)
        ]
        self.final_norm = vector_param(self, "final_norm", c.hidden_size)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Logits of every position, and the cache with these positions in it.

        Args:
          tokens: int32 ``[B, T]``.
          positions: int32 ``[B, T]``: for each row ``cache.lengths[b], cache.lengths[b] + 1, …``, then -1 for padding,
            whose logits mean nothing and which changes nothing.
          cache: see `gemma_jax.cache`.

        Returns:
          float32 logits ``[B, T, V]`` and the new cache.
        """
        h, cache = self.hidden(tokens, positions, cache)
        return self.logits(h), cache

    def hidden(
        self, tokens: jax.Array, positions: jax.Array, cache: KVCache
    ) -> tuple[Stream, KVCache]:
        """What `__call__` does before the head: the residual stream after the last layer, and the new cache."""
        c = self.config
        h, ple, rope = self._start(tokens, positions, 0, c.num_layers)
        h, cache, contexts = self._own_layers(h, ple, rope, positions, cache)
        for i in range(c.first_kv_shared_layer, c.num_layers):
            h = self._shared_layer(
                i, h, ple[..., i, :] if ple is not None else None, rope, positions, contexts
            )
        return h, cache

    def encode(
        self, tokens: jax.Array, positions: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Runs only the layers with K/V of their own: float32 hidden states ``[B, T, D]`` and the new cache."""
        h, ple, rope = self._start(tokens, positions, 0, self.config.first_kv_shared_layer)
        h, cache, _ = self._own_layers(h, ple, rope, positions, cache)
        eps = self.config.rms_norm_eps
        return normed(h, (None,), jnp.float32, eps, self.implementation)[0].h, cache

    def decode(self, h: jax.Array, tokens: jax.Array, cache: KVCache) -> jax.Array:
        """The KV-shared layers and the head, for the last position that each row has in the cache.

        Args:
          h: ``[B, 1, D]``, what `encode` gave for that position.
          tokens: int32 ``[B, 1]``, the token at that position.
          cache: the cache after `encode`.

        Returns:
          float32 logits ``[B, 1, V]``.
        """
        c = self.config
        residual = start(h, self.dtype, self.implementation)
        if c.num_kv_shared_layers:
            positions = cache.lengths[:, None] - 1
            first = c.first_kv_shared_layer
            _, ple, rope = self._start(tokens, positions, first, c.num_layers)
            contexts = {
                i: stored_context(kv, cache.lengths, cache.pages if c.is_global(i) else None)
                for i, kv in enumerate(cache.layers)
            }
            for i in range(first, c.num_layers):
                inputs = ple[..., i - first, :] if ple is not None else None
                residual = self._shared_layer(i, residual, inputs, rope, positions, contexts)
        return self.logits(residual)

    def _start(
        self, tokens: jax.Array, positions: jax.Array, first: int, end: int
    ) -> tuple[Stream, jax.Array | None, RopeTables]:
        """Scaled embeddings, per-layer inputs of layers ``first .. end - 1`` and the RoPE tables."""
        c = self.config
        with jax.named_scope("embed"):
            h = self.embed(tokens) * _rounded(c.hidden_size**0.5, c.dtype)
            ple = self.ple(tokens, h, first, end) if c.ple_size else None
            rope = {
                False: rope_table(positions, c.head_dim, c.rope_theta),
                True: rope_table(
                    positions, c.global_head_dim, c.global_rope_theta, c.global_rotary_factor
                ),
            }
        return start(h, self.dtype, self.implementation), ple, rope

    def _own_layers(
        self,
        h: Stream,
        ple: jax.Array | None,
        rope: RopeTables,
        positions: jax.Array,
        cache: KVCache,
    ) -> tuple[Stream, KVCache, dict[int, Context]]:
        c = self.config
        layers, contexts = [], {}
        for i, kv in enumerate(cache.layers):
            inputs = ple[..., i, :] if ple is not None else None
            source = (kv, cache.lengths, cache.pages if c.is_global(i) else None)
            h, kv, contexts[i] = self._layer(i, h, inputs, rope[c.is_global(i)], positions, source)
            layers.append(kv)
        lengths = cache.lengths + jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
        return h, cache.replace(layers=tuple(layers), lengths=lengths), contexts

    def _shared_layer(
        self,
        i: int,
        h: Stream,
        ple: jax.Array | None,
        rope: RopeTables,
        positions: jax.Array,
        contexts: dict[int, Context],
    ) -> Stream:
        c = self.config
        context = contexts[c.kv_source(i)]
        return self._layer(i, h, ple, rope[c.is_global(i)], positions, context)[0]

    def _layer(self, i: int, *args: Any) -> tuple[Stream, KeysAndValues, Context]:
        # What is traced once bears one name, that of the first layer of its kind; this scope tells them apart.
        with jax.named_scope(f"layers_{i}"):
            return self.layers[i](*args)

    def logits(self, h: Stream) -> jax.Array:
        """float32 logits ``[B, T, V]`` of the token after each position of the last layer's output."""
        c = self.config
        with jax.named_scope("head"):
            x = self._final_norm(h)
            logits = x.times(self.embed.weight, self.dtype, self.implementation)
            if c.final_logit_softcap is None:
                return logits
            return c.final_logit_softcap * jnp.tanh(logits / c.final_logit_softcap)

    def most_likely(self, h: Stream) -> jax.Array:
        """int32 ``[B, T]``: the arg-max of the logits, which a kernel finds without writing them to memory.

        The norm's factor and the soft cap are monotonic and left out. Of two logits that the cap rounds to one number
        the larger is taken here, where the arg-max of `logits` is the lower id.
        """
        with jax.named_scope("head"):
            x = self._final_norm(h).x.astype(self.dtype)
            return argmax_matmul(x, self.embed.weight, implementation=self.implementation)

    def _final_norm(self, h: Stream) -> NormedInput:
        eps = self.config.rms_norm_eps
        return normed(h, (self.final_norm,), self.dtype, eps, self.implementation)[1][0]


class Embedding(nn.Module):
    """The token embedding, whose table is also the output head: ``weight [V, D]``."""

    vocab_size: int
    hidden_size: int
    implementation: Implementation

    def setup(self) -> None:
        shape = (self.vocab_size, self.hidden_size)
        self.weight = weight_param(self, "weight", shape, nn.initializers.normal(0.02))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return embedding_lookup(self.weight, tokens, implementation=self.implementation)


class PerLayerEmbedding(nn.Module):
    """Per-layer embeddings (PLE): a second, gathered table plus a projection of the token embedding.

    ``(rms_norm(h @ projection.T * D**-0.5) + embedding[token] * sqrt(P)) * 2**-0.5``, one vector of size P per layer.
    """

    config: Gemma4Config
    dtype: Any
    implementation: Implementation

    @nn.compact
    def __call__(self, tokens: jax.Array, h: jax.Array, first: int, end: int) -> jax.Array:
        """float32 ``[B, T, end - first, P]`` for the layers ``first .. end - 1``."""
        c = self.config
        size = c.num_layers * c.ple_size
        normal = nn.initializers.normal(0.02)
        table = weight_param(self, "embedding", (c.vocab_size_per_layer_input, size), normal)
        projection = weight_param(self, "projection", (size, c.hidden_size), normal)
        norm = vector_param(self, "norm", c.ple_size)
        split = (*tokens.shape, -1, c.ple_size)
        wanted = slice(first * c.ple_size, end * c.ple_size)
        # Rows of a matrix are the leading axis of every plane, so a slice of layers stays quantized.
        rows = projection[wanted] if (first, end) != (0, c.num_layers) else projection
        context = quantized_matmul(h.astype(self.dtype), rows, implementation=self.implementation)
        context = rms_norm((context * c.hidden_size**-0.5).reshape(split), norm, c.rms_norm_eps)
        token = embedding_lookup(table, tokens, implementation=self.implementation)[..., wanted]
        return (context + token.reshape(split) * _rounded(c.ple_size**0.5, c.dtype)) * 2**-0.5


class Layer(nn.Module):
    """One decoder layer: attention, FFN (with an expert branch in MoE models), per-layer input, scalar.

    `index` is that of the first layer of its kind: those that have it in common are traced and lowered once.
    """

    config: Gemma4Config
    index: int
    dtype: Any
    implementation: Implementation

    def setup(self) -> None:
        c, i = self.config, self.index
        for name in ("input_norm", "post_attention_norm", "pre_ffn_norm", "post_ffn_norm"):
            setattr(self, name, vector_param(self, name, c.hidden_size))
        self.layer_scalar = vector_param(self, "layer_scalar", 1)
        self.attention = Attention(c, i, self.dtype, self.implementation)
        self.ffn = FeedForward(c.hidden_size, c.ffn_size(i), self.dtype, self.implementation)
        if c.num_experts:
            self.moe = MixtureOfExperts(c, self.dtype, self.implementation)
        if c.ple_size:
            self.ple = PerLayerInput(c, self.dtype, self.implementation)

    @nn.jit
    def __call__(
        self,
        h: Stream,
        ple: jax.Array | None,
        rope: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        source: Stored | Context,
    ) -> tuple[Stream, KeysAndValues, Context]:
        """`source` is ``(kv, lengths, pages)`` for a layer with K/V of its own, another layer's `Context` otherwise."""
        eps = self.config.rms_norm_eps
        numbers = (self.dtype, eps, self.implementation)
        with jax.named_scope("attention"):
            h, [x] = normed(h, (self.input_norm,), *numbers)
            a, kv, context = self.attention(x, rope, positions, source)
            h = plus(h, ((a, self.post_attention_norm),), None, eps)
        with jax.named_scope("ffn"):
            h, [x] = normed(h, (self.pre_ffn_norm,), *numbers)
            m = self.ffn(x)
            if self.config.num_experts:
                h = self.moe(h, m, self.post_ffn_norm)
            else:
                h = plus(h, ((m, self.post_ffn_norm),), None, eps)
        if ple is not None:
            with jax.named_scope("ple"):
                h = self.ple(h, ple)
        return times_scalar(h, self.layer_scalar), kv, context


class Attention(nn.Module):
    """Grouped-query attention over the window or the whole context, with normed q, k, v and logit scale 1."""

    config: Gemma4Config
    index: int
    dtype: Any
    implementation: Implementation

    @nn.compact
    def __call__(
        self,
        x: NormedInput,
        rope: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        source: Stored | Context,
    ) -> tuple[jax.Array, KeysAndValues, Context]:
        c, i = self.config, self.index
        heads, kv_heads, head_dim = c.num_heads, c.kv_heads_of(i), c.head_dim_of(i)
        own, tied = not c.is_kv_shared(i), c.shares_k_and_v(i)
        projected = heads + (kv_heads * (1 if tied else 2) if own else 0)
        normal = nn.initializers.normal(0.02)
        w_qkv = weight_param(self, "qkv", (projected * head_dim, c.hidden_size), normal)
        w_o = weight_param(self, "o", (c.hidden_size, heads * head_dim), normal)
        q_norm = vector_param(self, "q_norm", head_dim)

        k_norm = vector_param(self, "k_norm", head_dim) if own else None
        norms, window = (q_norm, k_norm), None if c.is_global(i) else c.sliding_window

        qkv = x.times(w_qkv, self.dtype, self.implementation)
        kv = source.kv if isinstance(source, Context) else source[0]
        pages = source.pages if isinstance(source, Context) else source[2]
        # Of several queries a ring does not hold what the first of them see and the last overwrite.
        is_held = c.is_global(i) or qkv.shape[1] == 1
        if is_held and has_kernel(qkv, rope, kv, positions, heads, self.implementation, pages):
            out, stored = attention_decode(
                qkv,
                norms,
                rope,
                kv,
                positions,
                heads=heads,
                window=window and min(window, kv.keys.shape[1]),
                pages=pages,
                eps=c.rms_norm_eps,
                implementation=self.implementation,
            )
            kv = KeysAndValues(*stored)
            if not isinstance(source, Context):
                source = extended_context(kv, positions, source[1], pages)
            return quantized_matmul(out, w_o, implementation=self.implementation), kv, source

        q, new = prepare(
            qkv,
            norms,
            rope,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            eps=c.rms_norm_eps,
        )
        if isinstance(source, Context):
            context = source
        else:
            assert new is not None
            kv, context = extend(
                kv,
                KeysAndValues(*new),
                positions,
                source[1],
                is_ring=not c.is_global(i),
                pages=pages,
            )
        out = attention(
            q.astype(self.dtype),
            context.kv.keys,
            context.kv.values,
            positions,
            context.positions,
            window=window,
            pages=pages,
            implementation=self.implementation,
        )
        out = out.reshape(*out.shape[:2], heads * head_dim)
        return quantized_matmul(out, w_o, implementation=self.implementation), kv, context


class FeedForward(nn.Module):
    """``down(gelu(gate(x)) * up(x))`` with gate and up stacked in one matrix ``[2F, D]``."""

    hidden_size: int
    width: int
    dtype: Any
    implementation: Implementation

    @nn.compact
    def __call__(self, x: NormedInput) -> jax.Array:
        normal = nn.initializers.normal(0.02)
        gate_up = weight_param(self, "gate_up", (2 * self.width, self.hidden_size), normal)
        down = weight_param(self, "down", (self.hidden_size, self.width), normal)
        h = x.x.astype(self.dtype)
        y = gated_matmul(h, gate_up, x.factor, implementation=self.implementation)
        return quantized_matmul(y, down, implementation=self.implementation)


class PerLayerInput(nn.Module):
    """``h + rms_norm(projection(gelu(gate(h)) * ple))``: the layer's embedding of the token, gated into the stream."""

    config: Gemma4Config
    dtype: Any
    implementation: Implementation

    @nn.compact
    def __call__(self, h: Stream, ple: jax.Array) -> Stream:
        c = self.config
        normal = nn.initializers.normal(0.02)
        gate = weight_param(self, "gate", (c.ple_size, c.hidden_size), normal)
        projection = weight_param(self, "projection", (c.hidden_size, c.ple_size), normal)
        post_norm = vector_param(self, "post_norm", c.hidden_size)
        options = {"implementation": self.implementation}
        h, [x] = normed(h, (None,), self.dtype, c.rms_norm_eps, **options)
        g = gelu_matmul(x.x.astype(self.dtype), gate, ple, **options)
        y = quantized_matmul(g, projection, **options)
        return plus(h, ((y, post_norm),), None, c.rms_norm_eps)


def param_shapes(config: Gemma4Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Path ("layers_0/attention/qkv") to shape of every parameter that a model of `config` has.

    A layer of each kind is enough to know all of them: loading a checkpoint waits for this.
    """
    layers = range(config.num_layers)
    kinds = [i for i in layers if config.first_like(i) == i]
    of_kinds = dataclasses.replace(
        config,
        num_layers=len(kinds),
        layer_types=tuple(config.layer_types[i] for i in kinds),
        num_kv_shared_layers=sum(config.is_kv_shared(i) for i in kinds),
    )
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for path, leaf in _initial_shapes(of_kinds).items():
        first, _, rest = path.partition("/")
        # What these have for each layer lies side by side.
        size = config.num_layers * config.ple_size
        if path == "ple/embedding":
            leaf = jax.ShapeDtypeStruct((leaf.shape[0], size), leaf.dtype)
        elif path == "ple/projection":
            leaf = jax.ShapeDtypeStruct((size, leaf.shape[1]), leaf.dtype)
        if not first.startswith("layers_"):
            shapes[path] = leaf
            continue
        kind = kinds[int(first.removeprefix("layers_"))]
        shapes |= {f"layers_{i}/{rest}": leaf for i in layers if config.first_like(i) == kind}
    return dict(sorted(shapes.items(), key=lambda item: item[0].split("/")))


def _initial_shapes(config: Gemma4Config) -> dict[str, jax.ShapeDtypeStruct]:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def init(tokens: jax.Array) -> Params:
        cache = init_cache(config, 1, 1, jnp.float32)
        return Gemma4(config).init(jax.random.key(0), tokens, tokens, cache)["params"]

    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(init, tokens))
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def _rounded(multiplier: float, dtype: str) -> jax.Array:
    """The embedding multiplier as the published code applies it: rounded to the type of the table."""
    return jnp.asarray(multiplier, dtype).astype(jnp.float32)
