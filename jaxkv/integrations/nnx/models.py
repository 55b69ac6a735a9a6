"""All caches of a model at once."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from jaxkv.addressing import Addressing, Contiguous
from jaxkv.cache.hybrid import AnyCache
from jaxkv.codecs import Codec
from jaxkv.integrations.attention import in_each_layer, layer_config, stacked
from jaxkv.integrations.nnx.hook import CachedAttention
from jaxkv.integrations.nnx.positions import warn_if_positions_restart


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

    Attention is causal from then on. Of an encoder-decoder model, pass the decoder's
    self-attention modules, one after the other: its encoder and cross-attention need no cache.
    Layers whose parameters are stacked on their first axis, for `flax.nnx.scan`, get caches
    stacked likewise.

    A model that numbers the tokens of each call from 0, as ``jnp.arange(tokens.shape[-1])`` does,
    would give every token that it decodes position 0; a `UserWarning` says so if the model takes
    tokens alone. Let it take positions, and pass those that the cache counts, as below.

    Args:
      model: any module that holds some.
      max_context_length: tokens that one sequence may hold.
      batch_size: sequences at once; None for a model without a batch axis.
      codec: how keys and values are stored; in the module's own dtype if None.
      addressing: which slot holds which token.
      **options: ``scale``, ``softcap``, ``window``, as in `jaxkv.attend`.

    Raises:
      ValueError: there is no such module in the model, one is cross-attention by its
        ``in_kv_features``, or layers are stacked on another axis than the first.

    >>> import jax.numpy as jnp, jaxkv
    >>> from flax import nnx
    >>> from jaxkv.integrations.nnx import add_caches
    >>> class Model(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.tokens = nnx.Embed(256, 8, rngs=rngs)
    ...         self.positions = nnx.Embed(16, 8, rngs=rngs)
    ...         self.attention = nnx.MultiHeadAttention(2, in_features=8, rngs=rngs)
    ...
    ...     def __call__(self, tokens, positions):
    ...         return self.attention(self.tokens(tokens) + self.positions(positions))
    >>> model = Model(nnx.Rngs(0))
    >>> add_caches(model, max_context_length=16, batch_size=1)
    >>> for tokens in (jnp.array([[72, 105, 33]]), jnp.array([[10]])):
    ...     cache = model.attention.attention_fn.cache.get_value()
    ...     positions = jaxkv.next_positions(cache, tokens.shape[-1])
    ...     print(positions, model(tokens, positions).shape)
    [[0 1 2]] (1, 3, 8)
    [[3]] (1, 1, 8)
    """
    modules = [module for _, module in nnx.iter_modules(model)]
    attentions = [each for each in modules if isinstance(each, nnx.MultiHeadAttention)]
    if not attentions:
        raise ValueError(
            f"No flax.nnx.MultiHeadAttention in this {type(model).__name__}. An attention class of "
            "your own calls jaxkv.append and jaxkv.attend itself, in some eight lines: see "
            'notebooks/2_bring_your_own_flax_model, "Your own attention class".'
        )
    stacks = [_stack(each) for each in attentions]
    for each, stack in zip(attentions, stacks, strict=True):
        config = layer_config(
            () if batch_size is None else (batch_size,), max_context_length,
            each.num_kv_heads, each.head_dim, each.dtype or each.param_dtype, codec,
            addressing=addressing,
        )  # fmt: skip
        hook = CachedAttention(config, **options)
        hook.cache.set_value(stacked(hook.cache.get_value(), stack))
        each.attention_fn = nnx.data(hook)
        each.decode = False
    warn_if_positions_restart(model, batch_size)


def _stack(attention: nnx.MultiHeadAttention) -> tuple[int, ...]:
    """How many layers a module stands for: none of its own, or those on its first axes."""
    if attention.in_kv_features != attention.in_features:
        raise ValueError(
            f"A MultiHeadAttention with in_features={attention.in_features} and "
            f"in_kv_features={attention.in_kv_features} is cross-attention, which needs no cache. "
            "Call add_caches for the decoder's self-attention modules alone."
        )
    shape = attention.key.kernel.shape
    one_layer = (attention.in_features, attention.num_kv_heads, attention.head_dim)
    if shape[-3:] != one_layer:
        raise ValueError(
            f"The key kernel of a MultiHeadAttention must be {list(one_layer)}, with axes of "
            f"stacked layers before them if any, got {list(shape)}. Stack layers on the first axis."
        )
    return shape[:-3]


def map_caches(function: Callable[[AnyCache], AnyCache], model: nnx.Module) -> None:
    """Apply a verb to every cache in a model, in place.

    Args:
      function: such as `jaxkv.reset`, `jaxkv.check`, or a partial `jaxkv.truncate`. Of caches
        that are stacked for `flax.nnx.scan` it is given one after the other.
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
            variable.set_value(in_each_layer(function, variable.get_value()))
    for _, module in nnx.iter_modules(model):
        for name, attribute in vars(module).items():
            if isinstance(attribute, AnyCache):
                setattr(module, name, in_each_layer(function, attribute))
