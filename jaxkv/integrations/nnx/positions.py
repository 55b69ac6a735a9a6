"""A warning for models that number the tokens of each call from 0: over a cache that is wrong."""

import inspect
import warnings
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxkv.cache.verbs import advance
from jaxkv.integrations.nnx.hook import CachedAttention

# In the names of parameters that say where a call's tokens stand.
_SAYS_WHERE = ("pos", "offset", "start", "index", "idx", "step", "length")


class _OnlyCounts(CachedAttention):
    """In place of attention: each token gets its own query back, so tokens do not mix."""

    def __init__(self, cache: nnx.Cache[Any]) -> None:
        self.cache = cache

    def __call__(self, query: Any, key: Any, value: Any, **_: Any) -> Any:
        cache = self.cache.get_value()
        self.cache.set_value(advance(cache, query.shape[-3]))
        return query


def warn_if_positions_restart(model: nnx.Module, batch_size: int | None) -> None:
    """Warn of a model with caches that computes positions from the number of tokens in a call.

    Nothing is known of models that take anything but tokens, and nothing is said of them.
    """
    parameters = inspect.signature(type(model).__call__).parameters
    if any(part in name for name in parameters for part in _SAYS_WHERE):
        return
    shape = (2,) if batch_size is None else (batch_size, 2)
    try:
        restart = _positions_restart(model, jnp.broadcast_to(jnp.array([0, 1], jnp.int32), shape))
    except Exception:
        return
    if restart:
        warnings.warn(
            f"{type(model).__name__} treats a token in a call of its own as it treats the first "
            "one of all: it seems to compute positions from the number of tokens it is given, as "
            "jnp.arange(tokens.shape[-1]) does. Over a cache every decoded token would be at "
            "position 0. Let the model take positions, and pass jaxkv.next_positions of a cache: "
            "see jaxkv.integrations.nnx.add_caches.",
            stacklevel=3,
        )


def _positions_restart(model: nnx.Module, tokens: jax.Array) -> bool:
    """Is the second of two tokens another one in a call of its own, by more than rounding?"""
    (both,) = _outputs(model, tokens)
    first, second = _outputs(model, tokens[..., :1], tokens[..., 1:])
    if both.shape[-2] != 2 or first.shape[-2] != 1:
        return False
    rounding = np.abs(both[..., :1, :] - first).max()
    difference = np.abs(both[..., 1:, :] - second).max()
    return bool(difference > 10 * rounding + 1e-3 * np.abs(both).max())


def _outputs(model: nnx.Module, *calls: jax.Array) -> list[np.ndarray]:
    """What a copy of the model gives in calls one after the other, without attention."""
    probe = nnx.clone(model)
    probe.eval()
    for _, module in list(nnx.iter_modules(probe)):
        if isinstance(module, nnx.MultiHeadAttention):
            module.attention_fn = nnx.data(
                _OnlyCounts(cast(CachedAttention, module.attention_fn).cache)
            )
    outputs = [jax.tree.leaves(probe(tokens))[0] for tokens in calls]
    return [np.asarray(output, np.float32) for output in outputs]
