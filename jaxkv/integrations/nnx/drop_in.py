"""The drop-in module: Flax's parameters, and a jaxkv cache for ``decode=True``."""

from typing import Any

from flax import nnx
from jaxtyping import Array

from jaxkv.addressing import Addressing, Contiguous
from jaxkv.cache.kv_cache import NumTokens
from jaxkv.codecs import Codec
from jaxkv.integrations.attention import layer_config
from jaxkv.integrations.nnx.hook import CachedAttention


class MultiHeadAttention(nnx.MultiHeadAttention):
    """`flax.nnx.MultiHeadAttention`, whose ``decode=True`` is a jaxkv cache.

    Arguments, parameters and, without ``decode``, results are Flax's, so checkpoints load
    unchanged. `init_cache` (or `flax.nnx.view`) takes a codec and an addressing besides.

    >>> import jax.numpy as jnp, jaxkv
    >>> from flax import nnx
    >>> from jaxkv.integrations.nnx import MultiHeadAttention
    >>> attention = MultiHeadAttention(2, in_features=8, decode=True, rngs=nnx.Rngs(0))
    >>> attention.init_cache((3, 16, 8), codec=jaxkv.Int8())  # three sequences of 16 tokens
    >>> attention(jnp.ones((3, 5, 8))).shape  # Flax's own takes one token at a time
    (3, 5, 8)
    """

    def __init__(self, *arguments: Any, **fields: Any):
        super().__init__(*arguments, **fields)
        self.kv_attention: CachedAttention | None = nnx.data(None)

    def init_cache(  # type: ignore[override]
        self,
        input_shape: tuple[int, ...],
        dtype: Any = None,
        *,
        codec: Codec | None = None,
        addressing: Addressing = Contiguous(),
        **options: Any,
    ) -> None:
        """Allocate an empty cache.

        Args:
          input_shape: ``[*batch, max_context_length, features]``.
          dtype: of keys and values; the module's own if None.
          codec: how they are stored instead.
          addressing: which slot holds which token.
          **options: ``scale``, ``softcap``, ``window``, as in `jaxkv.attend`.
        """
        *batch, max_context_length, _ = input_shape
        config = layer_config(
            tuple(batch), max_context_length, self.num_kv_heads, self.head_dim,
            dtype or self.dtype or self.param_dtype, codec, addressing=addressing,
        )  # fmt: skip
        self.kv_attention = nnx.data(CachedAttention(config, **options))

    def set_view(  # type: ignore[override]
        self,
        deterministic: bool | None = None,
        decode: bool | None = None,
        batch_size: int | tuple[int, ...] | None = None,
        max_length: int | None = None,
        codec: Codec | None = None,
    ) -> None:
        """What `flax.nnx.view` calls: it allocates a cache where there is none.

        Args:
          deterministic: True for no dropout.
          decode: whether calls use the cache.
          batch_size: sequences, one number or one for each batch axis.
          max_length: tokens that one sequence may hold.
          codec: how keys and values are stored.
        """
        if deterministic is not None:
            self.deterministic = deterministic
        if decode is not None:
            self.decode = decode
        if decode and self.kv_attention is None:
            if batch_size is None or max_length is None:
                raise TypeError("A cache needs a size: pass batch_size= and max_length= too.")
            batch = (batch_size,) if isinstance(batch_size, int) else batch_size
            self.init_cache((*batch, max_length, self.in_features), codec=codec)

    def __call__(
        self,
        inputs_q: Array,
        inputs_k: Array | None = None,
        inputs_v: Array | None = None,
        *,
        mask: Array | None = None,
        num_tokens: NumTokens | None = None,
        deterministic: bool | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        out_sharding: Any = None,
        qkv_sharding: Any = None,
        **others: Any,
    ) -> Array:
        """As `flax.nnx.MultiHeadAttention`; with ``decode`` any number of tokens, after all before.

        Args:
          inputs_q, inputs_k, inputs_v: ``[*batch, tokens, features]``, as in Flax; while decoding
            of the same tokens, for cross-attention needs no cache.
          mask, num_tokens: as in `CachedAttention`, while decoding.
          deterministic, sow_weights, decode, out_sharding, qkv_sharding: as in Flax.
          **others: ``rngs`` and ``is_causal``, as in Flax. Decoding is causal without them.
        """
        if decode is None:
            decode = self.decode
        if not decode:
            return super().__call__(
                inputs_q, inputs_k, inputs_v, mask=mask, deterministic=deterministic,
                sow_weights=sow_weights, decode=decode, out_sharding=out_sharding,
                qkv_sharding=qkv_sharding, **others,
            )  # fmt: skip
        if self.kv_attention is None:
            raise ValueError("There is no cache to decode with: call init_cache first.")
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        query = self.query(inputs_q, out_sharding=qkv_sharding)
        key = self.key(inputs_k, out_sharding=qkv_sharding)
        value = self.value(inputs_v, out_sharding=qkv_sharding)
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        mixed = self.kv_attention(
            query, key, value, mask=mask, num_tokens=num_tokens, dropout_rate=self.dropout_rate,
            deterministic=self.deterministic if deterministic is None else deterministic,
            module=self if sow_weights else None,
        )  # fmt: skip
        return self.out(mixed, out_sharding=out_sharding)
