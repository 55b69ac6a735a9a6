"""Weights that multiply the same numbers, in one array: a GPU reads one large matrix faster.

Products of Llama-3-8B's shapes with one row take an H200 5.06 ms a step apart and 3.93 so; on a CPU
`linears` is one call either way. A checkpoint keeps them apart, under the names that `PARTS` has.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxkv.models.layers import INIT_STD, matmul

# Modules here -> what a checkpoint calls their parts.
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Where each part is in ``[kv_heads, group + 2, head_dim]`` or ``[2, inner]``.
_PLACES: dict[str, tuple[Any, ...]] = {
    "q_proj": (slice(None), slice(None, -2)),
    "k_proj": (slice(None), -2),
    "v_proj": (slice(None), -1),
    "gate_proj": (0,),
    "up_proj": (1,),
}


class QKVProjection(nnx.Module):
    """Queries, keys and values: ``weight [in, kv_heads, group + 2, head_dim]``.

    What belongs to a KV head stands together, so that heads can be sharded.
    """

    def __init__(
        self,
        in_features: int,
        kv_heads: int,
        group: int,
        head_dim: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        bias: bool,
    ):
        shape = (kv_heads, group + 2, head_dim)
        self.weight, self.bias = _params(in_features, shape, rngs, dtype, bias)

    def __call__(
        self, x: Float[Array, "*batch tokens in_features"]
    ) -> tuple[
        Float[Array, "*batch tokens heads head_dim"],
        Float[Array, "*batch tokens kv_heads head_dim"],
        Float[Array, "*batch tokens kv_heads head_dim"],
    ]:
        both = _product(x, self.weight[...], self.bias)
        queries = both[..., :-2, :].reshape(*x.shape[:-1], -1, both.shape[-1])
        return queries, both[..., -2, :], both[..., -1, :]


class GateUpProjection(nnx.Module):
    """Both sides of a gated linear unit: ``weight [in, 2, inner]``."""

    def __init__(self, in_features: int, inner: int, *, rngs: nnx.Rngs, dtype: Any, bias: bool):
        self.weight, self.bias = _params(in_features, (2, inner), rngs, dtype, bias)

    def __call__(
        self, x: Float[Array, "*batch tokens in_features"]
    ) -> tuple[Float[Array, "*batch tokens inner"], Float[Array, "*batch tokens inner"]]:
        both = _product(x, self.weight[...], self.bias)
        return both[..., 0, :], both[..., 1, :]


def place_of(part: str, kind: str) -> tuple[Any, ...]:
    """Where a part is in the ``weight`` or the ``bias`` of its module."""
    return _PLACES[part] if kind == "bias" else (slice(None), *_PLACES[part])


def _params(
    in_features: int, shape: tuple[int, ...], rngs: nnx.Rngs, dtype: Any, bias: bool
) -> tuple[nnx.Param, nnx.Param | None]:
    normal = jax.nn.initializers.normal(INIT_STD)
    weight = nnx.Param(normal(rngs.params(), (in_features, *shape), dtype))
    return weight, nnx.Param(jnp.zeros(shape, dtype)) if bias else None


def _product(x: Array, weight: Array, bias: nnx.Param | None) -> Array:
    product = matmul(x, weight.reshape(weight.shape[0], -1))
    product = product.reshape(*x.shape[:-1], *weight.shape[1:])
    return product if bias is None else product + bias[...]
