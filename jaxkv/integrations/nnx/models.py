"""All caches of a model at once."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from jaxkv.addressing import Addressing, Contiguous
from jaxkv.codecs import Codec
from jaxkv.hybrid import AnyCache
from jaxkv.integrations.attention import layer_config
from jaxkv.integrations.nnx.hook import CachedAttention


def add_caches(
    model: nnx.Module,
    *,
    max_context_length: int,
    batch_size: int | None = None,
    codec: Codec | None = None,
    addressing: Addressing = Contiguous(),
    **options: Any,
) -> None:
    """Give every `flax.nnx.MultiHeadAttention` in a model a cache, in place.

    Args:
      model: any module that holds some.
      max_context_length: tokens that one sequence may hold.
      batch_size: sequences at once; None for a model without a batch axis.
      codec: how keys and values are stored; in the module's own dtype if None.
      addressing: which slot holds which token.
      **options: ``scale``, ``softcap``, ``window``, as in `jaxkv.attend`.

    Raises:
      ValueError: there is no such module in the model.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxkv.integrations.nnx import add_caches
    >>> model = nnx.Sequential(nnx.MultiHeadAttention(2, in_features=8, rngs=nnx.Rngs(0)))
    >>> add_caches(model, max_context_length=16, batch_size=1)
    >>> model(jnp.ones((1, 5, 8))).shape, model(jnp.ones((1, 1, 8))).shape
    ((1, 5, 8), (1, 1, 8))
    """
    modules = [module for _, module in nnx.iter_modules(model)]
    attentions = [each for each in modules if isinstance(each, nnx.MultiHeadAttention)]
    if not attentions:
        raise ValueError(f"No flax.nnx.MultiHeadAttention in this {type(model).__name__}.")
    for each in attentions:
        config = layer_config(
            () if batch_size is None else (batch_size,), max_context_length,
            each.num_kv_heads, each.head_dim, each.dtype or each.param_dtype, codec,
            addressing=addressing,
        )  # fmt: skip
        each.attention_fn = nnx.data(CachedAttention(config, **options))
        each.decode = False


def map_caches(function: Callable[[AnyCache], AnyCache], model: nnx.Module) -> None:
    """Apply a verb to every cache in a model, in place.

    Args:
      function: such as `jaxkv.reset`, `jaxkv.check`, or a partial `jaxkv.truncate`.
      model: any module; caches in variables and in attributes are found.

    >>> import jaxkv
    >>> from jaxkv.integrations.nnx import CachedAttention, map_caches
    >>> model = CachedAttention(jaxkv.KVCacheConfig(1, 16, num_kv_heads=2, head_dim=4))
    >>> map_caches(lambda cache: jaxkv.advance(cache, 3), model)
    >>> model.cache.get_value().lengths.tolist()
    3
    """
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Variable) and isinstance(variable.get_value(), AnyCache):
            variable.set_value(function(variable.get_value()))
    for _, module in nnx.iter_modules(model):
        for name, attribute in vars(module).items():
            if isinstance(attribute, AnyCache):
                setattr(module, name, function(attribute))
