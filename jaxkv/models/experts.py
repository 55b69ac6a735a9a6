"""A mixture of experts (Shazeer et al., 2017) in place of an MLP: gpt-oss's, and the usual kind."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxkv.models.config import DecoderConfig
from jaxkv.models.layers import ACTIVATIONS, INIT_STD, Linear, matmul
from jaxkv.models.mlp import MLP
from jaxkv.models.routing import Shares, shares_of

Hidden = Float[Array, "*batch tokens hidden"]


def of_chosen(
    run: Callable[[Array, Hidden], Hidden], x: Hidden, shares: Shares, weighs_inputs: bool = False
) -> Hidden:
    """What experts make of tokens, added up by their shares.

    One expert after the other, all tokens at once, and only those that some token chose are
    read. On a CPU that beats `lax.ragged_dot` and gathered weights at 1 and at 128 tokens.

    Args:
      run: one expert, by its number; it makes zeros of zeros.
      weighs_inputs: shares multiply what an expert is given.
    """

    def add(total: Hidden, expert: Array) -> tuple[Hidden, None]:
        share = shares[..., expert, None]

        def given() -> Hidden:
            return run(expert, share * x) if weighs_inputs else share * run(expert, x)

        return lax.cond((share != 0).any(), lambda: total + given(), lambda: total), None

    return lax.scan(add, jnp.zeros_like(x), jnp.arange(shares.shape[-1], dtype=jnp.int32))[0]


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
        return of_chosen(self._run, x, shares)

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


class Stack(nnx.Module):
    """Projections side by side, ``weight [experts, in, out]``."""

    def __init__(self, shape: tuple[int, ...], *, rngs: nnx.Rngs, dtype: Any, std: float):
        normal = jax.nn.initializers.normal(std)
        self.weight = nnx.Param(normal(rngs.params(), shape, dtype))


class GatedExperts(nnx.Module):
    """Gated linear units side by side."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any, out_std: float):
        experts = config.experts
        assert experts is not None
        shape = experts.num_experts, config.hidden_size, experts.intermediate_size
        shared = {"rngs": rngs, "dtype": dtype}
        self.gate_proj = Stack(shape, std=INIT_STD, **shared)
        self.up_proj = Stack(shape, std=INIT_STD, **shared)
        self.down_proj = Stack((shape[0], shape[2], shape[1]), std=out_std, **shared)
        self.activation, self.weighs_inputs = config.activation, experts.weighs_inputs

    def __call__(self, x: Hidden, shares: Shares) -> Hidden:
        def run(expert: Array, x: Hidden) -> Hidden:
            gate, up = (
                matmul(x, each.weight[...][expert]) for each in (self.gate_proj, self.up_proj)
            )
            inner = ACTIVATIONS[self.activation](gate) * up
            return matmul(inner, self.down_proj.weight[...][expert])

        return of_chosen(run, x, shares.astype(x.dtype), self.weighs_inputs)


class Router(nnx.Module):
    """Scores of experts, in float32."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any):
        experts = config.experts
        assert experts is not None
        normal = jax.nn.initializers.normal(INIT_STD)
        shape = config.hidden_size, experts.num_experts
        self.weight = nnx.Param(normal(rngs.params(), shape, dtype))
        self.e_score_correction_bias = (
            nnx.Param(jnp.zeros(experts.num_experts, jnp.float32)) if experts.is_corrected else None
        )
        self.experts = experts

    def __call__(self, x: Hidden) -> Shares:
        wide = x.astype(jnp.float32), self.weight[...].astype(jnp.float32)
        bias = self.e_score_correction_bias
        return shares_of(self.experts, matmul(*wide), None if bias is None else bias[...])


class RoutedExperts(nnx.Module):
    """A router gives each token a few experts; some are taken by all tokens."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any, out_std: float):
        experts = config.experts
        assert experts is not None
        shared = {"rngs": rngs, "dtype": dtype}
        self.gate = Router(config, **shared)
        self.experts = GatedExperts(config, out_std=out_std, **shared)
        inner = experts.shared_size or experts.shared_experts * experts.intermediate_size
        self.shared_experts = MLP(config, inner, out_std=out_std, **shared) if inner else None
        gated = inner and experts.shared_gate
        self.shared_expert_gate = Linear(config.hidden_size, 1, **shared) if gated else None

    def __call__(self, x: Hidden) -> Hidden:
        mixed = self.experts(x, self.gate(x))
        if self.shared_experts is None:
            return mixed
        given = self.shared_experts(x)
        if self.shared_expert_gate is not None:
            given *= jax.nn.sigmoid(self.shared_expert_gate(x))
        return mixed + given
