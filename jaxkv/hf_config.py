"""What a Hugging Face ``config.json`` says, with what transformers takes where it is silent."""

from collections.abc import Mapping
from typing import Any

from jaxkv.errors import ConfigError

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
    num_layers, kind = config["num_hidden_layers"], config.get("model_type")
    window, types = config.get("sliding_window"), config.get("layer_types")
    pattern = config.get("sliding_window_pattern")
    if window is None or not config.get("use_sliding_window", kind not in ("qwen2", "qwen3")):
        return (None,) * num_layers
    if kind == "mistral":
        slides = [True] * num_layers
    elif types:
        slides = _slides(types, num_layers)
    elif kind in ("qwen2", "qwen3"):
        slides = [layer >= config["max_window_layers"] for layer in range(num_layers)]
    else:  # all but every pattern-th
        slides = [bool(pattern) and (layer + 1) % pattern > 0 for layer in range(num_layers)]
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
