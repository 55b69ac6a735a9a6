"""Four, three or two bits a number: rotated by a Hadamard matrix, so that one codebook fits all."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, UInt8

from jaxkv.codecs import hadamard
from jaxkv.codecs.codec import Codec, LeafSpecs, Leaves, Vectors
from jaxkv.codecs.least import number_of_least
from jaxkv.codecs.packing import pack, packed_bytes, unpack
from jaxkv.codecs.scaled import SCALE_DTYPE, times_scales

# The positive levels of the quantizer with the least squared error for a normal distribution (Max,
# 1960; Lloyd, 1982), as whole numbers that fit in int8, and what one step of them is in standard
# deviations. Rounding to whole numbers costs 0.05 % of the error.
_LEVELS = {1: (1,), 2: (3, 10), 3: (10, 31, 55, 88), 4: (5, 15, 25, 36, 48, 62, 79, 104)}
_STEP = {1: 0.797885, 2: 0.151035, 3: 0.0244460, 4: 0.0262203}
# Scales that are tried for a vector, as factors of the one that fits a normal distribution. 128
# numbers differ from it enough for the best of these to take 7 % off the error of 4 bits.
_FACTORS = np.geomspace(0.75, 1.15, 6)


@dataclasses.dataclass(frozen=True)
class Rotated(Codec):
    """``bits`` per number and one bfloat16 scale per vector: ``head_dim * bits / 8 + 2`` bytes.

    A vector's signs are flipped by a fixed pattern and it is rotated by a Hadamard matrix, which
    makes its numbers nearly normal whatever they were (QuaRot: Ashkboos et al., 2024; TurboQuant:
    Zandieh et al., 2025). Each is then rounded to a level of the best quantizer for a normal
    distribution, times the scale that leaves the least squared error. Attention never rotates
    vectors back: it rotates its queries, once, and its output.

    The relative error of a Gaussian vector of 128 numbers is 0.089, 0.179 and 0.338 with 4, 3
    and 2 bits; Shannon's limit is 0.057, 0.115 and 0.229.

    Stored: leaf ``codes``, uint8, laid out as `packing.pack` says; code c stands for
    ``levels[c]`` times the vector's ``scales``. A head_dim that is not a power of two is rotated in
    blocks of the largest power of two that divides it, and one that is not in whole eights is
    padded with codes.

    Args:
      bits: 4, 3 or 2; or 1, which leaves the signs alone.

    Raises:
      ValueError: another number of bits.

    >>> import jaxkv
    >>> config = jaxkv.KVCacheConfig(32, 8192, 8, head_dim=128, codec=jaxkv.Rotated(bits=4))
    >>> config.size_bytes == 2 * 32 * 8192 * 8 * (128 * 4 // 8 + 2)
    True
    """

    bits: int = 4

    def __post_init__(self) -> None:
        if self.bits not in _LEVELS:
            raise ValueError(f"Rotated codec: bits must be 4, 3, 2 or 1, got {self.bits!r}.")

    @property
    def name(self) -> str:
        return f"rotated{self.bits}"

    @property
    def levels(self) -> tuple[int, ...]:
        positive = _LEVELS[self.bits]
        return (*(-level for level in reversed(positive)), *positive)

    @property
    def rotation(self) -> str:
        return "hadamard"

    def leaves(self, head_dim: int) -> LeafSpecs:
        codes = (packed_bytes(head_dim, self.bits),)
        return {"codes": (codes, "uint8"), "scales": ((), SCALE_DTYPE)}

    # A jit of its own: outside one, a loop is compiled anew on each call.
    @functools.partial(jax.jit, static_argnames="self")
    def encode(self, vectors: Vectors) -> Leaves:
        numbers, unit = hadamard.rotate_to_whole_numbers(vectors.astype(jnp.float32))
        codes, scales = self._nearest(numbers)
        scales = (scales * unit)[..., 0]  # NaN of a vector with one, which so spoils no other
        # Or the kernel that writes them to slots would find each code once more for each byte.
        packed = lax.optimization_barrier(pack(codes, self.bits))
        return {"codes": packed, "scales": scales.astype(SCALE_DTYPE)}

    def decode(self, leaves: Leaves, head_dim: int, dtype: jnp.dtype) -> Vectors:
        rotated = self.decode_rotated(leaves, head_dim, jnp.dtype("float32"))
        return hadamard.unrotate(rotated).astype(dtype)

    def rotate(self, queries: Vectors) -> Vectors:
        return hadamard.rotate(queries)

    def unrotate(self, outputs: Vectors) -> Vectors:
        return hadamard.unrotate(outputs)

    def rotate_values(self, values: Vectors) -> Vectors:
        return hadamard.rotate(values)

    def decode_rotated(self, leaves: Leaves, head_dim: int, dtype: jnp.dtype) -> Vectors:
        codes = unpack(leaves["codes"], self.bits, head_dim).astype(jnp.int32)
        levels = jnp.asarray(self.levels, jnp.float32)
        return times_scales(levels.at[codes].get(mode="promise_in_bounds"), leaves["scales"], dtype)

    def _nearest(
        self, numbers: Int32[Array, "*shape head_dim"]
    ) -> tuple[UInt8[Array, "*shape head_dim"], Float[Array, "*shape 1"]]:
        """Codes, and the scale that leaves the least squared error with them.

        Levels l under the scale ``sum(x l) / sum(l l)`` take ``sum(x l) ** 2 / sum(l l)`` off the
        squared error: of all factors the one that takes most is chosen.
        """
        sizes = jnp.abs(numbers)
        energy = jnp.sum(sizes * sizes, axis=-1, keepdims=True)
        borders = jnp.asarray(self._squared_borders(numbers.shape[-1]))

        def fit(number: Array | int) -> tuple[Array, Array, Array]:
            codes, levels = self._above(sizes, energy, borders[number])
            shared = jnp.sum(sizes * levels, axis=-1, keepdims=True).astype(jnp.float32)
            scales = shared / jnp.sum(levels * levels, axis=-1, keepdims=True).astype(jnp.float32)
            return codes, scales, -shared * scales

        worst = jnp.ones(energy.shape, jnp.float32)
        chosen = number_of_least(lambda number: fit(number)[2], len(borders), worst=worst)
        codes, scales, _ = fit(chosen)
        half = 1 << self.bits - 1
        return jnp.where(numbers < 0, half - 1 - codes, half + codes).astype(jnp.uint8), scales

    def _above(self, sizes: Array, energy: Array, squared_borders: Array) -> tuple[Array, Array]:
        """How many borders each size is above, and the level that it has there."""
        positive = _LEVELS[self.bits]
        squares = (sizes * sizes).astype(jnp.float32)
        code = jnp.zeros(jnp.broadcast_shapes(sizes.shape, squared_borders.shape[:-1]), jnp.int32)
        level = jnp.full_like(code, positive[0])
        for number, (lower, upper) in enumerate(itertools.pairwise(positive)):
            above = squares > energy.astype(jnp.float32) * squared_borders[..., number]
            code += above.astype(jnp.int32)
            level += jnp.where(above, upper - lower, 0)
        return code, level

    def _squared_borders(self, head_dim: int) -> Float[np.ndarray, "factors borders"]:
        """Between neighbouring levels, as shares of a vector's energy."""
        middles = [(lower + upper) / 2 for lower, upper in itertools.pairwise(_LEVELS[self.bits])]
        borders = _FACTORS[:, None] * _STEP[self.bits] * np.asarray(middles).reshape(1, -1)
        return (borders**2 / head_dim).astype(np.float32)
