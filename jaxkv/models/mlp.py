"""What a layer computes of each token alone."""

import statistics
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxkv.models.config import DecoderConfig
from jaxkv.models.layers import ACTIVATIONS, Linear, linears

Hidden = Float[Array, "*batch tokens hidden"]


class MLP(nnx.Module):
    """A gated linear unit (Shazeer, 2020), or where a family has no gate, two projections.

    With ``sparsity`` so large a share of the gate's numbers is zero, those that are lowest if they
    are distributed normally (Gemma 3n, 2025).
    """

    def __init__(
        self,
        config: DecoderConfig,
        inner: int,
        *,
        sparsity: float = 0,
        rngs: nnx.Rngs,
        dtype: Any,
        out_std: float,
    ):
        hidden, family = config.hidden_size, config.family
        shared = {"bias": config.mlp_bias, "rngs": rngs, "dtype": dtype}
        self.gate_proj = Linear(hidden, inner, **shared) if family.gated else None
        self.up_proj = Linear(hidden, inner, **shared)
        self.down_proj = Linear(inner, hidden, std=out_std, **shared)
        self.activation = config.activation
        self.cut = statistics.NormalDist().inv_cdf(sparsity) if sparsity else None

    def __call__(self, x: Hidden) -> Hidden:
        active = ACTIVATIONS[self.activation]
        if self.gate_proj is None:
            return self.down_proj(active(self.up_proj(x)))
        gate, up = linears(x, self.gate_proj, self.up_proj)
        if self.cut is not None:  # in deviations from the mean
            mean, deviation = (of(gate, axis=-1, keepdims=True) for of in (jnp.mean, jnp.std))
            gate = jax.nn.relu(gate - (mean + self.cut * deviation))
        return self.down_proj(active(gate) * up)
