"""Codecs of other projects, emulated: vectors rounded as theirs, and kept in float32.

What they take is said by `bits`; `Store` asks it.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import jaxkv

_GROUP = 32  # numbers that share a scale in llama.cpp


class Emulated(jaxkv.Codec):
    """A codec whose one leaf holds what it would decode to."""

    bits: float

    def leaves(self, head_dim):
        return {"data": ((head_dim,), "float32")}

    def decode(self, leaves, head_dim, dtype):
        return leaves["data"].astype(dtype)


@dataclasses.dataclass(frozen=True)
class PerGroup(Emulated):
    """q8_0 and q4_0 of llama.cpp: 32 numbers, and the largest of them over 127 or -8 in float16."""

    code_bits: int

    @property
    def name(self) -> str:
        return f"q{self.code_bits}_0"

    @property
    def bits(self) -> float:
        return self.code_bits + 16 / _GROUP

    def encode(self, vectors: Array) -> dict[str, Array]:
        groups = vectors.astype(jnp.float32).reshape(*vectors.shape[:-1], -1, _GROUP)
        sizes = jnp.abs(groups)
        if self.code_bits == 8:
            step, low, high = sizes.max(axis=-1, keepdims=True) / 127, -127, 127
        else:  # the largest number, with its sign, becomes -8
            largest = sizes.argmax(axis=-1, keepdims=True)
            step, low, high = jnp.take_along_axis(groups, largest, axis=-1) / -8, -8, 7
        step = lax.reduce_precision(step, exponent_bits=5, mantissa_bits=10)
        codes = jnp.clip(jnp.round(groups / jnp.where(step == 0, 1, step)), low, high)
        return {"data": (codes * step).reshape(vectors.shape)}


@dataclasses.dataclass(frozen=True)
class PerTensorFloat8(Emulated):
    """float8 e4m3 under a scale of 1, the default of vLLM."""

    bits = 8.0

    @property
    def name(self) -> str:
        return "fp8 per tensor"

    def encode(self, vectors: Array) -> dict[str, Array]:
        clipped = jnp.clip(vectors.astype(jnp.float32), -448, 448)
        return {"data": clipped.astype(jnp.float8_e4m3fn).astype(jnp.float32)}


@dataclasses.dataclass(frozen=True)
class TurboQuant(Emulated):
    """A length in float16, and numbers turned by one random rotation to the nearest of few levels.

    Zandieh et al., "TurboQuant" (2025), section 3.1: the levels are the best ones for a coordinate
    of a random unit vector, which is nearly a normal number.
    """

    code_bits: int
    head_dim: int = 64

    @property
    def name(self) -> str:
        return f"TurboQuant-{self.code_bits}"

    @property
    def bits(self) -> float:
        return self.code_bits + 16 / self.head_dim

    def encode(self, vectors: Array) -> dict[str, Array]:
        vectors, rotation = vectors.astype(jnp.float32), jnp.asarray(_rotation(self.head_dim))
        length = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
        length = lax.reduce_precision(length, exponent_bits=5, mantissa_bits=10)
        levels = jnp.asarray(_normal_levels(self.code_bits) / self.head_dim**0.5)
        turned = jnp.einsum("...d,ed->...e", vectors / jnp.where(length == 0, 1, length), rotation)
        codes = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, turned)
        return {"data": jnp.einsum("...e,ed->...d", levels[codes] * length, rotation)}


@functools.cache
def _rotation(size: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(0).standard_normal((size, size)))[0].astype("float32")


@functools.cache
def _normal_levels(bits: int) -> np.ndarray:
    """By Lloyd's iteration over a fine grid of a normal distribution."""
    grid = np.linspace(-6, 6, 24_001)
    weight = np.exp(-(grid**2) / 2)
    levels = np.linspace(-2.5, 2.5, 1 << bits)
    for _ in range(2_000):
        cells = np.searchsorted((levels[1:] + levels[:-1]) / 2, grid)
        levels = np.bincount(cells, weight * grid) / np.bincount(cells, weight)
    return levels.astype("float32")
