"""The rotation of `Rotated`: signs flipped by a fixed pattern, and a Hadamard matrix."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

# Float32 sums of whole numbers are exact up to 2 ** 24, in any order.
_EXACT_BITS = 24
# Bits of the whole numbers that come out: enough to place a border within 0.002 deviations.
_BITS = 10


def rotate(vectors: Float[Array, "*shape head_dim"]) -> Float[Array, "*shape head_dim"]:
    """``H s x``, float32; orthogonal. Numbers of 16 bits are multiplied as they are, exactly."""
    head_dim = vectors.shape[-1]
    signs = _signs(head_dim).astype(vectors.dtype)
    return _times_hadamard(vectors * signs) * block_size(head_dim) ** -0.5


def half_turn(head_dim: int) -> Float[np.ndarray, " head_dim"]:
    """What `rotate` multiplies with before its matrix of ones and minus ones, and `unrotate` after.

    The matrix is Sylvester's, of `block_size`.
    """
    return _signs(head_dim) * np.float32(block_size(head_dim) ** -0.5)


def unrotate(vectors: Float[Array, "*shape head_dim"]) -> Float[Array, "*shape head_dim"]:
    """The inverse of `rotate`."""
    head_dim = vectors.shape[-1]
    return _times_hadamard(vectors) * half_turn(head_dim)


def rotate_to_whole_numbers(
    vectors: Float[Array, "*shape head_dim"],
) -> tuple[Int32[Array, "*shape head_dim"], Float[Array, "*shape 1"]]:
    """`rotate` to ten bits and a unit for each vector: ``rotate(x) = whole numbers * unit``.

    All that is summed is whole and small enough for float32 to be exact, and units are powers of
    two until the last product. So the result is the same to the bit whatever the order of sums,
    and with it the backend, the shape of the batch and the fusions of the program.

    Args:
      vectors: float32. Numbers below 1e-29 become zero; a vector with a NaN or an infinity becomes
        zeros, with a unit of NaN.
    """
    block = block_size(vectors.shape[-1])
    bits = _EXACT_BITS - 1 - (block.bit_length() - 1)
    # 2 ** 30 above the smallest exponent, so that no power of two here is too small or too large.
    scaled, unit = _scaled(vectors, bits, smallest_exponent=30 - 127)
    rotated = _times_hadamard(jnp.round(scaled) * _signs(vectors.shape[-1]))
    scaled, unit_again = _scaled(rotated, _BITS - 1, smallest_exponent=0)
    return jnp.round(scaled).astype(jnp.int32), unit * unit_again * np.float32(block**-0.5)


def whole_numbers(vectors: Float[Array, "*shape numbers"]) -> Int32[Array, "*shape numbers"]:
    """Each vector in a unit of its own, a power of two, to ten bits and a sign.

    Up to 2,048 squares of them have a sum below 2 ** 31.
    """
    scaled, _ = _scaled(vectors, _BITS - 1, smallest_exponent=30 - 127)
    return jnp.round(scaled).astype(jnp.int32)


def block_size(head_dim: int) -> int:
    """How many numbers are rotated together: the largest power of two that divides head_dim."""
    return head_dim & -head_dim


def _scaled(vectors: Array, bits: int, *, smallest_exponent: int) -> tuple[Array, Array]:
    """Vectors over a power of two each, which leaves them below ``2 ** (bits + 1)``; and it.

    Of one that is not finite zeros, and NaN.
    """
    largest = jnp.max(jnp.abs(vectors), axis=-1, keepdims=True)
    finite = jnp.isfinite(largest)
    exponent = (lax.bitcast_convert_type(jnp.where(finite, largest, 0), jnp.int32) >> 23) - 127
    exponent = jnp.maximum(exponent, smallest_exponent) - bits
    scaled = jnp.where(finite, vectors * _power_of_two(-exponent), 0)
    return scaled, jnp.where(finite, _power_of_two(exponent), jnp.nan)


def _power_of_two(exponent: Int32[Array, "*shape"]) -> Float[Array, "*shape"]:
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _times_hadamard(vectors: Float[Array, "*shape head_dim"]) -> Float[Array, "*shape head_dim"]:
    size = block_size(vectors.shape[-1])
    blocks = vectors.reshape(*vectors.shape[:-1], -1, size)
    matrix = matrix_of(size).astype(vectors.dtype)
    rotated = jnp.matmul(blocks, matrix, precision="highest", preferred_element_type=jnp.float32)
    return rotated.reshape(vectors.shape)


@functools.cache
def matrix_of(size: int) -> Float[np.ndarray, "size size"]:
    """Sylvester's matrix of ones and minus ones."""
    odd = np.bitwise_count(np.arange(size)[:, None] & np.arange(size)) % 2 == 1
    return np.where(odd, np.float32(-1), np.float32(1))


@functools.cache
def _signs(head_dim: int) -> Float[np.ndarray, " head_dim"]:
    """Plus and minus ones; numpy keeps the stream of this old generator for good."""
    return np.random.RandomState(0).choice(np.array([-1, 1], np.float32), head_dim)
