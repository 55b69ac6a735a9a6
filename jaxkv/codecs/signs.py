"""The sign of a scale, which a scale does not need: it says which of two centres a vector has."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Bool

from jaxkv.codecs.codec import bitcast
from jaxkv.codecs.scaled import SCALE_DTYPE

_SIGN = 15


def signs_of(scales: BFloat16[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """Of zeros and NaNs too."""
    return bitcast(scales, jnp.uint16) >> _SIGN == 1


def with_signs(
    scales: BFloat16[Array, "*shape"], is_negative: Bool[Array, "*shape"]
) -> BFloat16[Array, "*shape"]:
    """Of scales that have none."""
    signs = is_negative.astype(jnp.uint16) << _SIGN
    return bitcast(bitcast(scales, jnp.uint16) | signs, SCALE_DTYPE)


def without_signs(scales: BFloat16[Array, "*shape"]) -> BFloat16[Array, "*shape"]:
    """Their magnitudes."""
    magnitude = np.uint16((1 << _SIGN) - 1)
    return bitcast(bitcast(scales, jnp.uint16) & magnitude, SCALE_DTYPE)
