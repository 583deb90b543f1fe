"""From logits to the next token, on the device, without sorting the vocabulary.

`process_logits` applies penalties, bias, temperature and filters in that order; `sample` draws
from what is left; `log_probabilities` reports on the untouched distribution. A full sort of
262144 entries would cost more than the rest of a decode step, and XLA turns a top_k of that width
into one: rows that keep few tokens (top_k below `CANDIDATES`) are drawn from the largest logits
alone, which `gemma_jax.candidates` finds, and for the others the filters look for the exact
threshold by bisection.

The settings are arrays (`SamplingParams`), so only the shape [B, V] is compiled in.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry_2x32

from gemma_jax.candidates import largest
from gemma_jax.sampling import SamplingParams, TokenCounts

# Written out: the bits must not follow the caller's jax_default_prng_impl, and with "rbg" a row's
# bits under vmap would depend on its place in the batch.
_PRNG = "threefry2x32"
_LOWEST = float(np.finfo(np.float32).min)

# Rows with a smaller top_k are drawn from that many of the largest logits, where the vocabulary is
# not so small that bisection over all of it is as quick.
CANDIDATES = 128
_SMALL_VOCABULARY = 2**15


def process_logits(
    logits: jax.Array, params: SamplingParams, counts: TokenCounts, mask: jax.Array | None = None
) -> jax.Array:
    """Logits of the distribution to draw from, relative to the largest; -inf for removed tokens.

    In this order, for each row (the conventions of Hugging Face `transformers`; presence and
    frequency as in the OpenAI API):

      x = l / r if l > 0 else l * r                 where the token is in the prompt or the output
      x = x - presence * [count > 0] - frequency * count        count: occurrences in the output
      x = x + bias
      x = max(x, lowest float32) if the mask allows the token else -inf                    (mask)
      x = (x - max x) / temperature                                  (not divided in greedy rows)
      x = -inf unless x >= the k-th largest                                               (top_k)
      x = -inf unless softmax mass of strictly larger x < p, over the survivors           (top_p)
      x = -inf unless exp(x) >= min_p                                                     (min_p)

    The mask comes after the bias and is stronger: of allowed tokens with a bias of -inf one is still
    taken where nothing else is allowed. Tokens that tie with the last one kept are kept too. Greedy
    rows (temperature 0) skip the filters, which cannot remove their arg-max; if no row asks for a
    filter, it does not run.
    Subtracting the maximum changes no probability and keeps any positive temperature finite.

    Args:
      logits: float [B, V].
      params: settings of the B rows.
      counts: tokens of the B rows so far.
      mask: uint32 [B, ceil(V / 32)] or None; token v is allowed in row b if bit v % 32 of
        mask[b, v // 32] is set, and at least one must be. Rows without constraint have all bits set.

    Returns:
      float32 [B, V], 0 at the most likely token.
    """
    with jax.named_scope("process_logits"):
        return _filter(_scale(logits, params, counts, mask), params)


def sample(
    logits: jax.Array,
    params: SamplingParams,
    counts: TokenCounts,
    step: jax.Array,
    mask: jax.Array | None = None,
) -> jax.Array:
    """The next token of each row.

    token = argmax x in greedy rows, otherwise argmax (x + g) with x = process_logits(...) and g
    independent standard Gumbel noise: a draw from softmax(x) (Maddison et al.,
    https://arxiv.org/abs/1411.0030). The noise comes from the key fold_in(key(seed), step) of the
    row alone, and that of a token from its id, so neither a row's neighbours nor its place in the
    batch matter.

    Args:
      logits: float [B, V].
      params: settings of the B rows.
      counts: tokens of the B rows so far.
      step: int32 [B], how many tokens each row has generated before this one.
      mask: uint32 [B, ceil(V / 32)] or None, the tokens to choose from; see `process_logits`.

    Returns:
      int32 [B].
    """

    with jax.named_scope("process_logits"):
        x = _scale(logits, params, counts, mask)
    with jax.named_scope("sample"):
        best = jnp.argmax(x, axis=-1).astype(jnp.int32)
        token, random = best, params.temperature > 0
        if x.shape[-1] > _SMALL_VOCABULARY:
            few = random & (params.top_k > 0) & (params.top_k < CANDIDATES)
            drawn, exact = lax.cond(
                jnp.any(few),
                lambda: _draw_from_largest(x, params, step),
                lambda: (best, jnp.zeros_like(few)),
            )
            # Which way a row goes depends on that row alone: the two add up top_p's masses in
            # different orders, and a neighbour must not decide about the last bit.
            token = jnp.where(few & exact, drawn, token)
            random &= ~(few & exact)
        drawn = lax.cond(jnp.any(random), lambda: _draw(x, params, step), lambda: best)
        return jnp.where(random, drawn, token)


def is_plain(params: SamplingParams) -> jax.Array:
    """bool [B]: rows whose token is the arg-max of the logits as they are, greedy and without penalty or bias."""
    return (
        (params.temperature <= 0)
        & (params.repetition_penalty == 1)
        & (params.presence_penalty == 0)
        & (params.frequency_penalty == 0)
        & jnp.all(params.bias_values == 0, axis=1)
    )


def log_probabilities(
    logits: jax.Array, tokens: jax.Array, top_n: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of the distribution before penalties, temperature and filters.

    log p[b, v] = logits[b, v] - log sum_u exp(logits[b, u]), in float32.

    Args:
      logits: float [B, V].
      tokens: int [B], the chosen tokens.
      top_n: how many of the most likely tokens to report, 0 .. V; static. Each costs one pass
        over the vocabulary.

    Returns:
      float32 [B] of the chosen tokens; int32 [B, top_n] the most likely tokens, best first, lower
      id first among equals; float32 [B, top_n] theirs.

    Raises:
      ValueError: top_n is out of range.
    """
    vocab_size = logits.shape[-1]
    if not 0 <= top_n <= vocab_size:
        raise ValueError(f"top_n: got {top_n}, accepted are integers from 0 to {vocab_size}")
    with jax.named_scope("log_probabilities"):
        values = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        rows = jnp.arange(values.shape[0])
        chosen = values[rows, tokens]

        def take_best(left: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            best = jnp.argmax(left, axis=-1).astype(jnp.int32)
            return left.at[rows, best].set(-jnp.inf), (best, values[rows, best])

        _, (top_ids, top_values) = lax.scan(take_best, values, length=top_n)
        return chosen, top_ids.T, top_values.T


def _penalize(x: jax.Array, params: SamplingParams, counts: TokenCounts) -> jax.Array:
    repeated = counts.prompt | (counts.output > 0)
    penalty = params.repetition_penalty[:, None]
    x = jnp.where(repeated, jnp.where(x > 0, x / penalty, x * penalty), x)
    x -= params.presence_penalty[:, None] * (counts.output > 0)
    x -= params.frequency_penalty[:, None] * counts.output
    rows = jnp.arange(x.shape[0])[:, None]
    return x.at[rows, params.bias_ids].add(params.bias_values, mode="drop", unique_indices=True)


def _allowed(mask: jax.Array, vocab_size: int) -> jax.Array:
    """bool [B, V]: the bits of uint32 [B, ceil(V / 32)], lowest first."""
    bits = (mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(mask.shape[0], -1)[:, :vocab_size] != 0


def _scale(
    logits: jax.Array, params: SamplingParams, counts: TokenCounts, mask: jax.Array | None
) -> jax.Array:
    """What `process_logits` does before the filters."""
    x = _penalize(logits.astype(jnp.float32), params, counts)
    if mask is not None:
        x = jnp.where(_allowed(mask, x.shape[-1]), jnp.maximum(x, _LOWEST), -jnp.inf)
    smallest = jnp.finfo(jnp.float32).tiny  # below it, the device may divide by zero
    random = params.temperature > 0
    temperature = jnp.where(random, jnp.maximum(params.temperature, smallest), 1.0)
    return (x - x.max(axis=-1, keepdims=True)) / temperature[:, None]


def _filter(x: jax.Array, params: SamplingParams) -> jax.Array:
    random = params.temperature > 0
    top_k = jnp.where(random, params.top_k, 0)
    x = lax.cond(jnp.any(top_k > 0), _keep_top_k, lambda x, _: x, x, top_k)
    top_p = jnp.where(random, params.top_p, 1.0)
    x = lax.cond(jnp.any(top_p < 1), _keep_top_p, lambda x, _: x, x, top_p)
    min_p = jnp.where(random, params.min_p, 0.0)
    return jnp.where(x >= jnp.log(min_p)[:, None], x, -jnp.inf)


def _draw(x: jax.Array, params: SamplingParams, step: jax.Array) -> jax.Array:
    """A token of each row from all that the filters leave of it."""
    ids = jnp.arange(x.shape[-1], dtype=jnp.int32)
    noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(params.seed, step, ids)
    return jnp.argmax(_filter(x, params) + noise, axis=-1).astype(jnp.int32)


def _draw_from_largest(
    x: jax.Array, params: SamplingParams, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`_draw` of rows with top_k in 1 .. CANDIDATES - 1, and whether it is exact: not among ties.

    A row is exact if its k-th largest is larger than the last candidate: what ties with it is then
    among the candidates too.
    """
    values, ids = largest(x, CANDIDATES)
    place = jnp.clip(params.top_k - 1, 0, CANDIDATES - 1)
    threshold = jnp.take_along_axis(values, place[:, None], axis=1)
    kept = values >= threshold
    mass = jnp.where(kept, jnp.exp(values), 0.0)
    larger = values[:, None, :] > values[:, :, None]
    mass_of_larger = jnp.where(larger, mass[:, None, :], 0.0).sum(axis=-1)
    top_p = params.top_p[:, None]
    # Of top_p = 0, too, the largest stays.
    kept &= (mass_of_larger < top_p * mass.sum(-1, keepdims=True)) | (top_p == 1) | (values == 0)
    kept &= values >= jnp.log(params.min_p)[:, None]
    noise = jax.vmap(_gumbel)(params.seed, step, ids)
    drawn = jnp.where(kept, values + noise, -jnp.inf)
    winners = drawn == drawn.max(axis=-1, keepdims=True)
    token = jnp.where(winners, ids, x.shape[-1]).min(axis=-1)  # arg-max takes the lowest id
    return token, threshold[:, 0] > values[:, -1]


def _gumbel(seed: jax.Array, step: jax.Array, ids: jax.Array) -> jax.Array:
    """Noise of the tokens `ids` ``[N]``, each from its own id: a part of them gets what all of them would."""
    key = jax.random.key_data(jax.random.fold_in(jax.random.key(seed, impl=_PRNG), step))
    words = threefry_2x32((key[0], key[1]), jnp.concatenate([0 * ids, ids]).astype(jnp.uint32))
    high, low = (word.astype(jnp.float32) for word in jnp.split(words, 2))
    # Uniform in (0, 1) with 24 bits wherever it lies. The upper tail of the noise is where it is
    # near 0: a large share of a 262144-token vocabulary has probabilities below 2**-24, which 24
    # bits in all would never draw at their true rate.
    uniform = (high + (low + 0.5) * 2.0**-32) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24)))


def _keep_top_k(x: jax.Array, top_k: jax.Array) -> jax.Array:
    image = _ordered_bits(x)
    ones = jnp.ones(x.shape, jnp.int32)
    threshold = _threshold(image, ones, jnp.minimum(top_k, x.shape[-1]))
    keep = (image >= threshold[:, None]) | (top_k == 0)[:, None]
    return jnp.where(keep, x, -jnp.inf)


def _keep_top_p(x: jax.Array, top_p: jax.Array) -> jax.Array:
    image = _ordered_bits(x)
    mass = jnp.exp(x)  # x is relative to its maximum, so this neither overflows nor vanishes
    threshold = _threshold(image, mass, top_p * mass.sum(axis=-1))
    # top_p = 0 is reached by the empty set, which lies above the maximum: one token must stay.
    threshold = jnp.minimum(threshold, image.max(axis=-1))
    keep = (image >= threshold[:, None]) | (top_p == 1)[:, None]
    return jnp.where(keep, x, -jnp.inf)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 image of float32 with the same order: a < b as floats iff as images (no NaN)."""
    x = jnp.where(x == 0, 0.0, x)  # -0 and +0 are equal and must stay so
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _threshold(image: jax.Array, weight: jax.Array, target: jax.Array) -> jax.Array:
    """Largest t with sum(weight where image >= t) >= target, row by row; 0 if there is none.

    The sum falls as t rises (in floating point too: the order of the additions is fixed and each
    is monotone), so t is found bit by bit from the top, in 32 passes over uint32 [B, V]. They are
    a loop because, unrolled, they would be most of the time that the program takes to compile.
    """

    def decide_bit(index: jax.Array, threshold: jax.Array) -> jax.Array:
        bit = jnp.uint32(1) << (31 - index).astype(jnp.uint32)
        candidate = threshold | bit
        above = jnp.where(image >= candidate[:, None], weight, jnp.zeros_like(weight))
        return jnp.where(above.sum(axis=-1) >= target, candidate, threshold)

    return lax.fori_loop(0, 32, decide_bit, jnp.zeros(target.shape, jnp.uint32))
