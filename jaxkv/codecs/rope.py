"""What a codec must know of a model's rotary positions to take the rotation out of keys."""

import dataclasses
import functools
from typing import Self

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

# Angles are added up from the digits of a position in this base; positions repeat after three.
_BASE_BITS, _DIGITS = 7, 3
# A product of two numbers of 12 bits is exact in float32, so a sum of two such products is rounded
# once, whether a program fuses the multiplication into the addition or not.
_MANTISSA_BITS = 11


@dataclasses.dataclass(frozen=True)
class Rope:
    """How keys are rotated by their position: RoPE (Su et al., 2021), scalings and all.

    Args:
      frequencies: radians a position for each pair of numbers, as the model has them for its
        context. Numbers beyond ``2 * len(frequencies)`` are not rotated.
      interleaved: pairs are neighbours (GPT-J, Llama's own code); if not, number i of the first
        half of those rotated goes with number i of the second (transformers, GPT-NeoX).

    >>> import jaxkv
    >>> [round(frequency, 3) for frequency in jaxkv.Rope.of(base=10_000, rotary_dim=4).frequencies]
    [1.0, 0.01]
    """

    frequencies: tuple[float, ...]
    interleaved: bool = False

    @classmethod
    def of(cls, base: float, rotary_dim: int, *, interleaved: bool = False) -> Self:
        """The plain rope: wavelengths in a geometric series.

        Args:
          base: of the series; ``rope_theta`` in configs.
          rotary_dim: how many of a head's numbers are rotated.
        """
        frequencies = float(base) ** -(np.arange(0, rotary_dim, 2) / rotary_dim)
        return cls(tuple(frequencies.tolist()), interleaved)

    @property
    def rotary_dim(self) -> int:
        """How many of a head's numbers are rotated."""
        return 2 * len(self.frequencies)

    @property
    def tables(self) -> Float[np.ndarray, "digits 2 base pairs"]:
        """Cosines and sines of what each digit of a position adds to the angles, to 12 bits."""
        return _tables(self.frequencies)

    def cos_sin(
        self, positions: Int[Array, "*shape"]
    ) -> tuple[Float[Array, "*shape pairs"], Float[Array, "*shape pairs"]]:
        """Cosine and sine of each angle, rounded to 12 bits: the same bits in every program."""
        digits = [
            jnp.maximum(positions, 0) >> number * _BASE_BITS & (1 << _BASE_BITS) - 1
            for number in range(_DIGITS)
        ]
        tables = jnp.asarray(self.tables)
        cos, sin = tables[0].at[:, digits[0]].get(mode="promise_in_bounds")
        for table, digit in zip(tables[1:], digits[1:], strict=True):
            more_cos, more_sin = table.at[:, digit].get(mode="promise_in_bounds")
            cos, sin = cos * more_cos - sin * more_sin, sin * more_cos + cos * more_sin
            cos, sin = to_12_bits(cos), to_12_bits(sin)
        return cos, sin

    def pairs(self, vectors: Float[Array, "*shape head_dim"]) -> tuple[Array, Array, Array]:
        """The first and the second number of each pair, and the numbers that are not rotated."""
        rotated, rest = jnp.split(vectors, [self.rotary_dim], axis=-1)
        if self.interleaved:
            return rotated[..., ::2], rotated[..., 1::2], rest
        first, second = jnp.split(rotated, 2, axis=-1)
        return first, second, rest

    def unturned(
        self,
        keys: Float[Array, "*tokens kv_heads head_dim"],
        positions: Int[Array, "*tokens #kv_heads"],
    ) -> Float[Array, "*tokens kv_heads head_dim"]:
        """Keys of tokens at these positions, as they were before they were rotated."""
        cos, sin = self.cos_sin(positions)
        first, second, rest = self.pairs(keys)
        return self.joined(first * cos + second * sin, second * cos - first * sin, rest)

    def joined(self, first: Array, second: Array, rest: Array) -> Float[Array, "*shape head_dim"]:
        """The inverse of `pairs`."""
        if self.interleaved:
            rotated = jnp.stack([first, second], axis=-1).reshape(
                *first.shape[:-1], self.rotary_dim
            )
        else:
            rotated = jnp.concatenate([first, second], axis=-1)
        return jnp.concatenate([rotated, rest], axis=-1)


def to_12_bits(numbers: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return lax.reduce_precision(numbers, exponent_bits=8, mantissa_bits=_MANTISSA_BITS)


@functools.cache
def _tables(frequencies: tuple[float, ...]) -> Float[np.ndarray, "digits 2 base pairs"]:
    """Cosines and sines of each digit's part of the angle, to 12 bits."""
    digits = np.arange(1 << _BASE_BITS, dtype=np.float64)
    places = 2.0 ** (_BASE_BITS * np.arange(_DIGITS))
    angles = places[:, None, None] * digits[:, None] * np.asarray(frequencies)
    mantissa, exponent = np.frexp(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    bits = 1 << _MANTISSA_BITS + 1
    return np.ldexp(np.round(mantissa * bits) / bits, exponent).astype(np.float32)
