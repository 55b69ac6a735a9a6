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
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not"),
        ({"use_sliding_window": True, "sliding_window": 8}, "sliding_window = 8 is not supported"),
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
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types must be 2 of sliding"),
        ("gemma2", {"layer_types": ["linear_attention"] * 2}, "got 2 with linear_attention"),
        ("gemma2", {"sliding_window": 0}, r"windows must be 2 entries.* got \(0, None\)"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attention_softcap must be a positive"),
        ("gemma3", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping = 5.0 is not supp"),
        (
            "gpt_oss",
            {"quantization_config": {"quant_method": "awq"}},
            "quantization_config = .*awq",
        ),
        ("gpt_oss", {"num_experts_per_tok": 7}, "at most num_experts = 6 experts, got .* = 7"),
    ],
)
def test_bad_configs_of_sliding_families_are_refused_by_name(variant, changes, message):
    with pytest.raises(CheckpointError, match=message):
        read(variant, **changes)


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
