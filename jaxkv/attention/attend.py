"""Reading the cache: one verb, and a table of implementations that can serve it."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxkv.attention.blockwise import KEY_BLOCK, blockwise, blockwise_part
from jaxkv.attention.call import LOWEST, AttentionCall, Grouped, LogTotal, request_of
from jaxkv.attention.cudnn.attend import cannot_serve as cudnn_cannot_serve
from jaxkv.attention.cudnn.attend import cudnn
from jaxkv.attention.cudnn.attend import should_not_serve as cudnn_should_not_serve
from jaxkv.attention.mosaic.attend import cannot_serve as mosaic_cannot_serve
from jaxkv.attention.mosaic.attend import mosaic, mosaic_part
from jaxkv.attention.mosaic.attend import should_not_serve as mosaic_should_not_serve
from jaxkv.attention.native import cannot_serve as native_cannot_serve
from jaxkv.attention.native import native, native_part
from jaxkv.attention.native import should_not_serve as native_should_not_serve
from jaxkv.attention.observed import Call, is_watched, notify
from jaxkv.attention.products import sums_in_place
from jaxkv.attention.reference import reference, reference_part
from jaxkv.attention.streamed import cannot_serve as streamed_cannot_serve
from jaxkv.attention.streamed import is_streamed, streamed, streamed_part
from jaxkv.cache.ancestors import Ancestors, check_ancestors, check_tree
from jaxkv.cache.axes import words_of_copies
from jaxkv.cache.checks import check_counts, check_layer, check_queries, layer_exists
from jaxkv.cache.groups import in_its_group
from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.kv_cache import KVCache, Layer, NumTokens, buffer_of
from jaxkv.cache.shards import in_each_shard, local_shapes
from jaxkv.cache.verbs import or_nan, real_of
from jaxkv.counts import check_count
from jaxkv.devices import PLATFORMS, by_platform, default_device, platform_of
from jaxkv.programs import one_program
from jaxkv.renamed import renamed
from jaxkv.show.text import format_bytes

# Scores that the reference form may hold at once, in bytes.
_REFERENCE_LIMIT = 64 << 20


class Implementation(NamedTuple):
    """A way to serve `attend`.

    Attributes:
      run: the function.
      cannot_read: why it cannot serve ``(cache, tokens)`` on its platform, or None.
      should_not_serve: why ``(cache, tokens, heads, platform)`` is better left to the next.
      platform: the only one that it is for; None for all.
      reads_host_memory: whether it can serve caches that are there.
      rotates: whether it rotates queries and outputs itself, as the codec wants.
      caps: whether it knows a softcap.
      in_any_order: whether queries need not stand one after the other: they may form a tree or, in
        cross-attention, see unlike numbers of tokens.
      side_by_side: whether it serves several queries that all see the same, as in cross-attention.
      part: the function with the log of its total too, by which parts of a context are merged.
    """

    run: Callable[[AttentionCall], Grouped]
    cannot_read: Callable[[KVCache, int], str | None]
    should_not_serve: Callable[[KVCache, int, int, str], str | None]
    platform: str | None = None
    reads_host_memory: bool = False
    rotates: bool = False
    caps: bool = True
    in_any_order: bool = True
    side_by_side: bool = True
    part: Callable[[AttentionCall], tuple[Grouped, LogTotal]] | None = None

    def cannot_serve(self, cache: KVCache, tokens: int, platform: str | None = None) -> str | None:
        """Why it cannot serve this call, on the platform where the cache is if none is named."""
        platform = platform or _expected_platform(cache)
        if self.platform not in (None, platform):
            return f"it runs on a {self.platform.upper()}, and this is for a {platform.upper()}"
        return self.cannot_read(cache, tokens)


def _no_reason(*call: Any) -> str | None:
    return None


def _reference_is_wasteful(cache: KVCache, tokens: int, heads: int, platform: str) -> str | None:
    extent = cache.index.extent
    scores = 4 * math.prod(cache.config.batch_shape) * heads * tokens * extent
    if scores > _REFERENCE_LIMIT:
        return f"its scores would take {format_bytes(scores)}"
    group = heads // cache.config.num_kv_heads
    if cache.config.codec.dtype is None and not sums_in_place(platform, tokens, group):
        return f"it would decode the whole {cache.config.codec.name} layer"
    if platform == "cpu" and extent > KEY_BLOCK:
        return f"on a CPU it reads all {extent} slots, blockwise only those in use"
    return None


class Asked(NamedTuple):
    """What a call asks for that not every implementation gives."""

    softcap: bool = False
    part: bool = False
    tree: bool = False
    side_by_side: bool = False
    unlike: bool = False  # queries side by side, of which some see more


# The first that can and should, serves; blockwise always can, but for host memory.
IMPLEMENTATIONS: dict[str, Implementation] = {
    # On a CPU host memory is the memory that it reads.
    "native": Implementation(
        native,
        native_cannot_serve,
        native_should_not_serve,
        "cpu",
        reads_host_memory=True,
        part=native_part,
    ),
    "mosaic": Implementation(
        mosaic,
        mosaic_cannot_serve,
        mosaic_should_not_serve,
        "gpu",
        rotates=True,
        in_any_order=False,
        side_by_side=False,
        part=mosaic_part,
    ),
    "cudnn": Implementation(
        cudnn,
        cudnn_cannot_serve,
        cudnn_should_not_serve,
        "gpu",
        rotates=True,
        caps=False,
        in_any_order=False,
    ),
    "reference": Implementation(reference, _no_reason, _reference_is_wasteful, part=reference_part),
    # Under a jit of its own a scan is traced once for all layers.
    "blockwise": Implementation(
        jax.jit(blockwise), _no_reason, _no_reason, part=jax.jit(blockwise_part)
    ),
    "streamed": Implementation(
        jax.jit(streamed),
        streamed_cannot_serve,
        _no_reason,
        reads_host_memory=True,
        part=jax.jit(streamed_part),
    ),
}


@overload
def attend(
    cache: AnyCache,
    /,
    queries: Float[Array, "*batch tokens heads head_dim"],
    *,
    layer: Layer,
    num_tokens: NumTokens | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sink_logits: Float[Array, " heads"] | None = None,
    ancestors: Ancestors | None = None,
    implementation: str | None = None,
    partial: Literal[False] = False,
) -> Float[Array, "*batch tokens heads head_dim"]: ...
@overload
def attend(
    cache: AnyCache,
    /,
    queries: Float[Array, "*batch tokens heads head_dim"],
    *,
    layer: Layer,
    num_tokens: NumTokens | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sink_logits: Float[Array, " heads"] | None = None,
    ancestors: Ancestors | None = None,
    implementation: str | None = None,
    partial: Literal[True],
) -> tuple[Float[Array, "*batch tokens heads head_dim"], Float[Array, "*batch tokens heads"]]: ...
@renamed(sinks="sink_logits")
@in_its_group
def attend(
    cache: KVCache,
    queries: Float[Array, "*batch tokens heads head_dim"],
    *,
    layer: Layer,
    num_tokens: NumTokens | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sink_logits: Float[Array, " heads"] | None = None,
    ancestors: Ancestors | None = None,
    implementation: str | None = None,
    partial: bool = False,
) -> Any:
    """Attention of the next tokens over the cache, causal: prefill, chunk and decode alike.

    Call it after `append` with the same tokens, before `advance`.

    Args:
      queries: ``[tokens, heads, head_dim]``, with a leading ``[batch]`` exactly when the config
        has a ``batch_size``. ``heads`` is a multiple of ``num_kv_heads``.
      layer: which layer; may be traced.
      num_tokens: as in `append`; padding queries give zeros.
      scale: of the logits; ``head_dim ** -0.5`` if None.
      softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2, section 2).
      window: a query sees this many newest tokens, itself included (Mistral 7B, section 2).
      sink_logits: one learned logit per head, added to the softmax denominator only (gpt-oss).
      ancestors: where the tokens form a tree, which of them come before which: ``[i, j]`` if token
        j is an ancestor of token i, bool ``[tokens, tokens]``, with a leading ``[batch]`` if
        sequences differ. Each sees the text before the step, its ancestors and itself; windows
        count these alone. Token i's own position, for its rope, is the length and the number of its
        ancestors (`next_positions`). `keep_path` makes one branch the text.
      implementation: a name in `IMPLEMENTATIONS`; None picks the first that can serve, see
        `explain`. A named one is used or an error, never replaced.
      partial: give the log-sum-exp of the logits too, for this to be one part of what queries see:
        of a context in several caches or on several devices. ``sink_logits`` are for one part.

    Returns:
      The attention output, of the queries' dtype and shape, but that a value has ``value_dim``
      numbers where the config says so. Zeros for a query that sees nothing, NaN if a traced layer
      does not exist. Where ``partial``, with the log-sum-exp, float32
      ``[*batch, tokens, heads]``: -1e30 for a query that sees nothing, so that differences are
      numbers. Outputs of parts are merged by the softmax of theirs (Rabe & Staats,
      "Self-attention does not need O(n^2) memory", 2021, section 3). Both can be differentiated.

    Raises:
      ConfigError: ``ancestors`` for a cache that `keep_path` refuses.
      IndexError, TypeError, ValueError: a bad layer, dtype, shape or option.

    >>> import jax.numpy as jnp, jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(1, 8, num_kv_heads=1, head_dim=4))
    >>> keys = values = jnp.ones((3, 1, 4))
    >>> cache = jaxkv.append(cache, keys, values, layer=0)
    >>> jaxkv.attend(cache, jnp.ones((3, 2, 4)), layer=0).shape
    (3, 2, 4)

    One query over two caches, such as a document that many requests share and a request's own:

    >>> query = jnp.ones((1, 2, 4))
    >>> document, own = (jaxkv.advance(cache, tokens) for tokens in (1, 2))
    >>> parts = [jaxkv.attend(each, query, layer=0, partial=True) for each in (document, own)]
    >>> outputs, logs = (jnp.stack(each) for each in zip(*parts))
    >>> weights = jax.nn.softmax(logs, axis=0)  # over a mesh axis: with pmax and psum
    >>> merged = (weights[..., None] * outputs).sum(axis=0)
    >>> [f"{weight:.1f}" for weight in weights[:, 0, 0]]  # by the tokens seen: 2 and 3
    ['0.4', '0.6']
    """
    _check_call(cache, queries, window, softcap, sink_logits)
    *_, tokens, heads, _ = queries.shape
    check_counts(cache, "num_tokens", num_tokens, most=tokens)
    num_tokens = real_of(cache, tokens, num_tokens)
    shapes = local_shapes(cache)
    if window is not None and shapes.index.share is not None:
        raise ValueError(
            "attend: window= is not served where the context is split over devices, which keep "
            "every token. Leave context out of the cache's axes, or window= out of the call."
        )
    platform = _platform_of(cache, queries)
    if ancestors is not None:
        ancestors = _checked_tree(cache, tokens, ancestors)
    part = partial or shapes.index.share is not None
    asked = Asked(softcap is not None, part, ancestors is not None)
    names = _serving(shapes, tokens, heads, asked, platform, implementation)
    number = check_layer(cache, layer)
    notify(Call(cache, queries, layer, num_tokens))
    arrays = cache, queries, number, num_tokens, scale, sink_logits, ancestors
    output = _run(names, platform, arrays, partial, softcap=softcap, window=window)
    exists = layer_exists(cache, layer)
    return jax.tree.map(lambda numbers: or_nan(numbers, exists), output)


def attend_all(
    cache: KVCache,
    queries: Float[Array, "*batch tokens heads head_dim"],
    *,
    layer: int,
    num_seen: Int[Array, "*batch tokens"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, " heads"] | None = None,
    implementation: str | None = None,
    partial: bool = False,
) -> Any:
    """`attend` by queries that are no tokens of the cache, and see all of it or its first ones."""
    _check_call(cache, queries, None, softcap, sink_logits)
    *batch, tokens, heads, _ = queries.shape
    if num_seen is not None and num_seen.shape != (*batch, tokens):
        raise ValueError(
            f"num_seen must be int32{[*batch, tokens]}, a number for each query, got "
            f"{num_seen.dtype}{list(num_seen.shape)}."
        )
    platform = _platform_of(cache, queries)
    several, unlike = tokens > 1, tokens > 1 and num_seen is not None
    asked = Asked(softcap is not None, partial, side_by_side=several, unlike=unlike)
    names = _serving(local_shapes(cache), tokens, heads, asked, platform, implementation)
    arrays = cache, queries, check_layer(cache, layer), None, scale, sink_logits, None, num_seen
    return _run(names, platform, arrays, partial, softcap=softcap, cross=True)


def _platform_of(cache: KVCache, queries: Array) -> str | None:
    """Where a call will run; None where that is not known yet."""
    if (spread := cache.spread or cache.part_of) is not None:
        return spread.platform
    return platform_of(buffer_of(cache), queries)


def _run(
    names: dict[str, str], platform: str | None, arrays: Any, partial: bool, **static: Any
) -> Any:
    """What serves on the platform, or on each where it is not known yet."""
    cache, queries, *_ = arrays
    if queries.shape[-3] == 0:
        output = jnp.zeros((*queries.shape[:-1], cache.config.pair.value_dim), queries.dtype)
        return (output, jnp.zeros(queries.shape[:-1], jnp.float32)) if partial else output
    serve: Any = _serve_part if partial else _serve
    call = functools.partial(serve, *arrays, **static)
    runs = {name: functools.partial(call, chosen=IMPLEMENTATIONS[name]) for name in names.values()}
    if platform is not None:
        return runs[names[platform]]()
    return by_platform({each: runs[name] for each, name in names.items()})


@one_program("chosen", "softcap", "window", "cross")
@in_each_shard(("batch", None, "heads", None))
def _serve(
    cache: KVCache,
    queries: Array,
    layer: Layer,
    num_tokens: NumTokens | None,
    scale: float | None,
    sink_logits: Array | None,
    ancestors: Array | None,
    num_seen: Array | None = None,
    *,
    chosen: Implementation,
    **options: Any,
) -> Array:
    options |= {"scale": scale, "sink_logits": sink_logits, "ancestors": ancestors}
    options |= {"num_seen": num_seen, "rotate": not chosen.rotates}
    request = request_of(cache, queries, layer, num_tokens, **options)
    output = chosen.run(request) if cache.index.share is None else _merged(request, chosen)[0]
    return _as_given(output, queries, cache, chosen)


@one_program("chosen", "softcap", "window", "cross")
@in_each_shard(("batch", None, "heads", None), ("batch", None, "heads"))
def _serve_part(
    cache: KVCache,
    queries: Array,
    layer: Layer,
    num_tokens: NumTokens | None,
    scale: float | None,
    sink_logits: Array | None,
    ancestors: Array | None,
    num_seen: Array | None = None,
    *,
    chosen: Implementation,
    **options: Any,
) -> tuple[Array, Array]:
    assert chosen.part is not None
    options |= {"scale": scale, "sink_logits": sink_logits, "ancestors": ancestors}
    options |= {"num_seen": num_seen, "rotate": not chosen.rotates}
    request = request_of(cache, queries, layer, num_tokens, **options)
    part = chosen.part(request) if cache.index.share is None else _merged(request, chosen)
    output, log_total = part
    log_total = jnp.moveaxis(log_total, 1, 2).reshape(queries.shape[:-1])
    return _as_given(output, queries, cache, chosen), log_total


def _as_given(output: Grouped, queries: Array, cache: KVCache, chosen: Implementation) -> Array:
    """The output as the queries came: not rotated, and in their order and dtype."""
    if not chosen.rotates:
        output = cache.config.codec.unrotate(output)
    output = cache.config.pair.cut(output)
    return jnp.moveaxis(output, 1, 2).reshape(*queries.shape[:-1], -1).astype(queries.dtype)


def _merged(request: AttentionCall, chosen: Implementation) -> tuple[Grouped, LogTotal]:
    """Over all devices that have a share of the context."""
    share = request.cache.index.share
    assert chosen.part is not None
    assert share is not None
    if request.sink_logits is not None:  # once
        sink_logits = jnp.where(share.rank == 0, request.sink_logits, LOWEST)
        request = dataclasses.replace(request, sink_logits=sink_logits)
    if not request.cache.codec_state:  # nobody asks for positions but the mask: for order
        own = share.inner, share.own(request.positions + 1) - 1, share.own(request.lengths)
        cache = dataclasses.replace(request.cache, index=own[0])
        request = dataclasses.replace(request, cache=cache, positions=own[1], lengths=own[2])
    output, log_total = chosen.part(request)
    highest = lax.pmax(lax.stop_gradient(log_total), share.axis)  # it cancels out
    weights = jnp.exp(log_total - highest)
    total, mix = lax.psum((weights, output * weights[..., None]), share.axis)
    return mix / total[..., None], highest + jnp.log(total)


def explain(
    cache: AnyCache,
    *,
    tokens: int = 1,
    heads: int | None = None,
    softcap: float | None = None,
    tree: bool = False,
) -> str:
    """Which implementation `attend` picks for a call of this shape, and why not each other one.

    Args:
      tokens: queries of each sequence: 1 for decode, more for prefill.
      heads: query heads; as many as KV heads if None.
      softcap: as in `attend`.
      tree: whether the tokens form one, as ``ancestors`` of `attend` say.

    >>> import jaxkv
    >>> print(jaxkv.explain(jaxkv.create(jaxkv.KVCacheConfig(1, 16, 1, 4)), tokens=9))
    native: not used, it serves up to 8 tokens per sequence, and this call has 9
    mosaic: not used, it runs on a GPU, and this is for a CPU
    cudnn: not used, it runs on a GPU, and this is for a CPU
    reference: used
    blockwise: not needed, reference comes first
    streamed: not used, the cache is on the device
    """
    call: Any = {"tokens": tokens, "heads": heads, "softcap": softcap}
    if len(cache.groups) + len(cache.cross) > 1:
        kinds = [
            f"group {number}, {group.config.addressing.name}:\n" + _explained(group, tree, **call)
            for number, group in enumerate(cache.groups)
        ]
        kinds += [
            "cross-attention:\n" + _explained(each, cross=True, **call) for each in cache.cross
        ]
        return "\n".join(kinds)
    (own,) = cache.groups
    return _explained(own, tree, **call)


def _explained(
    cache: KVCache,
    tree: bool = False,
    *,
    tokens: int,
    heads: int | None,
    softcap: float | None,
    cross: bool = False,
) -> str:
    """`explain` of one group."""
    heads = heads or cache.config.num_kv_heads
    platform = _expected_platform(cache)
    lines, spread = [], cache.spread
    if spread is not None and (copies := spread.copies(cache.config)) > 1:
        lines.append(f"copies: {words_of_copies(copies, spread.copied_bytes(cache.config))}")
    cache = local_shapes(cache)
    side_by_side = cross and tokens > 1
    asked = Asked(softcap is not None, cache.index.share is not None, tree, side_by_side)
    chosen = _first_choice(cache, tokens, heads, asked, platform)
    for name in IMPLEMENTATIONS:
        if name == chosen:
            verdict = "used"
        elif reason := _reason_against(name, cache, tokens, heads, asked, platform):
            verdict = f"not used, {reason}"
        else:
            verdict = f"not needed, {chosen} comes first"
        lines.append(f"{name}: {verdict}")
    return "\n".join(lines)


def _serving(
    cache: KVCache,
    tokens: int,
    heads: int,
    asked: Asked,
    platform: str | None,
    named: str | None,
) -> dict[str, str]:
    """For each platform that the call may be for, who serves there."""
    platforms = PLATFORMS if platform is None else (platform,)
    if named is None:
        return {each: _first_choice(cache, tokens, heads, asked, each) for each in platforms}
    if named not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {named!r}."
        )
    own = IMPLEMENTATIONS[named].platform
    if platform is None and own is not None:
        platforms = (own,)
    if reason := _cannot_serve(named, cache, tokens, asked, platforms[0]):
        raise ValueError(
            f"implementation {named!r} cannot serve this call: {reason}. Leave implementation= "
            "out, and one that can is chosen."
        )
    return dict.fromkeys(platforms, named)


def _first_choice(cache: KVCache, tokens: int, heads: int, asked: Asked, platform: str) -> str:
    call = cache, tokens, heads, asked, platform
    reasons = {name: _reason_against(name, *call) for name in IMPLEMENTATIONS}
    for name, reason in reasons.items():
        if not reason:
            return name
    raise ValueError(f"no implementation can serve this call: {reasons}.")


def _reason_against(
    name: str, cache: KVCache, tokens: int, heads: int, asked: Asked, platform: str
) -> str | None:
    reason = _cannot_serve(name, cache, tokens, asked, platform)
    return reason or IMPLEMENTATIONS[name].should_not_serve(cache, tokens, heads, platform)


def _cannot_serve(
    name: str, cache: KVCache, tokens: int, asked: Asked, platform: str
) -> str | None:
    if is_streamed(cache) and name != "streamed":
        if not IMPLEMENTATIONS[name].reads_host_memory:
            return "the cache is in host memory"
        if cache.resident is not None and cache.resident.bounds is not None:
            return "it reads all blocks, and this cache's placement chooses"
    if cache.newest is not None and name not in ("native", "blockwise", "streamed"):
        return "the newest tokens are in a cache of their own"
    if reason := IMPLEMENTATIONS[name].cannot_serve(cache, tokens, platform):
        return reason
    if asked.part and IMPLEMENTATIONS[name].part is None:
        return "it gives no log-sum-exp, by which parts of a context are merged"
    if asked.softcap and not IMPLEMENTATIONS[name].caps:
        return "it has no softcap"
    if asked.tree and not IMPLEMENTATIONS[name].in_any_order:
        return "it serves no tree of tokens"
    if asked.side_by_side and not IMPLEMENTATIONS[name].side_by_side:
        return "of cross-attention it serves one query per sequence"
    if asked.unlike and not IMPLEMENTATIONS[name].in_any_order:
        return "it serves no num_seen of several queries"
    return None


def _expected_platform(cache: KVCache) -> str:
    """The cache's platform; inside jit, where it is not known yet, the default device's."""
    if (spread := cache.spread or cache.part_of) is not None:
        return spread.platform
    return platform_of(buffer_of(cache)) or default_device().platform


def _checked_tree(cache: KVCache, tokens: int, ancestors: Ancestors) -> Array:
    """With a batch axis where the cache has one."""
    check_ancestors(cache, tokens, ancestors)
    check_tree(cache, "attend", tokens)
    if is_watched():
        raise ValueError(
            "attend: queries of tokens that form a tree are not observed, for a policy would score "
            "by those of all branches. Call the model itself, and evict after keep_path."
        )
    return jnp.broadcast_to(ancestors, (*cache.config.batch_shape, tokens, tokens))


def _check_call(
    cache: KVCache,
    queries: Array,
    window: int | None,
    softcap: float | None,
    sink_logits: Array | None,
) -> None:
    check_queries(cache, queries)
    heads = queries.shape[-2]
    if cache.spread is not None and heads % cache.spread.size("heads"):
        raise ValueError(
            f"attend: {heads} query heads cannot be split over the "
            f"{cache.spread.size('heads')} devices that share the heads of this cache. Let as many "
            "devices share them as divide their number, and others the batch or the context."
        )
    if window is not None:
        check_count("window", window)
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, got {softcap}.")
    if sink_logits is not None and sink_logits.shape != (heads,):
        raise ValueError(f"sink_logits must be [heads] = [{heads}], got {list(sink_logits.shape)}.")
