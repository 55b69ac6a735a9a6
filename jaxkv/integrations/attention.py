"""What the hooks of both Flax libraries do with a call: check it, append, attend, advance."""

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxkv.attention import attend
from jaxkv.attention.observed import is_watched
from jaxkv.cache.checks import check_alive, check_counts, check_room
from jaxkv.cache.config import KVCacheConfig
from jaxkv.cache.create import create
from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.kv_cache import KVCache, NumTokens
from jaxkv.cache.verbs import advance, append
from jaxkv.codecs import Codec, Dense
from jaxkv.devices import is_concrete
from jaxkv.programs import promotes_ranks


def one_layer(config: KVCacheConfig) -> KVCache:
    """An empty cache of one layer, whatever the config's number of them."""
    return create(dataclasses.replace(config, num_layers=1))


def layer_config(
    batch: tuple[int, ...], max_context_length: int, kv_heads: int, head_dim: int,
    dtype: Any, codec: Codec | None, **fields: Any,
) -> KVCacheConfig:  # fmt: skip
    """The cache that one attention module needs, in its own dtype if no codec is named."""
    return KVCacheConfig(
        1, max_context_length, kv_heads, head_dim,
        batch_size=math.prod(batch) if batch else None,
        codec=codec or Dense(jnp.dtype(dtype).name), **fields,
    )  # fmt: skip


def stacked(cache: KVCache, shape: tuple[int, ...]) -> KVCache:
    """One such cache for each of the layers whose parameters stand in one array, as for a scan."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*shape, *leaf.shape)), cache)


def in_each_layer(function: Callable[[AnyCache], AnyCache], cache: AnyCache) -> AnyCache:
    """Apply a verb to a cache, or to each of those that are `stacked`."""
    if cache.lengths.ndim == len(cache.config.batch_shape):
        return function(cache)
    layers = [
        in_each_layer(function, jax.tree.map(operator.itemgetter(number), cache))
        for number in range(len(cache.lengths))
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


@promotes_ranks
def cached_attention(
    cache: KVCache,
    query: Float[Array, "*batch tokens heads head_dim"],
    key: Float[Array, "*batch tokens kv_heads head_dim"],
    value: Float[Array, "*batch tokens kv_heads head_dim"],
    *,
    mask: Array | None = None,
    num_tokens: NumTokens | None = None,
    **options: Any,
) -> tuple[Float[Array, "*batch tokens heads head_dim"], KVCache]:
    """One layer's attention over its own cache, which has counted the tokens when it returns.

    Flax allows any number of batch axes. They are one for the cache, whose ``batch_size`` is
    their product. ``options`` are those of `jaxkv.attend`.
    """
    *batch, tokens, _, _ = query.shape
    if {key.shape[-3], value.shape[-3]} != {tokens}:
        raise ValueError(
            f"Queries are of {tokens} tokens, keys of {key.shape[-3]}, values of "
            f"{value.shape[-3]}: this is cross-attention, and a cache is for causal "
            "self-attention, where each token brings its own key. Leave this module without "
            "one, and the encoder's: give caches to the decoder's self-attention modules alone."
        )
    sound = None
    if mask is not None:
        if num_tokens is not None:
            raise ValueError("Both mask and num_tokens were given. Say once which tokens are real.")
        num_tokens, sound = _real_tokens(mask, tuple(batch), tokens)
    if cache.config.batch_size is not None and math.prod(batch) == cache.config.batch_size:
        query, key, value = (
            vectors.reshape(-1, *vectors.shape[-3:]) for vectors in (query, key, value)
        )
        if num_tokens is not None and jnp.ndim(num_tokens) > 1:
            num_tokens = jnp.reshape(num_tokens, -1)
    check_alive(cache)
    check_counts(cache, "num_tokens", num_tokens, most=tokens)
    check_room(cache, tokens if num_tokens is None else num_tokens)
    step = _step if is_watched() else _jitted_step
    output, cache = step(cache, query, key, value, num_tokens, **options)
    output = output.reshape(*batch, *output.shape[-3:])
    if sound is not None:
        output = jnp.where(sound[..., None, None, None], output, jnp.nan)
    return output, cache


def _step(
    cache: KVCache,
    query: Array,
    key: Array,
    value: Array,
    num_tokens: NumTokens | None,
    **options: Any,
) -> tuple[Array, KVCache]:
    cache = append(cache, key, value, layer=0, num_tokens=num_tokens, queries=query)
    output = attend(cache, query, layer=0, num_tokens=num_tokens, **options)
    return output, advance(cache, key.shape[-3] if num_tokens is None else num_tokens)


# Outside jit each operation would be compiled by itself, some sixty for every new shape.
_jitted_step = jax.jit(_step, static_argnames=("scale", "softcap", "window"))


def _real_tokens(
    mask: Array, batch: tuple[int, ...], tokens: int
) -> tuple[Int[Array, "*batch"], Bool[Array, "*batch"]]:
    """How many tokens a mask leaves, and whether it is causal and padded on the right."""
    if mask.ndim < 3 or mask.shape[-2:] != (tokens, tokens):
        raise ValueError(
            f"mask must be over the {tokens} new tokens, [batch, heads or 1, {tokens}, {tokens}], "
            f"got {list(mask.shape)}. The tokens before them are known to the cache: leave the "
            "mask out, or pass one that says which of the new tokens are padding."
        )
    seen = jnp.broadcast_to(mask, (*batch, *mask.shape[-3:])).astype(bool)
    count = seen.any((-3, -2)).sum(-1, dtype=jnp.int32)
    queries, keys = (
        jnp.arange(tokens, dtype=jnp.int32)[:, None],
        jnp.arange(tokens, dtype=jnp.int32),
    )
    needed = (keys <= queries) & (queries < count[..., None, None])
    sound = (seen | ~needed[..., None, :, :]).all((-3, -2, -1))
    if is_concrete(sound) and not np.asarray(sound).all():
        raise ValueError(
            "A cache attends causally, and pads on the right: this mask hides a token from a "
            "later one, or has padding before a token. Inside jit the output would be NaN."
        )
    return count, sound


def refuse_unserved(
    bias: Array | None, dropout_rate: float, deterministic: bool | None, sow_weights: bool
) -> None:
    """Refuse what Flax's attention can do and a cache cannot, rather than leave it out."""
    if bias is not None:
        raise ValueError("A cache attends without a bias, got one. Leave bias out.")
    if dropout_rate > 0 and not deterministic:
        raise ValueError(
            f"There is no dropout over a cache, got dropout_rate={dropout_rate} and "
            f"deterministic={deterministic}. Pass deterministic=True."
        )
    if sow_weights:
        raise ValueError("Attention over a cache has no weights to sow. Leave sow_weights out.")
