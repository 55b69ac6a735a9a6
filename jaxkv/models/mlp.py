"""What a layer computes of each token alone."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from jaxkv.models.config import DecoderConfig
from jaxkv.models.layers import ACTIVATIONS, Linear, linears

Hidden = Float[Array, "*batch tokens hidden"]


class MLP(nnx.Module):
    """A gated linear unit (Shazeer, 2020), or where a family has no gate, two projections."""

    def __init__(
        self, config: DecoderConfig, inner: int, *, rngs: nnx.Rngs, dtype: Any, out_std: float
    ):
        hidden, family = config.hidden_size, config.family
        shared = {"bias": config.mlp_bias, "rngs": rngs, "dtype": dtype}
        self.gate_proj = Linear(hidden, inner, **shared) if family.gated else None
        self.up_proj = Linear(hidden, inner, **shared)
        self.down_proj = Linear(inner, hidden, std=out_std, **shared)
        self.activation = config.activation

    def __call__(self, x: Hidden) -> Hidden:
        active = ACTIVATIONS[self.activation]
        if self.gate_proj is None:
            return self.down_proj(active(self.up_proj(x)))
        gate, up = linears(x, self.gate_proj, self.up_proj)
        return self.down_proj(active(gate) * up)
