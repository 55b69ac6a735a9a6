"""Reading the cache: one verb, and a table of implementations that can serve it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkv.attention.blockwise import KEY_BLOCK, blockwise
from jaxkv.attention.mosaic import cannot_serve as mosaic_cannot_serve
from jaxkv.attention.mosaic import mosaic
from jaxkv.attention.mosaic import should_not_serve as mosaic_should_not_serve
from jaxkv.attention.native import cannot_serve as native_cannot_serve
from jaxkv.attention.native import native
from jaxkv.attention.native import should_not_serve as native_should_not_serve
from jaxkv.attention.observed import Call, notify
from jaxkv.attention.products import sums_in_place
from jaxkv.attention.reference import reference
from jaxkv.attention.request import Grouped, Request, request_of
from jaxkv.attention.streamed import cannot_serve as streamed_cannot_serve
from jaxkv.attention.streamed import is_streamed, streamed
from jaxkv.cache import real_of
from jaxkv.checks import check_counts
from jaxkv.codecs import Dense, unrotate
from jaxkv.hybrid import AnyCache, HybridCache, in_its_group
from jaxkv.kv_cache import KVCache, Layer, NumTokens
from jaxkv.text import format_bytes

# Scores that the reference form may hold at once, in bytes.
_REFERENCE_LIMIT = 64 << 20


class Implementation(NamedTuple):
    """A way to serve `attend`.

    Attributes:
      run: the function.
      cannot_serve: why it cannot serve ``(cache, tokens)``, or None.
      should_not_serve: why ``(cache, tokens, heads)`` is better left to the next, or None.
      reads_host_memory: whether it can serve caches that are there.
      turns: whether it turns queries and outputs itself, as the codec wants.
    """

    run: Callable[[Request], Grouped]
    cannot_serve: Callable[[KVCache, int], str | None]
    should_not_serve: Callable[[KVCache, int, int], str | None]
    reads_host_memory: bool = False
    turns: bool = False


def _no_reason(cache: KVCache, tokens: int, heads: int = 0) -> str | None:
    return None


def _reference_is_wasteful(cache: KVCache, tokens: int, heads: int) -> str | None:
    extent = cache.index.extent
    scores = 4 * math.prod(cache.config.batch_shape) * heads * tokens * extent
    if scores > _REFERENCE_LIMIT:
        return f"its scores would take {format_bytes(scores)}"
    group = heads // cache.config.num_kv_heads
    if not isinstance(cache.config.codec, Dense) and not sums_in_place(tokens, group):
        return f"it would decode the whole {cache.config.codec.name} layer"
    if jax.default_backend() == "cpu" and extent > KEY_BLOCK:
        return f"on a CPU it reads all {extent} slots, blockwise only those in use"
    return None


# The first that can and should, serves; blockwise always can, but for host memory.
IMPLEMENTATIONS: dict[str, Implementation] = {
    # On a CPU host memory is the memory that it reads.
    "native": Implementation(native, native_cannot_serve, native_should_not_serve, True),
    "mosaic": Implementation(mosaic, mosaic_cannot_serve, mosaic_should_not_serve, turns=True),
    "reference": Implementation(reference, _no_reason, _reference_is_wasteful),
    # Outside jit a scan is compiled anew on each call; under a jit of its own, once.
    "blockwise": Implementation(jax.jit(blockwise), _no_reason, _no_reason),
    "streamed": Implementation(jax.jit(streamed), streamed_cannot_serve, _no_reason, True),
}


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
    sinks: Float[Array, " heads"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch tokens heads head_dim"]:
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
      sinks: a learned logit a head that takes probability and gives nothing (gpt-oss).
      implementation: a name in `IMPLEMENTATIONS`; None picks the first that can serve, see
        `explain`. A named one is used or an error, never replaced.

    Returns:
      The attention output, of the queries' shape and dtype. Zeros for a query that sees nothing.

    Raises:
      IndexError, TypeError, ValueError: a bad layer, dtype, shape or option.

    >>> import jax.numpy as jnp, jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(1, 8, num_kv_heads=1, head_dim=4))
    >>> keys = values = jnp.ones((3, 1, 4))
    >>> cache = jaxkv.append(cache, keys, values, layer=0)
    >>> jaxkv.attend(cache, jnp.ones((3, 2, 4)), layer=0).shape
    (3, 2, 4)
    """
    _check_call(cache, queries, window, softcap, sinks)
    *_, tokens, heads, _ = queries.shape
    check_counts(cache, "num_tokens", num_tokens, most=tokens)
    num_tokens = real_of(cache, tokens, num_tokens)
    name = implementation or _choose(cache, tokens, heads)
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {name!r}."
        )
    if reason := _cannot_serve(name, cache, tokens):
        raise ValueError(f"implementation {name!r} cannot serve this call: {reason}.")

    notify(Call(cache, queries, layer, num_tokens))
    if tokens == 0:
        return queries
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window, "sinks": sinks}
    chosen = IMPLEMENTATIONS[name]
    request = request_of(cache, queries, layer, num_tokens, turn=not chosen.turns, **options)
    output = chosen.run(request)
    if not chosen.turns:
        output = unrotate(cache.config.codec, output)
    return jnp.moveaxis(output, 1, 2).reshape(queries.shape).astype(queries.dtype)


def explain(cache: AnyCache, *, tokens: int = 1, heads: int | None = None) -> str:
    """Which implementation `attend` picks for a call of this shape, and why not each other one.

    Args:
      tokens: queries of each sequence: 1 for decode, more for prefill.
      heads: query heads; as many as KV heads if None.

    >>> import jaxkv
    >>> print(jaxkv.explain(jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4)), tokens=2))
    native: not used, it serves one token a sequence, and this call has 2
    mosaic: not used, it reads on a Hopper GPU, and the backend is cpu
    reference: used
    blockwise: not needed, reference comes first
    streamed: not used, the cache is on the device
    """
    if isinstance(cache, HybridCache):
        groups = (
            f"group {number}, {group.config.addressing.name}:\n"
            + explain(group, tokens=tokens, heads=heads)
            for number, group in enumerate(cache.groups)
        )
        return "\n".join(groups)
    heads = heads or cache.config.num_kv_heads
    chosen = _choose(cache, tokens, heads)
    lines = []
    for name in IMPLEMENTATIONS:
        if name == chosen:
            verdict = "used"
        elif reason := _reason_against(name, cache, tokens, heads):
            verdict = f"not used, {reason}"
        else:
            verdict = f"not needed, {chosen} comes first"
        lines.append(f"{name}: {verdict}")
    return "\n".join(lines)


def _choose(cache: KVCache, tokens: int, heads: int) -> str:
    reasons = {name: _reason_against(name, cache, tokens, heads) for name in IMPLEMENTATIONS}
    for name, reason in reasons.items():
        if not reason:
            return name
    raise ValueError(f"no implementation can serve this call: {reasons}.")


def _reason_against(name: str, cache: KVCache, tokens: int, heads: int) -> str | None:
    return _cannot_serve(name, cache, tokens) or IMPLEMENTATIONS[name].should_not_serve(
        cache, tokens, heads
    )


def _cannot_serve(name: str, cache: KVCache, tokens: int) -> str | None:
    if is_streamed(cache) and name != "streamed":
        if not IMPLEMENTATIONS[name].reads_host_memory:
            return "the cache is in host memory"
        if cache.resident is not None and cache.resident.bounds is not None:
            return "it reads all blocks, and this cache's placement chooses"
    if cache.newest is not None and name not in ("native", "blockwise", "streamed"):
        return "the newest tokens are in a cache of their own"
    return IMPLEMENTATIONS[name].cannot_serve(cache, tokens)


def _check_call(
    cache: KVCache,
    queries: Array,
    window: int | None,
    softcap: float | None,
    sinks: Array | None,
) -> None:
    config = cache.config
    if not jnp.issubdtype(queries.dtype, jnp.floating):
        raise TypeError(f"queries must be a float array, got {queries.dtype}.")
    shape, axes = (
        queries.shape,
        ["batch"] * len(config.batch_shape) + ["tokens", "heads", "head_dim"],
    )
    fits = (
        len(shape) == len(axes)
        and shape[:-3] == config.batch_shape
        and shape[-1] == config.head_dim
        and shape[-2] % config.num_kv_heads == 0
    )
    if not fits:
        expected = [
            *config.batch_shape,
            "tokens",
            f"a multiple of {config.num_kv_heads}",
            config.head_dim,
        ]
        raise ValueError(
            f"queries must be [{', '.join(axes)}] = [{', '.join(map(str, expected))}], "
            f"got {list(shape)}."
        )
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be an int of at least 1 token, got {window!r}.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, got {softcap}.")
    if sinks is not None and sinks.shape != (shape[-2],):
        raise ValueError(f"sinks must be [heads] = [{shape[-2]}], got {list(sinks.shape)}.")
