"""Attention that stays sharp in long texts, where no rope tells near from far (Llama 4)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def query_growth(
    positions: Int[Array, "*batch tokens"], step: float, growth: float
) -> Float[Array, "*batch tokens 1 1"]:
    """What queries at these positions are multiplied by: more with each ``step`` tokens before it.

    Nakanishi, "Scalable-Softmax is superior for attention" (2025), in steps. float32.

    >>> import jax.numpy as jnp
    >>> [f"{x:.3f}" for x in query_growth(jnp.array([0, 8191]), step=8192, growth=0.1).ravel()]
    ['1.000', '1.069']
    """
    steps = jnp.floor((positions.astype(jnp.float32) + 1) / step)
    return (1 + growth * jnp.log1p(steps))[..., None, None]
