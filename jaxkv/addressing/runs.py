"""Slots of the ctx axis: those of addressings that give each sequence one run, and any."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jaxkv.addressing.addressing import Layer


def read_runs(
    leaf: Array,
    layer: Layer,
    start: Int[Array, ""] | int,
    size: int,
    *,
    batch: tuple[int, ...],
    extent: int,
) -> Array:
    """``size`` slots from ``start`` on of every sequence's run of ``extent`` slots."""
    layers, sides, _, *vector = leaf.shape
    per_sequence = leaf.reshape(layers, sides, *batch, extent, *vector)
    begin = place(layer, 0, *(0 for _ in batch), start, *(0 for _ in vector))
    return lax.dynamic_slice(per_sequence, begin, [1, sides, *batch, size, *vector])[0]


def place(*starts: Int[Array, ""] | int) -> list[Array]:
    """Where a slice begins, in one type of integer, which `jax_enable_x64` would make two."""
    return [jnp.asarray(start, jnp.int32) for start in starts]


def first_slots(batch: tuple[int, ...], extent: int) -> Int[Array, "*batch 1"]:
    """Where each sequence's run starts, shaped to be added to slots within it."""
    return extent * jnp.arange(math.prod(batch), dtype=jnp.int32).reshape(*batch, 1)


def slots_of_runs(rows: Int[Array, " rows"], extent: int) -> Int[Array, " ctx"]:
    """The ctx slots of these sequences' runs, one after the other."""
    return (extent * rows[:, None] + jnp.arange(extent, dtype=jnp.int32)).reshape(-1)
