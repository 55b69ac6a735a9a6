"""Exact sizes before any device is touched, validation, and Hugging Face configs."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import jaxkv
from jaxkv.addressing import ADDRESSINGS
from jaxkv.codecs import CODECS

SHAPE = {"num_layers": 2, "max_context_length": 8, "num_kv_heads": 2, "head_dim": 4}

QWEN = {
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "hidden_size": 896,
}
LLAMA = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
}


@pytest.mark.parametrize(
    ("model", "tokens", "size"),
    [
        (QWEN, 2048, 25_165_824),
        (QWEN, 4096, 50_331_648),
        (LLAMA, 2048, 268_435_456),
        (LLAMA, 4096, 536_870_912),
        (LLAMA, 8192, 1_073_741_824),
        (LLAMA, 32768, 4_294_967_296),
    ],
)
def test_sizes_to_the_byte(model, tokens, size):
    assert jaxkv.cache_config(model, max_context_length=tokens).size_bytes == size


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_dense_size_is_the_product(dtype, itemsize):
    config = jaxkv.KVCacheConfig(3, 5, 7, 11, codec=jaxkv.Dense(dtype))
    assert config.size_bytes == 2 * 3 * 5 * 7 * 11 * itemsize
    assert config.bytes_per_token == 2 * 3 * 7 * 11 * itemsize
    assert dataclasses.replace(config, batch_size=13).size_bytes == 13 * config.size_bytes


def test_size_needs_no_device():
    code = "import jaxkv; print(jaxkv.KVCacheConfig(2, 8, 2, 4).size_bytes)"
    no_device = os.environ | {"JAX_PLATFORMS": "none_such"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=no_device, capture_output=True, text=True, check=True
    )
    assert done.stdout == "512\n"


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("addressing", ADDRESSINGS)
def test_equal_configs_hash_equal(codec, addressing):
    kind = {"codec": CODECS[codec], "addressing": ADDRESSINGS[addressing]}
    config = jaxkv.KVCacheConfig(**SHAPE, **kind)
    same = jaxkv.KVCacheConfig(**{name: np.int64(size) for name, size in SHAPE.items()}, **kind)
    assert config == same
    assert hash(config) == hash(same)
    others = [{name: size + 1} for name, size in SHAPE.items()] + [{"batch_size": 1}]
    assert len({config, *(dataclasses.replace(config, **other) for other in others)}) == 6


def test_equal_dtypes_are_equal_codecs():
    assert jaxkv.Dense(np.float32) == jaxkv.Dense("float32") == jaxkv.Dense(np.dtype("float32"))
    assert jaxkv.KVCacheConfig(**SHAPE).codec == jaxkv.Dense("bfloat16")


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        jaxkv.KVCacheConfig(**SHAPE).head_dim = 8


@pytest.mark.parametrize("value", [0, -1, 2.0, "8", None, True])
@pytest.mark.parametrize("field", [*SHAPE, "batch_size"])
def test_bad_sizes(field, value):
    if field == "batch_size" and value is None:
        return  # a single sequence
    with pytest.raises(jaxkv.ConfigError, match=f"{field} must be an int of at least 1.*{value!r}"):
        jaxkv.KVCacheConfig(**SHAPE | {field: value})


@pytest.mark.parametrize("value", ["float32", None, jaxkv.Dense, jaxkv.Contiguous()])
def test_bad_codec(value):
    with pytest.raises(jaxkv.ConfigError, match=r"codec must be .*jaxkv\.Dense.*, got "):
        jaxkv.KVCacheConfig(**SHAPE, codec=value)


@pytest.mark.parametrize("value", ["paged", None, jaxkv.Contiguous, jaxkv.Dense()])
def test_bad_addressing(value):
    with pytest.raises(jaxkv.ConfigError, match=r"addressing must be .*Contiguous\(\), got "):
        jaxkv.KVCacheConfig(**SHAPE, addressing=value)


def test_every_bad_field_is_named():
    with pytest.raises(jaxkv.ConfigError) as raised:
        jaxkv.KVCacheConfig(0, -1, 2.5, "x", batch_size=0, codec=3, addressing=4)
    for field in (*SHAPE, "batch_size", "codec", "addressing"):
        assert f"{field} must be" in str(raised.value)


def test_describe():
    config = jaxkv.KVCacheConfig(32, 4096, 8, 128)
    assert config.describe() == "4096 tokens x 32 layers x 8 KV heads x 128, bfloat16"
    batch = jaxkv.KVCacheConfig(1, 2, 3, 4, batch_size=5, codec=jaxkv.Dense("float32"))
    assert batch.describe() == "5 sequences x 2 tokens x 1 layers x 3 KV heads x 4, float32"


# --- Hugging Face ------------------------------------------------------------------------------

# A config, and the num_layers, num_kv_heads and head_dim that it means.
HF_CONFIGS = {
    "GQA": (LLAMA, (32, 8, 128)),
    "MHA, no num_key_value_heads": (
        {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64},
        (2, 4, 16),
    ),
    "num_key_value_heads null": (QWEN | {"num_key_value_heads": None}, (24, 14, 64)),
    "MQA by num_key_value_heads": (QWEN | {"num_key_value_heads": 1}, (24, 1, 64)),
    "MQA by multi_query": (
        {"n_layer": 24, "n_head": 16, "n_embd": 2048, "multi_query": True},
        (24, 1, 128),
    ),
    "multi_query false": (
        {"n_layer": 24, "n_head": 16, "n_embd": 2048, "multi_query": False},
        (24, 16, 128),
    ),
    "head_dim of its own": (LLAMA | {"head_dim": 256}, (32, 8, 256)),
    "head_dim null": (LLAMA | {"head_dim": None}, (32, 8, 128)),
    "GPT-2's names": ({"n_layer": 12, "n_head": 12, "n_embd": 768}, (12, 12, 64)),
    "nested": ({"text_config": QWEN, "vision_config": {"hidden_size": 7}}, (24, 2, 64)),
    "nested null": (QWEN | {"text_config": None}, (24, 2, 64)),
}


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_of_a_config_json(name):
    contents, expected = HF_CONFIGS[name]
    config = jaxkv.cache_config(contents, max_context_length=16)
    assert (config.num_layers, config.num_kv_heads, config.head_dim) == expected
    assert config.max_context_length == 16


def test_it_reads_a_dict_a_file_and_a_folder(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    fields = {"max_context_length": 16, "batch_size": 3, "codec": jaxkv.Dense("float16")}
    configs = {
        jaxkv.cache_config(source, **fields)
        for source in (LLAMA, path, str(path), tmp_path, str(tmp_path))
    }
    assert configs == {jaxkv.KVCacheConfig(32, 16, 8, 128, 3, codec=jaxkv.Dense("float16"))}


NOT_CONFIGS = {
    "not JSON": ("{nope", "config.json is not JSON"),
    "not an object": ("[1, 2]", "must hold a JSON object, got a list"),
    "empty": ("{}", "got the keys of an empty object"),
    "no decoder": ('{"vocab_size": 5, "hidden_size": 8}', "got the keys hidden_size, vocab_size"),
    "zero heads": (json.dumps(LLAMA | {"num_attention_heads": 0}), "Not the config of a decoder"),
    "text for a number": (json.dumps(LLAMA | {"hidden_size": "x"}), "Not the config of a decoder"),
    "bad KV heads": (json.dumps(LLAMA | {"num_key_value_heads": -1}), "num_kv_heads must be .*-1"),
}


@pytest.mark.parametrize("name", NOT_CONFIGS)
def test_a_bad_config_json_says_what_is_wrong(tmp_path, name):
    contents, message = NOT_CONFIGS[name]
    (tmp_path / "config.json").write_text(contents)
    with pytest.raises(jaxkv.ConfigError, match=message):
        jaxkv.cache_config(tmp_path, max_context_length=16)


def test_a_folder_without_a_config_json(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        jaxkv.cache_config(tmp_path, max_context_length=16)


def test_from_hf_is_cache_config_with_all_tokens_in_all_layers():
    fields = {"max_context_length": 4096, "batch_size": 2}
    with pytest.warns(DeprecationWarning, match="call jaxkv.cache_config"):
        old = jaxkv.KVCacheConfig.from_hf(LLAMA, **fields)
    assert old == jaxkv.cache_config(LLAMA, chunk=None, **fields)
