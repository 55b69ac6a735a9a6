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
        ({"hidden_act": "snake"}, "activation must be one of silu, .*, got 'snake'"),
    ],
)
def test_bad_llama_configs_are_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message):
        read(**changes)


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
