"""Tiny GGUF files: the models of `variants`, written as llama.cpp's converter writes them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.models.variants import hf_config, weights

_KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "rope_local_base_freq": "rope.freq_base_swa",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_ARCHITECTURES = {"gemma3_text": "gemma3", "mistral": "llama"}
_TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA_TENSORS = _TENSORS | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def metadata_of(config: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp's converter writes of a ``config.json``."""
    name = _ARCHITECTURES.get(config["model_type"], config["model_type"])
    known = {f"{name}.{key}": config[field] for field, key in _KEYS.items() if field in config}
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) in ("linear", "yarn"):
        known[f"{name}.rope.scaling.type"] = scaling.get("rope_type", scaling.get("type"))
        known[f"{name}.rope.scaling.factor"] = scaling["factor"]
    if "original_max_position_embeddings" in scaling:
        trained = scaling["original_max_position_embeddings"]
        known[f"{name}.rope.scaling.original_context_length"] = trained
    return {"general.architecture": name, **known}


def tensors_of(config: dict[str, Any], stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint as the converter writes them."""
    is_gemma = config["model_type"].startswith("gemma")
    names = _GEMMA_TENSORS if is_gemma else _TENSORS
    heads = config["num_attention_heads"]
    turned = {"attn_q": heads, "attn_k": config.get("num_key_value_heads", heads)}
    tensors = {}
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        prefix = ""
        if module.startswith("model.layers."):
            number, _, module = module.removeprefix("model.layers.").partition(".")
            prefix = f"blk.{number}."
        new = names[module]
        if config["model_type"] in ("llama", "mistral") and new in turned:
            tensor = in_pairs(tensor, turned[new])
        if is_gemma and new.endswith("norm"):
            tensor = tensor + np.float32(1)
        tensors[f"{prefix}{new}.{kind}"] = tensor
    return tensors


def in_pairs(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows so that those that rope turns together stand beside each other."""
    half = len(tensor) // heads // 2
    order = [
        head * 2 * half + part * half + pair
        for head in range(heads)
        for pair in range(half)
        for part in range(2)
    ]
    return tensor[order]


def write_gguf(
    file: Path,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    types: dict[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """A file with these tensors; one with a type is given as its bytes, uint8 ``[rows, bytes]``."""
    writer = gguf.GGUFWriter(file, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    by_type = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{by_type[type(value)]}")(key, value)


def write_variant(variant: str, file: Path, **more: Any) -> Path:
    """A variant in float32, and more metadata."""
    config = hf_config(variant)
    metadata = metadata_of(config) | more
    return write_gguf(file, metadata, tensors_of(config, weights(variant)))
