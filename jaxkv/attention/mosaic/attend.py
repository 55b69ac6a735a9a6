"""Decode on a Hopper GPU at the rate of its memory: a Pallas kernel for Mosaic GPU.

XLA copies the layer's slice out of the cache before it multiplies it by a group's queries, three
times the bytes (ARCHITECTURE.md, "On a GPU"). The kernel is given the whole cache and the
layer's number instead. What it is made of is in `kernel`; here are the calls that it
can serve, what it is told of one, and how the parts of a context that it leaves are combined.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxkv.addressing import RingSlots
from jaxkv.attention.blockwise import unrotated_blockwise_part
from jaxkv.attention.call import LOWEST, AttentionCall, Grouped, LogTotal
from jaxkv.attention.mosaic.centres import centres_of, turning_of
from jaxkv.attention.mosaic.plan import TILE, plan
from jaxkv.cache.kv_cache import KVCache, buffer_of
from jaxkv.codecs import Int8, Rotated, bitcast
from jaxkv.codecs.hadamard import half_turn
from jaxkv.devices import local_gpu, num_devices_of

Slots = Int[Array, " batch"]

_HEAD_DIMS = (64, 128, 256)
_CODES = [(each.levels, each.rotation) for each in (Int8(), Rotated(bits=4), Rotated(bits=2))]
MOST_TOKENS = 8  # of a sequence
_MOST_QUERIES = 32  # of a KV head; more do not fit in registers
_LOG2_E = 1.4426950408889634
# What is copied at once begins at a multiple of so many bytes in shared memory, and has at most so
# many numbers along an axis.
_COPIED_BYTES, _COPIED_NUMBERS, _SCALE_BYTES = 128, 256, 2


def cannot_serve(cache: KVCache, tokens: int) -> str | None:
    """Why this call is not for the Mosaic kernel, or None."""
    return _wrong_device() or cannot_read(cache, tokens)


def should_not_serve(cache: KVCache, tokens: int, heads: int, platform: str) -> str | None:
    """Why another implementation is the better choice, or None."""
    if (queries := tokens * (heads // cache.config.num_kv_heads)) > _MOST_QUERIES:
        return _too_many(queries)
    if (devices := num_devices_of(buffer_of(cache))) > 1:
        return f"the cache is on {devices} GPUs, and a sharded one would be gathered"
    return None


def cannot_read(cache: KVCache, tokens: int) -> str | None:
    """Why the kernel is not made for such a call, whatever the device is, or None."""
    config, index = cache.config, cache.index
    codec = config.codec
    in_16_bits = codec.dtype in ("bfloat16", "float16")
    if tokens > MOST_TOKENS:
        return f"it serves up to {MOST_TOKENS} tokens a sequence, and this call has {tokens}"
    if tokens > 1 and (not index.by_position or index.share is not None):
        return f"it serves one token a sequence of {config.addressing.name} caches, not {tokens}"
    if not in_16_bits and (codec.levels, codec.rotation) not in _CODES:
        return f"it reads bfloat16, float16, int8, rotated4 and rotated2, not {codec.name}"
    if config.pair.unlike:
        return f"it takes keys beside values of one size, and {config.pair.unlike}"
    if config.head_dim not in _HEAD_DIMS:
        return f"head_dim is {config.head_dim}, and it takes 64, 128 or 256"
    if codec.levels and len(codec.levels) == 4 and config.head_dim == 64:
        return "it takes at least 32 bytes a vector, and rotated2 with a head_dim of 64 has 16"
    if not in_16_bits and (wrong := _wrong_scales(cache)) is not None:
        return wrong
    if config.num_slots < TILE:
        return f"it reads {TILE} slots at once, and the cache has {config.num_slots}"
    if index.share is not None and config.codec_state:
        return f"it cannot read {codec.name} where the context is on several devices"
    ordered = index.by_position or index.ring or index.share
    if index.run is None or index.aligned or not ordered:
        return f"it cannot read {config.addressing.name} caches"
    if index.pages is not None:
        if index.run % TILE and (TILE % index.run or index.run < 8):
            return f"page_size {index.run} is not 8, 16, 32 or a multiple of {TILE}"
    elif index.extent % 8:
        return f"each sequence has {index.extent} slots, which is not a multiple of 8"
    return None


def _wrong_scales(cache: KVCache) -> str | None:
    """Why a tile's scales cannot be copied, or None."""
    kv_heads, run = cache.config.num_kv_heads, cache.index.run
    if not scales_in_a_row(kv_heads):
        return None
    if TILE * kv_heads > _COPIED_NUMBERS:
        return f"scales of {kv_heads} KV heads are not a multiple of 16 bytes"
    piece = min(run, TILE) if cache.index.pages is not None and run else TILE
    if piece * kv_heads * _SCALE_BYTES % _COPIED_BYTES:
        return (
            f"scales of {piece} slots and {kv_heads} KV heads, a page's, are not a multiple of "
            f"{_COPIED_BYTES} bytes"
        )
    return None


def scales_in_a_row(kv_heads: int) -> bool:
    """Whether a tile's scales are copied as one row, since a slot's are no multiple of 16 bytes."""
    return kv_heads % 8 != 0


def _too_many(queries: int) -> str:
    return f"{queries} queries read each KV head, and it takes {_MOST_QUERIES}"


def mosaic(request: AttentionCall) -> Grouped:
    """Attend with few tokens of each sequence; queries and outputs are not rotated."""
    return _attend(request, None)[0]


def mosaic_part(request: AttentionCall) -> tuple[Grouped, LogTotal]:
    """The same with the log of its total, by which parts of a context are merged."""
    return _attend(request, None)


@functools.cache
def _wrong_device() -> str | None:
    if (device := local_gpu()) is None:
        return "it needs a Hopper GPU, and this process has no GPU to ask"
    if (capability := str(getattr(device, "compute_capability", "none"))) != "9.0":
        return f"it needs a Hopper GPU (9.0), and {device.device_kind} is {capability}"
    try:
        importlib.import_module("jaxkv.attention.mosaic.kernel")
    except (ImportError, AttributeError) as error:
        return f"this JAX has no Mosaic GPU as it knows it: {error}"
    return None


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _attend(request: AttentionCall, interpret: object) -> tuple[Grouped, LogTotal]:
    # One kernel a cache under vmap: Pallas cannot batch this one.
    decode = functools.partial(_decode, interpret=interpret)
    return jax.custom_batching.sequential_vmap(decode)(request)


@_attend.defjvp
def _attend_jvp(interpret, primals, tangents):
    """The kernel has no derivative of its own; the blockwise form's is the same function's."""
    return jax.jvp(unrotated_blockwise_part, primals, tangents)


# Lowered once for all layers of a model: that takes longer than to compile it.
@functools.partial(jax.jit, static_argnames="interpret")
def _decode(request: AttentionCall, interpret: object) -> tuple[Grouped, LogTotal]:
    kernel = importlib.import_module("jaxkv.attention.mosaic.kernel")
    cache = request.cache
    batch, kv_heads, tokens, group, head_dim = request.queries.shape
    if (count := tokens * group) > _MOST_QUERIES:
        raise ValueError(f"implementation 'mosaic' cannot serve this call: {_too_many(count)}.")
    specs = cache.config.codec.leaves(head_dim)
    numbers, *scales = (bitcast(cache.storage[name], specs[name][1]) for name in specs)
    if scales_in_a_row(kv_heads):
        scales = [leaf.reshape(*leaf.shape[:2], -1) for leaf in scales]
    scale = jnp.float32(_unit(request))
    rotates = cache.config.codec.rotation is not None
    if rotates:
        scale = scale * half_turn(head_dim)
    queries, centres = request.queries * scale, None
    added: tuple[Array, ...] = ()
    if (turning := turning_of(request)) is None:
        added = _added(request)
    else:  # each query once for each centre
        assert request.offset_queries is not None
        queries = jnp.concatenate([queries] * turning.centres, axis=2)
        of_centres = jnp.moveaxis(request.offset_queries, 4, 2).reshape(*queries.shape[:4], -1)
        centres = centres_of(request, turning, _columns(of_centres * _unit(request)))
    columns = _columns(queries)
    mixes, sums = kernel.decode_parts(
        columns,
        (numbers, *scales),
        jnp.asarray(request.layer, jnp.int32).reshape(1),
        jnp.stack(_bounds(request), axis=-1),
        _page_table(cache),
        added,
        centres,
        plan=plan(request, 2 * columns.shape[3], turning),
        interpret=interpret,
    )
    # Slots that were stored less the second centre are parts of their own.
    sums, coarse, fine = (
        _of_each_centre(each, turning.centres if turning else 1, count)
        for each in (jnp.swapaxes(sums, 3, 4), *jnp.split(mixes.astype(jnp.float32), 2, axis=3))
    )
    highest, totals, *of_second = jnp.moveaxis(sums, 4, 0)
    sink_logits = (
        None if request.sink_logits is None else jnp.tile(request.sink_logits, (1, tokens))
    )
    unscaled = jnp.concatenate([coarse + fine, *(part[..., None] for part in of_second)], axis=-1)
    mix, share, log_total = _combined(unscaled, highest, totals, sink_logits)
    if tokens > 1:  # padding sees nothing
        real = jnp.repeat(request.positions >= 0, group, axis=1)[:, None]
        mix, share = jnp.where(real[..., None], mix, 0), jnp.where(real, share, 0)
    mix, second_share = mix[..., :head_dim], mix[..., head_dim:]
    if rotates:
        mix *= half_turn(head_dim)
    if (offsets := request.offsets) is not None:
        mix += share[..., None] * offsets.vectors[1][:, None]
        if offsets.second is not None:
            mix += second_share * (offsets.second - offsets.vectors)[1][:, None]
    return mix.reshape(request.queries.shape), log_total.reshape(batch, kv_heads, tokens, group)


def _unit(request: AttentionCall) -> float:
    """Of the kernel's scores: base 2, unless they are capped first."""
    return 1 if request.softcap else _LOG2_E


def _columns(
    queries: Float[Array, "batch kv_heads tokens group numbers"],
) -> Float[Array, "batch kv_heads numbers rows"]:
    """A column for each query of a KV head, and zeros up to a multiple of 8."""
    *lists, tokens, group, numbers = queries.shape
    rows = queries.reshape(*lists, tokens * group, numbers)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % 8), (0, 0)))
    return jnp.swapaxes(rows, 2, 3)


def _of_each_centre(
    columns: Float[Array, "splits batch kv_heads rows numbers"], centres: int, count: int
) -> Float[Array, "parts batch kv_heads group numbers"]:
    """Without padding, and what was found for a query with each centre as parts of their own."""
    splits, *lists, _, numbers = columns.shape
    own = columns[:, :, :, : centres * count].reshape(splits, *lists, centres, count, numbers)
    return jnp.moveaxis(own, 3, 0).reshape(-1, *lists, count, numbers)


def _bounds(request: AttentionCall) -> tuple[Slots, ...]:
    """What the kernel is told of visible slots."""
    bounds, first = visible_slots(request), request.positions[:, 0]
    if request.positions.shape[1] == 1:
        return bounds
    return *bounds, first + 1 - _window(request), first + 1


def visible_slots(request: AttentionCall) -> tuple[Slots, Slots, Slots, Slots]:
    """The first slot that is seen and the one after the last; and of a gap between, likewise."""
    index = request.cache.index
    if index.ring is not None:
        return _visible_slots_of_a_ring(request, index.ring)
    # Slot p holds position p. What is padding comes last, and has the position -1.
    first = request.positions[:, 0] + 1 - _window(request)
    last = jnp.minimum(request.positions.max(axis=1) + 1, index.capacity)
    return jnp.clip(first, 0, last), last, jnp.zeros_like(last), jnp.zeros_like(last)


def _window(request: AttentionCall) -> int:
    """Of both, or all that there is."""
    index = request.cache.index
    windows = [window for window in (request.window, index.window) if window is not None]
    return min(windows, default=index.extent)


def _visible_slots_of_a_ring(
    request: AttentionCall, index: RingSlots
) -> tuple[Slots, Slots, Slots, Slots]:
    """The gap is between sinks and oldest token or, once it has wrapped, newest and oldest."""
    position, sinks, ring = request.positions[:, 0], index.sinks, index.ring_slots
    held_from = index.first_position(request.lengths.reshape(index.lengths.shape)).reshape(-1)
    window = min(index.window, request.window or index.window)
    oldest = jnp.maximum(jnp.maximum(position + 1 - window, held_from), sinks)
    first = sinks + (oldest - sinks) % ring
    newest = jnp.minimum(position, index.capacity - 1)
    end = sinks + (newest - sinks) % ring + 1
    first_sink = 0 if request.window is None else jnp.maximum(position + 1 - request.window, 0)
    last_sink = jnp.minimum(newest + 1, sinks)

    none, wrapped = oldest > newest, first >= end
    low = jnp.where(none | wrapped | (first_sink < sinks), jnp.minimum(first_sink, sinks), first)
    high = jnp.where(none, last_sink, jnp.where(wrapped, index.extent, end))
    high = jnp.minimum(high, index.extent)
    gap = jnp.where(wrapped, end, jnp.maximum(low, sinks))
    return low, high, jnp.where(none, 0, gap), jnp.where(none, 0, jnp.minimum(first, high))


def _page_table(cache: KVCache) -> Array:
    """``[batch, pages]``; anything where there is none."""
    if cache.index.pages is None:
        return jnp.zeros((1, 1), jnp.int32)
    return cache.index.pages.table.reshape(cache.config.batch_size or 1, -1)


def _added(request: AttentionCall) -> tuple[Float[Array, "batch kv_heads slots rows"], ...]:
    """What keys were stored less, times the queries, in the units of the scores."""
    index, offsets = request.cache.index, request.offsets
    if offsets is None or request.offset_queries is None:
        return ()
    if not index.by_position:
        positions = request.key_positions(0, index.extent)
    else:  # behind a barrier, or XLA would compute the table while it compiles
        slots = jnp.arange(index.extent, dtype=jnp.int32)
        positions = lax.optimization_barrier(slots[None, None])
    features = offsets.features(positions)[:, 0]
    features = jnp.broadcast_to(features, (len(request.lengths), *features.shape[1:]))
    scores, *second = (
        jnp.einsum("bkfg,bsf->bksg", _columns(queries), features, precision="highest")
        for queries in jnp.moveaxis(request.offset_queries, -2, 0)
    )
    is_second = request.is_second(0, 0, index.extent)
    if second and is_second is not None:
        scores = jnp.where(jnp.swapaxes(is_second, 1, 2)[..., None], second[0], scores)
    return (scores * _unit(request),)


def _combined(
    mixes: Float[Array, "splits batch kv_heads group head_dim"],
    highest: Float[Array, "splits batch kv_heads group"],
    totals: Float[Array, "splits batch kv_heads group"],
    sink_logits: Float[Array, "kv_heads group"] | None,
) -> tuple[
    Float[Array, "batch kv_heads group head_dim"],
    Float[Array, "batch kv_heads group"],
    Float[Array, "batch kv_heads group"],
]:
    """What the parts of each sequence's context add up to, unrolled into one loop of XLA's.

    And what share of the probability is theirs, which is less than 1 beside sinks, and the log of
    the total.
    """
    peak = functools.reduce(jnp.maximum, highest)
    if sink_logits is not None:  # as a part of its own that gave nothing
        peak = jnp.maximum(peak, sink_logits * _LOG2_E)
    weights = [jnp.exp2(part - peak) for part in highest]
    total = own = sum(part * weight for part, weight in zip(totals, weights, strict=True))
    if sink_logits is not None:
        total += jnp.exp2(sink_logits * _LOG2_E - peak)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    log_total = jnp.where(seen, (peak + jnp.log2(total)) / _LOG2_E, LOWEST)
    mix = sum(part * weight[..., None] for part, weight in zip(mixes, weights, strict=True))
    return mix / total[..., None], own / total, log_total
