"""Weights that are quantized in a way that is not read here: refused by the way's name."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxkv.errors import CheckpointError

# As a config.json names them -> as people do.
_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "fp8 with scales",
    "fbgemm_fp8": "fp8 with scales",
    "modelopt": "ModelOpt",
    "compressed-tensors": "compressed-tensors",
    "mxfp4": "MXFP4",
}
# Ends of tensors' names that only such a checkpoint has, the first that fits decides.
_TRACES = {
    r"\.g_idx": "GPTQ",
    r"\.(qweight|qzeros)": "AWQ or GPTQ",
    r"\.(SCB|absmax|quant_map|nested_absmax|weight_format|quant_state\.\w+)": "bitsandbytes",
    r"\.weight_(packed|shape|zero_point)": "compressed-tensors",
    r"\.(weight_scale(_inv)?|weight_scale_2|input_scale)": "fp8 with scales",
}


def refuse_quantized(names: Iterable[str], folder: Path) -> None:
    """Refuse a checkpoint whose tensors are those of quantized weights.

    Raises:
      CheckpointError: naming how they are quantized, and a tensor.
    """
    names = list(names)
    for trace, method in _TRACES.items():
        found = sorted(name for name in names if re.search(f"{trace}$", name))
        if found:
            raise CheckpointError(f"{folder}: tensor {found[0]}: {quantized(method)}")


def method_of(config: Mapping[str, Any]) -> str | None:
    """The way in which a ``config.json`` says that weights are quantized; None for not at all."""
    packed = config.get("quantization_config")
    if config.get("compression_config"):
        return "compressed-tensors"
    if not packed:
        return None
    method = packed.get("quant_method", packed) if isinstance(packed, Mapping) else packed
    return str(method)


def quantized(method: str) -> str:
    """What to say of weights that are quantized so."""
    return (
        f"its weights are quantized ({_METHODS.get(method, method)}), which is not supported. Load "
        "the model that it was made from, or a GGUF file of it."
    )
