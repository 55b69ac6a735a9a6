"""The hook: what `flax.nnx.MultiHeadAttention` takes as its ``attention_fn``."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from jaxkv.cache.config import KVCacheConfig
from jaxkv.cache.kv_cache import NumTokens
from jaxkv.integrations.attention import cached_attention, one_layer, refuse_unserved


class CachedAttention(nnx.Module):
    """An ``attention_fn`` that keeps a cache: causal attention over all tokens so far.

    Given to `flax.nnx.MultiHeadAttention` with ``decode=False`` it takes the place of Flax's
    ``decode=True`` and ``init_cache``: prefill, chunks and single tokens, sequences of
    different lengths, fewer KV heads than query heads, any codec and addressing. Each
    attention module needs one of its own. Attention is always causal, whatever ``is_causal``, and
    cross-attention is refused. A model that embeds positions takes them as in `add_caches`.

    Args:
      config: the cache. One layer of it is allocated, whatever its ``num_layers``; its
        ``batch_size`` is the product of the model's batch axes, or None where it has none.
      scale, softcap, window: as in `jaxkv.attend`.

    Attributes:
      cache: the `jaxkv.KVCache`, in an `nnx.Cache` variable.

    >>> import jax.numpy as jnp, jaxkv
    >>> from flax import nnx
    >>> from jaxkv.integrations.nnx import CachedAttention
    >>> config = jaxkv.KVCacheConfig(1, 16, num_kv_heads=2, head_dim=4, batch_size=3)
    >>> attention = nnx.MultiHeadAttention(
    ...     num_heads=4, num_kv_heads=2, in_features=16, decode=False, rngs=nnx.Rngs(0),
    ...     attention_fn=CachedAttention(config),
    ... )
    >>> _ = attention(jnp.ones((3, 5, 16)))  # a prompt of five tokens
    >>> attention(jnp.ones((3, 1, 16))).shape  # and one more
    (3, 1, 16)
    >>> attention.attention_fn.cache.get_value().lengths.tolist()
    [6, 6, 6]
    """

    def __init__(
        self,
        config: KVCacheConfig,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
    ):
        self.cache = nnx.Cache(one_layer(config))
        self.scale, self.softcap, self.window = scale, softcap, window

    def __call__(
        self,
        query: Float[Array, "*batch tokens heads head_dim"],
        key: Float[Array, "*batch tokens kv_heads head_dim"],
        value: Float[Array, "*batch tokens kv_heads head_dim"],
        *,
        mask: Array | None = None,
        num_tokens: NumTokens | None = None,
        bias: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool | None = True,
        module: nnx.Module | None = None,
        **_: Any,
    ) -> Float[Array, "*batch tokens heads head_dim"]:
        """Append the tokens, attend to all so far, count them.

        Args:
          query, key, value: of the new tokens.
          mask: which of the new tokens are real, as `flax.nnx.make_attention_mask` or
            `make_causal_mask` write it: ``[batch, heads or 1, tokens, tokens]``, over the new
            tokens alone, padded on the right. Padding gives zeros.
          num_tokens: the same as a number for each sequence.
          bias, dropout_rate, deterministic, module: refused where they ask for what a cache
            cannot do.

        Raises:
          CacheFullError: outside jit, when there is no room. Inside jit the tokens are
            dropped, and ``map_caches(jaxkv.check, model)`` says so.
          ValueError: keys of another length than the queries, a mask that is not causal or
            padded on the left (inside jit its output is NaN), a bias, dropout, or weights to sow.
        """
        refuse_unserved(bias, dropout_rate, deterministic, module is not None)
        output, cache = cached_attention(
            self.cache.get_value(), query, key, value,
            mask=mask, num_tokens=num_tokens,
            scale=self.scale, softcap=self.softcap, window=self.window,
        )  # fmt: skip
        self.cache.set_value(cache)
        return output
