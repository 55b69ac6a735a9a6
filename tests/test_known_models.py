import dataclasses
import inspect
import json

import pytest

import jaxkv
from jaxkv.models.hf_config import layer_windows, text_config
from jaxkv.models.known import KNOWN_MODELS, known_shape
from jaxkv.models.model import Model
from jaxkv.models.shape import SameInAllLayers, Shape


@pytest.mark.parametrize(
    "name",
    ["Qwen2.5-0.5B", "qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"],
)
def test_any_way_to_write_it(name):
    assert known_shape(name)[:3] == (24, 2, 64)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", "Llama-3-8B"),
        ("meta-llama/Llama-2-7b-chat-hf", "Llama-2-7B"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "Mistral-7B"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "TinyLlama-1.1B"),
        ("openai-community/gpt2-medium", "gpt2-medium"),
        ("Qwen/Qwen3-4B-Base", "Qwen3-4B"),
        ("mistralai/Mistral-7B-Instruct-v0.1", "Mistral-7B-v0.1"),
        ("google/gemma-3-27b-it", "Gemma-3-27B"),
        ("google/gemma-3n-E4B-it", "Gemma-3n-E4B"),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "Llama-4-Scout-17B-16E"),
    ],
)
def test_tuned_models_have_the_shape_of_their_base(name, expected):
    assert known_shape(name) == KNOWN_MODELS[expected]


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "gpt2-huge", "gpt3", "Llama-3-8B-Vision", ""])
def test_unknown(name):
    with pytest.raises(jaxkv.ConfigError, match="No file, folder or known model is called"):
        known_shape(name)


def test_unknown_names_what_is_close():
    with pytest.raises(jaxkv.ConfigError, match="Did you mean Llama-3-8B"):
        known_shape("lama-3-8b")


@pytest.mark.parametrize(
    ("name", "tokens", "size_bytes"),
    [
        ("Qwen2.5-0.5B", 2048, 25_165_824),
        ("Qwen2.5-0.5B", 4096, 50_331_648),
        ("Llama-3-8B", 2048, 268_435_456),
        ("Llama-3-8B", 32_768, 4_294_967_296),
        ("gpt2", 1024, 37_748_736),
        # 4,096 bytes a token and layer: 5 layers of 34 in full, 29 of 1,024 + 128 slots.
        ("gemma-3-4b-it", 32_768, 4096 * (5 * 32_768 + 29 * 1152)),
        ("gpt-oss-20b", 131_072, 2048 * (12 * 131_072 + 12 * 256)),
        ("Mistral-7B-v0.1", 32_768, 32 * 4096 * 4224),
        ("Mistral-7B-v0.1", 1024, 32 * 4096 * 1024),
        ("deepseek-ai/DeepSeek-V3", 32_768, 32_768 * 61 * (512 + 64) * 2),
    ],
)
def test_sizes_to_the_byte(name, tokens, size_bytes):
    assert jaxkv.cache_config(name, max_context_length=tokens).size_bytes == size_bytes


# What the config.json of each says: model_type, layers, query heads, KV heads, width, and more.
PUBLISHED = {
    "DeepSeek-V2": ("deepseek_v2", 60, 128, 128, 5120),
    "DeepSeek-V2-Lite": ("deepseek_v2", 27, 16, 16, 2048, {"q_lora_rank": None}),
    "DeepSeek-V3": ("deepseek_v3", 61, 128, 128, 7168, {"kv_lora_rank": 512}),
    "DeepSeek-R1": ("deepseek_v3", 61, 128, 128, 7168, {"qk_rope_head_dim": 64}),
    "Kimi-K2": ("kimi_k2", 61, 64, 64, 7168, {"kv_lora_rank": 512, "qk_rope_head_dim": 64}),
    "gpt2": ("gpt2", 12, 12, None, 768),
    "gpt2-medium": ("gpt2", 24, 16, None, 1024),
    "gpt2-large": ("gpt2", 36, 20, None, 1280),
    "gpt2-xl": ("gpt2", 48, 25, None, 1600),
    "gpt-oss-20b": ("gpt_oss", 24, 64, 8, 2880, {"head_dim": 64}),
    "gpt-oss-120b": ("gpt_oss", 36, 64, 8, 2880, {"head_dim": 64}),
    "Gemma-2-2B": ("gemma2", 26, 8, 4, 2304, {"head_dim": 256}),
    "Gemma-2-9B": ("gemma2", 42, 16, 8, 3584, {"head_dim": 256}),
    "Gemma-2-27B": ("gemma2", 46, 32, 16, 4608, {"head_dim": 128}),
    "Gemma-3-270M": ("gemma3_text", 18, 4, 1, 640, {"sliding_window": 512}),
    "Gemma-3-1B": ("gemma3_text", 26, 4, 1, 1152, {"sliding_window": 512}),
    "Gemma-3-4B": ("gemma3_text", 34, 8, 4, 2560, {"sliding_window": 1024}),
    "Gemma-3-12B": ("gemma3_text", 48, 16, 8, 3840, {"sliding_window": 1024}),
    "Gemma-3-27B": ("gemma3_text", 62, 32, 16, 5376, {"sliding_window": 1024, "head_dim": 128}),
    "Gemma-3n-E2B": ("gemma3n_text", 30, 8, 2, 2048, {"num_kv_shared_layers": 10}),
    "Gemma-3n-E4B": ("gemma3n_text", 35, 8, 2, 2048, {"num_kv_shared_layers": 15}),
    "Llama-2-7B": ("llama", 32, 32, 32, 4096),
    "Llama-2-13B": ("llama", 40, 40, 40, 5120),
    "Llama-2-70B": ("llama", 80, 64, 8, 8192),
    "Llama-3-8B": ("llama", 32, 32, 8, 4096),
    "Llama-3-70B": ("llama", 80, 64, 8, 8192),
    "Llama-3.1-8B": ("llama", 32, 32, 8, 4096),
    "Llama-3.1-70B": ("llama", 80, 64, 8, 8192),
    "Llama-3.1-405B": ("llama", 126, 128, 8, 16384),
    "Llama-3.2-1B": ("llama", 16, 32, 8, 2048, {"head_dim": 64}),
    "Llama-3.2-3B": ("llama", 28, 24, 8, 3072, {"head_dim": 128}),
    "Llama-3.3-70B": ("llama", 80, 64, 8, 8192),
    "Llama-4-Scout-17B-16E": ("llama4_text", 48, 40, 8, 5120),
    "Llama-4-Maverick-17B-128E": ("llama4_text", 48, 40, 8, 5120, {"use_qk_norm": False}),
    "Mistral-7B": ("mistral", 32, 32, 8, 4096, {"sliding_window": None}),
    "Mistral-7B-v0.1": ("mistral", 32, 32, 8, 4096, {"sliding_window": 4096}),
    "Mixtral-8x7B": ("mixtral", 32, 32, 8, 4096, {"sliding_window": None}),
    "Qwen2.5-0.5B": ("qwen2", 24, 14, 2, 896),
    "Qwen2.5-1.5B": ("qwen2", 28, 12, 2, 1536),
    "Qwen2.5-3B": ("qwen2", 36, 16, 2, 2048),
    "Qwen2.5-7B": ("qwen2", 28, 28, 4, 3584),
    "Qwen2.5-14B": ("qwen2", 48, 40, 8, 5120),
    "Qwen2.5-32B": ("qwen2", 64, 40, 8, 5120),
    "Qwen2.5-72B": ("qwen2", 80, 64, 8, 8192),
    "Qwen3-0.6B": ("qwen3", 28, 16, 8, 1024),
    "Qwen3-1.7B": ("qwen3", 28, 16, 8, 2048),
    "Qwen3-4B": ("qwen3", 36, 32, 8, 2560),
    "Qwen3-8B": ("qwen3", 36, 32, 8, 4096),
    "Qwen3-14B": ("qwen3", 40, 40, 8, 5120),
    "Qwen3-32B": ("qwen3", 64, 64, 8, 5120),
    "SmolLM2-135M": ("llama", 30, 9, 3, 576),
    "SmolLM2-360M": ("llama", 32, 15, 5, 960),
    "SmolLM2-1.7B": ("llama", 24, 32, 32, 2048),
    "TinyLlama-1.1B": ("llama", 22, 32, 4, 2048),
}


def test_a_name_means_what_its_config_says():
    """And that is held to transformers in models/test_hf_families.py."""
    assert PUBLISHED.keys() == KNOWN_MODELS.keys()
    for name, (model_type, layers, heads, kv_heads, width, *more) in PUBLISHED.items():
        fields = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width}
        if kv_heads is not None:
            fields["num_key_value_heads"] = kv_heads
        config = {"model_type": model_type} | fields | (more[0] if more else {})
        by_config = jaxkv.cache_config(config, max_context_length=40_000)
        assert jaxkv.cache_config(name, max_context_length=40_000) == by_config, name


def test_a_configs_windows_become_rings(tmp_path):
    """By dict and by folder; with steps of any size, every layer keeps every token."""
    text = {"model_type": "gemma3_text", "num_hidden_layers": 12, "sliding_window": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    hybrid = jaxkv.cache_config(tmp_path, max_context_length=4096, batch_size=2, chunk=16)
    assert hybrid == jaxkv.cache_config(text, max_context_length=4096, batch_size=2, chunk=16)
    ring, full = hybrid.groups
    assert ring == jaxkv.KVCacheConfig(10, 4096, 4, 256, 2, addressing=jaxkv.Ring(64, chunk=16))
    assert full == jaxkv.KVCacheConfig(2, 4096, 4, 256, 2)
    paged = jaxkv.cache_config(text, max_context_length=4096, addressing=jaxkv.Paged(), chunk=None)
    assert paged == jaxkv.KVCacheConfig(12, 4096, 4, 256, addressing=jaxkv.Paged())


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"model_type": "mistral"}, (4096,) * 4),
        ({"model_type": "mistral", "sliding_window": None}, (None,) * 4),
        ({"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 2}, (None,) * 4),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2},
            (None, None, 4096, 4096),
        ),
        ({"model_type": "gpt_oss"}, (128, None, 128, None)),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 3}, (4096, 4096, None, 4096)),
        ({"model_type": "starcoder2", "sliding_window": 8}, (8,) * 4),
        ({"model_type": "llama", "sliding_window": 8}, (None,) * 4),
        ({"sliding_window": 8}, (None,) * 4),
        (
            {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
            (8, None, 8, None),
        ),
    ],
)
def test_windows_by_family(config, windows):
    shape = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64}
    assert layer_windows(text_config(shape | config)) == windows


def test_codecs_that_are_not_one_a_layer():
    with pytest.raises(jaxkv.ConfigError, match="one for each of 12 layers, got 1"):
        jaxkv.cache_config("gpt2", max_context_length=8, codec=[jaxkv.Int8()])


@pytest.mark.parametrize("maker", [jaxkv.cache_config, Shape.cache_config, Model.cache_config])
def test_every_maker_takes_all_that_a_model_does_not_decide(maker):
    fields = {field.name for field in dataclasses.fields(jaxkv.KVCacheConfig)}
    own = {"self", "model", "fields", "state_dtype"}  # the last one a model's own
    own.add("max_encoder_length")  # of those with cross-attention
    named = set(inspect.signature(maker).parameters) - own
    decided = {"num_layers", "num_kv_heads", "head_dim", "value_dim", "values_in_keys"}
    left = fields - decided | {"chunk"}
    assert named | set(SameInAllLayers.__annotations__) == left


def test_chunks_of_llama_4():
    """Three layers of four keep 8,192 tokens and those of a step, and others all."""
    config = jaxkv.cache_config({"model_type": "llama4_text"}, max_context_length=1 << 20)
    assert config.groups[0].addressing == jaxkv.Chunked(8192, chunk=128)
    assert config.group_of_layer == (0, 0, 0, 1) * 12
    per_layer = 2 * 8 * 128 * 2
    assert config.size_bytes == per_layer * (36 * (8192 + 128) + 12 * (1 << 20))
    with pytest.raises(jaxkv.ConfigError, match=r"chunk must be the most tokens .* got None"):
        jaxkv.cache_config({"model_type": "llama4_text"}, max_context_length=8, chunk=None)


def test_placement_reaches_every_group():
    placement = jaxkv.HostMemory(resident=1024)
    config = jaxkv.cache_config("gemma-3-4b", max_context_length=32_768, placement=placement)
    assert [group.placement for group in config.groups] == [placement, placement]
    assert config.host_bytes == 4096 * (5 * 32_768 + 29 * 1152)


def test_codecs_by_name():
    def codecs(named):
        config = jaxkv.cache_config("gpt2", max_context_length=8, codec=named)
        return [group.codec for group in config.groups]

    assert codecs("int8") == [jaxkv.Int8()]
    assert codecs(["rotated4"] + [jaxkv.Int8()] * 11) == [jaxkv.Rotated(4), jaxkv.Int8()]
    for wrong in ("int7", ["int7"] * 12):
        with pytest.raises(jaxkv.ConfigError, match=r"codec must be one of .*int8.*, got 'int7'"):
            codecs(wrong)
