"""Codecs of other projects, emulated: vectors rounded as theirs, and kept in float32.

What they take is said by `bits`; `Store` asks it.
"""

import dataclasses

import jax.numpy as jnp
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
