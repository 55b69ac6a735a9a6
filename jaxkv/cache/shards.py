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
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array

from jaxkv.addressing.interleaved import Interleaved, whole
from jaxkv.cache.axes import Spread
from jaxkv.cache.config import KVCacheConfig
from jaxkv.cache.create import shapes_of, specs_of
from jaxkv.cache.kv_cache import KVCache, books_of_index, buffer_of
from jaxkv.placement import host_sharding, in_host_memory
from jaxkv.programs import promotes_ranks

P = ParamSpec("P")
R = TypeVar("R")
# What each axis of an array is: "batch", "heads" of queries, "kv_heads", "context" or None.
What = tuple[str | None, ...]
KEPT: What = ("kept",)  # of a dict: a layer's arrays of state, by name

# Of arguments, by name. The batch axis is absent where the cache has none.
_ARGUMENTS: dict[str, What] = {
    **dict.fromkeys(("keys", "values"), ("batch", None, "kv_heads", None)),
    "queries": ("batch", None, "heads", None),
    "ancestors": ("batch", None, None),
    "num_seen": ("batch", None),
    # Those of a KV head together.
    "grouped_queries": ("batch", None, "kv_heads", None),
    "layer_queries": (None, "batch", None, "kv_heads", None),
    **dict.fromkeys(("scores", "remembered"), (None, "batch", "kv_heads", None)),
    "limits": (None, "batch", "kv_heads"),
    **dict.fromkeys(("pages", "path"), ("batch", None)),
    **dict.fromkeys(("num_tokens", "length", "lengths", "in_range", "rows", "since"), ("batch",)),
    **dict.fromkeys(("numbers", "sources", "destinations"), ("batch",)),  # of pages
    "contents": (None, None, None, "heads"),
    "sink_logits": ("heads",),
    "kept": KEPT,
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
            check_outside(cache, work.__name__)
            named = list(zip(names, arrays, strict=False))
            after = config_of(cache, *arrays, **options) if config_of else cache.config

            def on_shard(cache: Any, parts: list[Any]) -> Any:
                own = (
                    _own_heads(cache, name, part)
                    for (name, _), part in zip(named, parts, strict=True)
                )
                result = work(own_part(cache), *own, **options)  # type: ignore[arg-type]
                return result if given else _of_all(result, spread, after)

            specs = specs_like(cache, cache.config), [_spec_of(cache, *pair) for pair in named]
            results: Any = tuple(_split_as(cache, _present(cache, what)) for what in given)
            results = results[0] if len(results) == 1 else results
            mapped = _shard_map(spread, on_shard, specs, results or specs_like(cache, after))
            output = mapped(cache, list(arrays))
            return _one_of_each_copy(cache, given, output) if given else output

        return run  # type: ignore[return-value]

    return decorate


def beside_storage(work: Callable[P, R]) -> Callable[P, R]:
    """Let a function that changes no buffer leave them where they are; a program would copy."""

    @functools.wraps(work)
    def run(cache: Any, *arrays: Any) -> Any:
        changed: Any = work(dataclasses.replace(cache, storage={}), *arrays)  # type: ignore[call-arg]
        return dataclasses.replace(changed, storage=cache.storage)

    return run  # type: ignore[return-value]


def is_within(spread: Spread) -> bool:
    """Whether this is traced for one device: in a `jax.shard_map` over the axes that split a cache.

    Raises:
      ValueError: over some of them, and not all.
    """
    manual = set(jax.sharding.get_abstract_mesh().manual_axes) & set(spread.names)
    if manual and manual < set(spread.names):
        raise ValueError(
            f"this jax.shard_map is over {sorted(manual)}, and the cache is split over "
            f"{sorted(spread.names)}. Map over all of them, with jaxkv.partition_specs(cache)."
        )
    return bool(manual)


def check_outside(cache: Any, what: str) -> None:
    """Refuse one device's part of a cache, for what works on the whole."""
    if any(group.spread is not None and is_within(group.spread) for group in cache.groups):
        raise ValueError(
            f"{what.strip('_')}: this works on the whole cache, and here is one device's part of "
            "it. Call it outside of the jax.shard_map."
        )


def own_part(cache: KVCache) -> KVCache:
    """The cache of one device, of one that is spread, in a `jax.shard_map` over its axes."""
    spread, leaves = cache.spread, jax.tree.leaves(cache)
    assert spread is not None
    own = _structure(cache, spread.local(cache.config)).unflatten(leaves)
    axis = spread.axes.context
    own = dataclasses.replace(own, part_of=spread)
    if own.newest is not None:
        own = dataclasses.replace(own, newest=dataclasses.replace(own.newest, part_of=spread))
    if axis is None or not cache.config.per_token:
        return own
    return _interleaved(spread, own, lax.axis_index(axis))


def _of_all(own: Any, spread: Spread, config: KVCacheConfig) -> KVCache:
    """The other way: a device's part of each array of a cache that is spread."""
    stored = dataclasses.replace(own, index=whole(own.index))
    cache: KVCache = _structure(own, config).unflatten(jax.tree.leaves(stored))
    return dataclasses.replace(cache, spread=spread)


def where_it_is(verb: Callable[..., Any], cache: Any, *arguments: Any, **options: Any) -> Any:
    """What a verb gives: inside a user's own `jax.shard_map`, of one device's part of the cache."""
    spread = cache.spread
    if spread is None or not is_within(spread):
        return verb(cache, *arguments, **options)
    result = verb(own_part(cache), *arguments, **options)
    if not isinstance(result, type(cache)):
        return result
    return _of_all(result, spread, spread.whole(cache.config, result.config))


def partition_specs(cache: Any) -> Any:
    """How each array of a cache is split: ``in_specs`` and ``out_specs`` of one's own shard_map.

    Inside it the verbs work on one device's part of the cache: `append` and `attend` take keys and
    queries of its own sequences and heads, and what `attend` gives is of them. Where several
    devices have the same KV head, each takes that head's keys.

    Returns:
      The cache, with a `jax.sharding.PartitionSpec` for each array; an empty one for each array of
      a cache that is not spread.

    >>> import jax, jax.numpy as jnp, jaxkv
    >>> from jax.sharding import PartitionSpec
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> config = jaxkv.KVCacheConfig(1, 16, 1, 4, batch_size=2)
    >>> cache = jaxkv.create(config, mesh=mesh, axes=jaxkv.Axes(batch="data"))
    >>> specs = jaxkv.partition_specs(cache)
    >>> def step(cache, vectors):
    ...     cache = jaxkv.append(cache, vectors, vectors, layer=0)
    ...     return jaxkv.advance(cache, 3)
    >>> in_specs = (specs, PartitionSpec("data"))
    >>> options = {"mesh": mesh, "in_specs": in_specs, "out_specs": specs, "check_vma": False}
    >>> run = jax.jit(jax.shard_map(step, **options))
    >>> run(cache, jnp.ones((2, 3, 1, 4))).lengths.tolist()
    [3, 3]
    """
    groups, states, cross = (
        [specs_like(each, each.config) for each in kinds]
        for kinds in (cache.groups, cache.states, cache.cross)
    )
    return cache.with_groups(groups, states, cross)


def local_shapes(cache: KVCache) -> KVCache:
    """The cache of one device as shapes: what is asked who could serve a call of it."""
    spread, config = cache.spread, cache.config
    if spread is None:
        return cache
    rank = jax.ShapeDtypeStruct((), jnp.int32)
    own: Any = shapes_of(spread.local(config))
    if in_host_memory(buffer_of(cache)):
        there = host_sharding(SingleDeviceSharding(spread.mesh.local_devices[0]))
        storage = {name: leaf.update(sharding=there) for name, leaf in own.storage.items()}
        own = dataclasses.replace(own, storage=storage)
    return _interleaved(spread, own, rank)


def _interleaved(spread: Spread, cache: KVCache, rank: Any) -> KVCache:
    axis = spread.axes.context
    if axis is None:
        return cache
    index = Interleaved(cache.index, rank, axis, spread.size("context"))
    return dataclasses.replace(cache, index=index)


def _structure(cache: Any, config: KVCacheConfig) -> Any:
    """Of a cache of this config, with what this one has beside it, see `_with_those_of`."""
    return jax.tree.structure(_with_those_of(cache, shapes_of(config)))


def _with_those_of(cache: Any, other: KVCache) -> KVCache:
    """With the buffers and the padded step of this one, and whether its codec learns."""
    storage = {name: other.storage[name] for name in cache.storage}
    own = {"learns": cache.learns} if cache.config.per_token else {}
    return dataclasses.replace(other, storage=storage, real_tokens=cache.real_tokens, **own)


def specs_like(cache: KVCache, config: KVCacheConfig) -> KVCache:
    """How each array of a cache of this config is split, that is spread as this one is."""
    spread = cache.spread
    if spread is None:
        return jax.tree.map(lambda _: PartitionSpec(), cache)
    specs: Any = jax.tree.unflatten(jax.tree.structure(shapes_of(config)), specs_of(config, spread))
    specs = dataclasses.replace(_with_those_of(cache, specs), spread=spread)
    if cache.real_tokens is None:
        return specs
    of_tokens = spread.spec("batch") if jnp.ndim(cache.real_tokens) else PartitionSpec()
    return dataclasses.replace(specs, real_tokens=of_tokens)


def _present(cache: KVCache, what: What) -> What:
    if cache.config.batch_size is not None:
        return what
    return tuple(each for each in what if each != "batch")


def _spec(spread: Spread, what: What) -> PartitionSpec:
    return spread.spec(*("heads" if each == "kv_heads" else each for each in what))


def _split_as(cache: KVCache, what: What) -> Any:
    """How an array is split whose axes are these, or arrays of state, by name."""
    spread = cache.spread
    assert spread is not None
    if what != KEPT:
        return _spec(spread, what)
    storage = specs_like(cache, cache.config).storage
    return {name: of_layers[0] for name, of_layers in storage.items()}


def _spec_of(cache: KVCache, name: str, value: Any) -> Any:
    spread = cache.spread
    assert spread is not None
    what = _present(cache, _ARGUMENTS.get(name, ()))
    if what == KEPT:
        return _split_as(cache, what)
    if spread.copies(cache.config) > 1:  # whole, for a device to take the head that it has
        what = tuple(None if each == "kv_heads" else each for each in what)
    spec = _spec(spread, what)
    return jax.tree.map(lambda leaf: spec if jnp.ndim(leaf) else PartitionSpec(), value)


def _own_heads(cache: KVCache, name: str, part: Any) -> Any:
    """Of KV heads, the one that several devices have copies of; anything else as it is."""
    spread, config = cache.spread, cache.config
    assert spread is not None
    copies = spread.copies(config)
    what = _present(cache, _ARGUMENTS.get(name, ()))
    if "kv_heads" not in what or copies == 1:
        return part
    axis, number = what.index("kv_heads"), lax.axis_index(spread.axes.heads) // copies

    def own(array: Array) -> Array:
        size = array.shape[axis] // config.num_kv_heads
        return lax.dynamic_slice_in_dim(array, number * size, size, axis)

    return jax.tree.map(own, part)


def _one_of_each_copy(cache: KVCache, given: tuple[What, ...], output: Any) -> Any:
    """Results of KV heads that several devices have, each head once."""
    spread = cache.spread
    assert spread is not None
    copies = spread.copies(cache.config)
    if copies == 1:
        return output

    def once(what: What, result: Any) -> Any:
        what = _present(cache, what)
        if "kv_heads" not in what:
            return result
        axis = what.index("kv_heads")
        together = _spec(spread, tuple(None if each == "kv_heads" else each for each in what))

        def of(array: Array) -> Array:
            array = resharded(spread, together, array)
            return lax.slice_in_dim(array, 0, array.shape[axis], copies, axis)

        return jax.tree.map(of, result)

    if len(given) == 1:
        return once(given[0], output)
    return tuple(once(what, result) for what, result in zip(given, output, strict=True))


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
    if not spread.is_explicit or in_host_memory(array):  # which is where it was created
        return array
    return jax.sharding.reshard(array, NamedSharding(spread.mesh, spec))


def books_of(cache: KVCache) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outside jit, the length of each sequence, its room, and whether it is intact."""
    if cache.spread is None:
        return books_of_index(cache.index)
    leaves, structure = jax.tree.flatten(dataclasses.replace(cache, storage={}))
    types = tuple((leaf.shape, leaf.dtype, _placement_of(leaf)) for leaf in leaves)
    lengths, room, intact = jax.device_get(
        _books(structure, types)(jax.tree.unflatten(structure, leaves))
    )
    return lengths, room, intact


def _placement_of(leaf: Any) -> Any:
    """Where an array must be; None for one that goes to wherever it is needed."""
    return leaf.sharding if getattr(leaf, "committed", False) else None


@functools.lru_cache(maxsize=256)
@promotes_ranks
def _books(structure: Any, types: tuple[tuple[Any, Any, Any], ...]) -> Any:
    """A compiled program, which runs where a function is traced too."""
    leaves = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype, sharding in types
    ]
    books = jax.jit(lambda cache: everywhere(cache, _own_books(cache)))
    return books.lower(jax.tree.unflatten(structure, leaves)).compile()


@in_each_shard(("batch",), ("batch",), ("batch",))
def _own_books(cache: KVCache) -> tuple[Array, Array, Array]:
    shape, index = cache.lengths.shape, cache.index
    room, intact = (jnp.broadcast_to(each, shape) for each in (index.room, index.intact))
    return index.lengths, room, intact


def everywhere(cache: Any, arrays: R) -> R:
    """The arrays, whole on every device where the cache is spread: a process reads no other's."""
    return _placed(cache, arrays)


def by_row(cache: Any, arrays: R) -> R:
    """Arrays of something per sequence, where the cache is spread on the devices of each."""
    return _placed(cache, arrays, "batch")


def _placed(cache: Any, arrays: R, *what: str) -> R:
    spread = cache.groups[0].spread
    if spread is None:
        return arrays
    place = jax.sharding.reshard if spread.is_explicit else lax.with_sharding_constraint
    sharding = NamedSharding(spread.mesh, spread.spec(*what))
    return jax.tree.map(lambda array: place(array, sharding), arrays)


def check_whole(cache: Any, verb: str) -> None:
    """Refuse a cache that is spread over a mesh, for what works on one device alone."""
    for group in cache.groups:
        if group.spread is not None:
            raise ValueError(
                f"{verb}: this cache is spread over {group.spread.mesh.size} devices by "
                f"{group.spread.axes}, and {verb} takes it on one. Bring it there with "
                "jaxkv.gather, and back with jaxkv.spread."
            )


def check_sequences_whole(cache: Any, verb: str) -> None:
    """Refuse a cache whose sequences are dealt out, for what compares the tokens of a sequence."""
    for group in cache.groups:
        spread = group.spread or group.part_of
        if spread is not None and spread.size("context") > 1:
            raise ValueError(
                f"{verb}: the context of this cache is split over {spread.size('context')} "
                f"devices, and {verb} compares all tokens of a sequence. Gather it first, with "
                "jaxkv.gather; jaxkv.spread brings it back, by batch and heads."
            )
