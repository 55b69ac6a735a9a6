import pytest

from jaxkv.errors import CheckpointError, ConfigError
from jaxkv.models import DecoderConfig, GPT2Config
from tests.models.variants import VARIANTS, hf_config


def read(variant="llama", **changes):
    config = hf_config(variant) | changes
    kind = GPT2Config if "n_embd" in config else DecoderConfig
    return kind.from_hf(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_written_config_reads_back(variant):
    config = read(variant, eos_token_id=[1, 2])
    assert type(config).from_hf(config.to_hf()) == config
    assert hash(type(config).from_hf(config.to_hf())) == hash(config)


def test_defaults_of_absent_fields():
    config = read(num_key_value_heads=None, rope_theta=None)
    assert config.num_kv_heads == 4
    assert config.head_dim == 8
    assert config.rope.theta == 10000.0
    assert read("gpt2").intermediate_size == 128


@pytest.mark.parametrize(("given", "expected"), [(None, ()), (7, (7,)), ([7, 9], (7, 9))])
def test_end_of_text_tokens(given, expected):
    assert read(eos_token_id=given).eos_token_ids == expected
    assert read("gpt2", eos_token_id=given).eos_token_ids == expected


def test_architecture_may_be_told_by_model_type():
    assert read("qwen3", architectures=None).architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not supported; known are"),
        ({"architectures": None, "model_type": "rwkv"}, "architecture 'rwkv' is not supported"),
        ({"quantization_config": {"bits": 4}}, r"weights are quantized \({'bits': 4}\)"),
        ({"partial_rotary_factor": 0.5}, "factor = 0.5 is not .* rotates whole heads"),
        ({"rope_interleaved": True}, "rope_interleaved = True is not supported"),
        ({"attn_logit_softcapping": 5.0}, "attn_logit_softcapping = 5.0 is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = .*sliding"),
        ({"rope_scaling": {"type": "mrope"}}, "config.json: rope type 'mrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "config.json: rope type linear: factor must"),
        ({"hidden_size": None}, "config.json: hidden_size is missing"),
        ({"num_hidden_layers": "two"}, "num_layers must be an int of at least 1, got 'two'"),
        ({"num_key_value_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supp"),
        ({"hidden_act": "snake"}, "activation must be one of silu, .*, got 'snake'"),
    ],
)
def test_bad_llama_configs_are_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("gemma2", {"layer_types": ["full_attention"]}, "gemma2 must be 2 of sliding"),
        ("gemma2", {"layer_types": ["linear_attention"] * 2}, "got 2 with linear_attention"),
        ("gemma2", {"sliding_window": 0}, r"windows must be 2 entries.* got \(0, None\)"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attention_softcap must be a positive"),
        ("gemma3", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping = 5.0 is not supp"),
        ("gemma3 linear", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not"),
        (
            "gemma3 rope_parameters",
            {"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.25}}},
            "partial_rotary_factor = 0.25 is not",
        ),
        ("qwen2", {"attention_bias": True}, "attention_bias = True is not supp"),
        ("mistral", {"layer_types": ["linear_attention"] * 2}, "layer_types = .*linear_attention"),
        (
            "gpt_oss",
            {"quantization_config": {"quant_method": "awq"}},
            r"quantized \(AWQ\)",
        ),
        ("gpt_oss", {"num_experts_per_tok": 7}, "at most num_experts = 6 experts, got .* = 7"),
        ("mixtral", {"num_experts_per_tok": 7}, "7 experts per token are not among 1 of 1 groups"),
        ("qwen3_moe", {"num_experts": None}, "num_local_experts or num_experts is missing"),
        ("deepseek_v2", {"topk_method": "best"}, "method must be one of greedy, .*, got 'best'"),
        ("deepseek_v3", {"topk_group": 5}, "not among 5 of 4 groups of 8 experts"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scores of noaux_tc must be sigmoid"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq = 2 is not supported"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier must be a positive"),
        ("smollm3", {"no_rope_layers": [1]}, r"rope_layers must be 3 entries.* got \(True,\)"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm = True is not supported"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm = True is not supported"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual = True is not supp"),
        ("starcoder2", {"use_bias": False}, "use_bias = False is not supported"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported"),
        ("llama4", {"num_experts_per_tok": 5}, "5 experts per token are not among"),
        ("llama4", {"floor_scale": 0}, "query_growth_step must be a positive"),
        ("llama4", {"layer_types": ["sliding_attention"] * 3}, "must be 3 of chunked_attention"),
        ("gemma3n", {"intermediate_size": [48, 32, 48, 48]}, "must be one number in all of 4"),
        ("gemma3n", {"activation_sparsity_pattern": [0.5]}, "activation_sparsity must be 4 ent"),
        ("gemma3n", {"activation_sparsity_pattern": [1.0] * 4}, "shares from 0 to below 1"),
        ("gemma3n", {"altup_active_idx": 4}, "active must be one of 4 streams, got 4"),
        ("gemma3n", {"num_kv_shared_layers": 3}, "leaves layers whose keys and values no layer"),
    ],
)
def test_bad_configs_of_sliding_families_are_refused_by_name(variant, changes, message):
    with pytest.raises(CheckpointError, match=message):
        read(variant, **changes)


@pytest.mark.parametrize(
    ("variant", "changes", "named"),
    [
        ("llama", {"mystery": 7, "other": None}, "nothing reads mystery = 7 for LlamaForCausalLM"),
        ("mistral", {"use_sliding_window": False}, "nothing reads use_sliding_window = False for"),
        ("llama", {"use_sliding_window": True, "sliding_window": 8}, "reads .*sliding_window = 8"),
        ("gpt2", {"head_dim": 4}, "nothing reads head_dim = 4 for GPT2LMHeadModel"),
        ("qwen3", {"rope_local_base_freq": 5.0}, "nothing reads rope_local_base_freq = 5.0"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "default", "mystery": 2}},
            "no rope type here reads mystery",
        ),
    ],
)
def test_what_nothing_reads_is_named(variant, changes, named):
    """And changes nothing, as in transformers: so its windows stay where Mistral says not to."""
    with pytest.warns(UserWarning, match=named):
        config = read(variant, **changes)
    assert config == read(variant)


# What config.json files of the Hub say beside what is read.
_OF_THE_HUB = {
    "llama": {"_name_or_path": "x", "pretraining_tp": 1, "torch_dtype": "bfloat16"}
    | {"transformers.js_config": {}, "is_llama_config": True, "rope_interleaved": False},
    "mistral": {"attention_dropout": 0.0, "use_cache": True, "bos_token_id": 1},
    "qwen2": {"use_mrope": False, "max_window_layers": 21, "initializer_range": 0.02},
    "gemma2": {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}
    | {"sliding_window_size": 7, "_name_or_path": ""},
    "gemma3 layer types": {"_sliding_window_pattern": 6, "use_bidirectional_attention": False},
    "gpt_oss": {"experts_per_token": 4, "initial_context_length": 4096, "hidden_act": "silu"}
    | {"output_router_logits": False, "router_aux_loss_coef": 0.9},
    "qwen3_moe": {"max_window_layers": 48, "use_sliding_window": False, "sliding_window": None}
    | {"decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001},
    "mixtral": {"router_aux_loss_coef": 0.02, "output_router_logits": False}
    | {"sliding_window": None},
    "deepseek_v2": {"aux_loss_alpha": 0.001, "seq_aux": True, "scoring_func": "softmax"}
    | {"ep_size": 1, "moe_layer_freq": 1, "norm_topk_prob": False},
    "deepseek_v3": {"num_nextn_predict_layers": 1, "scoring_func": "sigmoid", "ep_size": 1}
    | {"moe_layer_freq": 1},
    "llama4": {"router_jitter_noise": 0.1, "for_llm_compressor": False, "attention_dropout": 0.0},
    "gemma3n": {"altup_lr_multiplier": 1.0, "altup_coef_clip": 120.0, "query_pre_attn_scalar": 256},
    "phi3": {"embd_pdrop": 0.0, "full_attn_mod": 1, "interpolate_factor": 1}
    | {"lm_head_bias": False, "attention_bias": False},
    "smollm3": {"max_window_layers": 28, "use_sliding_window": False},
    "cohere2": {"cache_implementation": "hybrid", "layer_switch": 4, "rotary_pct": 1.0}
    | {"position_embedding_type": "rope_gptj", "use_parallel_block": True},
    "starcoder2": {"activation_function": "gelu", "mlp_type": "default", "use_bias": True},
    "stablelm": {"qk_layernorm": False, "use_parallel_residual": False},
    "gpt2": {"n_ctx": 32, "resid_pdrop": 0.1, "summary_type": "cls_index", "use_cache": True}
    | {"task_specific_params": {"text-generation": {"max_length": 50}}},
}


@pytest.mark.parametrize("variant", _OF_THE_HUB)
def test_what_does_not_matter_goes_without_a_word(variant):
    assert read(variant, **_OF_THE_HUB[variant]) == read(variant)


def test_a_multimodal_model_that_is_quantized():
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    outer |= {"text_config": hf_config("gemma3"), "quantization_config": {"quant_method": "awq"}}
    with pytest.raises(CheckpointError, match=r"quantized \(AWQ\)"):
        DecoderConfig.from_hf(outer)


def test_gemma3_of_the_hub_leaves_most_to_the_defaults():
    """As gemma-3-4b-it says what it is."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text |= {"model_type": "gemma3_text", "sliding_window": 1024}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    config = DecoderConfig.from_hf(outer | {"eos_token_id": [1, 106], "text_config": text})
    assert config.architecture == "Gemma3ForCausalLM"
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.windows == ((1024,) * 5 + (None,)) * 5 + (1024,) * 4
    assert (config.rope.theta, config.rope.factor, config.local_rope.theta) == (1e6, 8.0, 1e4)
    assert config.local_rope.rope_type == "default"
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (1, 106)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_cross_attention": True}, "add_cross_attention = True is not supported"),
        ({"n_layer": 0}, "num_layers must be an int of at least 1, got 0"),
        ({"n_head": 5}, "hidden_size must be a multiple of num_heads, got 32 and 5"),
        ({"activation_function": "snake"}, "activation must be one of"),
    ],
)
def test_bad_gpt2_configs_are_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message):
        read("gpt2", **changes)


def test_a_config_goes_to_its_own_class():
    with pytest.raises(CheckpointError, match="GPT2LMHeadModel is read by GPT2Config"):
        DecoderConfig.from_hf(hf_config("gpt2"))
    with pytest.raises(CheckpointError, match="LlamaForCausalLM is read by DecoderConfig"):
        GPT2Config.from_hf(hf_config("llama"))


def test_bad_fields_of_a_config_made_by_hand():
    with pytest.raises(ConfigError, match=r"DecoderConfig: vocab_size must be an int .* got True"):
        DecoderConfig(True, 8, 8, 1, 1)
    with pytest.raises(ConfigError, match="architecture must be one of LlamaForCausalLM"):
        DecoderConfig(8, 8, 8, 1, 1, architecture="GPT2LMHeadModel")
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no windows"):
        DecoderConfig(8, 8, 8, 1, 1, windows=(4,))
