"""Two centres of a layer's keys and values: their mean, and what the first token has.

The first token of a sequence is an attention sink in most trained models, and so are some others:
their keys are alike, short, and far from the mean of all others (StreamingLLM: Xiao et al., 2024).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxkv.codecs import hadamard
from jaxkv.codecs.rope import Rope, to_12_bits

# Vectors this many times as long as the median are left out of a mean: no token may move it far.
_LONGEST = 8.0
_PASSES = 2

Both = Float[Array, "2 tokens kv_heads head_dim"]
Centre = Float[Array, "2 kv_heads head_dim"]


def in_a_row(
    vectors: Float[Array, "2 *batch tokens kv_heads head_dim"],
    positions: Int[Array, "*batch tokens"],
    rope: Rope | None,
) -> Both:
    """Keys, turned back, and values of all sequences' tokens in a row."""
    keys, values = vectors.astype(jnp.float32)
    both = jnp.stack([keys if rope is None else rope.unturned(keys, positions[..., None]), values])
    return both.reshape(2, -1, *both.shape[-2:])


def centres_of(both: Both, positions: Int[Array, " tokens"]) -> tuple[Centre, Centre]:
    """The mean of what is nearer to it than to the first token's vector, and that one; 12 bits.

    Vectors that are not finite, of a length that stands out, or at position -1 do not count. Of
    several sequences the first tokens' mean is taken.
    """
    length = jnp.sum(both * both, axis=-1, keepdims=True)
    counts = jnp.isfinite(length) & (positions >= 0)[:, None, None]
    is_first = (positions == 0)[:, None, None]
    first = to_12_bits(_mean(both, counts & is_first, zeros=0))
    counts &= length <= _LONGEST**2 * _median(length, counts)
    near = counts & ~is_first
    mean = _mean(both, near)
    for _ in range(_PASSES):
        nearer = _squares(both - mean[:, None]) <= _squares(both - first[:, None])
        mean = _mean(both, near & nearer)
    return to_12_bits(mean), first


def is_nearer_to_second(
    first: Float[Array, "*shape head_dim"], second: Float[Array, "*shape head_dim"]
) -> Bool[Array, "*shape"]:
    """Whether the second of two differences is the shorter; the same in every program.

    They are rounded to whole numbers in one unit, small enough for exact sums of squares.
    """
    both = jnp.concatenate([first, second], axis=-1)
    whole = hadamard.whole_numbers(jnp.where(jnp.isfinite(both), both, 0))
    lengths = [jnp.sum(side * side, axis=-1) for side in jnp.split(whole, 2, axis=-1)]
    return lengths[1] < lengths[0]


def _squares(vectors: Both) -> Float[Array, "2 tokens kv_heads 1"]:
    return jnp.sum(vectors * vectors, axis=-1, keepdims=True)


def _mean(both: Both, counts: Bool[Array, "2 tokens kv_heads 1"], zeros: int = 1) -> Centre:
    """With so many vectors of zeros, where few tokens say little."""
    total = jnp.sum(jnp.where(counts, both, 0), axis=1)
    return total / jnp.maximum(zeros + jnp.sum(counts, axis=1, dtype=jnp.float32), 1)


def _median(
    lengths: Float[Array, "2 tokens kv_heads 1"], counts: Bool[Array, "2 tokens kv_heads 1"]
) -> Float[Array, "2 1 kv_heads 1"]:
    """The lower median of those that count, a side and head; infinite where none does."""
    ordered = jnp.sort(jnp.where(counts, lengths, jnp.inf), axis=1)
    middle = (jnp.maximum(jnp.sum(counts, axis=1, keepdims=True), 1) - 1) // 2
    return jnp.take_along_axis(ordered, middle, axis=1)
