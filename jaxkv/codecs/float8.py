"""Eight-bit floats (e4m3), one scale per token and head: for caches that others wrote."""

import dataclasses

import jax.numpy as jnp

from jaxkv.codecs.codec import Codec, LeafSpecs, Leaves, Vectors
from jaxkv.codecs.scaled import SCALE_DTYPE, scales_and_ratios, times_scales

_DTYPE = "float8_e4m3fn"
_LARGEST = float(jnp.finfo(_DTYPE).max)  # 448


@dataclasses.dataclass(frozen=True)
class Float8(Codec):
    """``scale = bfloat16(max|x| / 448)``, ``codes = e4m3(x / scale)``: head_dim + 2 bytes each.

    The format of Micikevicius et al., "FP8 formats for deep learning" (2022). Saturating: JAX's
    own conversion turns what is too large into NaN. As many bytes as `Int8` and four times its
    error, so take it for exchange with systems that use it.

    >>> import jaxkv
    >>> jaxkv.Float8().leaves(head_dim=128)
    {'codes': ((128,), 'float8_e4m3fn'), 'scales': ((), 'bfloat16')}
    """

    @property
    def name(self) -> str:
        return "float8"

    @property
    def scaled_dtype(self) -> str:
        return _DTYPE

    def leaves(self, head_dim: int) -> LeafSpecs:
        return {"codes": ((head_dim,), _DTYPE), "scales": ((), SCALE_DTYPE)}

    def encode(self, vectors: Vectors) -> Leaves:
        scales, ratios = scales_and_ratios(vectors, _LARGEST)
        return {"codes": ratios.astype(_DTYPE), "scales": scales}

    def decode(self, leaves: Leaves, head_dim: int, dtype: jnp.dtype) -> Vectors:
        return times_scales(leaves["codes"], leaves["scales"], dtype)
