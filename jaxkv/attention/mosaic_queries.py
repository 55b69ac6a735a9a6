"""What the kernel of `mosaic_kernel` makes of its queries before it reads, and of its mix after.

Tensor cores take numbers of 8 or 16 bits, so queries are cut into two parts, high and low. Packed
codes are of vectors that were turned by a Hadamard matrix, so queries are turned first and the mix
is turned back. Kernels of XLA's for each of these steps, small as they are, would together take
longer than a short context.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.attention import pallas_gpu as gpu

LOW_STEPS = 254  # of the low part in one step of the high part
BLOCK = 64  # of the Hadamard matrix that is multiplied with: the rows of a product


def in_two_bfloat16(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``high + low``, exact to 16 bits of each number."""
    high = matrix.astype(jnp.bfloat16)
    return high, (matrix - high.astype(jnp.float32)).astype(jnp.bfloat16)


def in_two_bytes(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(LOW_STEPS * high + low) * step``: whole numbers up to 127, and a step for each column.

    They are multiplied with the stored codes as they are, so keys need not be widened.
    """
    largest = jnp.maximum(jnp.abs(matrix).max(axis=0), 1e-30)
    step = largest / (127 * LOW_STEPS)
    rows, columns = matrix.shape
    steps = matrix / gpu.across(step, (rows, columns), 1)
    high = jnp.round(steps / LOW_STEPS)
    return high, jnp.round(steps - LOW_STEPS * high), step


def store_in_two(tiles: Any, matrix: jax.Array) -> None:
    """``[rows, columns]`` in bfloat16 to ``[2 * columns, rows]``: high parts, then low ones."""
    gpu.store_transposed(tiles, in_two_bfloat16(matrix))


def store_in_two_bytes(tiles: Any, matrix: jax.Array) -> jax.Array:
    """The same in int8; the step of each column."""
    high, low, step = in_two_bytes(matrix)
    gpu.store_transposed(tiles, [high, low])
    return step


def turned(matrix: jax.Array, tiles: Any, signs: Any, *, interpret: bool) -> jax.Array:
    """Sylvester's Hadamard matrix times this one, ``[64 or 128, columns]``.

    That of 128 is ``[[h, h], [h, -h]]`` of that of 64.

    Args:
      tiles: bfloat16 ``[2 * columns, rows]``, for the matrix.
      signs: bfloat16 ``[64, 64]``, that of 64.
      interpret: whether no GPU is there.
    """
    store_in_two(tiles, matrix)
    gpu.commit()
    parts = []
    for start in range(0, matrix.shape[0], BLOCK):
        whole = matrix.shape[0] == BLOCK
        some = tiles if whole else tiles.at[:, gpu.span(start, BLOCK)]
        coarse, fine = gpu.products(signs, gpu.transposed(some), jnp.float32)
        parts.append(coarse + fine)
    if len(parts) == 1:
        return parts[0]
    first, second = parts
    return gpu.stacked([first + second, first - second], interpret=interpret)
