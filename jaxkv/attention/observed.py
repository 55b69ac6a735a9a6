"""A model's queries, for policies that score tokens by them: seen where it calls `attend`."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.kv_cache import KVCache, Layer, NumTokens
from jaxkv.devices import is_concrete


class Call(NamedTuple):
    """One call of `attend`: its cache holds the keys and values of the same tokens."""

    cache: KVCache
    queries: Float[Array, "*batch tokens heads head_dim"]
    layer: Layer
    num_tokens: NumTokens | None


_calls: contextvars.ContextVar[list[Call] | None] = contextvars.ContextVar("calls", default=None)


def notify(call: Call) -> None:
    """Add a call to those that are being watched for, if any are."""
    if (calls := _calls.get()) is not None:
        if not is_concrete(call.layer):
            raise TypeError(
                "The queries of a model that scans over its layers cannot be observed: attend was "
                "called with a traced layer. Give the policy its queries yourself, as "
                "[layers, *batch, window, heads, head_dim]."
            )
        calls.append(call)


def is_watched() -> bool:
    """Are calls being watched for? Then none may be hidden in a jitted function's own trace."""
    return _calls.get() is not None


@contextlib.contextmanager
def watch() -> Iterator[list[Call]]:
    """The calls of `attend` inside the block, in order. Use it inside what is jitted."""
    calls: list[Call] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


def observed(
    model: Callable[..., tuple[Array, AnyCache]], *, window: int | None = None
) -> Callable[..., tuple[Array, AnyCache, Float[Array, "layers *batch window heads head_dim"]]]:
    """The same model, which returns its queries too: ``(logits, cache, queries)``.

    Args:
      model: ``model(tokens, cache, ...) -> (logits, cache)`` that calls `attend` once a layer,
        with a static layer. Jit the result rather than the model.
      window: how many queries to return, the newest ones; as many as tokens if None. All of a
        long prompt's are larger than its keys and values.

    Returns:
      A function whose third output is ``[layers, *batch, window, heads, head_dim]``, float32, or
      a list of layers if these differ in heads. In a batch padded on the right (``num_tokens``)
      each sequence's last query is its last token's.

    >>> import jax.numpy as jnp, jaxkv
    >>> def model(tokens, cache):
    ...     vectors = jnp.ones((len(tokens), 1, 4))
    ...     cache = jaxkv.append(cache, vectors, vectors, layer=0)
    ...     return jaxkv.attend(cache, vectors, layer=0), jaxkv.advance(cache, len(tokens))
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(1, 8, num_kv_heads=1, head_dim=4))
    >>> _, cache, queries = observed(model, window=2)(jnp.arange(3), cache)
    >>> queries.shape
    (1, 2, 1, 4)
    """

    def run(*arguments: Any, **options: Any) -> tuple[Array, AnyCache, Any]:
        with watch() as calls:
            logits, cache = model(*arguments, **options)
        _check_order(calls, cache)
        newest = [_newest(call, window) for call in calls]
        alike = len({queries.shape for queries in newest}) == 1
        return logits, cache, jnp.stack(newest) if alike else newest

    return run


def _check_order(calls: list[Call], cache: AnyCache) -> None:
    """Layers one after the other, each once; those of a hybrid cache count within their group."""
    config, layers = cache.config, [call.layer for call in calls]
    expected = [config.locate(layer)[1] for layer in range(config.num_layers)]
    if layers != expected:
        raise ValueError(
            f"observed: expected one call of attend a layer, in order, got layers {layers} of "
            f"{config.num_layers}."
        )


def _newest(call: Call, window: int | None) -> Array:
    queries = call.queries.astype(jnp.float32)
    tokens = queries.shape[-3]
    if call.num_tokens is not None:  # the newest real one to the end
        padding = tokens - jnp.broadcast_to(
            jnp.asarray(call.num_tokens), call.cache.config.batch_shape
        )
        roll = lambda rows, shift: jnp.roll(rows, shift, axis=0)  # noqa: E731
        queries = (jax.vmap(roll) if padding.ndim else roll)(queries, padding)
    return queries[..., tokens - min(window or tokens, tokens) :, :, :]
