"""The one way to write to slots of a buffer on the device."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxkv.addressing import Layer


def scatter(
    buffer: Array, slots: Int[Array, "*slots"], vectors: Array, layer: Layer | None = None
) -> Array:
    """The buffer with other vectors in some slots, in place under donation.

    Args:
      buffer: ``[layers, sides, ctx, ...]``.
      slots: each named once; what has a slot below 0, or past the end, is dropped.
      vectors: ``[layers, sides, *slots, ...]`` for all layers, ``[*slots, sides, ...]`` for one.
      layer: the one to write to; all if None.
    """
    slots = _dropped_past_the_end(buffer, slots)
    place = buffer.at[:, :, slots] if layer is None else buffer.at[layer, :, slots]
    return place.set(vectors, mode="drop", unique_indices=True)


def scatter_tokens(
    buffer: Array, slots: Int[Array, "*batch tokens"], encoded: Array, layer: Layer
) -> Array:
    """`scatter` of a codec's leaf of new tokens, ``[sides, *batch, tokens, ...]``, to one layer."""
    if slots.size > 1:
        return scatter(buffer, slots, jnp.moveaxis(encoded, 0, slots.ndim), layer)
    # Of a write of one vector XLA makes a read, a choice and a write, in two kernels of a GPU; of
    # two writes, a side each, it makes one kernel.
    sides = jnp.arange(buffer.shape[1], dtype=jnp.int32).reshape(-1, *(1 for _ in slots.shape))
    place = buffer.at[layer, sides, _dropped_past_the_end(buffer, slots)]
    return place.set(encoded, mode="drop", unique_indices=True)


def _dropped_past_the_end(buffer: Array, slots: Int[Array, "*slots"]) -> Int[Array, "*slots"]:
    """Slots that do not exist get numbers past the end, each its own.

    XLA drops them, and may still be told that no two writes meet.
    """
    past_the_end = buffer.shape[2] + jnp.arange(slots.size, dtype=jnp.int32).reshape(slots.shape)
    return jnp.where(slots < 0, past_the_end, slots)
