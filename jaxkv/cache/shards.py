"""Work on a cache that is spread over a mesh: on each device, on what it holds of the cache."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxkv.addressing.interleaved import Interleaved, whole
from jaxkv.cache.axes import Spread
from jaxkv.cache.config import KVCacheConfig
from jaxkv.cache.create import shapes_of, specs_of
from jaxkv.cache.kv_cache import KVCache, books_of_index
from jaxkv.programs import one_program

P = ParamSpec("P")
R = TypeVar("R")
What = tuple[str | None, ...]  # what each axis of an array is: "batch", "heads", "context" or None

# Of arguments, by name. The batch axis is absent where the cache has none.
_ARGUMENTS: dict[str, What] = {
    **dict.fromkeys(("keys", "values", "queries"), ("batch", None, "heads", None)),
    **dict.fromkeys(("num_tokens", "length", "in_range", "rows"), ("batch",)),
    "sinks": ("heads",),
}


def in_each_shard(
    *given: What, config_of: Callable[..., KVCacheConfig] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function of a cache and arrays work on each device, where the cache is on several.

    Args:
      given: what the axes of its results are; it returns a cache if there are none.
      config_of: the config of the cache that it returns, from its arguments; that of the one that
        it is given if None.
    """

    def decorate(work: Callable[P, R]) -> Callable[P, R]:
        names = list(inspect.signature(work).parameters)[1:]

        @functools.wraps(work)
        def run(cache: Any, *arrays: Any, **options: Any) -> Any:
            spread: Spread | None = cache.spread
            if spread is None:
                return work(cache, *arrays, **options)
            named = list(zip(names, arrays, strict=False))
            after = config_of(cache, *arrays) if config_of else cache.config

            def on_shard(leaves: list[Any], ranks: Array, parts: list[Any]) -> Any:
                own = (
                    _own_part(cache, name, part)
                    for (name, _), part in zip(named, parts, strict=True)
                )
                result = work(_local_cache(cache, leaves, ranks[0]), *own, **options)  # type: ignore[arg-type]
                return result if given else jax.tree.leaves(_as_stored(result))

            ranks = np.arange(spread.size("context"), dtype=np.int32)
            of_arrays = [_spec_of(cache, *pair) for pair in named]
            specs = _specs(cache, cache.config), spread.spec("context"), of_arrays
            results: Any = tuple(spread.spec(*_present(cache, what)) for what in given)
            results = results[0] if len(results) == 1 else results
            output = _shard_map(spread, on_shard, specs, results or _specs(cache, after))(
                jax.tree.leaves(cache), jnp.asarray(ranks), list(arrays)
            )
            return output if given else _whole_cache(cache, output, after)

        return run  # type: ignore[return-value]

    return decorate


def beside_storage(work: Callable[P, R]) -> Callable[P, R]:
    """Let a function that changes no buffer leave them where they are; a program would copy."""

    @functools.wraps(work)
    def run(cache: Any, *arrays: Any) -> Any:
        if cache.spread is not None:  # whose parts a program is told of together
            return work(cache, *arrays)  # type: ignore[call-arg]
        changed: Any = work(dataclasses.replace(cache, storage={}), *arrays)  # type: ignore[call-arg]
        return dataclasses.replace(changed, storage=cache.storage)

    return run  # type: ignore[return-value]


def _local_cache(cache: KVCache, leaves: list[Any], rank: Array) -> KVCache:
    """The cache of one device, from its parts of all arrays."""
    spread, config = cache.spread, cache.config
    assert spread is not None
    return _interleaved(spread, _structure(cache, spread.local(config)).unflatten(leaves), rank)


def local_shapes(cache: KVCache) -> KVCache:
    """The same as shapes: what is asked who could serve a call of it."""
    spread, config = cache.spread, cache.config
    if spread is None:
        return cache
    rank = jax.ShapeDtypeStruct((), jnp.int32)
    return _interleaved(spread, shapes_of(spread.local(config)), rank)


def _interleaved(spread: Spread, cache: KVCache, rank: Any) -> KVCache:
    axis = spread.axes.context
    if axis is None:
        return cache
    index = Interleaved(cache.index, rank, axis, spread.size("context"))
    return dataclasses.replace(cache, index=index)


def _whole_cache(cache: KVCache, leaves: list[Any], config: KVCacheConfig) -> KVCache:
    own = _structure(cache, config).unflatten(leaves)
    return dataclasses.replace(own, spread=cache.spread)


def _as_stored(cache: Any) -> Any:
    return dataclasses.replace(cache, index=whole(cache.index))


def _structure(cache: KVCache, config: KVCacheConfig) -> Any:
    """Of a cache of this config, in the midst of a padded step where this one is."""
    return jax.tree.structure(dataclasses.replace(shapes_of(config), real_tokens=cache.real_tokens))


def _specs(cache: KVCache, config: KVCacheConfig) -> list[PartitionSpec]:
    spread = cache.spread
    assert spread is not None
    specs = list(specs_of(config, spread))
    if cache.real_tokens is not None:
        specs.append(spread.spec("batch") if jnp.ndim(cache.real_tokens) else PartitionSpec())
    return specs


def _present(cache: KVCache, what: What) -> What:
    single = cache.config.batch_size is None and what[:1] == ("batch",)
    return what[1:] if single else what


def _spec_of(cache: KVCache, name: str, value: Any) -> Any:
    spread = cache.spread
    assert spread is not None
    what = _present(cache, _ARGUMENTS.get(name, ()))
    if name in ("keys", "values") and spread.copies(cache.config) > 1:
        what = tuple(None if each == "heads" else each for each in what)
    return jax.tree.map(
        lambda leaf: spread.spec(*what) if jnp.ndim(leaf) else PartitionSpec(), value
    )


def _own_part(cache: KVCache, name: str, part: Any) -> Any:
    """Of new vectors, the one head that several devices have copies of; anything else as it is."""
    spread = cache.spread
    assert spread is not None
    copies = spread.copies(cache.config)
    if name in ("keys", "values") and copies > 1 and part is not None:
        number = lax.axis_index(spread.axes.heads) // copies
        return lax.dynamic_slice_in_dim(part, number, 1, axis=-2)
    return part


def _shard_map(
    spread: Spread, work: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    mapped = jax.shard_map(
        work, mesh=spread.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )

    def placed(*operands: Any) -> Any:
        put = functools.partial(resharded, spread)
        is_spec = functools.partial(_is_a, PartitionSpec)
        return mapped(*jax.tree.map(put, in_specs, operands, is_leaf=is_spec))

    return placed


def _is_a(kind: type, value: Any) -> bool:
    return isinstance(value, kind)


def resharded(spread: Spread, spec: PartitionSpec, array: Array) -> Array:
    """The array as its reader wants it, which nobody sees to where axes are explicit."""
    if not spread.is_explicit:
        return array
    return jax.sharding.reshard(array, NamedSharding(spread.mesh, spec))


def books_of(cache: KVCache) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outside jit, the length of each sequence, its room, and whether it is intact."""
    if cache.spread is None:
        return books_of_index(cache.index)
    with jax.ensure_compile_time_eval():
        lengths, room, intact = jax.device_get(_books(cache))
    return lengths, room, intact


@one_program()
def _books(cache: KVCache) -> Any:
    return everywhere(cache, _own_books(cache))


@in_each_shard(("batch",), ("batch",), ("batch",))
def _own_books(cache: KVCache) -> tuple[Array, Array, Array]:
    shape, index = cache.lengths.shape, cache.index
    room, intact = (jnp.broadcast_to(each, shape) for each in (index.room, index.intact))
    return index.lengths, room, intact


def everywhere(cache: Any, arrays: R) -> R:
    """The arrays, whole on every device where the cache is spread: a process reads no other's."""
    spread = cache.groups[0].spread
    if spread is None:
        return arrays
    place = jax.sharding.reshard if spread.is_explicit else lax.with_sharding_constraint
    whole = NamedSharding(spread.mesh, PartitionSpec())
    return jax.tree.map(lambda array: place(array, whole), arrays)


def check_whole(cache: Any, verb: str) -> None:
    """Refuse a cache that is spread over a mesh, for what works on one device alone."""
    for group in cache.groups:
        if group.spread is not None:
            raise ValueError(
                f"{verb}: this cache is spread over {group.spread.mesh.size} devices by "
                f"{group.spread.axes}, and {verb} takes it on one. Bring it there with "
                "jaxkv.gather, and back with jaxkv.spread."
            )
