"""The tensors of a GGUF file under the names, and in the order of rows, of a Hugging Face one."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxkv.errors import CheckpointError
from jaxkv.gguf.header import Header, Place

# Name in the file -> name in a Hugging Face checkpoint, without what stands before it.
_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IN_GEMMA_LAYER = _IN_LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Their contents are in the config.
_READ_ELSEWHERE = {"rope_freqs.weight"}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor; nothing of it is in memory yet.

    Attributes:
      name: in the file.
      place: where it lies.
      heads: of a projection whose rows stand in pairs to be rotated (llama.cpp's order for Llama)
        where Hugging Face has the first of all pairs, then the second; None for others.
      plus_one: it is stored with one added, as Gemma's norms multiply by it.
    """

    name: str
    place: Place
    heads: int | None
    plus_one: bool

    @property
    def file(self) -> Path:
        return self.place.file

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.shape

    def read(self) -> np.ndarray:
        """Its numbers, as `gguf.quants` makes them, in float32."""
        from gguf import quants

        stored = self.place.read(_num_bytes(self.place))
        stored = stored.reshape(*self.shape[:-1], -1)
        numbers = quants.dequantize(stored, _type(self.place)).reshape(self.shape)
        if self.heads is not None:
            pairs = numbers.reshape(self.heads, -1, 2, *self.shape[1:])
            numbers = pairs.swapaxes(1, 2).reshape(self.shape)
        return numbers - np.float32(1) if self.plus_one else numbers


def gguf_tensors(header: Header, config: Mapping[str, Any]) -> dict[str, GgufTensor]:
    """Every tensor by the name that it has in a Hugging Face checkpoint without its prefix.

    Args:
      config: `jaxkv.gguf.hf_config` of the header.

    Raises:
      CheckpointError: a type that the package ``gguf`` cannot make floats of, or a file that ends
        before its tensors do.
      ImportError: the package ``gguf`` is not there.
    """
    is_gemma = config["model_type"].startswith("gemma")
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    rotated = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads or heads}
    tensors = {}
    for place in header.places.values():
        if place.name in _READ_ELSEWHERE:
            continue
        place.check(_num_bytes(place))
        name = _hf_name(place.name, _IN_GEMMA_LAYER if is_gemma else _IN_LAYER)
        module = re.sub(r"^layers\.\d+\.|\.(weight|bias)$", "", name)
        in_pairs = rotated.get(module) if config["model_type"] == "llama" else None
        plus_one = is_gemma and name.endswith("norm.weight")
        tensors[name] = GgufTensor(place.name, place, in_pairs, plus_one)
    return tensors


def _hf_name(name: str, in_layer: Mapping[str, str]) -> str:
    """A name that is not known stays: it is refused with the tensors that have no place."""
    module, _, kind = name.rpartition(".")
    if layer := re.fullmatch(r"blk\.(\d+)\.(\w+)", module):
        number, module = layer.groups()
        return f"layers.{number}.{in_layer[module]}.{kind}" if module in in_layer else name
    return f"{_NAMES[module]}.{kind}" if module in _NAMES else name


def _type(place: Place) -> Any:
    """The type of a tensor, one of those that can be made floats.

    Raises:
      CheckpointError: another one.
      ImportError: the package ``gguf`` is not there.
    """
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
    except ImportError as error:
        raise ImportError(
            f"load: {place.file} needs the package gguf. Run `pip install jaxkv[gguf]`."
        ) from error
    known = {int(member): member for member in GGMLQuantizationType}
    try:
        found = known[place.type]
        _, size = GGML_QUANT_SIZES[found]
        quants.dequantize(np.zeros((1, size), np.uint8), found)
    except (KeyError, NotImplementedError) as error:
        stored = known[place.type].name if place.type in known else f"type {place.type}"
        raise CheckpointError(
            f"{place.file}: tensor {place.name} is stored as {stored}, of which the package gguf "
            "makes no floats. Take a file with Q4_0 to Q8_0, Q2_K to Q6_K, F16 or BF16."
        ) from error
    return found


def _num_bytes(place: Place) -> int:
    """The bytes that a tensor takes in its file.

    Raises:
      CheckpointError: as `_type`, or rows that are no whole blocks.
    """
    kind = _type(place)
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    *_, row = place.shape
    if row % block or 0 in place.shape:
        raise CheckpointError(
            f"{place.file}: tensor {place.name} has shape {list(place.shape)}; its type needs rows "
            f"of whole blocks of {block}."
        )
    count = 1
    for axis in place.shape:
        count *= axis
    return count // block * size
