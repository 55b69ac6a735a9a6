"""How a verb runs under flags that its caller's own code is held to, inside jit and outside.

Operations that are run one by one bring their constants to the device each time, take no host
arrays where methods of device arrays are used, and no array that other processes hold parts of.
So outside jit a verb's work on arrays is one compiled program.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

from jaxkv.devices import is_concrete

P = ParamSpec("P")
R = TypeVar("R")


def promotes_ranks(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function broadcast as numpy does, whatever `jax_numpy_rank_promotion` says."""

    @functools.wraps(function)
    def promoting(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return promoting


def moves_data(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function that is there to move data do so, whatever `jax_transfer_guard` says too."""

    @functools.wraps(function)
    def moving(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.transfer_guard("allow"):
            return function(*args, **kwargs)

    return promotes_ranks(moving)


def one_program(*static: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function of arrays be compiled where it is not traced already.

    Args:
      static: names of arguments that are no arrays, given by keyword.
    """

    def decorate(work: Callable[P, R]) -> Callable[P, R]:
        compiled: Any = jax.jit(work, static_argnames=static)

        @promotes_ranks
        @functools.wraps(work)
        def run(*arrays: P.args, **options: P.kwargs) -> R:
            if not is_concrete(*jax.tree.leaves(arrays)):
                return work(*arrays, **options)
            return compiled(*jax.tree.map(on_device, arrays), **options)

        return run

    return decorate


def on_device(leaf: Any) -> Any:
    """A host's number or array, brought to the device on purpose; any other as it is."""
    if isinstance(leaf, int | float):
        leaf = np.asarray(leaf, np.int32 if isinstance(leaf, int) else np.float32)
    return jax.device_put(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf
