"""How a model's weights are split over a mesh: as its cache, so that a layer has two all-reduces.

Shoeybi et al., "Megatron-LM" (2019), section 3: what makes heads or inner features is split by
what it gives, what takes them by what it is given. The rest is on every device.
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxkv.cache.axes import Spread
from jaxkv.models.model import Model

# Of a module's arrays, which axis is split over the devices that share the heads.
_BY_OUTPUT = (
    *("q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "lm_head", "c_fc"),
    *("gate_up_proj", "gate_up_proj_bias"),
)
_BY_INPUT = ("o_proj", "down_proj")
_BY_HEAD = ("k_proj", "v_proj")


def sharding_of(model: Model, path: Sequence[Any], param: nnx.Param[Any], spread: Spread) -> Any:
    """Where a parameter is, on each device of the mesh in part or whole.

    Args:
      path: the names that lead to it, as in a checkpoint.
    """
    axes: list[str | None] = [None] * len(param.shape)
    at = split_axis(model, path, param, spread.size("heads"))
    if at is not None:
        axes[at] = spread.axes.heads
    return NamedSharding(spread.mesh, PartitionSpec(*axes))


def split_axis(
    model: Model, path: Sequence[Any], param: nnx.Param[Any], devices: int
) -> int | None:
    """The axis of a parameter that is split over so many devices; None for one that is on all."""
    names = [str(part) for part in path]
    at = _split_axis(model, names, len(param.shape), devices)
    return at if at is not None and param.shape[at] % devices == 0 else None


def _split_axis(model: Model, path: list[str], ndim: int, size: int) -> int | None:
    owner = path[-1] if path[-1] not in ("weight", "bias") else path[-2]
    is_bias = path[-1] == "bias" and ndim == 1
    if owner == "sinks" or owner in _BY_OUTPUT:
        return ndim - 1
    if owner in _BY_HEAD:  # a head on several devices is not split
        config: Any = model.config
        return ndim - 1 if config.num_kv_heads % size == 0 else None
    if owner in _BY_INPUT and not is_bias:
        return ndim - 2
    if owner in ("embed_tokens", "embed_tokens_per_layer"):
        return 0
    return None
