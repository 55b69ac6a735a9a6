"""A mixture of experts (Shazeer et al., 2017), as gpt-oss has it in place of an MLP."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxkv.models.config import DecoderConfig
from jaxkv.models.layers import INIT_STD, Linear, matmul

Hidden = Float[Array, "*batch tokens hidden"]
# What each expert contributes to each token: zero for most.
Shares = Float[Array, "*batch tokens experts"]


class Experts(nnx.Module):
    """MLPs side by side, ``[experts, in, out]``; gate and up projection alternate in columns."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any, out_std: float):
        count, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
        normal, out_normal = (jax.nn.initializers.normal(std) for std in (INIT_STD, out_std))
        self.gate_up_proj = nnx.Param(normal(rngs.params(), (count, hidden, 2 * inner), dtype))
        self.gate_up_proj_bias = nnx.Param(jnp.zeros((count, 2 * inner), dtype))
        self.down_proj = nnx.Param(out_normal(rngs.params(), (count, inner, hidden), dtype))
        self.down_proj_bias = nnx.Param(jnp.zeros((count, hidden), dtype))
        self.config = config

    def __call__(self, x: Hidden, shares: Shares) -> Hidden:
        """The experts' outputs, added up by their shares.

        One expert after the other, all tokens at once, and only those that some token chose are
        read. On a CPU that beats `lax.ragged_dot` and gathered weights at 1 and at 128 tokens.
        """

        def add(total: Hidden, expert: Array) -> tuple[Hidden, None]:
            share = shares[..., expert, None]
            return lax.cond(
                (share != 0).any(),
                lambda: total + share * self._run(expert, x),
                lambda: total,
            ), None

        return lax.scan(
            add, jnp.zeros_like(x), jnp.arange(self.config.num_experts, dtype=jnp.int32)
        )[0]

    def _run(self, expert: Array, x: Hidden) -> Hidden:
        """One expert: a gated linear unit with a clamped swish, and one added to the other side."""
        limit, alpha = self.config.swiglu_limit, self.config.swiglu_alpha
        both = matmul(x, self.gate_up_proj[...][expert]) + self.gate_up_proj_bias[...][expert]
        gate, up = jnp.minimum(both[..., ::2], limit), jnp.clip(both[..., 1::2], -limit, limit)
        inner = (up + 1) * gate * jax.nn.sigmoid(alpha * gate)
        return matmul(inner, self.down_proj[...][expert]) + self.down_proj_bias[...][expert]


class MixtureOfExperts(nnx.Module):
    """A router gives each token a few experts, weighted by the softmax of their scores."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any, out_std: float):
        shared = {"rngs": rngs, "dtype": dtype}
        self.router = Linear(config.hidden_size, config.num_experts, bias=True, **shared)
        self.experts = Experts(config, out_std=out_std, **shared)
        self.experts_per_token = config.experts_per_token

    def __call__(self, x: Hidden) -> Hidden:
        scores = self.router(x)
        highest, chosen = lax.top_k(scores, self.experts_per_token)
        weights = jax.nn.softmax(highest, axis=-1)[..., None]
        shares = (weights * jax.nn.one_hot(chosen, scores.shape[-1], dtype=x.dtype)).sum(axis=-2)
        return self.experts(x, shares)
