"""Two centres of a layer's keys and values: their mean, and what the first token has.

The first token of a sequence is an attention sink in most trained models, and so are some others:
their keys are alike, short, and far from the mean of all others (StreamingLLM: Xiao et al., 2024).
"""

from typing import TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxkv.codecs import hadamard
from jaxkv.codecs.codec import State
from jaxkv.codecs.rope import Rope, to_12_bits

# Vectors this many times as long as the median are left out of a mean: no token may move it far.
_LONGEST = 8.0
_PASSES = 2

Numbers = TypeVar("Numbers")
Both = Float[Array, "2 tokens kv_heads head_dim"]
Centre = Float[Array, "2 kv_heads head_dim"]


def in_a_row(
    vectors: Float[Array, "2 *batch tokens kv_heads head_dim"],
    positions: Int[Array, "*batch tokens"],
    rope: Rope | None,
) -> Both:
    """Keys, rotated back, and values of all sequences' tokens in a row."""
    keys, values = vectors.astype(jnp.float32)
    both = jnp.stack([keys if rope is None else rope.unturned(keys, positions[..., None]), values])
    return both.reshape(2, -1, *both.shape[-2:])


def centres_of(
    both: Both, positions: Int[Array, " tokens"], axis: str | None = None
) -> tuple[Centre, Centre]:
    """The mean of what is nearer to it than to the first token's vector, and that one; 12 bits.

    Vectors that are not finite, of a length that stands out, or at position -1 do not count. Of
    several sequences the first tokens' mean is taken. With the tokens of all devices along a mesh
    axis: lengths and sums of vectors move, and no vector.
    """
    length = jnp.sum(both * both, axis=-1, keepdims=True)
    counts = jnp.isfinite(length) & (positions >= 0)[:, None, None]
    is_first = (positions == 0)[:, None, None]
    first = to_12_bits(_mean(both, counts & is_first, axis, zeros=0))
    counts &= length <= _LONGEST**2 * _median(length, counts, axis)
    near = counts & ~is_first
    mean = _mean(both, near, axis)
    for _ in range(_PASSES):
        nearer = _squares(both - mean[:, None]) <= _squares(both - first[:, None])
        mean = _mean(both, near & nearer, axis)
    return to_12_bits(mean), first


def sums_over(axis: str | None, numbers: Numbers) -> Numbers:
    """Over all devices along a mesh axis; as they are where there is none."""
    return numbers if axis is None else lax.psum(numbers, axis)


def where_all(empty: Bool[Array, ""], axis: str, new: State, old: State) -> State:
    """The new state if the sequences of all devices are empty, and of these alone."""
    all_empty = lax.pmin(jnp.int32(empty), axis) > 0
    return {name: jnp.where(all_empty, new[name], old[name]) for name in old}


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


def _mean(
    both: Both,
    counts: Bool[Array, "2 tokens kv_heads 1"],
    axis: str | None,
    zeros: int = 1,
) -> Centre:
    """With so many vectors of zeros, where few tokens say little."""
    total = jnp.sum(jnp.where(counts, both, 0), axis=1)
    total, number = sums_over(axis, (total, jnp.sum(counts, axis=1, dtype=jnp.float32)))
    return total / jnp.maximum(zeros + number, 1)


def _median(
    lengths: Float[Array, "2 tokens kv_heads 1"],
    counts: Bool[Array, "2 tokens kv_heads 1"],
    axis: str | None,
) -> Float[Array, "2 1 kv_heads 1"]:
    """The lower median of those that count, a side and head; infinite where none does."""
    lengths = jnp.where(counts, lengths, jnp.inf)
    if axis is not None:
        lengths = lax.all_gather(lengths, axis, axis=1, tiled=True)
    ordered, counts = jnp.sort(lengths, axis=1), jnp.isfinite(lengths)
    middle = (jnp.maximum(jnp.sum(counts, axis=1, keepdims=True), 1) - 1) // 2
    return jnp.take_along_axis(ordered, middle, axis=1)
