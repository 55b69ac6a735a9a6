"""jaxkv in Flax linen: a hook for attention modules, and a drop-in one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxkv.addressing import Addressing, Contiguous
from jaxkv.cache.config import KVCacheConfig
from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.kv_cache import NumTokens
from jaxkv.codecs import Codec
from jaxkv.integrations.attention import (
    cached_attention,
    in_each_layer,
    layer_config,
    one_layer,
    refuse_unserved,
)

try:
    from flax import linen as nn
except ImportError as error:
    raise ImportError(
        "jaxkv.integrations.linen needs Flax, which is not installed: pip install 'flax>=0.12.8'"
    ) from error

__all__ = ["CachedAttention", "MultiHeadDotProductAttention", "map_caches"]


class CachedAttention(nn.Module):
    """An ``attention_fn`` that keeps a cache: causal attention over all tokens so far.

    Given to `flax.linen.MultiHeadDotProductAttention` with ``decode=False`` it takes the place
    of Flax's ``decode=True``: prefill, chunks and single tokens, sequences of different
    lengths, any codec and addressing; fewer KV heads than query heads where a module of your
    own projects so. The cache stands in the collection ``cache``, so calls say
    ``mutable=["cache"]``; ``init`` leaves it empty. Each attention module needs one of its own.
    Cross-attention is refused.

    A model that embeds positions must not number the tokens of each call from 0, as
    ``jnp.arange(tokens.shape[-1])`` does: let it take positions, and pass
    ``jaxkv.next_positions`` of any of its caches, as below.

    Attributes:
      config: the cache. One layer of it is allocated, whatever its ``num_layers``; its
        ``batch_size`` is the product of the model's batch axes, or None where it has none.
      scale, softcap, window: as in `jaxkv.attend`.

    >>> import jax, jax.numpy as jnp, jaxkv
    >>> from flax import linen as nn
    >>> from jaxkv.integrations.linen import CachedAttention
    >>> config = jaxkv.KVCacheConfig(1, 16, num_kv_heads=2, head_dim=4, batch_size=1)
    >>> class Model(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, tokens, positions):
    ...         x = nn.Embed(256, 8)(tokens) + nn.Embed(16, 8)(positions)
    ...         hook = CachedAttention(config, name="hook")
    ...         return nn.MultiHeadDotProductAttention(2, attention_fn=hook)(x)
    >>> model, tokens = Model(), jnp.array([[72, 105, 33]])
    >>> variables = model.init(jax.random.key(0), tokens, tokens)
    >>> for tokens in (jnp.array([[72, 105, 33]]), jnp.array([[10]])):
    ...     cache = variables["cache"]["hook"]["kv_cache"]
    ...     positions = jaxkv.next_positions(cache, tokens.shape[-1])
    ...     output, changed = model.apply(variables, tokens, positions, mutable=["cache"])
    ...     variables |= changed
    ...     print(positions, output.shape)
    [[0 1 2]] (1, 3, 8)
    [[3]] (1, 1, 8)
    """

    config: KVCacheConfig
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "*batch tokens heads head_dim"],
        key: Float[Array, "*batch tokens kv_heads head_dim"],
        value: Float[Array, "*batch tokens kv_heads head_dim"],
        mask: Array | None = None,
        num_tokens: NumTokens | None = None,
        bias: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool | None = True,
        module: nn.Module | None = None,
    ) -> Float[Array, "*batch tokens heads head_dim"]:
        """Append the tokens, attend to all so far, count them.

        Args:
          query, key, value: of the new tokens.
          mask: which of the new tokens are real, as `flax.linen.make_attention_mask` or
            `make_causal_mask` write it: ``[batch, heads or 1, tokens, tokens]``, over the new
            tokens alone, padded on the right. Padding gives zeros.
          num_tokens: the same as a number for each sequence.
          bias, dropout_rate, deterministic, module: refused where they ask for what a cache
            cannot do.

        Raises:
          CacheFullError: outside jit, when there is no room. Inside jit the tokens are
            dropped, and ``map_caches(jaxkv.check, variables["cache"])`` says so.
          ValueError: keys of another length than the queries, a mask that is not causal or
            padded on the left (inside jit its output is NaN), a bias, dropout, or weights to sow.
        """
        refuse_unserved(bias, dropout_rate, deterministic, module is not None)
        held = self.variable("cache", "kv_cache", one_layer, self.config)
        output, cache = cached_attention(
            held.value, query, key, value, mask=mask, num_tokens=num_tokens,
            scale=self.scale, softcap=self.softcap, window=self.window,
        )  # fmt: skip
        if not self.is_initializing():
            held.value = cache
        return output


class MultiHeadDotProductAttention(nn.MultiHeadDotProductAttention):
    """`flax.linen.MultiHeadDotProductAttention`, whose ``decode=True`` is a jaxkv cache.

    Fields, parameters and, without ``decode``, results are Flax's, so checkpoints load
    unchanged. As there, an ``init`` with as many tokens as the longest sequence will have
    sizes the cache; with ``max_context_length`` any input does, and ``init`` is not needed.
    Positions are as in `CachedAttention`, and cross-attention goes without ``decode``.

    Attributes:
      max_context_length: tokens that one sequence may hold; as many as ``init`` was given if
        None.
      codec: how keys and values are stored; in their own dtype if None.
      addressing: which slot holds which token.
      scale, softcap, window: as in `jaxkv.attend`, while decoding.

    >>> import jax, jax.numpy as jnp, jaxkv
    >>> from jaxkv.integrations.linen import MultiHeadDotProductAttention
    >>> attention = MultiHeadDotProductAttention(2, decode=True, codec=jaxkv.Int8())
    >>> variables = attention.init(jax.random.key(0), jnp.ones((3, 16, 8)))
    >>> output, changed = attention.apply(variables, jnp.ones((3, 5, 8)), mutable=["cache"])
    >>> changed["cache"]["kv_cache"].lengths.tolist()
    [5, 5, 5]
    """

    max_context_length: int | None = None
    codec: Codec | None = None
    addressing: Addressing = Contiguous()
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None

    @nn.compact
    def __call__(  # type: ignore[override]
        self, *inputs: Array, num_tokens: NumTokens | None = None, **options: Any
    ) -> Array:
        """As Flax's own; with ``decode`` any number of tokens, after all before.

        Args:
          *inputs: queries, and keys and values if they are others: ``[*batch, tokens, features]``;
            while decoding of the same tokens.
          num_tokens: how many of the tokens are real, while decoding, as in `jaxkv.append`.
          **options: Flax's own. While decoding a ``mask`` is as in `CachedAttention`.
        """
        if not self.decode:
            return super().__call__(*inputs, **options)

        def attention(
            query: Array,
            key: Array,
            value: Array,
            mask: Array | None = None,
            dropout_rate: float = 0.0,
            deterministic: bool = True,
            module: nn.Module | None = None,
        ) -> Array:
            refuse_unserved(None, dropout_rate, deterministic, module is not None)
            if not self.is_initializing() and not self.has_variable("cache", "kv_cache"):
                self._need_a_length()
            held = self.variable("cache", "kv_cache", lambda: one_layer(self._config(key)))
            output, cache = cached_attention(
                held.value, query, key, value, mask=mask, num_tokens=num_tokens,
                scale=self.scale, softcap=self.softcap, window=self.window,
            )  # fmt: skip
            if not self.is_initializing():
                held.value = cache
            return output

        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(nn.MultiHeadDotProductAttention)
            if field.name not in ("parent", "name", "decode", "attention_fn")
        }
        plain = nn.MultiHeadDotProductAttention(**fields, attention_fn=attention)
        nn.share_scope(self, plain)  # its parameters are this module's own
        return plain(*inputs, **options)

    def _need_a_length(self) -> None:
        if self.max_context_length is None:
            raise ValueError(
                "There is no cache to decode with, and its length is not known: pass the "
                '"cache" that init returned, or set max_context_length.'
            )

    def _config(self, key: Array) -> KVCacheConfig:
        *batch, tokens, kv_heads, head_dim = key.shape
        return layer_config(
            tuple(batch), self.max_context_length or tokens, kv_heads, head_dim,
            key.dtype, self.codec, addressing=self.addressing,
        )  # fmt: skip


def map_caches(function: Callable[[AnyCache], AnyCache], variables: Any) -> Any:
    """Apply a verb to every cache among variables, and return them with the new ones.

    Args:
      function: such as `jaxkv.reset`, `jaxkv.check`, or a partial `jaxkv.truncate`. Of caches
        that are stacked by `flax.linen.scan` it is given one after the other.
      variables: any pytree, such as what ``apply(..., mutable=["cache"])`` returned.

    >>> import functools, jaxkv
    >>> from jaxkv.integrations.linen import map_caches
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(1, 16, num_kv_heads=2, head_dim=4))
    >>> variables = {"cache": {"kv_cache": jaxkv.advance(cache, 5)}}
    >>> variables = map_caches(functools.partial(jaxkv.truncate, length=3), variables)
    >>> variables["cache"]["kv_cache"].lengths.tolist()
    3
    """

    def is_cache(node: Any) -> bool:
        return isinstance(node, AnyCache)

    return jax.tree.map(
        lambda node: in_each_layer(function, node) if is_cache(node) else node,
        variables,
        is_leaf=is_cache,
    )
