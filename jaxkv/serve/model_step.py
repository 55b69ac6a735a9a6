"""A step of a model under jit: the model's arrays are passed, and the rest of it is compared.

So a model with other weights compiles nothing, and the program keeps no weights.
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxkv.cache.hybrid import AnyCache
from jaxkv.devices import Device, platform_of
from jaxkv.errors import ModelChangedError
from jaxkv.serve.closures import Hoisted, hoist, inlined, named_arrays

T = TypeVar("T")
# ``model(tokens [batch, tokens], cache) -> (logits [batch, tokens, vocabulary], cache)``
Model = Callable[[Array, AnyCache], tuple[Array, AnyCache]]


@runtime_checkable
class GivesNextLogits(Protocol):
    """A model that can give logits for one place of each sequence alone.

    Logits of a whole prompt may take more memory than its cache, and a last token by itself takes a
    step in which all weights are read.
    """

    def next_logits(
        self,
        tokens: Int[Array, "batch tokens"],
        cache: AnyCache,
        *,
        num_tokens: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch vocab"], AnyCache]:
        """Of what comes after the first ``num_tokens`` of each, and the cache with them counted."""
        ...


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model as it is now.

    Attributes:
      model: itself.
      treedef: of a pytree; None for any other callable.
      arrays: the leaves of a pytree; of any other callable those that it names.
    """

    model: Model
    treedef: Any
    arrays: list[Any]

    @classmethod
    def of(cls, model: Model) -> "Weights":
        leaves, treedef = jax.tree.flatten(model)
        if jax.tree_util.treedef_is_leaf(treedef):
            return cls(model, None, named_arrays(model))
        return cls(model, treedef, leaves)

    @property
    def home(self) -> Device | None:
        """The one device that the arrays are bound to; None where they are free, or on several.

        What goes from step to step is best made there. A step binds what it returns, and one whose
        arguments were free the first time is compiled twice.
        """
        arrays = (array for array in self.arrays if isinstance(array, jax.Array))
        bound = set().union(*(array.devices() for array in arrays if array.committed))
        return bound.pop() if len(bound) == 1 else None

    def spread_over(self, mesh: Mesh) -> "Weights":
        """With arrays that are on one device copied to all of a mesh, once and not in each step."""
        return dataclasses.replace(self, arrays=spread_over(mesh, self.arrays))

    @functools.cached_property
    def types(self) -> list[Any]:
        """Of the arrays, and where they are: hundreds of them, which every program asks for."""
        return _types_of(self.arrays)


def spread_over(mesh: Mesh, tree: T) -> T:
    """With arrays that are on one device copied to all of a mesh."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.sharding == everywhere:
            return leaf
        if isinstance(leaf.sharding, NamedSharding) and leaf.sharding.num_devices > 1:
            return jax.device_put(leaf, NamedSharding(mesh, leaf.sharding.spec))
        return jax.device_put(leaf, everywhere)

    return jax.tree.map(place, tree)


class Watch:
    """Tells weights that were exchanged from those that it saw, and keeps none of them alive."""

    def __init__(self, weights: Weights):
        self._treedef = weights.treedef
        self._seen = [_reference(array) for array in weights.arrays]

    def sees(self, weights: Weights) -> bool:
        """Are they the same?"""
        if self._treedef != weights.treedef or len(self._seen) != len(weights.arrays):
            return False
        return all(seen() is array for seen, array in zip(self._seen, weights.arrays, strict=True))


def _reference(leaf: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(leaf)
    except TypeError:  # a number
        return lambda: leaf


# XLA makes one product of those that share few rows, where no weight is larger than this. By its
# default of 32 MB gate and up weights are multiplied with apart, which takes longer.
_OF_FEW_ROWS = {"xla_gpu_dot_merger_threshold_mb": 4096}


class ModelStep:
    """A function ``step(model, *arguments, **options)`` under jit.

    Args:
      step: the function; its options are hashable.
      donated: numbers of the arguments that are.
      few_rows: whether it multiplies few rows with all weights, as decode does.
    """

    def __init__(self, step: Callable[..., Any], donated: Sequence[int], *, few_rows: bool = False):
        def run(program: Any, arrays: Sequence[Any], *arguments: Any) -> Any:
            return program(arrays, *arguments)

        run.__name__ = step.__name__
        numbers = [number + 2 for number in donated]
        jitted = functools.partial(jax.jit, run, static_argnums=0, donate_argnums=numbers)
        self._jitted = jitted()
        self._on_gpu = jitted(compiler_options=_OF_FEW_ROWS) if few_rows else self._jitted
        self._step = step
        self._known: dict[int, _Known] = {}
        self._compiled: set[Any] = set()

    def __call__(self, weights: Weights, *arguments: Any, **options: Any) -> Any:
        program, arrays = self._program(weights, arguments, options)
        _check_alive(arrays)
        return self._jit_for(arguments)(program, arrays, *arguments)

    def compilation(
        self, weights: Weights, *arguments: Any, **options: Any
    ) -> Callable[[], object]:
        """What compiles the program of a call, on any thread; does nothing where it is there."""
        program, arrays = self._program(weights, arguments, options)
        of_arrays = weights.types if arrays is weights.arrays else _types_of(arrays)
        leaves, tree = jax.tree.flatten(arguments)
        types = program, tree, (*of_arrays, *_types_of(leaves))
        if types in self._compiled:  # JAX would take milliseconds to find that out
            return lambda: None
        self._compiled.add(types)
        return self._jit_for(arguments).lower(program, arrays, *arguments).compile

    def lower(self, weights: Weights, *arguments: Any, **options: Any) -> Any:
        """As of a function under jit."""
        return self._jitted.lower(*self._program(weights, arguments, options), *arguments)

    def _jit_for(self, arguments: Sequence[Any]) -> Any:
        given = (leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.Array))
        return self._on_gpu if platform_of(*given) == "gpu" else self._jitted

    def _program(
        self, weights: Weights, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[Any, list[Any]]:
        """What is compared, and the arrays that are passed."""
        named = tuple(sorted(options.items()))
        if weights.treedef is not None:
            return _OfPytree(self._step, weights.treedef, named), weights.arrays
        leaves, tree = jax.tree.flatten(arguments)
        shape = named, tree, tuple(map(jax.typeof, leaves)), jax.sharding.get_abstract_mesh()
        known = self._known_of(weights)
        if shape not in known:
            step = functools.partial(self._step, inlined(weights.model), **options)
            known[shape] = _Found.among(weights.arrays, *hoist(step, *arguments))
        return known[shape].program, known[shape].arrays(weights.arrays)

    def _known_of(self, weights: Weights) -> dict[Any, "_Found"]:
        """The steps of a function that were traced while it named the same arrays, by shape."""
        number = id(weights.model)
        if number not in self._known:
            try:
                weakref.finalize(weights.model, self._known.pop, number, None)
            except TypeError:  # it cannot be told when it is gone
                return {}
        elif self._known[number].watch.sees(weights):
            return self._known[number].steps
        self._known[number] = _Known(Watch(weights), {})
        return self._known[number].steps


def _types_of(leaves: Sequence[Any]) -> list[Any]:
    def sharding_of(leaf: Any) -> Any:
        return leaf.sharding if isinstance(leaf, jax.Array) else None

    return [(jax.typeof(leaf), sharding_of(leaf)) for leaf in leaves]


def _check_alive(arrays: Sequence[Any]) -> None:
    deleted = sum(isinstance(array, jax.Array) and array.is_deleted() for array in arrays)
    if deleted:
        raise ModelChangedError(
            f"{deleted} of the model's arrays were deleted, as by a training step that takes them "
            "donated. Give the model that holds the new ones, to an Engine by update."
        )


class _OfPytree(NamedTuple):
    """A step of a model that is a pytree."""

    step: Callable[..., Any]
    treedef: Any
    options: tuple[tuple[str, Any], ...]

    def __call__(self, arrays: Sequence[Any], *arguments: Any) -> Any:
        return self.step(self.treedef.unflatten(arrays), *arguments, **dict(self.options))


class _Known(NamedTuple):
    watch: Watch
    steps: dict[Any, "_Found"]


class _Found(NamedTuple):
    """A step of a function, and which of the arrays that the function names are its own."""

    program: Hoisted
    places: list[int | None]
    others: list[Any]

    @classmethod
    def among(cls, named: Sequence[Any], program: Hoisted, arrays: list[Any]) -> "_Found":
        place_of = {id(array): place for place, array in enumerate(named)}
        places = [place_of.get(id(array)) for array in arrays]
        others = [array for array, place in zip(arrays, places, strict=True) if place is None]
        return cls(program, places, others)

    def arrays(self, named: Sequence[Any]) -> list[Any]:
        others = iter(self.others)
        return [next(others) if place is None else named[place] for place in self.places]
