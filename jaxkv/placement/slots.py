"""Slots of a buffer in host memory, which JAX can slice, but neither gather from nor scatter to."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jaxkv.addressing import Index, Layer, PageTable
from jaxkv.addressing.runs import first_slots, place
from jaxkv.devices import is_concrete
from jaxkv.placement.host_memory import in_host_memory, to_device, to_host

# Copied in one iteration of a loop. On an H100 pages of 64 arrive at 22 GB/s so, one by one at 15.
_PIECES_AT_ONCE = 8


def needed_run(index: Index) -> int:
    """`Index.run` of one whose buffers are in host memory.

    Raises:
      ValueError: it has no runs.
    """
    if (run := index.run) is None:
        raise ValueError(
            "The slots of this cache in host memory stand in no runs that could be read or written "
            "(those of a cache with a number of tokens for each head do not). Bring it back with "
            "jaxkv.prefetch first."
        )
    return run


def take_slots(leaf: Array, slots: Int[Array, " ctx"]) -> Array:
    """A buffer with these slots of another one, where that is. In host memory outside jit alone."""
    if not in_host_memory(leaf):
        return jnp.take(leaf, slots, axis=2)
    if not is_concrete(leaf, slots):
        raise ValueError(
            "Sequences of a cache in host memory cannot be rearranged inside jit. Do it outside "
            "jit, or bring the cache back with jaxkv.prefetch first."
        )
    return jax.device_put(np.take(np.asarray(leaf), np.asarray(slots), axis=2), leaf.sharding)


def copy_runs(
    leaf: Array, sources: Int[Array, " runs"], targets: Int[Array, " runs"], size: int
) -> Array:
    """Copy runs of ``size`` slots within a leaf in host memory, in all layers.

    Args:
      sources, targets: numbers of runs; a target that there is not is skipped.
    """
    runs = leaf.shape[2] // size
    exists = (targets >= 0) & (targets < runs)
    order = jnp.argsort(~exists)  # those that exist first

    def read(run: Array) -> Array:
        return to_device(lax.dynamic_slice_in_dim(leaf, run * size, size, axis=2))

    found = lax.map(read, jnp.clip(sources, 0, runs - 1))  # all, before any is written

    def write(iteration: Array, leaf: Array) -> Array:
        number = order[iteration]
        place = targets[number] * size
        return lax.dynamic_update_slice_in_dim(leaf, to_host(found[number]), place, axis=2)

    return lax.fori_loop(0, exists.sum(), write, leaf)


def read_slots(
    index: Index,
    leaf: Array,
    layer: Layer,
    start: Int[Array, "..."] | int,
    size: int,
    *,
    whole_pages: bool = False,
) -> Array:
    """What `Index.read` returns, on the device, wherever the buffer is.

    Args:
      start: one for all sequences or, in host memory, also one for each, ``[batch, 1]``.
      whole_pages: ``start`` is where a page begins, or a whole number of ``size`` within one.
    """
    if not in_host_memory(leaf):
        return index.read(leaf, layer, start, size)
    run = needed_run(index)
    if index.pages is not None:
        fits = size % run == 0 or run % size == 0
        read = _pages if whole_pages and fits else _parts_of_pages
        return read(index.pages, leaf, layer, start, size)
    if jnp.ndim(start) == 0:
        return to_device(index.read(leaf, layer, start, size))
    return _joined(leaf, layer, first_slots(index.lengths.shape, run) + start, size)


def _pages(
    index: PageTable, leaf: Array, layer: Layer, start: Int[Array, "..."] | int, size: int
) -> Array:
    piece = min(size, index.page_size)
    logical = start + piece * jnp.arange(size // piece, dtype=jnp.int32)
    return _joined(leaf, layer, index.places(logical), piece)


def _parts_of_pages(
    index: PageTable, leaf: Array, layer: Layer, start: Int[Array, "..."] | int, size: int
) -> Array:
    """From anywhere on: all pages that are touched, and of these what was asked for."""
    page_size = index.page_size
    first, inside = jnp.divmod(jnp.asarray(start, jnp.int32), page_size)
    touched = (size + page_size - 2) // page_size + 1
    pages = _pages(index, leaf, layer, first * page_size, touched * page_size)
    slots = jnp.broadcast_to(
        inside + jnp.arange(size, dtype=jnp.int32), (*index.lengths.shape, size)
    )
    slots = slots.reshape(*slots.shape, *(1 for _ in leaf.shape[3:]))
    return jnp.take_along_axis(pages, slots[None], axis=1 + index.lengths.ndim)


def _joined(leaf: Array, layer: Layer, starts: Int[Array, "*batch pieces"], size: int) -> Array:
    """``[sides, *batch, pieces * size, ...]`` on the device, pieces of ``size`` ctx slots."""
    sides, rest = leaf.shape[1], leaf.shape[3:]
    origin = [0 for _ in rest]

    flat = starts.reshape(-1)
    at_once = math.gcd(flat.size, _PIECES_AT_ONCE)

    def some(iteration: Int[Array, ""], whole: Array) -> Array:
        places = (place(layer, 0, flat[iteration * at_once + i], *origin) for i in range(at_once))
        pieces = [lax.dynamic_slice(leaf, each, (1, sides, size, *rest)) for each in places]
        joined = jnp.concatenate([to_device(piece)[0] for piece in pieces], axis=1)
        return lax.dynamic_update_slice(
            whole, joined, place(0, iteration * at_once * size, *origin)
        )

    whole = jnp.zeros((sides, flat.size * size, *rest), leaf.dtype)
    whole = lax.fori_loop(0, flat.size // at_once, some, whole)
    return whole.reshape(sides, *starts.shape[:-1], starts.shape[-1] * size, *rest)


def write_slots(
    leaf: Array, layer: Layer, new: Array, slots: Int[Array, "batch tokens"], run: int
) -> Array:
    """Each sequence's new tokens, in one layer of a leaf in host memory.

    As far as tokens stand next to each other in a run: a piece is read, what is new in it is put
    in, and it is written back. For a scatter into host memory crashes XLA (openxla/xla
    34565), and a slice update clamps.

    Args:
      new: ``[sides, batch, tokens, ...]``.
      slots: the ctx slot of each token, -1 for none.
    """
    batch, tokens = slots.shape
    size = min(tokens, run)
    sizes = (1, leaf.shape[1], size, *leaf.shape[3:])

    def one_piece(row: Array | int, token: Array | int, leaf: Array) -> tuple[Array, Array]:
        """From a token on; with the number of the first one that is not in the slot after."""
        slot = jnp.maximum(slots[row, token], 0)
        end = (slot // run + 1) * run
        start = jnp.minimum(slot, end - size)
        places = start + jnp.arange(size, dtype=jnp.int32)
        numbers = jnp.clip(token + places - slot, 0, tokens - 1)
        is_new = slots[row, numbers] == places
        in_order = jnp.cumprod(is_new | (places < slot), dtype=jnp.int32).sum(dtype=jnp.int32)
        begin = place(layer, 0, start, *(0 for _ in leaf.shape[3:]))
        old = to_device(lax.dynamic_slice(leaf, begin, sizes))
        is_new = is_new.reshape(-1, *(1 for _ in leaf.shape[3:]))
        piece = jnp.where(is_new, new[:, row, numbers][None], old)
        following = jnp.maximum(token + 1, token + start + in_order - slot)
        return following, lax.dynamic_update_slice(leaf, to_host(piece), begin)

    def one_sequence(row: Array | int, leaf: Array) -> Array:
        if tokens == 1:
            return one_piece(row, 0, leaf)[1]
        numbers = jnp.arange(tokens, dtype=jnp.int32)
        stop = jnp.where(slots[row] >= 0, numbers + 1, 0).max()
        return lax.while_loop(
            lambda state: state[0] < stop,
            lambda state: one_piece(row, *state),
            (jnp.int32(0), leaf),
        )[1]

    return one_sequence(0, leaf) if batch == 1 else lax.fori_loop(0, batch, one_sequence, leaf)
