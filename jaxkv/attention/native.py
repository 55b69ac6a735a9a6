"""Decode on a CPU at the rate of memory, by `jaxkv.native`.

XLA's CPU backend has no loop over slots that keeps up with memory (ARCHITECTURE.md, "Reading on
a CPU"). The kernel is given the whole cache, the layer's number, and where each logical slot is
and what it holds, so it serves every addressing.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxkv.addressing import Index
from jaxkv.attention.blockwise import blockwise_part
from jaxkv.attention.call import LOWEST, AttentionCall, Grouped, LogTotal
from jaxkv.cache.kv_cache import KVCache, buffer_of
from jaxkv.cache.vectors import state_of
from jaxkv.codecs import Codec
from jaxkv.codecs.codec import Steps
from jaxkv.devices import num_devices_of
from jaxkv.native import unavailable

_LANES = 16
_COUNTS = (2, 4, 8, 16)  # of the levels of packed codes
_INT8 = tuple(range(-128, 128))
_MOST_TOKENS = 8  # of a sequence: a verified draft; each reads the slots that it sees
_WHOLE_RUNS = 64  # of which each eighth is in whole bytes
_MOST_LEVELS = 64  # of codes in steps
_MOST_NUMBERS = 1024  # of a vector of codes, which is widened on the stack


def cannot_serve(cache: KVCache, tokens: int) -> str | None:
    """Why this call is not for the native kernel, or None."""
    config = cache.config
    if tokens > _MOST_TOKENS:
        return f"it serves up to {_MOST_TOKENS} tokens per sequence, and this call has {tokens}"
    if tokens > 1 and cache.newest is not None:
        return f"beside newest tokens it serves one token per sequence, and this call has {tokens}"
    keys, values = config.codec.sides
    floats = keys == values and (keys.dtype or keys.scaled_dtype)
    steps = config.codec.steps(config.head_dim)
    if not floats and not ((steps or _bits(keys)) and _bits(values)):
        return f"it cannot read {config.codec.name}"
    if steps and config.head_dim % _WHOLE_RUNS:
        return f"of {config.codec.name} it reads head_dims in multiples of {_WHOLE_RUNS}"
    if cache.index.run is None or cache.index.aligned:
        return f"it cannot read {config.addressing.name} caches"
    if config.pair.width != config.head_dim:
        return f"it takes keys and values of one size, and {config.pair.unlike}"
    if config.head_dim % _LANES:
        return f"head_dim {config.head_dim} is not a multiple of {_LANES}"
    if config.head_dim > _MOST_NUMBERS:
        return f"head_dim {config.head_dim} is more than {_MOST_NUMBERS}"
    if cache.newest is not None and (reason := cannot_serve(cache.newest, tokens)):
        return f"of the newest tokens, {reason}"
    return unavailable()


def should_not_serve(cache: KVCache, tokens: int, heads: int, platform: str) -> str | None:
    """Why another implementation is the better choice, or None."""
    if (devices := num_devices_of(buffer_of(cache))) > 1:
        return f"the cache is on {devices} devices, and a sharded one would be gathered"
    return None


def native(request: AttentionCall) -> Grouped:
    """Attend with a few queries per sequence, each with the bits that it has alone."""
    return native_part(request)[0]


@jax.custom_jvp
def native_part(request: AttentionCall) -> tuple[Grouped, LogTotal]:
    """The same with the log of its total, by which parts of a context are merged."""
    output, log_total = _read(request)
    if request.newest is not None:
        newest, newest_log_total = _read(request.newest)
        newest = request.newest.cache.config.codec.unrotate(newest)
        newest = request.cache.config.codec.rotate_values(newest)
        share = jax.nn.sigmoid(newest_log_total - log_total)[..., None]
        output = output * (1 - share) + newest * share
        log_total = jnp.logaddexp(log_total, newest_log_total)
    return jnp.moveaxis(output, 1, 2), jnp.moveaxis(log_total, 1, 2)


def _read(
    request: AttentionCall,
) -> tuple[
    Float[Array, "batch tokens kv_heads group head_dim"],
    Float[Array, "batch tokens kv_heads group"],
]:
    """The output, rotated as values are, and the log of all scores' exponentials, sinks' too."""
    index, codec = request.cache.index, request.cache.config.codec
    key_codec, value_codec = codec.sides
    keys, values = _leaves(request.cache, 0), _leaves(request.cache, 1)
    queries, offsets, offset_queries = request.queries, request.offsets, request.offset_queries
    steps = codec.steps(queries.shape[-1])
    if steps is not None:
        state = state_of(request.cache, request.layer)
        offsets = codec.centres(state)
        offset_queries = None if offsets is None else offsets.queries(queries)
        queries = codec.stepped(queries, state)
    queries = jnp.moveaxis(queries, 2, 1)  # [batch, tokens, kv_heads, group, head_dim]
    sink_logits = request.sink_logits
    if sink_logits is None:
        sink_logits = jnp.full(queries.shape[2:4], LOWEST, jnp.float32)
    table, page_size = _pages(index)
    offset_queries, rope_tables = _offsets(request, offset_queries)
    hidden_from = _hidden_from(request)
    output, log_total, second_share = jax.ffi.ffi_call(
        "jaxkv_decode",
        jax.eval_shape(_like_results, queries, keys[0]),
        vmap_method="sequential",
    )(
        keys[0],
        values[0],
        keys[1],
        values[1],
        jnp.stack([_levels(key_codec), _levels(value_codec)]),
        *_tables_of(steps),
        jnp.asarray(request.layer, jnp.int32),
        queries,
        request.positions,
        jnp.minimum(request.lengths, hidden_from),
        sink_logits,
        offset_queries,
        rope_tables,
        table,
        _key_positions(request, hidden_from),
        *_branches(request),
        key_bits=np.int64(_bits(value_codec if steps else key_codec)),
        value_bits=np.int64(_bits(value_codec)),
        extent=np.int64(index.extent),
        page_size=np.int64(page_size),
        window=np.int64(request.window or 0),
        kept_window=np.int64(index.window or 0),
        kept_sinks=np.int64(index.sinks),
        softcap=np.float32(request.softcap or 0),
    )
    if offsets is not None:
        # Of probability, what tokens took.
        share = 1 - jnp.exp(jnp.minimum(sink_logits - log_total, 0))
        first, *second = (codec.rotate_values(values) for _, values in offsets.centres)
        output += share[..., None] * first[:, None]
        for other in second:
            output += second_share[..., None] * (other - first)[:, None]
    return output, log_total


def _like_results(queries: Array, buffer: Array) -> tuple[Array, Array, Array]:
    """Arrays of the results' types: in a `jax.shard_map` they vary as what they are made of."""
    output = queries + buffer.reshape(-1)[0].astype(jnp.float32)
    return output, output[..., 0], output[..., 0]


def _hidden_from(request: AttentionCall) -> Int[Array, " batch"]:
    """Tokens from this position on are read from the cache of newest ones."""
    if request.newest is None:
        return request.lengths
    index = request.newest.cache.index.ring
    assert index is not None
    first = index.first_position(request.lengths.reshape(index.lengths.shape)).reshape(-1)
    return jnp.maximum(first, request.positions[:, 0] + 1 - index.window)


def _offsets(request: AttentionCall, offset_queries: Array | None) -> tuple[Array, Array]:
    """Their share in the scores: queries, and tables of cosines and sines; empty if none."""
    if offset_queries is None:
        return jnp.zeros((0,) * 6, jnp.float32), jnp.zeros((0,) * 4, jnp.float32)
    rope = request.cache.config.codec.rope
    queries = jnp.transpose(offset_queries, (4, 0, 2, 1, 3, 5))  # centres, and tokens before heads
    if rope and rope.rotary_dim == request.cache.config.head_dim:
        queries = queries[..., :-1]  # no number is left unturned
    queries = jnp.pad(queries, ((0, 0),) * 5 + ((0, -queries.shape[-1] % _LANES),))
    tables = rope.tables if rope else np.zeros((0, 0, 0, 0), np.float32)
    return queries, jnp.asarray(tables.swapaxes(2, 3))  # what neighbours have is side by side


def _bits(codec: Codec) -> int:
    """Of a code that stands for a whole number; 0 for a codec that has none, or other ones."""
    count = len(codec.levels or ())
    return count.bit_length() - 1 if count in _COUNTS or codec.levels == _INT8 else 0


def _levels(codec: Codec) -> Int[Array, " codes"]:
    """What packed codes stand for, in a table; those of 8 bits are the numbers."""
    levels = codec.levels if codec.levels and codec.levels != _INT8 else ()
    return jnp.asarray([*levels, *(0,) * (_COUNTS[-1] - len(levels))], jnp.int8)


def _tables_of(steps: Steps | None) -> tuple[Array, Array, Array]:
    """Widths of codes and their counts, what codes stand for, and what bytes for scales do."""
    if steps is None:
        return jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.int8), jnp.zeros(0, jnp.float32)
    levels = np.zeros((len(steps.runs), _MOST_LEVELS), np.int8)
    for row, own in zip(levels, steps.levels, strict=True):
        row[: len(own)] = own
    return jnp.asarray(steps.runs, jnp.int32), jnp.asarray(levels), jnp.asarray(steps.scales)


def _leaves(cache: KVCache, side: int) -> tuple[Array, Array]:
    """The buffers of one side's vectors and scales; no scales where vectors are what they are."""
    vectors, *scales = (cache.storage[name] for name in cache.config.pair.names(side))
    return vectors, scales[0] if scales else jnp.zeros(0, jnp.uint16)


def _pages(index: Index) -> tuple[Int[Array, "*batch pages"], int]:
    """The page table and the size of a page; an empty one where a sequence's slots are a run."""
    table = jnp.zeros(0, jnp.int32) if index.pages is None else index.pages.table
    return table, index.run or 0


def _key_positions(
    request: AttentionCall, hidden_from: Int[Array, " batch"]
) -> Int[Array, " positions"]:
    """What each logical slot holds; empty where slot p holds position p, if that is written."""
    index = request.cache.index
    if index.by_position:
        return jnp.zeros(0, jnp.int32)
    positions = request.key_positions(0, index.extent)
    return jnp.where(positions < hidden_from[:, None, None], positions, -1).reshape(-1)


def _branches(request: AttentionCall) -> tuple[Int[Array, " starts"], Int[Array, " queries"]]:
    """Where a tree of tokens begins, and what each query sees of it, in bits; empty for no tree."""
    if request.tree is None:
        return jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.int32)
    bits = 1 << jnp.arange(request.tree.sees.shape[-1], dtype=jnp.int32)
    sees = jnp.where(request.tree.sees, bits, 0).sum(-1, dtype=jnp.int32)
    return request.tree.start, sees.reshape(-1)


@native_part.defjvp
def _native_jvp(primals, tangents):
    """The kernel has no derivative of its own; the blockwise form's is the same function's."""
    return jax.jvp(blockwise_part, primals, tangents)
