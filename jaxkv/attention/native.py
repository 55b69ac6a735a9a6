"""Decode on a CPU at the rate of memory, by `jaxkv.native`.

XLA's CPU backend has no loop over slots that keeps up with memory (ARCHITECTURE.md, "Reading on
a CPU"). The kernel is given the whole cache, the layer's number, and where each logical slot is
and what it holds, so it serves every addressing.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxkv.addressing import Index, PagedIndex
from jaxkv.addressing.contiguous import ContiguousIndex
from jaxkv.addressing.kept import KeptIndex
from jaxkv.addressing.ring import RingIndex
from jaxkv.attention.blockwise import blockwise
from jaxkv.attention.request import Grouped, Request
from jaxkv.codecs import Dense, Int8
from jaxkv.kv_cache import KVCache
from jaxkv.native import unavailable

_LANES = 16
_NO_SINK = -1e30


def cannot_serve(cache: KVCache, tokens: int) -> str | None:
    """Why this call is not for the native kernel, or None."""
    config = cache.config
    if jax.default_backend() != "cpu":
        return f"it reads on a CPU, and the backend is {jax.default_backend()}"
    if tokens != 1:
        return f"it serves one token a sequence, and this call has {tokens}"
    if not isinstance(config.codec, Dense | Int8):
        return f"it cannot read {config.codec.name}"
    if not isinstance(cache.index, ContiguousIndex | PagedIndex | RingIndex | KeptIndex):
        return f"it cannot read {config.addressing.name} caches"
    if config.head_dim % _LANES:
        return f"head_dim {config.head_dim} is not a multiple of {_LANES}"
    return unavailable()


def should_not_serve(cache: KVCache, tokens: int, heads: int) -> str | None:
    """Why another implementation is the better choice, or None."""
    if (devices := jax.local_device_count("cpu")) > 1:
        return f"this process has {devices} CPU devices, and a sharded cache would be gathered"
    return None


@jax.custom_jvp
def native(request: Request) -> Grouped:
    """Attend with one query a sequence."""
    codes, *scales = request.cache.storage.values()
    index = request.cache.index
    queries = request.queries[:, :, 0]  # [batch, kv_heads, group, head_dim]
    sinks = request.sinks
    if sinks is None:
        sinks = jnp.full(queries.shape[1:3], _NO_SINK, jnp.float32)
    table, page_size = _pages(index)
    output = jax.ffi.ffi_call(
        "jaxkv_decode",
        jax.ShapeDtypeStruct(queries.shape, jnp.float32),
        vmap_method="sequential",
    )(
        codes,
        scales[0] if scales else jnp.zeros(0, jnp.uint16),
        jnp.asarray(request.layer, jnp.int32),
        queries,
        request.positions[:, 0],
        request.lengths,
        sinks,
        table,
        _key_positions(request),
        extent=np.int64(index.extent),
        page_size=np.int64(page_size),
        window=np.int64(request.window or 0),
        kept_window=np.int64(index.window or 0),
        kept_sinks=np.int64(index.sinks),
        softcap=np.float32(request.softcap or 0),
    )
    return output[:, :, None]


def _pages(index: Index) -> tuple[Int[Array, "*batch pages"], int]:
    """The page table and the size of a page; an empty one where a sequence's slots are a run."""
    place = index.within if isinstance(index, KeptIndex) else index
    if isinstance(place, PagedIndex):
        return place.table, place.page_size
    return jnp.zeros(0, jnp.int32), index.extent


def _key_positions(request: Request) -> Int[Array, " positions"]:
    """What each logical slot holds; empty where slot p holds position p, if that is written."""
    index = request.cache.index
    if isinstance(index, ContiguousIndex | PagedIndex):
        return jnp.zeros(0, jnp.int32)
    return request.key_positions(0, index.extent).reshape(-1)


@native.defjvp
def _native_jvp(primals, tangents):
    """The kernel has no derivative of its own; the blockwise form's is the same function's."""
    return jax.jvp(blockwise, primals, tangents)
