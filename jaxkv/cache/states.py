"""The verbs of state per sequence: read, write, keep a copy and go back to it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxkv.cache.checks import check_alive
from jaxkv.cache.hybrid import AnyCache, HybridCache, check_static_layer
from jaxkv.cache.kv_cache import NumTokens
from jaxkv.cache.shards import KEPT, in_each_shard, where_it_is
from jaxkv.cache.state import StateCache
from jaxkv.cache.verbs import real_of, truncate
from jaxkv.devices import is_concrete
from jaxkv.programs import one_program


def state(cache: AnyCache, layer: int) -> dict[str, Array]:
    """What a layer keeps of each sequence, by name: zeros before its first token.

    Args:
      layer: a plain int that counts over all layers of the model.

    Returns:
      Arrays ``[*batch, *shape]`` of the config's dtypes.

    Raises:
      IndexError, TypeError: no such layer, or a traced one.
      ValueError: the layer keeps no state.

    >>> import jaxkv
    >>> kept = jaxkv.StateConfig(layers=(0,), arrays=[("conv", (2, 16), "float32")])
    >>> attends = jaxkv.KVCacheConfig(1, 64, num_kv_heads=1, head_dim=4)
    >>> config = jaxkv.HybridConfig((attends,), group_of_layer=(-1, 0), states=(kept,))
    >>> cache = jaxkv.create(config)
    >>> jaxkv.state(cache, 0)["conv"].shape
    (2, 16)
    """
    check_alive(cache)
    number, position = _locate(cache, layer)
    kept: dict[str, Array] = where_it_is(_read, cache.states[number], position=position)
    return kept


@one_program("position")
@in_each_shard(KEPT)
def _read(cache: StateCache, *, position: int) -> dict[str, Array]:
    return cache.read(position)


def with_state(cache: AnyCache, layer: int, new: Mapping[str, Array]) -> HybridCache:
    """Write what a layer keeps after the tokens of a step. Lengths do not move.

    In place under donation. What padding would add must not be in it: `real_tokens` says which
    tokens are real. A sequence all of whose tokens are padding by `padded_after` keeps what it has.

    Args:
      layer: as in `state`.
      new: an array per name, as `state` gives them; rounded to the config's dtypes.

    Raises:
      IndexError, TypeError: no such layer, or a traced one.
      ValueError: the layer keeps no state, or other names or shapes than those.

    >>> import jax.numpy as jnp, jaxkv
    >>> kept = jaxkv.StateConfig(layers=(0,), arrays=[("sum", (), "float32")])
    >>> attends = jaxkv.KVCacheConfig(1, 64, num_kv_heads=1, head_dim=4)
    >>> cache = jaxkv.create(jaxkv.HybridConfig((attends,), (-1, 0), states=(kept,)))
    >>> cache = jaxkv.with_state(cache, 0, {"sum": jnp.float32(3)})
    >>> float(jaxkv.state(jaxkv.advance(cache, 1), 0)["sum"])
    3.0
    """
    check_alive(cache)
    number, position = _locate(cache, layer)
    states, own = list(cache.states), dict(new)
    states[number] = where_it_is(_with_kept, states[number], own, layer=layer, position=position)
    return _with_states(cache, states)


def _with_kept(
    cache: StateCache, new: dict[str, Array], *, layer: int, position: int
) -> StateCache:
    config = cache.config
    expected = {array.name: (*config.batch_shape, *array.shape) for array in config.arrays}
    given = {name: jnp.shape(array) for name, array in new.items()}
    if given != expected:
        raise ValueError(
            f"with_state: layer {layer} keeps {_shapes(expected)}, got {_shapes(given)}."
        )
    return _written(cache, new, position=position)


@one_program("position")
@in_each_shard()
def _written(cache: StateCache, kept: dict[str, Array], *, position: int) -> StateCache:
    return cache.written(position, kept)


def real_tokens(
    cache: AnyCache, tokens: int, num_tokens: NumTokens | None = None
) -> Bool[Array, "*batch tokens"]:
    """Which of a step's tokens are real, and no padding: those that may enter a state.

    Args:
      tokens: of the step.
      num_tokens: how many of them are real, as in `jaxkv.append`. Inside `jaxkv.generate` and
        `jaxkv.Engine` the cache itself knows.

    >>> import jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(1, 8, num_kv_heads=1, head_dim=4))
    >>> jaxkv.real_tokens(cache, 3, num_tokens=2).tolist()
    [True, True, False]
    """
    real = real_of(cache.groups[0], tokens, num_tokens)
    limit = jnp.asarray(tokens if real is None else real, jnp.int32)
    limit = jnp.broadcast_to(limit, cache.config.batch_shape)
    return jnp.arange(tokens, dtype=jnp.int32) < limit[..., None]


def copy_state(cache: AnyCache) -> tuple[StateCache, ...]:
    """A copy of all that a cache keeps as state, for `restore_state` to go back to.

    Raises:
      CacheClosedError: the cache was donated or deleted.

    >>> import jaxkv
    >>> jaxkv.copy_state(jaxkv.create(jaxkv.KVCacheConfig(1, 8, num_kv_heads=1, head_dim=4)))
    ()
    """
    check_alive(cache)
    return jax.tree.map(jnp.copy, cache.states)


def restore_state(cache: AnyCache, copied: tuple[StateCache, ...]) -> AnyCache:
    """Go back to where a copy of the state was made: keys and values of later tokens are forgotten.

    Args:
      copied: from `copy_state` of this cache when it was at most as long as now. Not used up.

    Raises:
      ValueError: a copy of another cache, or outside jit, of one that was longer than this.

    >>> import jaxkv
    >>> kept = jaxkv.StateConfig(layers=(0,), arrays=[("sum", (), "float32")])
    >>> attends = jaxkv.KVCacheConfig(1, 64, num_kv_heads=1, head_dim=4)
    >>> cache = jaxkv.create(jaxkv.HybridConfig((attends,), (-1, 0), states=(kept,)))
    >>> cache = jaxkv.advance(cache, 3)
    >>> copied = jaxkv.copy_state(cache)
    >>> int(jaxkv.restore_state(jaxkv.advance(cache, 2), copied).lengths)
    3
    """
    check_alive(cache)
    if [each.config for each in copied] != [each.config for each in cache.states]:
        raise ValueError(
            "restore_state: the copy must be from jaxkv.copy_state of a cache of this config, got "
            f"{list(copied)} for {list(cache.states)}."
        )
    if not copied:
        raise ValueError("restore_state: this cache keeps no state. truncate takes tokens back.")
    lengths = copied[0].lengths
    if is_concrete(cache.lengths, lengths) and np.any(
        np.asarray(jax.device_get(lengths)) > np.asarray(jax.device_get(cache.lengths))
    ):
        raise ValueError(
            f"restore_state: the copy is of {np.asarray(lengths).tolist()} tokens, and the cache "
            f"holds {np.asarray(cache.lengths).tolist()}. A copy is of this cache when it was "
            "shorter."
        )
    groups = [truncate(group, lengths) for group in cache.groups]
    states = [jax.tree.map(jnp.copy, each) for each in copied]
    return cache.with_groups(groups, states)


def _with_states(cache: AnyCache, states: list[StateCache]) -> HybridCache:
    changed = cache.with_groups(cache.groups, states)
    assert isinstance(changed, HybridCache)
    return changed


def _locate(cache: AnyCache, layer: int) -> tuple[int, int]:
    """The number of the kind of state that a layer keeps, and the layer's within it."""
    number = check_static_layer(cache.config, layer)
    for kind, each in enumerate(cache.config.states):
        if number in each.layers:
            return kind, each.layers.index(number)
    keeping = [layer for each in cache.config.states for layer in each.layers]
    raise ValueError(
        f"layer {number} keeps no state: those that do are {keeping or 'none of this cache'}."
    )


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "nothing"
