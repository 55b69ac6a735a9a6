"""What int8 and float8 share: one scale for each token and head, and narrow numbers under it."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

SCALE_DTYPE = "bfloat16"


def scales_and_ratios(
    vectors: Float[Array, "*shape head_dim"], largest: float
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape head_dim"]]:
    """The scale that brings each vector's largest number to ``largest``, and the vector under it.

    The ratios are those to the scale as it is stored, rounded to bfloat16, and are clipped to
    ``largest``: rounding may have made the scale a little small. A vector of zeros (or too small
    for its scale to be told from zero) has ratios of zero. One with a NaN or an infinity has a
    scale of that kind, and so stays the only one that it spoils.
    """
    wide = vectors.astype(jnp.float32)
    exact = jnp.max(jnp.abs(wide), axis=-1) / largest
    scales = exact.astype(SCALE_DTYPE)
    stored = scales.astype(jnp.float32)[..., None]
    ratios = jnp.where(stored == 0, 0, wide / jnp.where(stored == 0, 1, stored))
    return scales, jnp.clip(ratios, -largest, largest)


def times_scales(
    codes: Num[Array, "*shape head_dim"], scales: Float[Array, "*shape"], dtype: jnp.dtype
) -> Float[Array, "*shape head_dim"]:
    """The numbers that codes and scales stand for."""
    product = codes.astype(jnp.float32) * scales.astype(jnp.float32)[..., None]
    return product.astype(dtype)
