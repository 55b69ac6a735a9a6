"""What a Hugging Face ``config.json`` says, with what transformers takes where it is silent."""

import json
import os
from collections.abc import Mapping
from typing import Any

from jaxkv.errors import ConfigError

# A ``config.json``, the folder that holds it, or its contents.
Source = str | os.PathLike | Mapping[str, Any]

# By model_type. Public folders lean on these: gemma-3-4b-it's says neither heads nor head size.
_DEFAULTS: dict[Any, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096},
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    "gemma2": {
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
    },
    "gemma3_text": {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    "gpt_oss": {
        "head_dim": 64,
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "sliding_window": 128,
        "sliding_window_pattern": 2,
        "rope_theta": 150_000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
    },
}


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's fields, flat: those of ``text_config`` where a multimodal model nests them.

    >>> nested = {"model_type": "gemma3", "text_config": {"num_hidden_layers": 34}}
    >>> text = text_config(nested)
    >>> text["model_type"], text["num_hidden_layers"], text["head_dim"]
    ('gemma3_text', 34, 256)
    """
    nested = config.get("text_config") or {}
    kind = nested.get("model_type") or config.get("model_type")
    kind = "gemma3_text" if kind == "gemma3" else kind
    return {**_DEFAULTS.get(kind, {}), **config, **nested, "model_type": kind}


def layer_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The window of each layer of a `text_config`, in tokens; None for one that sees all.

    The window counts the query itself. A ``sliding_window`` of a family that is not known here,
    and that says nothing of its layers, is left out: what is planned is then the most that it
    can need.

    Raises:
      ConfigError: ``layer_types`` that are not one a layer, or not known.

    >>> gemma2 = {"model_type": "gemma2", "num_hidden_layers": 4, "sliding_window": 8}
    >>> layer_windows(text_config(gemma2))
    (8, None, 8, None)
    """
    num_layers = config.get("num_hidden_layers") or config["n_layer"]
    kind = config.get("model_type")
    window, types = config.get("sliding_window"), config.get("layer_types")
    if window is None or not config.get("use_sliding_window", kind not in ("qwen2", "qwen3")):
        return (None,) * num_layers
    if kind == "mistral":
        slides = [True] * num_layers
    elif types:
        slides = _slides(types, num_layers)
    elif kind in ("qwen2", "qwen3"):
        slides = [layer >= config["max_window_layers"] for layer in range(num_layers)]
    else:  # all but every so many-th
        full_every = config.get("sliding_window_pattern") or 1
        slides = [(layer + 1) % full_every > 0 for layer in range(num_layers)]
    return tuple(window if slide else None for slide in slides)


def _slides(layer_types: Any, num_layers: int) -> list[bool]:
    known = {"sliding_attention": True, "full_attention": False}
    unknown = sorted(set(layer_types) - known.keys())
    if unknown or len(layer_types) != num_layers:
        raise ConfigError(
            f"layer_types must be {num_layers} of {', '.join(known)}, one a layer, got "
            f"{len(layer_types)}{f' with {unknown[0]}' if unknown else ''}."
        )
    return [known[layer_type] for layer_type in layer_types]


def read_hf(source: Source) -> Mapping[str, Any]:
    """The contents of a ``config.json``: given as such, by its path, or by its folder.

    Raises:
      ConfigError: no JSON object.
      FileNotFoundError: no such file.
    """
    if isinstance(source, Mapping):
        return source
    path = os.fspath(source)
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
    with open(path, encoding="utf-8") as file:
        try:
            contents = json.load(file)
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(contents, dict):
        raise ConfigError(f"{path} must hold a JSON object, got a {type(contents).__name__}.")
    return contents


def hf_shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """num_layers, num_kv_heads and head_dim of a `text_config`, whatever a family calls them.

    Raises:
      ConfigError: not a decoder with keys and values.
    """

    def first(*names: str) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), None)

    num_layers = first("num_hidden_layers", "n_layer")
    num_heads = first("num_attention_heads", "n_head")
    width = first("hidden_size", "n_embd")
    if not all(isinstance(number, int) and number > 0 for number in (num_layers, num_heads, width)):
        raise ConfigError(
            "Not the config of a decoder: expected num_hidden_layers, num_attention_heads and "
            "hidden_size (or GPT-2's n_layer, n_head and n_embd), got the keys "
            f"{', '.join(sorted(config.keys() - {'model_type'})) or 'of an empty object'}."
        )
    if config.get("kv_lora_rank") is not None:
        raise ConfigError(
            "This model keeps a latent vector a token (kv_lora_rank, multi-head latent attention), "
            "not keys and values: its cache is not one of these."
        )
    kv_heads = first("num_key_value_heads") or num_heads
    return {
        "num_layers": num_layers,
        "num_kv_heads": 1 if config.get("multi_query") else kv_heads,
        "head_dim": first("head_dim") or width // num_heads,
    }
