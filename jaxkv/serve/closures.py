"""A function that closes over arrays, as one that is given them.

jit takes such arrays for a part of the program, and keeps the program, and so them, for good. As
arguments they are kept by nobody, and functions that differ in nothing else are one program.
"""

import dataclasses
import functools
import hashlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Array

from jaxkv.attention.observed import is_watched


@dataclasses.dataclass(frozen=True)
class Hoisted:
    """A function for arguments of one shape, given the arrays that it closed over.

    Two are equal if their programs are, word for word.
    """

    program: Any
    trees: tuple[Any, Any]
    jaxpr: Any = dataclasses.field(compare=False)

    def __call__(self, arrays: Sequence[Array], *arguments: Any) -> Any:
        leaves = jax.core.eval_jaxpr(self.jaxpr, arrays, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(self.trees[1], leaves)


def hoist(function: Callable[..., Any], *arguments: Any) -> tuple[Hoisted, list[Array]]:
    """Trace a function, whatever jax remembers of it, and find the arrays that it closes over."""
    traced = jax.jit(lambda *arguments: function(*arguments)).trace(*arguments)
    leaves, tree = jax.tree.flatten(arguments)
    jaxpr, arrays = traced.jaxpr.jaxpr, list(traced.jaxpr.consts)

    def program(arrays: Sequence[Array], *leaves: Any) -> list[Any]:
        return jax.core.eval_jaxpr(jaxpr, arrays, *leaves)

    text = jax.jit(program).lower(arrays, *leaves).as_text()
    # What calls Python back has a number there, which may be another function's the next time.
    name: Any = object() if "callback" in text else hashlib.sha256(text.encode()).digest()
    return Hoisted(name, (tree, jax.tree.structure(traced.out_info)), jaxpr), arrays


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, without those calls of jit in it that close over arrays themselves.

    `hoist` finds these arrays then. It cannot see into the program of an inner jit.
    """

    def call(*arguments: Any) -> Any:
        if is_watched():  # queries of an inner trace would not leave it
            return function(*arguments)
        anew = jax.make_jaxpr(lambda *arguments: function(*arguments), return_shape=True)
        closed, out = anew(*arguments)
        leaves = _evaluate(closed, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(out), leaves)

    return call


def _evaluate(closed: ClosedJaxpr, *arguments: Any) -> list[Any]:
    jaxpr = closed.jaxpr
    if not any(map(_inner, jaxpr.eqns)):
        return jax.core.eval_jaxpr(jaxpr, closed.consts, *arguments)
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *arguments], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        if inner := _inner(equation):
            results = _evaluate(inner, *map(read, equation.invars))
        else:
            taken = list(dict.fromkeys(v for v in equation.invars if not isinstance(v, Literal)))
            alone = jaxpr.replace(
                constvars=[],
                invars=taken,
                outvars=equation.outvars,
                eqns=[equation],
                debug_info=jaxpr.debug_info.with_unknown_names(),
            )
            results = jax.core.eval_jaxpr(alone, [], *map(read, taken))
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _inner(equation: Any) -> ClosedJaxpr | None:
    """The program of a call of jit that closes over arrays, or None."""
    closed = equation.params["jaxpr"] if equation.primitive.name == "jit" else None
    found = closed is not None and (closed.consts or any(map(_inner, closed.jaxpr.eqns)))
    return closed if found else None


def named_arrays(function: Callable[..., Any]) -> list[Any]:
    """The arrays that a function names, so that one can see whether they were exchanged.

    Those of its closure, of the object whose method it is and, in its own file, of globals and of
    the functions that it names.
    """
    arrays, seen, home = [], set(), None
    left: list[tuple[Any, bool]] = [(function, True)]  # and whether to look into an object
    while left:
        thing, look_inside = left.pop()
        if id(thing) in seen or isinstance(thing, types.ModuleType | type):
            continue
        seen.add(id(thing))
        if isinstance(thing, jax.Array | np.ndarray):
            arrays.append(thing)
            continue
        named: list[Any] = []
        if isinstance(thing, types.FunctionType):
            home = thing.__globals__ if home is None else home
            named += [cell.cell_contents for cell in thing.__closure__ or ()]
            if thing.__globals__ is home:
                named += [home[name] for name in _names(thing.__code__) if name in home]
        elif isinstance(thing, types.MethodType):
            named += [thing.__self__, thing.__func__]
        elif isinstance(thing, functools.partial):
            named += [thing.func, *thing.args, *thing.keywords.values()]
        elif hasattr(thing, "__wrapped__"):  # by jit
            named.append(thing.__wrapped__)
        else:
            leaves = jax.tree.leaves(thing)
            if not any(leaf is thing for leaf in leaves):
                named += [x for x in leaves if isinstance(x, jax.Array | np.ndarray) or callable(x)]
            elif look_inside and hasattr(thing, "__dict__"):
                look_inside, named = False, list(vars(thing).values())
        left += [(other, look_inside) for other in named]
    return arrays


def _names(code: types.CodeType) -> Iterator[str]:
    """The globals that a function names, and those that functions within it do."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
