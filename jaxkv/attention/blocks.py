"""Which blocks of a cache in host memory a call of `attend` fetches, and in which order."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jaxkv.addressing import RingSlots
from jaxkv.attention.call import AttentionCall
from jaxkv.placement import HostMemory

# For caches that were put into host memory as they are, by `jaxkv.offload`.
_OFFLOADED = HostMemory()


@dataclasses.dataclass(frozen=True)
class Iterations:
    """The iterations of the loop that fetches blocks.

    Attributes:
      first, stop: iterations from the one up to, and without, the other.
      blocks: the block that an iteration fetches, one for all sequences or one for each. Block b is
        logical slots ``b * size`` and up. No sequence gets one twice.
    """

    first: Int[Array, ""]
    stop: Int[Array, ""]
    blocks: Callable[[Int[Array, ""]], Int[Array, "#batch"]]


def block_size(request: AttentionCall) -> int:
    """Slots that are fetched together."""
    placement = request.cache.config.placement or _OFFLOADED
    return min(placement.block, request.cache.index.extent)


def first_on_device(request: AttentionCall) -> Int[Array, " batch"]:
    """The position of each sequence from which on tokens are on the device."""
    resident = request.cache.resident
    if resident is None:
        return request.lengths
    lengths = request.lengths.reshape(request.cache.lengths.shape)
    return resident.first_position(lengths).reshape(-1)


def chosen_blocks(
    request: AttentionCall, end: Int[Array, " batch"]
) -> Int[Array, "batch blocks"] | None:
    """The older blocks to fetch, those that may matter most first; None for all in order.

    The largest product that a query could have with a key within a block's bounds, over all
    queries and heads. Blocks that do not exist, or lie before a window, come last.
    """
    placement, resident = request.cache.config.placement, request.cache.resident
    if placement is None or resident is None or resident.bounds is None:
        return None
    bounds, layer = resident.bounds, request.layer
    up, down = jnp.maximum(request.queries, 0), jnp.minimum(request.queries, 0)
    products = jnp.einsum("bktgd,bnkd->bntkg", up, bounds.highest[layer])
    products += jnp.einsum("bktgd,bnkd->bntkg", down, bounds.lowest[layer])
    real = (request.positions >= 0)[:, None, :, None, None]
    largest = jnp.where(real, products, -jnp.inf).max(axis=(2, 3, 4), initial=-jnp.inf)
    starts = jnp.arange(largest.shape[1], dtype=jnp.int32) * placement.block
    seen = (starts < end[:, None]) & (starts + placement.block > _oldest_seen(request)[:, None])
    ranked = jnp.where(seen, largest, -jnp.inf)
    return lax.top_k(ranked, min(placement.blocks_per_query or 1, ranked.shape[1]))[1]


def iterations_of(request: AttentionCall, end: Int[Array, " batch"]) -> Iterations:
    """Through all blocks with tokens before ``end`` that a query can see, or the chosen ones."""
    index, size = request.cache.index, block_size(request)
    count, zero = -(-index.extent // size), jnp.int32(0)
    chosen = chosen_blocks(request, end)
    if chosen is not None:
        stop = jnp.minimum(-(-end.max() // size), chosen.shape[1])
        return Iterations(zero, stop, lambda iteration: chosen[:, iteration])
    if not index.by_position and index.ring is None:  # its tokens stand in no order
        return Iterations(zero, jnp.int32(count), lambda iteration: iteration[None])
    oldest = _oldest_seen(request)
    if index.ring is not None and request.cache.resident is not None:
        return _round_the_ring(index.ring, size, jnp.clip(oldest, index.sinks, end), end)
    stop = jnp.minimum(-(-end.max() // size), count)
    first = jnp.minimum(oldest.min() // size, stop) if index.by_position else zero
    return Iterations(first, stop, lambda iteration: iteration[None])


def _oldest_seen(request: AttentionCall) -> Int[Array, " batch"]:
    """The first position of each sequence that a window leaves in sight."""
    index = request.cache.index
    window = min((w for w in (index.window, request.window) if w is not None), default=None)
    if window is None:
        return jnp.zeros_like(request.lengths)
    positions = jnp.where(request.positions >= 0, request.positions, index.capacity)
    return jnp.maximum(positions.min(axis=-1, initial=index.capacity) - window + 1, 0)


def _round_the_ring(
    index: RingSlots, size: int, oldest: Int[Array, " batch"], end: Int[Array, " batch"]
) -> Iterations:
    """From the slot of each sequence's oldest token on, to that of the one before ``end``."""
    lowest = index.sinks // size
    in_ring = -(-index.extent // size) - lowest
    from_slot, to_slot = index.logical_slots(oldest), index.logical_slots(end - 1)
    first, last = from_slot // size, to_slot // size
    all_the_way_round = (first == last) & (to_slot < from_slot)
    count = jnp.where(all_the_way_round, in_ring, (last - first) % in_ring + 1)
    stop = jnp.where(oldest < end, count, 0).max()
    return Iterations(jnp.int32(0), stop, lambda i: lowest + (first - lowest + i) % in_ring)
