"""A module that holds its caches, as a model of `jaxkv.generate` and `jaxkv.Engine`."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array

from jaxkv.cache.hybrid import AnyCache, HybridConfig
from jaxkv.cache.verbs import next_positions
from jaxkv.integrations.nnx.hook import CachedAttention
from jaxkv.models.shape import Codecs, codec_of_each_layer


def _tokens_alone(model: Any, tokens: Array, positions: Array) -> Array:
    return model(tokens)


class AsModel(nnx.Module):
    """``model(tokens, cache) -> (logits, cache)`` of a module with `add_caches`.

    The caches that the module holds are of no use to it and stay as they are; give them a
    ``max_context_length`` of 1.

    Args:
      model: any module with `CachedAttention` in it.
      call: ``call(model, tokens, positions)`` gives its logits; ``model(tokens)`` if left out.

    Raises:
      ValueError: there is no `CachedAttention` in it, or layers are stacked for `flax.nnx.scan`.

    >>> import jaxkv
    >>> from flax import nnx
    >>> from jaxkv.integrations.nnx import AsModel, add_caches
    >>> class Model(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.tokens = nnx.Embed(256, 8, rngs=rngs)
    ...         self.positions = nnx.Embed(64, 8, rngs=rngs)
    ...         self.attention = nnx.MultiHeadAttention(2, in_features=8, rngs=rngs)
    ...
    ...     def __call__(self, tokens, positions):
    ...         x = self.attention(self.tokens(tokens) + self.positions(positions))
    ...         return self.tokens.attend(x)
    >>> model = Model(nnx.Rngs(0))
    >>> add_caches(model, max_context_length=1, batch_size=1)
    >>> model = AsModel(model, lambda model, tokens, positions: model(tokens, positions))
    >>> result = jaxkv.generate(model, [[72, 105]], max_new_tokens=3, max_context_length=64)
    >>> len(result.tokens[0])
    3
    """

    def __init__(
        self, model: nnx.Module, call: Callable[[Any, Array, Array], Array] = _tokens_alone
    ):
        self.model, self.call = model, call
        hooks = _hooks(model)
        if not hooks:
            raise ValueError(f"AsModel: no CachedAttention in this {type(model).__name__}.")
        if any(hook.cache.get_value().lengths.ndim > 1 for hook in hooks):
            raise ValueError(
                "AsModel: layers that are stacked for nnx.scan hold one cache for all, and a model "
                "of generate has one per layer. Give it layers in an nnx.List."
            )

    def cache_config(
        self,
        *,
        max_context_length: int,
        batch_size: int | None = None,
        codec: Codecs | None = None,
        **fields: Any,
    ) -> HybridConfig:
        """A cache for each attention module, as its own but for what is said here."""
        fields.pop("chunk", None)  # of windows, which these have not
        fields |= {"max_context_length": max_context_length, "batch_size": batch_size}
        groups = [hook.cache.get_value().config.replace(**fields) for hook in _hooks(self.model)]
        if codec is not None:
            codecs = codec_of_each_layer(codec, len(groups))
            groups = [group.replace(codec=own) for group, own in zip(groups, codecs, strict=True)]
        return HybridConfig(tuple(groups), tuple(range(len(groups))))

    def __call__(self, tokens: Array, cache: AnyCache) -> tuple[Array, AnyCache]:
        model = nnx.clone(self.model)  # of the trace at hand, where it may change
        hooks = _hooks(model)
        for hook, group in zip(hooks, cache.groups, strict=True):
            hook.cache.set_value(group)
        logits = self.call(model, tokens, next_positions(cache, tokens.shape[-1]))
        return logits, cache.with_groups([hook.cache.get_value() for hook in hooks])


def _hooks(model: nnx.Module) -> list[CachedAttention]:
    """Those that hold caches, in the order in which nnx finds them."""
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, CachedAttention)]
