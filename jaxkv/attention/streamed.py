"""Attention over a cache in host memory: the newest tokens where they are, the rest by blocks.

The copy of each block to the device is carried through the loop, so that it can run while the
block before it is worked on. The memory is that of two blocks of one layer.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jaxkv.addressing.contiguous import ContiguousIndex
from jaxkv.attention.blockwise import KEY_BLOCK, with_newest
from jaxkv.attention.online import Online
from jaxkv.attention.request import Grouped, Request
from jaxkv.codecs import Leaves
from jaxkv.kv_cache import KVCache, Layer
from jaxkv.placement import HostMemory, in_host_memory, to_device

# For caches that were put into host memory as they are, by `jaxkv.offload`.
_OFFLOADED = HostMemory()


def cannot_serve(cache: KVCache, tokens: int) -> str | None:
    """Why this call is not for streaming, or None."""
    if not is_streamed(cache):
        return "the cache is on the device"
    if not isinstance(cache.index, ContiguousIndex):
        return f"it streams contiguous caches; prefetch this {cache.config.addressing.name} one"
    return None


def is_streamed(cache: KVCache) -> bool:
    """Whether a cache's buffers are in host memory."""
    return in_host_memory(next(iter(cache.storage.values())))


def streamed(request: Request) -> Grouped:
    """Attend to what is on the device, then to older blocks as they arrive."""
    end = first_on_device(request)
    state = _with_newest(request, Online.start(request), end)
    return with_newest(request, _with_older(request, state, end)).output()


def first_on_device(request: Request) -> Int[Array, " batch"]:
    """The position of each sequence from which on tokens are on the device."""
    resident = request.cache.resident
    if resident is None:
        return request.lengths
    lengths = request.lengths.reshape(request.cache.lengths.shape)
    return resident.first_position(lengths, _placement(request).block).reshape(-1)


def chosen_blocks(request: Request, end: Int[Array, " batch"]) -> Int[Array, "batch blocks"] | None:
    """The older blocks to fetch, those that may matter most first; None for all in order.

    The largest product that a query could have with a key within a block's bounds, over all
    queries and heads. Blocks that do not exist come last.
    """
    placement, resident = _placement(request), request.cache.resident
    if resident is None or resident.bounds is None or placement.blocks_per_query is None:
        return None
    bounds, layer = resident.bounds, request.layer
    up, down = jnp.maximum(request.queries, 0), jnp.minimum(request.queries, 0)
    products = jnp.einsum("bktgd,bnkd->bntkg", up, bounds.highest[layer])
    products += jnp.einsum("bktgd,bnkd->bntkg", down, bounds.lowest[layer])
    real = (request.positions >= 0)[:, None, :, None, None]
    largest = jnp.where(real, products, -jnp.inf).max(axis=(2, 3, 4))
    exists = jnp.arange(largest.shape[1]) * placement.block < end[:, None]
    ranked = jnp.where(exists, largest, -jnp.inf)
    return lax.top_k(ranked, min(placement.blocks_per_query, ranked.shape[1]))[1]


def _placement(request: Request) -> HostMemory:
    return request.cache.config.placement or _OFFLOADED


def _with_newest(request: Request, state: Online, end: Int[Array, " batch"]) -> Online:
    resident = request.cache.resident
    if resident is None:
        return state
    storage, index = resident.storage, resident.index(request.cache.lengths)
    newest = dataclasses.replace(request.cache, storage=storage, index=index)
    ring = dataclasses.replace(request, cache=newest)
    extent, capacity = index.extent, request.cache.index.capacity
    size = min(KEY_BLOCK, extent)

    def one_block(block: Int[Array, ""], state: Online) -> Online:
        start = jnp.minimum(block * size, extent - size)
        positions = ring.key_positions(start, size)[:, 0]
        here = (positions >= end[:, None]) & (positions < capacity)
        here &= start + jnp.arange(size) >= block * size
        leaves = {
            name: index.read(leaf, request.layer, start, size) for name, leaf in storage.items()
        }
        return _with_tokens(request, state, leaves, jnp.where(here, positions, -1))

    return lax.fori_loop(0, -(-extent // size), one_block, state)


@dataclasses.dataclass(frozen=True)
class _Fetched:
    """The index of leaves that were read already: what stands in them, -1 for nothing to see."""

    positions: Int[Array, "batch slots"]

    window: ClassVar[None] = None
    sinks: ClassVar[int] = 0

    @property
    def lengths(self) -> Int[Array, " batch"]:
        return self.positions[:, 0]  # for its shape

    def read(self, leaf: Array, layer: Layer, start: int, size: int) -> Array:
        return leaf

    def key_positions(
        self, layer: Layer, lengths: Array, start: int, size: int
    ) -> Int[Array, "batch slots"]:
        return self.positions


def _with_tokens(
    request: Request, state: Online, leaves: Leaves, positions: Int[Array, "batch slots"]
) -> Online:
    """After some tokens of each sequence, whose leaves are on the device."""
    index: Any = _Fetched(positions)
    cache = dataclasses.replace(request.cache, storage=leaves, index=index)
    there, size = dataclasses.replace(request, cache=cache), positions.shape[1]
    return state.with_slots(there, 0, size, there.visible(0, size))


def _with_older(request: Request, state: Online, end: Int[Array, " batch"]) -> Online:
    """The loop: work on one block, while the next is on its way."""
    cache, capacity = request.cache, request.cache.index.capacity
    size, numbers = min(_placement(request).block, capacity), chosen_blocks(request, end)
    first, stop = jnp.int32(0), -(-end.max() // size)
    if numbers is not None:
        stop = jnp.minimum(stop, numbers.shape[1])
    elif request.window is not None:
        oldest = jnp.where(request.positions >= 0, request.positions, capacity).min()
        first = jnp.minimum(jnp.maximum(oldest - request.window + 1, 0) // size, stop)

    def numbers_of(turn: Int[Array, ""]) -> Int[Array, "#batch"]:
        return turn[None] if numbers is None else numbers[:, turn]

    def fetch(turn: Int[Array, ""]) -> Leaves:
        starts = jnp.minimum(numbers_of(turn) * size, capacity - size)
        return {
            name: _fetched(cache, leaf, request.layer, starts, size)
            for name, leaf in cache.storage.items()
        }

    def work(turn: Int[Array, ""], state: Online, block: Leaves) -> Online:
        number = numbers_of(turn)[:, None]
        positions = jnp.minimum(number * size, capacity - size) + jnp.arange(size, dtype=jnp.int32)
        held = (positions < end[:, None]) & (positions >= number * size)
        return _with_tokens(request, state, block, jnp.where(held, positions, -1))

    def one_turn(turn: Int[Array, ""], carry: tuple[Online, Leaves]) -> tuple[Online, Leaves]:
        state, block = carry
        following = fetch(turn + 1)
        return work(turn, state, block), following

    def all_turns(state: Online) -> Online:
        state, block = lax.fori_loop(first, stop - 1, one_turn, (state, fetch(first)))
        return work(stop - 1, state, block)

    return lax.cond(stop > first, all_turns, lambda state: state, state)


def _fetched(
    cache: KVCache, leaf: Array, layer: Layer, starts: Int[Array, "#batch"], size: int
) -> Array:
    """``size`` slots of each sequence from its own start on, or all from one, on the device."""
    if starts.size == 1:
        return to_device(cache.index.read(leaf, layer, starts[0], size))
    capacity, rest = cache.index.capacity, leaf.shape[3:]
    sizes, origin = (1, leaf.shape[1], size, *rest), [0 for _ in rest]
    pieces = [
        to_device(lax.dynamic_slice(leaf, (layer, 0, row * capacity + start, *origin), sizes))[0]
        for row, start in enumerate(starts)
    ]
    return jnp.stack(pieces, axis=1)
