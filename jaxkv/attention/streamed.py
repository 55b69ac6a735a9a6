"""Attention over a cache in host memory: the newest tokens where they are, the rest by blocks.

The copy of each block to the device is carried through the loop, so that it can run while the
block before it is worked on. The memory is that of two blocks of one layer.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jaxkv.addressing.addressing import PlainIndex
from jaxkv.attention.blocks import block_size, first_on_device, iterations_of
from jaxkv.attention.blockwise import KEY_BLOCK, with_newest
from jaxkv.attention.call import AttentionCall, Grouped, LogTotal
from jaxkv.attention.online import Online
from jaxkv.cache.host import on_the_device
from jaxkv.cache.kv_cache import KVCache, Layer, buffer_of
from jaxkv.codecs import Leaves
from jaxkv.placement import in_host_memory, read_slots


def cannot_serve(cache: KVCache, tokens: int) -> str | None:
    """Why this call is not for streaming, or None."""
    if not is_streamed(cache):
        return "the cache is on the device"
    if cache.index.run is None:
        return f"it cannot fetch from {cache.config.addressing.name} caches; prefetch this one"
    return None


def is_streamed(cache: KVCache) -> bool:
    """Whether a cache's buffers are in host memory."""
    return in_host_memory(buffer_of(cache))


def streamed(request: AttentionCall) -> Grouped:
    """Attend to what is on the device, then to older blocks as they arrive."""
    return streamed_part(request)[0]


def streamed_part(request: AttentionCall) -> tuple[Grouped, LogTotal]:
    """The same with the log of its total, by which parts of a context are merged."""
    end = first_on_device(request)
    state = _with_newest(request, Online.start(request), end)
    state = with_newest(request, _with_older(request, state, end))
    return state.output(), state.log_total()


def _with_newest(request: AttentionCall, state: Online, end: Int[Array, " batch"]) -> Online:
    if request.cache.resident is None:
        return state
    newest = on_the_device(request.cache)
    storage, index = newest.storage, newest.index
    ring = dataclasses.replace(request, cache=newest)
    extent = index.extent
    size = min(KEY_BLOCK, extent)

    def one_block(block: Int[Array, ""], state: Online) -> Online:
        start = jnp.minimum(block * size, extent - size)
        positions = ring.key_positions(start, size)
        here = (positions >= end[:, None, None]) | (positions < index.sinks)
        here &= start + jnp.arange(size, dtype=jnp.int32) >= block * size
        leaves = {
            name: index.read(leaf, request.layer, start, size) for name, leaf in storage.items()
        }
        return _with_tokens(request, state, leaves, jnp.where(here, positions, -1))

    return lax.fori_loop(0, -(-extent // size), one_block, state)


@dataclasses.dataclass(frozen=True)
class _Fetched(PlainIndex):
    """The index of leaves that were read already: what stands in them, -1 for nothing to see."""

    positions: Int[Array, "batch #kv_heads slots"]
    lengths: Int[Array, "*batch"]  # for their shape
    window: int | None
    sinks: int
    aligned: bool

    def read(self, leaf: Array, layer: Layer, start: int, size: int) -> Array:
        return leaf

    def key_positions(
        self, layer: Layer, lengths: Array, start: int, size: int
    ) -> Int[Array, "batch #kv_heads slots"]:
        return self.positions


def _with_tokens(
    request: AttentionCall,
    state: Online,
    leaves: Leaves,
    positions: Int[Array, "batch #kv_heads slots"],
) -> Online:
    """After some tokens of each sequence, whose leaves are on the device."""
    whole, size = request.cache.index, positions.shape[-1]
    index: Any = _Fetched(positions, whole.lengths, whole.window, whole.sinks, whole.aligned)
    there = dataclasses.replace(
        request, cache=dataclasses.replace(request.cache, storage=leaves, index=index)
    )
    return state.with_slots(there, 0, size, there.visible(0, size))


def _with_older(request: AttentionCall, state: Online, end: Int[Array, " batch"]) -> Online:
    """The loop: work on one block, while the next is on its way."""
    cache, size, iterations = request.cache, block_size(request), iterations_of(request, end)
    extent = cache.index.extent
    on_device = 0 if cache.resident is None else cache.resident.sinks

    def start_of(blocks: Int[Array, "#batch"]) -> Int[Array, ""] | Int[Array, "batch 1"]:
        # The last block is moved back to end with the sequence; slots seen before are masked.
        starts = jnp.minimum(blocks * size, extent - size)
        return starts[0] if starts.size == 1 else starts[:, None]

    def fetch(iteration: Int[Array, ""]) -> Leaves:
        start = start_of(iterations.blocks(iteration))
        return {
            name: read_slots(cache.index, leaf, request.layer, start, size, whole_pages=True)
            for name, leaf in cache.storage.items()
        }

    def work(iteration: Int[Array, ""], state: Online, block: Leaves) -> Online:
        blocks = iterations.blocks(iteration)
        start = start_of(blocks)
        positions = request.key_positions(start, size)
        slots = start + jnp.arange(size, dtype=jnp.int32)
        held = (slots >= blocks[:, None] * size)[:, None]
        held &= (positions < end[:, None, None]) & (positions >= on_device)
        return _with_tokens(request, state, block, jnp.where(held, positions, -1))

    def one_iteration(
        iteration: Int[Array, ""], carry: tuple[Online, Leaves]
    ) -> tuple[Online, Leaves]:
        state, block = carry
        following = fetch(iteration + 1)
        return work(iteration, state, block), following

    def all_iterations(state: Online) -> Online:
        state, block = lax.fori_loop(
            iterations.first, iterations.stop - 1, one_iteration, (state, fetch(iterations.first))
        )
        return work(iterations.stop - 1, state, block)

    return lax.cond(iterations.stop > iterations.first, all_iterations, lambda state: state, state)
