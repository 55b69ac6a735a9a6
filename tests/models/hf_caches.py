"""What transformers itself keeps for a config, after five tokens.

Two configs of each decoder of texts: the defaults of its class, and a tiny one, which the CPU can
run. `benchmarks/make_cache_goldens.py` records what they keep, and a slow test
asks the version that is installed.
"""

import warnings
from pathlib import Path
from typing import Any

from jaxkv.models.hf_families import BY_MODEL_TYPE

# (KV heads, head_dim, window or None) of a layer that keeps keys and values of one size, and KV
# heads and head_dim of what it keeps of an encoder; of any other a few words on what it keeps.
Layer = tuple[int, int, int | None] | tuple[int, int, int | None, int, int] | str

GOLDENS = Path(__file__).parent / "goldens" / "hf_caches.json.gz"

# What no default config says, beside the default configs.
CHANGED: list[tuple[str, dict[str, Any]]] = [
    ("afmoe", {"global_attn_every_n_layers": 2}),
    ("cohere2", {"sliding_window": None}),
    ("exaone4", {"sliding_window": None}),
    ("exaone4", {"sliding_window_pattern": 8}),
    ("falcon", {"multi_query": False}),
    # falcon-40b
    (
        "falcon",
        {"hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128}
        | {"num_kv_heads": 8, "new_decoder_architecture": True},
    ),
    ("gemma3_text", {"sliding_window": 512, "sliding_window_pattern": 3}),
    ("gemma3_text", {"use_bidirectional_attention": True}),
    ("gpt_bigcode", {"multi_query": False}),
    ("gpt2", {"add_cross_attention": True}),
    ("laguna", {"layer_types": ["full_attention", "sliding_attention"] * 20}),
    ("llama", {"num_key_value_heads": 8, "head_dim": 64}),
    ("mellum", {"layer_types": ["full_attention", "sliding_attention"] * 14}),
    ("ministral3", {"sliding_window": 512}),
    ("mistral", {"sliding_window": None}),
    ("mixtral", {"sliding_window": 512}),
    ("phi3", {"sliding_window": 2047}),
    ("phimoe", {"sliding_window": 512}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 20}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 512}),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}),
    ("qwen3_moe", {"use_sliding_window": True, "head_dim": 128}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 512}),
    ("starcoder2", {"sliding_window": 512}),
]

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_QWEN_VL = {"rope_parameters": _ROPE | {"mrope_section": [16, 24, 24]}}
# Where transformers cannot build its own defaults.
HELPED: dict[str, dict[str, Any]] = {
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "glm4v_moe_text": {"head_dim": 128, "rope_parameters": _ROPE | {"mrope_section": [8, 12, 12]}},
    "glm4v_text": {"rope_parameters": _ROPE | {"mrope_section": [16, 24, 24]}},
    "gpt_neo": {"num_layers": 8, "attention_types": [[["global", "local"], 4]]},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    **dict.fromkeys(("qwen2_5_vl_text", "qwen2_vl_text"), _QWEN_VL),
    **{kind: {"text_config": _QWEN_VL} for kind in ("qwen2_5_vl", "qwen2_vl")},
}

# What a tiny config says, under the names that its class has. Eight layers show every pattern.
TINY: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 8),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), 3),
    **dict.fromkeys(("encoder_layers", "encoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 32),
    "d_kv": 24,
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("head_dim", "kv_channels"), 24),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "ffn_dim"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size",), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts",), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "rotary_dim": 8,
    "vocab_size": 64,
    "sliding_window": 8,
    "pad_token_id": 0,
}
_SECTIONS = {"head_dim": 16, "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}}
_HALVES = {"rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}}
# Where those do not fit together.
TINY_HELPED: dict[str, dict[str, Any]] = {
    "helium": {"head_dim": 16},
    "mllama": {"cross_attention_layers": [1, 4]},
    **dict.fromkeys(("glm4v_moe_text", "glm4v_text", "glm_ocr_text"), _SECTIONS),
    **dict.fromkeys(("qwen2_5_vl", "qwen2_5_vl_text", "qwen2_vl", "qwen2_vl_text"), _HALVES),
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}}
    | {"ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1}},
}
# Text decoders that transformers makes only inside of another model.
_INSIDE = {
    "emu3_text_model": "emu3",
    "ernie4_5_vl_moe_text": "ernie4_5_vl_moe",
    "mllama_text_model": "mllama",
}


def model_types() -> list[str]:
    """Every decoder of texts that transformers has, with an encoder or without, and what else of it
    is planned here."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto

    planned = {_INSIDE.get(kind, kind) for kind in BY_MODEL_TYPE if kind}
    of_texts = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    with_encoders = (
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.keys()
        | modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.keys()
    )
    return sorted(planned & set(CONFIG_MAPPING) | of_texts | with_encoders)


def config_of(model_type: str, *, tiny: bool = False, **fields: Any) -> Any:
    """The config class's own defaults, but for these fields and, if ``tiny``, the sizes."""
    from transformers import CONFIG_MAPPING

    fields = HELPED.get(model_type, {}) | fields
    if not tiny:
        return CONFIG_MAPPING[model_type](**fields)
    whole = CONFIG_MAPPING[model_type](**fields)
    text = decoder_of(whole)
    names = text.to_dict().keys()
    small = {name: value for name, value in TINY.items() if name in names}
    small |= TINY_HELPED.get(model_type, {})
    if text is not whole:
        small = {"text_config": {"model_type": text.model_type} | small}
    return CONFIG_MAPPING[model_type](**fields | small)


def decoder_of(config: Any) -> Any:
    """The part of a config that says of the decoder: all of it, where that is beside an encoder."""
    return config if config.is_encoder_decoder else config.get_text_config(decoder=True)


def kept_by_transformers(config: Any, device: str = "cpu") -> list[Layer]:
    """What each layer keeps; nothing at all for a model that has no cache."""
    import torch
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
        AutoModelForSpeechSeq2Seq,
    )
    from transformers.modeling_outputs import BaseModelOutput

    kinds: Any = AutoModelForCausalLM, AutoModelForImageTextToText, AutoModel
    if config.is_encoder_decoder:
        kinds = AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq
    auto = next(kind for kind in kinds if type(config) in kind._model_mapping)
    with warnings.catch_warnings(), torch.no_grad(), torch.device(device):
        warnings.simplefilter("ignore")
        model = auto.from_config(config, dtype=torch.bfloat16).eval()
        ids = torch.ones((1, 5), dtype=torch.long)
        if config.is_encoder_decoder:
            made = torch.ones((1, 7, config.hidden_size), dtype=torch.bfloat16)
            encoded = BaseModelOutput(last_hidden_state=made)
            encoded.router_logits = None  # which models with experts want to see
            output = model(decoder_input_ids=ids, encoder_outputs=encoded, use_cache=True)
        else:
            output = model(input_ids=ids, use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if type(cache).__name__ == "EncoderDecoderCache":
        parts = cache.self_attention_cache.layers, cache.cross_attention_cache.layers
        return [_crossing(*pair, config) for pair in zip(*parts, strict=True)]
    if not hasattr(cache, "layers"):
        return [] if cache is None else [type(cache).__name__]
    return [_layer(layer, config) for layer in cache.layers]


def _crossing(of_text: Any, of_encoder: Any, config: Any) -> Layer:
    """Of one that attends to the text and to an encoder's seven tokens."""
    own, cross = (_layer(layer, config) for layer in (of_text, of_encoder))
    if isinstance(own, str) or isinstance(cross, str) or of_encoder.keys.shape[2] != 7:
        return f"{own} and of an encoder {cross}"
    return (*own[:3], *cross[:2])


def _layer(layer: Any, config: Any) -> Layer:
    keys, values = (getattr(layer, name, None) for name in ("keys", "values"))
    kind = type(layer).__name__
    plain = kind in ("DynamicLayer", "DynamicSlidingWindowLayer") and keys is not None
    if not plain or keys.shape != values.shape:
        shapes = [list(part.shape[1:]) for part in (keys, values) if part is not None]
        return f"{kind} {shapes}"
    _, kv_heads, _, head_dim = keys.shape
    if getattr(config, "new_decoder_architecture", False):
        kv_heads = config.num_kv_heads  # Falcon's is kept once for each of its query heads
    return kv_heads, head_dim, getattr(layer, "sliding_window", None)
