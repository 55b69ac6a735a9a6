"""A few rows times matrices of weights, as in decode, at the rate at which the weights are read.

XLA's CPU backend wakes its threads for every product, which takes as long as reading a
megabyte (ARCHITECTURE.md, "Reading on a CPU").
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from jaxkv.devices import num_devices_of
from jaxkv.native.library import unavailable

_LEAST_BYTES = 64 << 10  # of weights; for fewer the call itself takes longer than the product
_MOST_ROWS = 8
_LANES = 32  # elements that the kernel reads at once


def cannot_multiply(x: Array, weights: Sequence[Array]) -> str | None:
    """Why `products` is not for these arrays on a CPU, or None."""
    if (devices := max(num_devices_of(array) for array in (x, *weights))) > 1:
        return f"the arrays are on {devices} devices, and sharded ones would be gathered"
    if (rows := x.size // max(1, x.shape[-1])) not in range(1, _MOST_ROWS + 1):
        return f"it is for 1 to {_MOST_ROWS} rows, and these are {rows}"
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it multiplies float32 and bfloat16, and this is {x.dtype}"
    if any(weight.dtype != x.dtype for weight in weights):
        return f"the weights have another dtype than the rows, {x.dtype}"
    if any(weight.shape[1] % _LANES for weight in weights):
        return f"a weight's last axis is not a multiple of {_LANES}"
    if sum(weight.nbytes for weight in weights) < _LEAST_BYTES:
        return f"it is for at least {_LEAST_BYTES >> 10} KiB of weights"
    return unavailable()


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def products(
    x: Float[Array, "*batch features"], weights: tuple[Float[Array, "_ _"], ...], axis: int
) -> tuple[Float[Array, "*batch out"], ...]:
    """``x`` times each weight, in float32: `native.cc` for arrays that `cannot_multiply` allows.

    Args:
      axis: of every weight that is contracted: 0 for ``[features, out]``, 1 for a table
        ``[out, features]``.
    """
    return _custom_call(axis)(x, weights)


@products.defjvp
def _jvp(axis: int, primals: Any, tangents: Any) -> Any:
    """The kernel has no derivative of its own; XLA's product is the same function."""
    return jax.jvp(functools.partial(_by_xla, axis), primals, tangents)


@functools.cache
def _custom_call(axis: int) -> Callable[..., Any]:
    """For each axis one function, which under `vmap` is a product of more rows: XLA's."""

    @custom_vmap
    def call(x: Array, weights: tuple[Array, ...]) -> tuple[Array, ...]:
        rows = x.reshape(-1, x.shape[-1])
        results = jax.ffi.ffi_call(
            "jaxkv_products", jax.eval_shape(functools.partial(_by_xla, axis), rows, weights)
        )(rows.astype(jnp.float32), *weights, table=axis == 1)
        return tuple(result.reshape(*x.shape[:-1], -1) for result in results)

    @call.def_vmap
    def vmapped(axis_size: int, in_batched: Any, x: Array, weights: Any) -> Any:
        in_axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(in_batched))
        results = jax.vmap(functools.partial(_by_xla, axis), in_axes=in_axes)(x, weights)
        return results, tuple(True for _ in results)

    return call


def _by_xla(axis: int, x: Array, weights: tuple[Array, ...]) -> tuple[Array, ...]:
    contracted = (((x.ndim - 1,), (axis,)), ((), ()))
    return tuple(
        lax.dot_general(x, weight, contracted, preferred_element_type=jnp.float32)
        for weight in weights
    )
