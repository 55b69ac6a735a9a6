"""Tokens of one step that form a tree: guesses of what comes next, and of what comes after each."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxkv.cache.kv_cache import KVCache
from jaxkv.devices import is_concrete
from jaxkv.errors import ConfigError

# ``ancestors[i, j]``: is token j of the step an ancestor of token i?
Ancestors = Bool[Array, "... tokens tokens"]


def with_itself(ancestors: Ancestors) -> Ancestors:
    """Which tokens of the step each token sees. None comes before its ancestors."""
    tokens = np.arange(ancestors.shape[-1])
    before, itself = tokens[:, None] > tokens, tokens[:, None] == tokens
    return (jnp.asarray(ancestors) & jnp.asarray(before)) | jnp.asarray(itself)


def depths_of(ancestors: Ancestors) -> Int[Array, "... tokens"]:
    """How many ancestors each token has: its position, counted from the first of the step."""
    return with_itself(ancestors).sum(axis=-1, dtype=jnp.int32) - 1


def check_ancestors(cache: Any, tokens: int, ancestors: Ancestors) -> None:
    """Refuse what says nothing of ``tokens`` tokens, or has one before its ancestor.

    Raises:
      TypeError, ValueError: such ancestors.
    """
    given: Any = ancestors if isinstance(ancestors, jax.Array) else np.asarray(ancestors)
    if given.dtype != jnp.bool_:
        raise TypeError(f"ancestors must be a bool array, got {given.dtype}.")
    shapes = {(tokens, tokens), (*cache.config.batch_shape, tokens, tokens)}
    if given.shape not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in sorted(shapes, key=len))
        raise ValueError(
            f"ancestors must be bool [tokens, tokens], for each sequence if they differ, {allowed} "
            f"here; got {list(given.shape)}."
        )
    if not is_concrete(ancestors):
        return
    later = np.argwhere(np.triu(np.asarray(jax.device_get(given)), 1))
    if later.size:
        *_, token, other = later[0].tolist()
        raise ValueError(
            f"ancestors: token {other} of the step is said to be an ancestor of token {token}, "
            "which comes before it. Put each token after its ancestors."
        )


def check_tree(cache: KVCache, verb: str, tokens: int) -> None:
    """Refuse caches in which tokens that were not accepted would leave something behind.

    Raises:
      ConfigError: such a cache.
    """
    config = cache.config
    spread = cache.spread or cache.part_of
    beside = [("newest=", cache.newest.index.extent)] if cache.newest is not None else []
    if cache.resident is not None:
        beside.append(("HostMemory", cache.resident.window))
    codecs = [each.config.codec for each in (cache, cache.newest) if each is not None]
    reasons = [
        f"{codec.name} takes the rope of a token's position out of its key, and tokens of a tree "
        "are stored at others than their own; take a codec without a rope"
        for codec in codecs
        if codec.rope is not None
    ]
    if spread is not None and spread.size("context") > 1:
        reasons.append("the context is split over devices, and tokens do not move between them")
    if config.addressing.state:
        reasons.append("a policy sums up what queries see, and those of all branches would count")
    if config.placement is not None and config.placement.blocks_per_query is not None:
        reasons.append("keys of all branches would enter the bounds of blocks_per_query=")
    reasons += [
        f"{name} keeps {count} tokens, and the tree has {tokens}; let it keep as many"
        for name, count in beside
        if tokens > count
    ]
    if reasons:
        raise ConfigError(f"{verb}: no tree of tokens for this cache: {reasons[0]}.")
