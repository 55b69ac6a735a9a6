"""A step of a model under jit: the model's arrays are passed, and the rest of it is compared.

So a model with other weights compiles nothing, and the program keeps no weights.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from jaxkv.closures import Hoisted, hoist, inlined, named_arrays
from jaxkv.hybrid import AnyCache

# ``model(tokens [batch, tokens], cache) -> (logits [batch, tokens, vocabulary], cache)``
Model = Callable[[Array, AnyCache], tuple[Array, AnyCache]]


class Weights(NamedTuple):
    """A model as it is now.

    Attributes:
      structure: the treedef of a pytree; any other callable itself.
      arrays: the leaves of a pytree; of any other callable those that it names.
    """

    structure: Any
    arrays: list[Any]

    @classmethod
    def of(cls, model: Model) -> "Weights":
        leaves, treedef = jax.tree.flatten(model)
        if jax.tree_util.treedef_is_leaf(treedef):
            return cls(model, named_arrays(model))
        return cls(treedef, leaves)


class Watch:
    """Tells arrays that were exchanged from those that it saw, and keeps none of them alive."""

    def __init__(self, arrays: Sequence[Any]):
        self._seen = [_reference(array) for array in arrays]

    def sees(self, arrays: Sequence[Any]) -> bool:
        """Are they the same?"""
        same = zip(self._seen, arrays, strict=False)
        return len(self._seen) == len(arrays) and all(seen() is array for seen, array in same)


def _reference(leaf: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(leaf)
    except TypeError:  # a number
        return lambda: leaf


class ModelStep:
    """A function ``step(model, *arguments, **options)`` under jit.

    Args:
      step: the function; its options are hashable.
      donated: numbers of the arguments that are.
    """

    def __init__(self, step: Callable, donated: Sequence[int]):
        def run(program: Any, arrays: Sequence[Any], *arguments: Any) -> Any:
            return program(arrays, *arguments)

        run.__name__ = step.__name__
        numbers = [number + 2 for number in donated]
        self._jitted = jax.jit(run, static_argnums=0, donate_argnums=numbers)
        self._step = step
        self._known: dict[int, _Known] = {}

    def __call__(self, weights: Weights, *arguments: Any, **options: Any) -> Any:
        return self._jitted(*self._program(weights, arguments, options), *arguments)

    def lower(self, weights: Weights, *arguments: Any, **options: Any) -> Any:
        """As of a function under jit."""
        return self._jitted.lower(*self._program(weights, arguments, options), *arguments)

    def _program(
        self, weights: Weights, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[Callable, list[Any]]:
        """What is compared, and the arrays that are passed."""
        named = tuple(sorted(options.items()))
        model = weights.structure
        if isinstance(model, jax.tree_util.PyTreeDef):
            return _OfPytree(self._step, model, named), weights.arrays
        known = self._known.get(id(model))
        if known is None:
            weakref.finalize(model, self._known.pop, id(model), None)
        if known is None or not known.watch.sees(weights.arrays):
            known = self._known[id(model)] = _Known(Watch(weights.arrays), {})
        leaves, tree = jax.tree.flatten(arguments)
        shape = named, tree, tuple(map(jax.typeof, leaves)), jax.sharding.get_abstract_mesh()
        if shape not in known.hoisted:
            step = functools.partial(self._step, inlined(model), **options)
            known.hoisted[shape] = _Found.among(weights.arrays, *hoist(step, *arguments))
        return known.hoisted[shape].program, known.hoisted[shape].arrays(weights.arrays)


class _OfPytree(NamedTuple):
    """A step of a model that is a pytree."""

    step: Callable
    treedef: Any
    options: tuple[tuple[str, Any], ...]

    def __call__(self, arrays: Sequence[Any], *arguments: Any) -> Any:
        return self.step(self.treedef.unflatten(arrays), *arguments, **dict(self.options))


class _Known(NamedTuple):
    """What is known of a function while it and the arrays that it names are the same."""

    watch: Watch
    hoisted: dict[Any, "_Found"]


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
