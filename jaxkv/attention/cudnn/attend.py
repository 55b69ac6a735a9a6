"""Attention by cuDNN: many tokens on an NVIDIA GPU, and decode where `mosaic` cannot.

Softmax over some keys and over others is softmax over both, given the logsumexp of each. So a call
is two parts. **Old pieces**: runs of up to 64 slots that were full before these tokens came, and
that all queries see. They are read where they are, through a table of pieces; codes are decoded
for one layer first. **The rest**: tokens after the last whole piece and the new ones, gathered in
the order of their positions, under a causal mask. cuDNN's query i sees keys up to number i, so the
first query is put where its own key is, behind rows that nobody asked for. Queries of
cross-attention see all of both parts, and so need no such place. Where few tokens can stand before
these, they are part of the rest, too.

Pieces are whole because cuDNN multiplies what stands behind the last token by zero, and zero times
NaN is NaN. With a window, the rest is all that some query sees.
"""

import dataclasses
import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkv.attention.blockwise import unrotated_blockwise
from jaxkv.attention.call import AttentionCall, Grouped
from jaxkv.attention.cudnn.slots import number_type, piece_size, pieces_of, tokens_at
from jaxkv.attention.online import Online
from jaxkv.cache.kv_cache import KVCache, buffer_of
from jaxkv.devices import local_gpu, num_devices_of

# A block of threads takes 128 queries of a head; two blocks for each multiprocessor keep an H200
# busy, and where queries are fewer, more blocks share the keys.
_QUERIES_PER_BLOCK, _BLOCKS = 128, 256
# Pieces are looked up for all keys that a block takes at once, beyond the table's end too: 128 in
# the kernels seen, and twice that leaves nothing to chance.
_MOST_KEYS_AT_ONCE = 256
_MOST_HEAD_DIM, _MOST_BEFORE_HOPPER = 256, 128
# A window's rows without a query cost less than `blockwise` up to about this many for each token.
_MOST_ROWS_PER_TOKEN = 14
# What a part more costs for each token, in pairs of a query and a key. With 32 heads of 128 an H200
# takes 8 ns (of 8,192 tokens) to 50 (of 1,024) for the one, and 30 ps for the other.
_PAIRS_PER_TOKEN = 500
_LOWEST = -1e30  # a finite "minus infinity": differences of it are never NaN


Queries = Float[Array, "batch tokens kv_heads group head_dim"]


class Rows(NamedTuple):
    """Queries, each in the row of its own key.

    Attributes:
      before: how many rows are before a sequence's first query.
      counts: and how many there are up to its last one.
    """

    queries: Queries
    before: Int[Array, " batch"]
    counts: Int[Array, " batch"]


class Part(NamedTuple):
    """Softmax over some of the keys, and the logsumexp of their logits.

    Of a query that sees none of them the first is anything, the second `_LOWEST`.
    """

    output: Queries
    logsumexp: Float[Array, "batch kv_heads group tokens"]


def cannot_serve(cache: KVCache, tokens: int) -> str | None:
    """Why this call is not for cuDNN, or None."""
    return _wrong_device(cache.config.head_dim) or cannot_read(cache, tokens)


def should_not_serve(cache: KVCache, tokens: int, heads: int, platform: str) -> str | None:
    """Why another implementation is the better choice, or None."""
    if (devices := num_devices_of(buffer_of(cache))) > 1:
        return f"the cache is on {devices} GPUs, and a sharded one would be gathered"
    window = _window(cache, None)
    if window is not None and tokens > 1 and window > _MOST_ROWS_PER_TOKEN * tokens:
        return f"{tokens} queries would stand behind a window of {window} rows without one"
    return None


def cannot_read(cache: KVCache, tokens: int) -> str | None:
    """Why cuDNN is not made for such a cache, whatever the device is, or None."""
    config = cache.config
    if "float32" in (side.dtype for side in config.codec.sides):
        return "it multiplies numbers of 16 bits, and this cache keeps float32"
    if cache.index.per_head or cache.index.aligned or cache.index.share is not None:
        return f"it cannot read {config.addressing.name} caches"
    if config.pair.unlike:
        return f"it takes keys beside values of one size, and {config.pair.unlike}"
    if config.head_dim % 8 or config.head_dim > _MOST_HEAD_DIM:
        return f"head_dim is {config.head_dim}, and it takes multiples of 8 up to {_MOST_HEAD_DIM}"
    return None


@functools.cache
def _wrong_device(head_dim: int) -> str | None:
    if (device := local_gpu()) is None:
        return "it needs an NVIDIA GPU, and this process has no GPU to ask"
    capability = str(getattr(device, "compute_capability", "none"))
    generation, dot, _ = capability.partition(".")
    if not dot or int(generation) < 8:
        return f"it needs an Ampere GPU (8.0) or later, and {device.device_kind} is {capability}"
    if int(generation) < 9 and head_dim > _MOST_BEFORE_HOPPER:
        return f"head_dim is {head_dim}, and before Hopper it takes up to {_MOST_BEFORE_HOPPER}"
    try:
        _cudnn_call()
    except ImportError as error:
        return f"this JAX has no cuDNN attention as it knows it: {error}"
    return None


def _cudnn_call() -> Any:
    return importlib.import_module("jaxkv.attention.cudnn.call")


def cudnn(request: AttentionCall) -> Grouped:
    """Attend with keys, values and queries of 16 bits; queries and outputs are not rotated."""
    return _attend(request)


@jax.custom_jvp
def _attend(request: AttentionCall) -> Grouped:
    # One call a cache under vmap: a batch of pieces would need tables of its own.
    return jax.custom_batching.sequential_vmap(_merged)(request)


@_attend.defjvp
def _attend_jvp(primals, tangents):
    """There is none of a logsumexp; the blockwise form's is the same function's."""
    return jax.jvp(unrotated_blockwise, primals, tangents)


@jax.jit  # lowered once for all layers of a model
def _merged(request: AttentionCall) -> Grouped:
    codec = request.cache.config.codec
    window = _window(request.cache, request.window)
    parts = _of_all(request) if window is None else _of_window(request, window)
    mix = codec.unrotate(_combined(request, parts))
    return jnp.moveaxis(mix, 2, 1).astype(jnp.float32)


def _of_all(request: AttentionCall) -> list[Part]:
    size, extent = piece_size(request.cache.index), request.cache.index.extent
    tokens = request.positions.shape[1]
    most_before = max(extent - tokens, 0)
    if most_before**2 / 2 < _PAIRS_PER_TOKEN * tokens and not request.side_by_side:
        first, most = jnp.zeros_like(_start(request)), most_before + tokens
        return [_rest(request, _placed(request, first, most), first, most)]
    runs = jnp.minimum(_start(request), _end(request)) // size
    most = size - 1 + _most_new(request)
    rows = _placed(request, runs * size, most)
    return [*_old_pieces(request, rows, runs), _rest(request, rows, runs * size, most)]


def _of_window(request: AttentionCall, window: int) -> list[Part]:
    first = jnp.maximum(_start(request) - (window - 1), _first_held(request))
    most = window - 1 + _most_new(request)
    rows = _placed(request, first, most)
    parts = [_rest(request, rows, first, most, window)]
    if request.cache.index.sinks:
        parts.append(_first_tokens(request, first, window))
    return parts


def _window(cache: KVCache, asked: int | None) -> int | None:
    """Newest tokens that a query sees; None if that is all there can be."""
    index = cache.index
    windows = [window for window in (asked, index.window) if window is not None]
    if not index.by_position:
        return min([*windows, index.capacity])
    return min(windows) if windows and min(windows) < index.capacity else None


def _start(request: AttentionCall) -> Int[Array, " batch"]:
    """The position of the first of these tokens; past the end where they are none of the cache."""
    return request.lengths if request.side_by_side else request.cache.lengths.reshape(-1)


def _added(request: AttentionCall) -> Int[Array, " batch"]:
    """How many queries there are to serve."""
    if request.side_by_side:
        return jnp.where(request.lengths > 0, request.positions.shape[1], 0)
    return request.lengths - _start(request)


def _most_new(request: AttentionCall) -> int:
    """Keys from the first query's own on, at most."""
    return 1 if request.side_by_side else request.positions.shape[1]


def _end(request: AttentionCall) -> Int[Array, " batch"]:
    """The position after the last token that has a slot."""
    return jnp.minimum(request.lengths, jnp.asarray(request.cache.index.room).reshape(-1))


def _first_held(request: AttentionCall) -> Int[Array, " batch"] | int:
    """The first position that was not written over."""
    ring = request.cache.index.ring
    if ring is None:
        return 0
    return ring.first_position(request.lengths.reshape(ring.lengths.shape)).reshape(-1)


def _queries(request: AttentionCall) -> Queries:
    """As the model had them, to the bit where it left the scale alone: cuDNN scales by itself."""
    head_dim, codec = request.queries.shape[-1], request.cache.config.codec
    queries = jnp.moveaxis(request.queries * head_dim**0.5, 1, 2).astype(number_type(codec))
    return codec.rotate(queries).astype(queries.dtype)


def _placed(request: AttentionCall, first: Int[Array, " batch"], most: int) -> Rows:
    """For so many keys at most, from position ``first`` on."""
    queries = _queries(request)
    tokens = queries.shape[1]
    if tokens == 1 or request.side_by_side:  # they see all keys, wherever they stand
        return Rows(queries, jnp.zeros_like(first), _added(request))
    before = jnp.clip(_start(request) - first, 0, most)
    counts = jnp.minimum(before + _added(request), most)  # those past the cache's end have no row
    places = jnp.arange(most, dtype=jnp.int32) - before[:, None]
    places = jnp.clip(places, 0, tokens - 1)[:, :, None, None, None]
    return Rows(jnp.take_along_axis(queries, places, axis=1, mode="clip"), before, counts)


def _old_pieces(request: AttentionCall, rows: Rows, runs: Int[Array, " batch"]) -> list[Part]:
    """Every query over the first runs of slots; parts of them apart where queries are few."""
    pieces = pieces_of(request.cache, request.layer)
    size, extent = pieces.keys.shape[1], request.cache.index.extent
    batch, kv_heads, tokens, group, _ = request.queries.shape
    blocks = batch * kv_heads * -(-tokens * group // _QUERIES_PER_BLOCK)
    splits = 1
    while tokens > 1 and 2 * splits * blocks <= _BLOCKS and 2 * splits * size <= extent:
        splits *= 2
    # Every so many runs are one part's, whatever the length.
    each = jnp.arange(splits, dtype=jnp.int32)
    counts = size * ((runs[:, None] + splits - 1 - each) // splits)

    def of_parts(table: Array) -> Array:
        """Runs that are not there are the first one, so that nothing else is read."""
        table = jnp.where(jnp.arange(table.shape[1]) < runs[:, None], table, table[:, :1])
        multiple = splits * (_MOST_KEYS_AT_ONCE // size)
        table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % multiple)), mode="edge")
        return jnp.swapaxes(table.reshape(batch, -1, splits), 1, 2).reshape(batch * splits, -1)

    call = functools.partial(
        _cudnn_call().call,
        keys=pieces.keys,
        values=pieces.values,
        key_counts=counts.reshape(-1),
        tables=(of_parts(pieces.key_table), of_parts(pieces.value_table)),
    )
    # With a group's queries as rows of one head its keys are read once, but queries are copied.
    if splits > 1 or 1 < tokens < extent // 2:
        folded = jnp.swapaxes(_queries(request), 2, 3).reshape(batch, tokens * group, kv_heads, -1)
        output, logsumexp = call(
            jnp.repeat(folded, splits, axis=0),
            query_counts=jnp.repeat(_added(request) * group, splits),
        )
        output = output.reshape(batch, splits, tokens, group, kv_heads, -1)
        logsumexp = logsumexp.reshape(batch, splits, kv_heads, tokens, group)
        output, logsumexp = jnp.swapaxes(output, 3, 4), jnp.swapaxes(logsumexp, 3, 4)
        return [
            _seen(request, output[:, part], logsumexp[:, part], counts[:, part])
            for part in range(splits)
        ]
    output, logsumexp = call(_heads(rows.queries), query_counts=rows.counts)
    return [_taken(request, rows, output, logsumexp, counts[:, 0])]


def _rest(
    request: AttentionCall,
    rows: Rows,
    first: Int[Array, " batch"],
    most: int,
    window: int | None = None,
) -> Part:
    """Every query over the tokens from position ``first`` on, so many at most, that it may see."""
    causal, end = request.queries.shape[2] > 1 and not request.side_by_side, _end(request)
    positions = first[:, None] + jnp.arange(most, dtype=jnp.int32)
    held = jnp.where(positions < end[:, None], positions, -1)
    keys, values = tokens_at(request.cache, request.layer, held)
    counts = jnp.clip(end - first, 0, most)
    output, logsumexp = _cudnn_call().call(
        _heads(rows.queries),
        keys=keys,
        values=values,
        query_counts=rows.counts,
        key_counts=counts,
        causal=causal,
        window=window if causal else None,
    )
    return _taken(request, rows, output, logsumexp, counts)


def _heads(queries: Queries) -> Float[Array, "batch tokens heads head_dim"]:
    return queries.reshape(*queries.shape[:2], -1, queries.shape[-1])


def _taken(
    request: AttentionCall,
    rows: Rows,
    output: Array,
    logsumexp: Array,
    key_counts: Int[Array, " batch"],
) -> Part:
    """What cuDNN gave the rows that have a query."""
    batch, kv_heads, tokens, group, head_dim = request.queries.shape
    places = rows.before[:, None] + jnp.arange(tokens, dtype=jnp.int32)
    take = functools.partial(jnp.take_along_axis, mode="clip")
    output = take(output, places[:, :, None, None], axis=1)
    logsumexp = take(logsumexp, places[:, None, :], axis=2)
    logsumexp = jnp.where((places < rows.counts[:, None])[:, None], logsumexp, -jnp.inf)
    output = output.reshape(batch, tokens, kv_heads, group, head_dim)
    logsumexp = logsumexp.reshape(batch, kv_heads, group, tokens)
    return _seen(request, output, logsumexp, key_counts)


def _seen(
    request: AttentionCall, output: Array, logsumexp: Array, key_counts: Int[Array, " batch"]
) -> Part:
    """A part as cuDNN leaves it: what its logsumexp is of padding, or of no key, is anything."""
    real = (request.positions >= 0) & (key_counts > 0)[:, None]
    seen = real[:, None, None] & (logsumexp != -jnp.inf)
    return Part(output, jnp.where(seen, logsumexp, _LOWEST))


def _first_tokens(request: AttentionCall, first: Int[Array, " batch"], window: int) -> Part:
    """The first tokens that a ring keeps for good, where its window does not reach them."""
    sinks = request.cache.index.sinks
    slots, before = jnp.arange(sinks), first[:, None, None]
    beyond = (slots < before) | (slots <= request.positions[:, :, None] - window)
    seen = request.visible(0, sinks) & beyond[:, None, :, None]
    rotated = request.cache.config.codec.rotate(request.queries)
    alone = dataclasses.replace(request, queries=rotated, sink_logits=None)
    state = Online.start(alone).with_slots(alone, 0, sinks, seen)
    logsumexp = jnp.where(state.total > 0, state.highest + jnp.log(state.total), _LOWEST)
    return Part(jnp.moveaxis(state.output(), 1, 2), jnp.swapaxes(logsumexp, 2, 3))


def _combined(request: AttentionCall, parts: list[Part]) -> Queries:
    """What the parts add up to, in 16 bits."""
    sink_logits = request.sink_logits
    peak = functools.reduce(jnp.maximum, [part.logsumexp for part in parts])
    if sink_logits is not None:  # as a part of its own that gave nothing
        sink_logits = sink_logits[:, :, None]
        peak = jnp.maximum(peak, sink_logits)
    weights = [
        jnp.where(part.logsumexp == _LOWEST, 0, jnp.exp(part.logsumexp - peak)) for part in parts
    ]
    total = functools.reduce(jnp.add, weights)
    if sink_logits is not None:
        total += jnp.exp(sink_logits - peak)
    total = jnp.where(total == 0, 1, total)

    def share_of(part: Part, weight: Array) -> Array:
        share = jnp.moveaxis(weight / total, 3, 1)[..., None]
        return jnp.where(share == 0, 0, part.output.astype(jnp.float32) * share)

    mix = functools.reduce(jnp.add, map(share_of, parts, weights))
    return mix.astype(number_type(request.cache.config.codec))
