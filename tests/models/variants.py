"""Tiny models in every variant of their configs, with weights that numpy makes from a seed.

`benchmarks/make_goldens.py` runs transformers on them and stores the logits; the tests here
make the same weights again. Numpy promises that a seeded PCG64 stream never changes.
"""

import copy
import functools
import json
import re
import tempfile
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

NUM_TOKENS = 24
VOCAB_SIZE = 64
GOLDENS = Path(__file__).parent / "goldens" / "logits.npz"

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_QWEN2 = _LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
_QWEN3 = _LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}
_GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 32,
}

_MISTRAL = _LLAMA | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 7,
}
_SLIDING_QWEN = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
_GEMMA2 = _LLAMA | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "hidden_act": None,
    "tie_word_embeddings": None,
    "head_dim": 16,
    "query_pre_attn_scalar": 10,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 8.0,
    "sliding_window": 7,
}
_GEMMA3 = _GEMMA2 | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 3,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_theta": 1000.0,
    "rope_local_base_freq": 50.0,
    "sliding_window_pattern": 3,
}
_GEMMA3N = _GEMMA3 | {
    "architectures": ["Gemma3nForCausalLM"],
    "model_type": "gemma3n_text",
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "sliding_window_pattern": None,
    "activation_sparsity_pattern": [0.9, 0.0, 0.5, 0.0],
    "laurel_rank": 6,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
}
_GPT_OSS = _LLAMA | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 32,
    "intermediate_size": 32,
    "head_dim": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "swiglu_limit": 1.0,
    "sliding_window": 7,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 16,
    },
}

_YOUTU = _LLAMA | {
    "architectures": ["YoutuForCausalLM"],
    "model_type": "youtu",
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
}


def _like_llama(architecture: str, model_type: str, **fields: Any) -> dict[str, Any]:
    return _LLAMA | {"architectures": [architecture], "model_type": model_type} | fields


_QWEN3_MOE = _like_llama(
    *("Qwen3MoeForCausalLM", "qwen3_moe"),
    head_dim=16,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    norm_topk_prob=True,
)
_MIXTRAL = _like_llama("MixtralForCausalLM", "mixtral", num_local_experts=6, num_experts_per_tok=2)
_DEEPSEEK_V2 = _YOUTU | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "routed_scaling_factor": 1.5,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
}
_DEEPSEEK_V3 = _DEEPSEEK_V2 | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "n_shared_experts": 1,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
}
_LLAMA4 = _like_llama(
    *("Llama4ForCausalLM", "llama4_text"),
    num_hidden_layers=3,
    attention_chunk_size=7,
    no_rope_layer_interval=3,
    head_dim=16,
    intermediate_size_mlp=40,
    interleave_moe_layer_step=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    floor_scale=5,
    attn_scale=0.4,
)
_OLMO2 = _like_llama("Olmo2ForCausalLM", "olmo2")
_OLMO3 = _like_llama(
    *("Olmo3ForCausalLM", "olmo3"),
    sliding_window=7,
    layer_types=["sliding_attention", "full_attention"],
)
_PHI3 = _like_llama("Phi3ForCausalLM", "phi3", pad_token_id=0)
_GLM4 = _like_llama(
    "Glm4ForCausalLM", "glm4", head_dim=12, partial_rotary_factor=0.5, pad_token_id=0
)
_SMOLLM3 = _like_llama(
    *("SmolLM3ForCausalLM", "smollm3"),
    num_hidden_layers=3,
    no_rope_layers=[1, 0, 1],
    pad_token_id=0,
)
_GRANITE = _like_llama(
    *("GraniteForCausalLM", "granite"),
    embedding_multiplier=3.0,
    attention_multiplier=0.2,
    residual_multiplier=0.4,
    logits_scaling=2.5,
)
_COHERE = _like_llama(
    *("CohereForCausalLM", "cohere"),
    tie_word_embeddings=None,
    rms_norm_eps=None,
    layer_norm_eps=1e-4,
    logit_scale=0.4,
)
_COHERE2 = _COHERE | {
    "architectures": ["Cohere2ForCausalLM"],
    "model_type": "cohere2",
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"],
}
_STARCODER2 = _like_llama(
    *("Starcoder2ForCausalLM", "starcoder2"),
    hidden_act="gelu_pytorch_tanh",
    rms_norm_eps=None,
    norm_epsilon=1e-4,
    sliding_window=7,
    tie_word_embeddings=None,
)
_STABLELM = _like_llama(
    *("StableLmForCausalLM", "stablelm"),
    hidden_size=64,
    rms_norm_eps=None,
    layer_norm_eps=1e-4,
    partial_rotary_factor=0.25,
)

_GPT_NEOX = _like_llama(
    *("GPTNeoXForCausalLM", "gpt_neox"),
    hidden_act="gelu",
    num_key_value_heads=None,
    rms_norm_eps=None,
    layer_norm_eps=1e-4,
    rotary_pct=0.5,
    rotary_emb_base=1000,
    rope_theta=None,
)

_OLMOE = _like_llama("OlmoeForCausalLM", "olmoe", num_experts=6, num_experts_per_tok=2)
_GLM4_MOE = {
    name: value
    for name, value in _DEEPSEEK_V3.items()
    if not name.startswith(("qk_", "v_", "q_", "kv_", "topk_method"))
} | {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "num_key_value_heads": 2,
    "head_dim": 12,
    "attention_bias": True,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "pad_token_id": 0,
}
_QWEN3_NEXT = _like_llama(
    *("Qwen3NextForCausalLM", "qwen3_next"),
    layer_types=["linear_attention", "full_attention"],
    head_dim=16,
    partial_rotary_factor=0.25,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=20,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    linear_conv_kernel_dim=4,
)
_BAMBA = _like_llama(
    *("BambaForCausalLM", "bamba"),
    attn_layer_indices=[1],
    mamba_n_heads=8,
    mamba_n_groups=2,
    mamba_d_state=6,
    mamba_chunk_size=8,
    partial_rotary_factor=0.5,
)
_LFM2 = _like_llama(
    *("Lfm2ForCausalLM", "lfm2"),
    rms_norm_eps=None,
    norm_eps=1e-4,
    hidden_act=None,
    layer_types=["conv", "full_attention"],
    block_auto_adjust_ff_dim=False,
    tie_word_embeddings=None,
    pad_token_id=0,
)
_SEED_OSS = _like_llama("SeedOssForCausalLM", "seed_oss", attention_bias=True, head_dim=12)
_ARCEE = _like_llama("ArceeForCausalLM", "arcee", hidden_act="relu2", head_dim=8)
_GEMMA = _like_llama(
    "GemmaForCausalLM", "gemma", hidden_act=None, tie_word_embeddings=None, head_dim=16
)

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.5, 2.5, 4.0, 6.0],
}

# The contexts before extension are so short that 24 tokens go beyond them.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama mha": _LLAMA | {"num_key_value_heads": None},
    "llama mqa": _LLAMA | {"num_key_value_heads": 1},
    "llama tied": _LLAMA | {"tie_word_embeddings": True},
    "llama attention bias": _LLAMA | {"attention_bias": True},
    "llama mlp bias": _LLAMA | {"mlp_bias": True},
    "llama head_dim": _LLAMA | {"head_dim": 12},
    "llama theta": _LLAMA | {"rope_theta": 500000.0},
    "llama gelu": _LLAMA | {"hidden_act": "gelu"},
    "llama linear": _LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama dynamic": _LLAMA
    | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    "llama dynamic short": _LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama llama3": _LLAMA | {"rope_scaling": _LLAMA3, "rope_theta": 100.0},
    "llama yarn": _LLAMA | {"rope_scaling": _YARN, "rope_theta": 100.0},
    "llama yarn mscale": _LLAMA | {"rope_scaling": _YARN | {"mscale": 1.5, "mscale_all_dim": 0.7}},
    "llama yarn attention_factor": _LLAMA | {"rope_scaling": _YARN | {"attention_factor": 1.3}},
    "llama yarn betas": _LLAMA | {"rope_scaling": _YARN | {"beta_fast": 2.0, "beta_slow": 0.25}},
    "llama yarn untruncated": _LLAMA
    | {"rope_scaling": _YARN | {"truncate": False}, "rope_theta": 100.0},
    "llama longrope": _LLAMA
    | {"rope_scaling": _LONGROPE | {"original_max_position_embeddings": 16}},
    "llama longrope short": _LLAMA
    | {"rope_scaling": _LONGROPE | {"original_max_position_embeddings": 32}},
    "llama longrope outside": _LLAMA
    | {
        "rope_scaling": _LONGROPE | {"factor": None},
        "original_max_position_embeddings": 16,
        "max_position_embeddings": 128,
    },
    "llama rope_parameters": _LLAMA
    | {"rope_theta": None, "rope_parameters": _LLAMA3 | {"rope_theta": 100.0}},
    "llama rope_parameters default": _LLAMA
    | {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "qwen2": _QWEN2,
    "qwen2 tied": _QWEN2 | {"tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen2 yarn": _QWEN2
    | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "qwen2 window unused": _QWEN2 | {"use_sliding_window": False, "sliding_window": 4},
    "qwen3": _QWEN3,
    "qwen3 tied": _QWEN3 | {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen3 attention bias": _QWEN3 | {"attention_bias": True},
    "qwen3 yarn": _QWEN3 | {"rope_scaling": _YARN},
    "qwen2 sliding": _QWEN2 | _SLIDING_QWEN,
    "qwen3 sliding": _QWEN3
    | _SLIDING_QWEN
    | {"layer_types": ["sliding_attention", "full_attention"]},
    "mistral": _MISTRAL,
    "mistral default window": _MISTRAL | {"sliding_window": None, "head_dim": 12},
    "gemma2": _GEMMA2,
    "gemma2 defaults": _GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma2 attention bias": _GEMMA2 | {"attention_bias": True, "num_key_value_heads": 1},
    "gemma2 layer types": _GEMMA2 | {"layer_types": ["full_attention", "sliding_attention"]},
    "gemma3": _GEMMA3,
    "gemma3 linear": _GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gemma3 softcap": _GEMMA3 | {"final_logit_softcapping": 8.0},
    "gemma3 rope_parameters": _GEMMA3
    | {"rope_theta": None, "rope_local_base_freq": None}
    | {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        }
    },
    "gemma3 layer types": _GEMMA3
    | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "gemma3n": _GEMMA3N,
    "gemma3n unshared": _GEMMA3N
    | {"num_kv_shared_layers": 0, "altup_num_inputs": 3, "altup_active_idx": 1}
    | {"num_hidden_layers": 2, "layer_types": None, "activation_sparsity_pattern": None}
    | {"altup_correct_scale": False, "attention_bias": True, "final_logit_softcapping": 8.0},
    "gpt_oss": _GPT_OSS,
    "gpt_oss defaults": _GPT_OSS | {"swiglu_limit": None, "rope_scaling": None, "rope_theta": None},
    "gpt_oss no bias": _GPT_OSS | {"attention_bias": False, "num_experts_per_tok": 1},
    "gpt_oss layer types": _GPT_OSS | {"layer_types": ["full_attention", "sliding_attention"]},
    "gpt_oss mxfp4": _GPT_OSS | {"quantization_config": {"quant_method": "mxfp4"}},
    "youtu": _YOUTU,
    "youtu yarn": _YOUTU
    | {"rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}, "rope_theta": 100.0},
    "youtu plain queries": _YOUTU | {"q_lora_rank": None, "rope_interleave": False},
    "mixtral": _MIXTRAL,
    "mixtral sliding": _MIXTRAL | {"sliding_window": 7, "num_experts_per_tok": 1},
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_moe unnormalized": _QWEN3_MOE
    | {"norm_topk_prob": False, "tie_word_embeddings": True, "attention_bias": True},
    "qwen3_moe some layers": _QWEN3_MOE
    | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v2 greedy": _DEEPSEEK_V2
    | {"topk_method": "greedy", "n_group": None, "topk_group": None, "q_lora_rank": None},
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v3 yarn": _DEEPSEEK_V3
    | {"rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}, "rope_theta": 100.0},
    "deepseek_v3 halves": _DEEPSEEK_V3
    | {"rope_interleave": False, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
    | {"attention_bias": True},
    "llama4": _LLAMA4,
    "llama4 other layers": _LLAMA4
    | {
        "num_hidden_layers": 4,
        "moe_layers": [0, 3],
        "no_rope_layers": [0, 1, 1, 0],
        "use_qk_norm": False,
    }
    | {"layer_types": ["chunked_attention", "full_attention"] * 2, "attention_bias": True}
    | {"rope_scaling": _LLAMA3, "rope_theta": 100.0},
    "llama4 plain queries": _LLAMA4
    | {"attn_temperature_tuning": False, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
    | {"num_hidden_layers": 2, "no_rope_layer_interval": 2, "num_key_value_heads": 4},
    "olmo2": _OLMO2,
    "olmo2 attention bias": _OLMO2 | {"attention_bias": True, "num_key_value_heads": 4},
    "olmo3": _OLMO3,
    "phi3": _PHI3,
    "phi3 sliding": _PHI3 | {"sliding_window": 7, "partial_rotary_factor": 0.5},
    "phi3 longrope": _PHI3
    | {
        "rope_scaling": {name: _LONGROPE[name] for name in ("short_factor", "long_factor")}
        | {"type": "longrope"},
        "original_max_position_embeddings": 16,
    },
    "glm4": _GLM4,
    "glm4 no bias": _GLM4 | {"attention_bias": False, "partial_rotary_factor": 1.0},
    "smollm3": _SMOLLM3,
    "smollm3 interval": _SMOLLM3 | {"no_rope_layers": None, "no_rope_layer_interval": 2},
    "granite": _GRANITE,
    "granite biases": _GRANITE | {"attention_bias": True, "mlp_bias": True},
    "cohere": _COHERE,
    "cohere2": _COHERE2,
    "cohere2 attention bias": _COHERE2 | {"attention_bias": True, "sliding_window": None},
    "starcoder2": _STARCODER2,
    "stablelm": _STABLELM,
    "stablelm bias": _STABLELM | {"use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "olmoe": _OLMOE,
    "glm4_moe": _GLM4_MOE,
    "glm4_moe no norms": _GLM4_MOE | {"use_qk_norm": False, "attention_bias": False},
    "lfm2": _LFM2,
    "lfm2 as released": _LFM2
    | {"layer_types": None, "full_attn_idxs": [0], "block_ff_dim": 60, "conv_bias": True}
    | {"block_auto_adjust_ff_dim": True, "block_multiple_of": 16, "conv_L_cache": 4},
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_next dense": _QWEN3_NEXT
    | {"layer_types": ["full_attention", "linear_attention"], "mlp_only_layers": [0, 1]}
    | {"attention_bias": True, "linear_conv_kernel_dim": 2, "linear_num_key_heads": 4},
    "bamba": _BAMBA,
    "bamba bias": _BAMBA
    | {"mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_d_head": 8, "mamba_n_groups": 1}
    | {"time_step_limit": [0.3, 0.9], "attn_layer_indices": [0], "mamba_d_conv": 3},
    "seed_oss": _SEED_OSS,
    "arcee": _ARCEE,
    "gemma": _GEMMA,
    "gpt_neox": _GPT_NEOX,
    "gpt_neox one after the other": _GPT_NEOX | {"use_parallel_residual": False},
    "gpt_neox no bias": _GPT_NEOX | {"attention_bias": False},
    "gpt2": _GPT2,
    "gpt2 untied": _GPT2 | {"tie_word_embeddings": False},
    "gpt2 inner": _GPT2 | {"n_inner": 40, "layer_norm_epsilon": 1e-3},
    "gpt2 unscaled": _GPT2 | {"scale_attn_weights": False},
    "gpt2 by layer": _GPT2 | {"scale_attn_by_inverse_layer_idx": True},
    "gpt2 upcast": _GPT2 | {"reorder_and_upcast_attn": True},
    "gpt2 gelu": _GPT2 | {"activation_function": "gelu"},
    "gpt2 gelu_fast": _GPT2 | {"activation_function": "gelu_fast"},
    "gpt2 tanh approximation": _GPT2 | {"activation_function": "gelu_pytorch_tanh"},
    "gpt2 quick_gelu": _GPT2 | {"activation_function": "quick_gelu"},
    "gpt2 relu": _GPT2 | {"activation_function": "relu"},
    "gpt2 tanh": _GPT2 | {"activation_function": "tanh"},
}


def hf_config(variant: str) -> dict[str, Any]:
    """The contents of the variant's ``config.json``."""
    fields = copy.deepcopy(VARIANTS[variant])  # transformers writes into the dicts it is given
    said = ("q_lora_rank",)  # whose None means something
    return {name: value for name, value in fields.items() if value is not None or name in said}


@functools.cache
def goldens() -> dict[str, np.ndarray]:
    """The logits of transformers for every variant."""
    with np.load(GOLDENS) as file:
        return dict(file)


@functools.cache
def model_of(variant: str) -> Any:
    """The variant's model, loaded from a checkpoint as transformers writes it."""
    from jaxkv.models import load  # goldens are made where there is no jax

    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load(write_checkpoint(variant, Path(folder)))
    assert tokenizer is None
    return model


def token_ids(variant: str) -> np.ndarray:
    return _generator(variant).integers(0, VOCAB_SIZE, NUM_TOKENS, dtype=np.int32)


def weights(variant: str, config: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
    """Every tensor of the variant's checkpoint, or of one of another config."""
    config = hf_config(variant) if config is None else config
    makers = {"gpt2": _gpt2_shapes, "gpt_neox": _gpt_neox_shapes}
    return _made(variant, config, makers.get(config["model_type"], _llama_shapes)(config))


def mtp_weights(variant: str, config: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
    """What is beside them where the checkpoint has a module of multi-token prediction."""
    config = hf_config(variant) if config is None else config
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    last = f"model.layers.{layers}."
    longer = _llama_shapes(config | {"num_hidden_layers": layers + 1})
    block = {n.removeprefix(last): shape for n, shape in longer.items() if n.startswith(last)}
    first, names = last, ("enorm", "hnorm", "shared_head.norm", "eh_proj")
    if variant == "qwen2":  # MiMo's is one of these with a module
        first = "model.mtp_layers.0."
        names = ("token_layernorm", "hidden_layernorm", "final_layernorm", "input_proj")
    *norms, projection = names
    block |= {f"{name}.weight": (hidden,) for name in norms}
    block[f"{projection}.weight"] = (hidden, 2 * hidden)
    made = _made(variant, config, {first + name: shape for name, shape in block.items()})
    if variant == "qwen2":
        return made
    own = weights(variant, config)
    copies = {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}
    return made | {
        f"{first}{name}.weight": own[f"{original}.weight"] for name, original in copies.items()
    }


def _made(variant: str, config: dict[str, Any], shapes: "_Shapes") -> dict[str, np.ndarray]:
    """Numbers of these shapes. Wide, so that logits are not flat."""
    made = {}
    for name, shape in shapes.items():
        if name.endswith(("_blocks", "_scales")):  # scales of 1/32 to 1/8
            low, high = (0, 256) if name.endswith("_blocks") else (122, 125)
            made[name] = _generator(variant + name).integers(low, high, shape, dtype=np.uint8)
            continue
        noise = 0.3 * _generator(variant + name).standard_normal(shape)
        if name.endswith("correction_bias"):  # the sign of a score decides in transformers
            noise = np.abs(noise)
        is_norm_weight = "norm.weight" in name or (".ln_" in name and name.endswith("weight"))
        # The norms of Gemma but of 3n add the one.
        is_plus_one = re.match("gemma(?!3n)", config["model_type"]) is not None
        if config["model_type"] == "qwen3_next":  # but that of a delta net
            is_plus_one = "linear_attn" not in name
        made[name] = (noise + (is_norm_weight and not is_plus_one)).astype(np.float32)
    return made


def write_checkpoint(variant: str, folder: Path, dtype: str = "float32") -> Path:
    """The variant as a Hugging Face folder."""
    tensors = {
        name: tensor.astype(_DTYPES[dtype]) if tensor.dtype == np.float32 else tensor
        for name, tensor in weights(variant).items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(variant)))
    return folder


_Shapes = dict[str, tuple[int, ...]]
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def _generator(text: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(text.encode())))


def _llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    keys = config.get("num_key_value_heads", heads) * head_dim
    family = config["model_type"]
    qkv = {"q": heads * head_dim, "k": keys, "v": keys}
    biased = qkv if family == "qwen2" or config.get("use_qkv_bias") else {}
    if config.get("attention_bias", family in ("gpt_oss", "starcoder2", "glm4")):
        biased = qkv if family in ("glm4", "glm4_moe", "seed_oss") else qkv | {"o": hidden}

    shapes = {"model.embed_tokens.weight": (VOCAB_SIZE, hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        block = {
            "self_attn.q_proj.weight": (heads * head_dim, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, heads * head_dim),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        if "kv_lora_rank" in config:
            block = _without(block, "self_attn.") | _latent_shapes(config)
        if family == "gpt_oss":
            block = _without(block, "mlp.") | _expert_shapes(config)
            block |= {"self_attn.sinks": (heads,)}
        if _is_routed(config, layer):
            block = _without(block, "mlp.") | _routed_shapes(config)
        if family in ("gemma2", "gemma3_text"):
            block |= {f"{name}_feedforward_layernorm.weight": (hidden,) for name in ("pre", "post")}
        if family in ("olmo2", "olmo3"):
            block = _without(block, "input_") | {"post_feedforward_layernorm.weight": (hidden,)}
        if family.startswith("olmo"):
            block |= {f"self_attn.{name}_norm.weight": (qkv[name],) for name in "qk"}
        if family == "phi3":
            block = _without(block, "self_attn.[qkv]_")
            block["self_attn.qkv_proj.weight"] = (sum(qkv.values()), hidden)
        if family in ("phi3", "glm4"):
            block = _without(block, "mlp.(gate|up)_")
            block["mlp.gate_up_proj.weight"] = (2 * inner, hidden)
        if family == "glm4":
            block |= {f"post_{name}_layernorm.weight": (hidden,) for name in ("self_attn", "mlp")}
        if family.startswith("cohere"):
            block = _without(block, "post_")
        if family == "starcoder2":
            block = _without(block, "mlp.")
            block |= {"mlp.c_fc.weight": (inner, hidden), "mlp.c_fc.bias": (inner,)}
            block |= {"mlp.c_proj.weight": (hidden, inner), "mlp.c_proj.bias": (hidden,)}
        if family in ("starcoder2", "stablelm"):
            norms = [name for name in block if name.endswith("layernorm.weight")]
            block |= {name.replace("weight", "bias"): (hidden,) for name in norms}
        if "kv_lora_rank" in config and biased:
            biased = {"o": hidden}
            block["self_attn.q_a_proj.bias"] = (config["q_lora_rank"],)
            block["self_attn.kv_a_proj_with_mqa.bias"] = block[
                "self_attn.kv_a_proj_with_mqa.weight"
            ][:1]
        block |= {f"self_attn.{name}_proj.bias": (size,) for name, size in biased.items()}
        if config.get("mlp_bias"):
            block |= {f"mlp.{name}_proj.bias": (inner,) for name in ("gate", "up")}
            block["mlp.down_proj.bias"] = (hidden,)
        if family in _MIXERS:
            block = _MIXERS[family](config, layer, block)
        if family == "arcee":
            block = _without(block, "mlp.gate_")
        if family in ("qwen3", "qwen3_moe", "gemma3_text", "glm4_moe") and config.get(
            "use_qk_norm", True
        ):
            block |= {f"self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    if family == "gemma3n_text":
        shapes |= {f"model.{name}": shape for name, shape in _beside_gemma3n(config).items()}
    if family in ("starcoder2", "stablelm"):
        shapes["model.norm.bias"] = (hidden,)
    if family in ("lfm2", "bamba"):
        name = {"lfm2": "embedding_norm", "bamba": "final_layernorm"}[family]
        shapes[f"model.{name}.weight"] = shapes.pop("model.norm.weight")
    tied = family.startswith(("gemma", "cohere", "starcoder", "lfm2"))
    if not config.get("tie_word_embeddings", tied):
        shapes["lm_head.weight"] = (VOCAB_SIZE, hidden)
    return shapes


def _of_gemma3n(config: dict[str, Any], layer: int, block: _Shapes) -> _Shapes:
    hidden, rank = config["hidden_size"], config["laurel_rank"]
    own, count = config["hidden_size_per_layer_input"], config.get("altup_num_inputs", 4)
    return block | {
        "pre_feedforward_layernorm.weight": (hidden,),
        "post_feedforward_layernorm.weight": (hidden,),
        "self_attn.q_norm.weight": (config["head_dim"],),
        "self_attn.k_norm.weight": (config["head_dim"],),
        "laurel.linear_left.weight": (rank, hidden),
        "laurel.linear_right.weight": (hidden, rank),
        "laurel.post_laurel_norm.weight": (hidden,),
        "altup.correct_output_scale": (hidden,),
        "altup.correction_coefs.weight": (count, count),
        "altup.prediction_coefs.weight": (count**2, count),
        "altup.modality_router.weight": (count, hidden),
        "altup.router_norm.weight": (hidden,),
        "per_layer_input_gate.weight": (own, hidden),
        "per_layer_projection.weight": (hidden, own),
        "post_per_layer_input_norm.weight": (hidden,),
    }


def _beside_gemma3n(config: dict[str, Any]) -> _Shapes:
    """What is beside its layers."""
    hidden, own = config["hidden_size"], config["hidden_size_per_layer_input"]
    inputs = config["num_hidden_layers"] * own
    shapes = {
        "embed_tokens_per_layer.weight": (VOCAB_SIZE, inputs),
        "per_layer_model_projection.weight": (inputs, hidden),
        "per_layer_projection_norm.weight": (own,),
    }
    for stream in range(config.get("altup_num_inputs", 4) - 1):
        for name in ("projections", "unembed_projections"):
            shapes[f"altup_{name}.{stream}.weight"] = (hidden, hidden)
    return shapes


def _of_lfm2(config: dict[str, Any], layer: int, block: _Shapes) -> _Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    if config["block_auto_adjust_ff_dim"]:
        inner = -(-(2 * config["block_ff_dim"] // 3) // 16) * 16
    attends = config.get("full_attn_idxs") or [1]
    shapes = {f"feed_forward.w{i}.weight": (inner, hidden) for i in (1, 3)}
    shapes |= {"feed_forward.w2.weight": (hidden, inner)}
    shapes |= {f"{name}_norm.weight": (hidden,) for name in ("operator", "ffn")}
    if layer in attends:
        own = {name: block[f"self_attn.{name}_proj.weight"] for name in ("q", "k", "v")}
        shapes |= {f"self_attn.{name}_proj.weight": shape for name, shape in own.items()}
        head_dim = hidden // config["num_attention_heads"]
        shapes |= {f"self_attn.{name}_layernorm.weight": (head_dim,) for name in "qk"}
        return shapes | {"self_attn.out_proj.weight": (hidden, hidden)}
    shapes["conv.conv.weight"] = (hidden, 1, config.get("conv_L_cache", 3))
    for name, rows in (("in", 3 * hidden), ("out", hidden)):
        shapes[f"conv.{name}_proj.weight"] = (rows, hidden)
    biases = {"conv.in_proj": 3 * hidden, "conv.out_proj": hidden, "conv.conv": hidden}
    if config.get("conv_bias"):
        shapes |= {f"{name}.bias": (size,) for name, size in biases.items()}
    return shapes


def _of_qwen3_next(config: dict[str, Any], layer: int, block: _Shapes) -> _Shapes:
    hidden, shared = config["hidden_size"], config["shared_expert_intermediate_size"]
    attends = config["layer_types"][layer] == "full_attention"
    if "mlp.gate.weight" in block:
        for name in ("gate", "up"):
            block[f"mlp.shared_expert.{name}_proj.weight"] = (shared, hidden)
        block["mlp.shared_expert.down_proj.weight"] = (hidden, shared)
        block["mlp.shared_expert_gate.weight"] = (1, hidden)
    if attends:
        rows, columns = block["self_attn.q_proj.weight"]
        block["self_attn.q_proj.weight"] = (2 * rows, columns)
        if "self_attn.q_proj.bias" in block:
            block["self_attn.q_proj.bias"] = (2 * rows,)
        return block | {f"self_attn.{name}_norm.weight": (config["head_dim"],) for name in "qk"}
    heads, values = config["linear_num_value_heads"], config["linear_value_head_dim"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    made = {
        "in_proj_qkvz.weight": (2 * keys + 2 * heads * values, hidden),
        "in_proj_ba.weight": (2 * heads, hidden),
        "conv1d.weight": (2 * keys + heads * values, 1, config["linear_conv_kernel_dim"]),
        "dt_bias": (heads,),
        "A_log": (heads,),
        "norm.weight": (values,),
        "out_proj.weight": (hidden, heads * values),
    }
    return _without(block, "self_attn.") | {f"linear_attn.{n}": shape for n, shape in made.items()}


def _of_bamba(config: dict[str, Any], layer: int, block: _Shapes) -> _Shapes:
    hidden, heads, width = (
        config["hidden_size"],
        config["mamba_n_heads"],
        config.get("mamba_d_conv", 4),
    )
    inner, side = 2 * hidden, config["mamba_n_groups"] * config["mamba_d_state"]
    renamed = {
        name.replace("mlp.", "feed_forward.").replace("post_attention_", "pre_ff_"): shape
        for name, shape in block.items()
    }
    if layer in config["attn_layer_indices"]:
        return renamed
    made = {
        "in_proj.weight": (2 * inner + 2 * side + heads, hidden),
        "conv1d.weight": (inner + 2 * side, 1, width),
        "dt_bias": (heads,),
        "A_log": (heads,),
        "D": (heads,),
        "norm.weight": (inner,),
        "out_proj.weight": (hidden, inner),
    }
    if config.get("mamba_proj_bias"):
        made |= {"in_proj.bias": made["in_proj.weight"][:1], "out_proj.bias": (hidden,)}
    if config.get("mamba_conv_bias", True):
        made["conv1d.bias"] = made["conv1d.weight"][:1]
    return _without(renamed, "self_attn.") | {f"mamba.{n}": shape for n, shape in made.items()}


def _of_llama4(config: dict[str, Any], layer: int, block: _Shapes) -> _Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    experts, dense = config["num_local_experts"], config["intermediate_size_mlp"]
    step, layers = config["interleave_moe_layer_step"], config.get("moe_layers")
    mlp, size = "feed_forward", dense
    is_routed = (layer + 1) % step == 0 if layers is None else layer in layers
    if is_routed:
        mlp, size = "feed_forward.shared_expert", inner
    block = _without(block, "mlp.") | {
        f"{mlp}.gate_proj.weight": (size, hidden),
        f"{mlp}.up_proj.weight": (size, hidden),
        f"{mlp}.down_proj.weight": (hidden, size),
    }
    routed = {
        "feed_forward.router.weight": (experts, hidden),
        "feed_forward.experts.gate_up_proj": (experts, hidden, 2 * inner),
        "feed_forward.experts.down_proj": (experts, inner, hidden),
    }
    return block | routed if is_routed else block


_MIXERS = {
    "gemma3n_text": _of_gemma3n,
    "llama4_text": _of_llama4,
    "lfm2": _of_lfm2,
    "qwen3_next": _of_qwen3_next,
    "bamba": _of_bamba,
}


def _without(block: dict[str, tuple[int, ...]], names: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in block.items() if not re.match(names, name)}


def _is_routed(config: dict[str, Any], layer: int) -> bool:
    if "moe_intermediate_size" not in config:
        return config["model_type"] in ("mixtral", "olmoe")
    return (
        layer >= config.get("first_k_dense_replace", 0)
        and layer not in config.get("mlp_only_layers", ())
        and (layer + 1) % config.get("decoder_sparse_step", 1) == 0
    )


def _routed_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, family = config["hidden_size"], config["model_type"]
    inner = config.get("moe_intermediate_size", config["intermediate_size"])
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next(config[name] for name in names if name in config)
    mlp, gate, up, down = "mlp", "gate_proj", "up_proj", "down_proj"
    if family == "mixtral":
        mlp, gate, up, down = "block_sparse_moe", "w1", "w3", "w2"
    shapes = {f"{mlp}.gate.weight": (count, hidden)}
    if family in ("deepseek_v3", "glm4_moe"):
        shapes["mlp.gate.e_score_correction_bias"] = (count,)
    sizes = {f"experts.{expert}": inner for expert in range(count)}
    if "n_shared_experts" in config:
        sizes["shared_experts"] = config["n_shared_experts"] * inner
    for name, size in sizes.items():
        shapes |= {f"{mlp}.{name}.{each}.weight": (size, hidden) for each in (gate, up)}
        shapes[f"{mlp}.{name}.{down}.weight"] = (hidden, size)
    return shapes


def _latent_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads, rank = (
        config[name] for name in ("hidden_size", "num_attention_heads", "kv_lora_rank")
    )
    rope, plain, values = (
        config[name] for name in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    )
    made_of = {"q": (heads * (plain + rope), hidden)}
    if query_rank := config.get("q_lora_rank"):
        made_of = {"q_a": (query_rank, hidden), "q_b": (heads * (plain + rope), query_rank)}
    shapes = {f"self_attn.{name}_proj.weight": shape for name, shape in made_of.items()}
    if query_rank:
        shapes["self_attn.q_a_layernorm.weight"] = (query_rank,)
    return shapes | {
        "self_attn.kv_a_proj_with_mqa.weight": (rank + rope, hidden),
        "self_attn.kv_a_layernorm.weight": (rank,),
        "self_attn.kv_b_proj.weight": (heads * (plain + values), rank),
        "self_attn.o_proj.weight": (hidden, heads * values),
    }


def _expert_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, experts = (
        config[name] for name in ("hidden_size", "intermediate_size", "num_local_experts")
    )
    shapes: dict[str, tuple[int, ...]] = {
        "mlp.router.weight": (experts, hidden),
        "mlp.router.bias": (experts,),
    }
    for name, rows, columns in (("gate_up", hidden, 2 * inner), ("down", inner, hidden)):
        matrix = f"mlp.experts.{name}_proj"
        shapes[f"{matrix}_bias"] = (experts, columns)
        if "quantization_config" in config:
            shapes[f"{matrix}_blocks"] = (experts, columns, rows // 32, 16)
            shapes[f"{matrix}_scales"] = (experts, columns, rows // 32)
        else:
            shapes[matrix] = (experts, rows, columns)
    return shapes


def _gpt_neox_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    block = {
        "attention.query_key_value": (3 * hidden, hidden),
        "attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (inner, hidden),
        "mlp.dense_4h_to_h": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    plain = () if config.get("attention_bias", True) else ("attention",)
    shapes = {f"{name}.weight": (VOCAB_SIZE, hidden) for name in ("gpt_neox.embed_in", "embed_out")}
    for kind in ("weight", "bias"):
        shapes[f"gpt_neox.final_layer_norm.{kind}"] = (hidden,)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in block.items():
            shapes[f"gpt_neox.layers.{layer}.{name}.weight"] = shape
            if not name.startswith(plain):
                shapes[f"gpt_neox.layers.{layer}.{name}.bias"] = shape[:1]
    return shapes


def _gpt2_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["n_embd"], config.get("n_inner", 4 * config["n_embd"])
    shapes = {
        "transformer.wte.weight": (VOCAB_SIZE, hidden),
        "transformer.wpe.weight": (config["n_positions"], hidden),
        "transformer.ln_f.weight": (hidden,),
        "transformer.ln_f.bias": (hidden,),
    }
    for layer in range(config["n_layer"]):
        linear = {
            "attn.c_attn": (hidden, 3 * hidden),
            "attn.c_proj": (hidden, hidden),
            "mlp.c_fc": (hidden, inner),
            "mlp.c_proj": (inner, hidden),
        }
        prefix = f"transformer.h.{layer}."
        for name, shape in linear.items():
            shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[1:]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{prefix}{name}.weight": (hidden,), f"{prefix}{name}.bias": (hidden,)}
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (VOCAB_SIZE, hidden)
    return shapes
