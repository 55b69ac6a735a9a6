"""Caches planned from a config.json: what transformers keeps for it, or refused by name."""

import collections
import gzip
import json

import pytest

import jaxkv
from tests.models.hf_caches import GOLDENS, HELPED, config_of, kept_by_transformers

RECORDS = json.loads(gzip.decompress(GOLDENS.read_bytes()))["caches"]
DEFAULTS = [record for record in RECORDS if record["size"] == "default" and not record["changed"]]
# Families. Those not run are what transformers cannot run at its own defaults without memory.
OUTCOMES = {"right": 150, "refused": 92, "not run": 4}
# What a plan is read from, under any family's names.
READ = (
    *("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_attention_heads", "n_head"),
    *("num_heads", "n_heads", "attention_heads", "hidden_size", "n_embd", "d_model", "head_dim"),
    *("num_key_value_heads", "num_kv_heads", "kv_channels", "multi_query", "layer_types"),
    *("new_decoder_architecture", "sliding_window", "use_sliding_window", "max_window_layers"),
    *("sliding_window_pattern", "global_attn_every_n_layers", "kv_lora_rank", "qk_rope_head_dim"),
    *("v_head_dim", "num_kv_shared_layers", "attention_chunk_size", "no_rope_layers"),
    *("decoder_layers", "decoder_attention_heads", "num_decoder_layers", "d_kv"),
    *("is_encoder_decoder", "cross_attention_layers", "max_source_positions"),
)


def kind_of(group):
    """What `hf_caches.Layer` is of a group's layers, and their numbers per token."""
    heads, keys, window = group.num_kv_heads, group.head_dim, group.addressing.window
    if group.pair.unlike is None:
        return (heads, keys, window), 2 * heads * keys
    values = group.value_dim
    if group.values_in_keys:  # transformers keeps latents as keys, and the rope's part as values
        keys, values = values, keys - values
    kind = "DynamicLayer" if window is None else "DynamicSlidingWindowLayer"
    return f"{kind} {[[heads, 5, keys], [heads, 5, values]]}", heads * (keys + values)


def planned(config):
    """What each layer that keeps its own does, as `hf_caches.Layer`; or the refusal's message."""
    try:
        try:
            cache = jaxkv.cache_config(config, max_context_length=16, max_encoder_length=7)
        except jaxkv.ConfigError as none:
            if "has no cross-attention" not in str(none):
                raise
            cache = jaxkv.cache_config(config, max_context_length=16)
    except jaxkv.ConfigError as refusal:
        return str(refusal)
    kinds = {
        layer: kind_of(group)
        for number, group in enumerate(cache.groups)
        for layer in cache.layers_of(number)
    }
    for state in cache.states:  # whose sizes tests/models/test_stateful.py has
        kinds |= dict.fromkeys(state.layers, ("LinearAttentionLayer []", 0))
    for layer, number in enumerate(cache.cross_of_layer):
        if number >= 0:
            (heads, keys, _), count = kind_of(cache.cross[number])
            assert cache.cross[number].bytes_per_token == 2 * count * cache.cross[number].num_layers
            own, per_text = kinds.get(layer, ((), 0))
            # One that attends to images alone was given none, and keeps nothing.
            kinds[layer] = ((*own, heads, keys), per_text) if own else ("DynamicLayer []", 0)
    layers, numbers = zip(*(kinds[layer] for layer in sorted(kinds)), strict=True)
    per_token = 2 * sum(numbers)  # bfloat16
    assert sum(group.bytes_per_token for group in cache.groups) == per_token
    held = sum(group.size_bytes for group in cache.groups)
    assert held == 16 * per_token  # no window is smaller with its chunk
    return list(layers)


def kept(record):
    """The same as transformers has it; None if it could not be run."""
    if "layers" not in record:
        return None
    layers = []
    for layer, count in record["layers"]:
        layers += [tuple(layer) if isinstance(layer, list) else layer] * count
    return layers


def family(config):
    return (config.get("text_config") or config)["model_type"]


def outcome(config, expected):
    """Right, refused, not run; or what is wrong."""
    plan, kind = planned(config), family(config)
    if isinstance(plan, str):
        return "refused" if kind in plan else f"a refusal that does not name {kind}: {plan}"
    if expected is None:
        return "not run"
    return "right" if plan == expected else f"planned {plan}, kept {expected}"


def test_a_plan_is_what_transformers_keeps_or_refused():
    """Every decoder of texts, at its default sizes and at tiny ones, and what no default says."""
    table = collections.defaultdict(set)
    for record in RECORDS:
        table[outcome(record["config"], kept(record))].add(record["of"])
    wrong = {of: families for of, families in table.items() if of not in OUTCOMES}
    assert not wrong
    right, refused = table["right"], table["refused"] - table["right"]
    not_run = table["not run"] - right - refused
    assert {"right": len(right), "refused": len(refused), "not run": len(not_run)} == OUTCOMES


def test_a_config_that_is_silent_means_what_transformers_takes():
    """Each field left out in turn, and all of them, beside the class's own defaults."""
    wrong = {}
    for record in DEFAULTS:
        if record["of"] in HELPED:
            continue
        config = record["config"]
        expected = kept(record) or planned(config)
        read = [field for field in READ if field in config]
        silent = [{name: config[name] for name in config if name != field} for field in read]
        for fields in [{"model_type": config["model_type"]}, *silent]:
            found = outcome(fields, expected)
            if found not in OUTCOMES:
                wrong[record["of"]] = found
    assert not wrong


# As transformers 5.24 makes a cache of each, by its source: it cannot run the first and the second
# at these sizes, and of the others it says other things than the files on the hub.
@pytest.mark.parametrize(
    ("config", "layers", "read_from"),
    [
        pytest.param(
            {"model_type": "gemma3n_text"},
            [(2, 256, None if layer % 5 == 4 else 512) for layer in range(20)],
            [*range(20), *(19 if layer % 5 == 4 else 18 for layer in range(20, 35))],
            id="gemma 3n: 15 of 35 layers read layers 18 and 19",
        ),
        pytest.param(
            {"model_type": "gemma4_text", "num_hidden_layers": 12, "num_kv_shared_layers": 6}
            | {"attention_k_eq_v": True, "num_global_key_value_heads": 2},
            [*[(4, 256, 512)] * 5, (2, 512, None)],
            [*range(6), *[4] * 5, 5],
            id="gemma 4: two heads of 512 where all is seen",
        ),
        pytest.param(
            {"model_type": "mimo_v2_flash", "num_hidden_layers": 7, "sliding_window_size": 128}
            | {"swa_num_key_value_heads": 8, "swa_head_dim": 192, "swa_v_head_dim": 128},
            [
                (4, 192, 128, None),
                *[(8, 192, 128, 129)] * 4,
                (4, 192, 128, None),
                (8, 192, 128, 129),
            ],
            [*range(7)],
            id="mimo: values of 128, and eight heads where a window is",
        ),
    ],
)
def test_layers_of_unlike_kinds(config, layers, read_from):
    cache = jaxkv.cache_config(config, max_context_length=1024)
    kinds = {}
    for number, group in enumerate(cache.groups):
        sizes = [group.head_dim] if group.value_dim is None else [group.head_dim, group.value_dim]
        kind = (group.num_kv_heads, *sizes, group.addressing.window)
        kinds |= dict.fromkeys(cache.layers_of(number), kind)
    assert [kinds[layer] for layer in sorted(kinds)] == layers
    assert list(cache.source_of_layer or range(cache.num_layers)) == read_from


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "mimo_v2_flash", "swa_num_key_value_heads": 4},
            "swa_num_key_value_heads of a mimo_v2_flash must be 8, got 4",
        ),
        (
            {"model_type": "gemma4_text", "per_layer_config": {"5": {"v_head_dim": 8}}},
            "per_layer_config has v_head_dim",
        ),
        (
            {"model_type": "gemma4_text", "num_hidden_layers": 7},
            "last layer of a gemma4_text must see all tokens",
        ),
        (
            {"model_type": "gemma3n_text", "num_hidden_layers": 15},
            "leaves layers whose keys and values no layer before them keeps",
        ),
        ({"model_type": "deepseek_v3", "index_topk": 2048}, "keys of an index"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 0}, "kv_lora_rank must be"),
        ({"model_type": "t5"}, "max_encoder_length must be the most tokens of an encoder"),
        ({"model_type": "t5", "is_encoder_decoder": False}, "This t5 is an encoder alone"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "gpt2 has cross-attention"),
        ({"model_type": "moonshine", "is_encoder_decoder": True}, "moonshine has cross-attention"),
        (
            {"model_type": "mllama_text_model", "num_hidden_layers": 12},
            "cross_attention_layers of a mllama_text_model must be numbers of its 12 layers",
        ),
    ],
)
def test_what_a_row_cannot_plan_is_refused(config, message):
    with pytest.raises(jaxkv.ConfigError, match=message):
        jaxkv.cache_config(config, max_context_length=16)


# What the config.json of each says of its decoder, and bytes by what transformers keeps of it: keys
# and values of every layer of bfloat16, per token of the text, and per token of the encoder.
CROSSING = {
    "whisper-large-v3": (
        {"model_type": "whisper", "is_encoder_decoder": True, "d_model": 1280}
        | {"decoder_layers": 32, "decoder_attention_heads": 20, "encoder_layers": 32}
        | {"num_hidden_layers": 32, "max_source_positions": 1500, "max_target_positions": 448},
        (2 * 32 * 1280 * 2, 1500 * 2 * 32 * 1280 * 2),
    ),
    "whisper-large-v3-turbo": (  # a decoder of fewer layers than the encoder
        {"model_type": "whisper", "is_encoder_decoder": True, "d_model": 1280}
        | {"decoder_layers": 4, "decoder_attention_heads": 20, "encoder_layers": 32}
        | {"num_hidden_layers": 32, "max_source_positions": 1500, "max_target_positions": 448},
        (2 * 4 * 1280 * 2, 1500 * 2 * 4 * 1280 * 2),
    ),
    "bart-large, its decoder alone": (
        {"model_type": "bart", "is_encoder_decoder": False, "d_model": 1024}
        | {"decoder_layers": 12, "decoder_attention_heads": 16},
        (2 * 12 * 1024 * 2, 0),
    ),
    "Llama-3.2-11B-Vision": (  # 8 of 40 layers attend to images alone
        {"model_type": "mllama", "text_config": {"model_type": "mllama_text_model"}},
        (2 * 32 * 8 * 128 * 2, 6404 * 2 * 8 * 8 * 128 * 2),
    ),
}


@pytest.mark.parametrize("name", CROSSING)
def test_bytes_of_cross_attention(name):
    config, (per_token, of_encoder) = CROSSING[name]
    more = {"max_encoder_length": 4 * 1601} if "text_config" in config else {}
    cache = jaxkv.cache_config(config, max_context_length=100, batch_size=3, **more)
    assert cache.size_bytes == 3 * (100 * per_token + of_encoder)
    assert jaxkv.plan(cache, "100GB").needed_bytes == cache.size_bytes + cache.index_bytes
    coded = jaxkv.cache_config(config, max_context_length=100, codec="int8", **more)
    assert {each.codec for each in (*coded.groups, *coded.cross)} == {jaxkv.Int8()}
    if not of_encoder:
        assert isinstance(cache, jaxkv.KVCacheConfig)
        with pytest.raises(jaxkv.ConfigError, match="this model has no cross-attention"):
            jaxkv.cache_config(config, max_context_length=100, max_encoder_length=8)


def test_one_codec_per_layer_makes_a_kind_each_of_what_cross_attention_reads():
    codecs = ["bfloat16", "int8", "int8", "bfloat16"]
    cache = jaxkv.cache_config({"model_type": "whisper"}, max_context_length=8, codec=codecs)
    assert cache.cross_of_layer == cache.group_of_layer == (0, 1, 1, 0)
    assert [each.codec.name for each in cache.cross] == ["bfloat16", "int8"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "changed", "expected"),
    [
        ("bloom", {}, "right"),
        ("cohere2", {}, "right"),
        ("falcon", {}, "right"),
        ("falcon", {"new_decoder_architecture": True}, "right"),
        ("gemma3_text", {}, "right"),
        ("gpt2", {}, "right"),
        ("gpt_oss", {}, "right"),
        ("jetmoe", {}, "right"),
        ("llama", {}, "right"),
        ("mamba", {}, "refused"),
        ("mistral", {}, "right"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}, "right"),
        ("bart", {}, "right"),
        ("mllama", {}, "right"),
        ("t5", {}, "right"),
        ("whisper", {}, "right"),
    ],
)
def test_the_transformers_that_is_installed(model_type, changed, expected):
    """Made anew as the recorded caches were, of tiny models on the CPU."""
    pytest.importorskip("torch", reason="transformers makes its caches of torch's tensors")
    pytest.importorskip("transformers", minversion="5", reason="caches of transformers 5")
    config = config_of(model_type, tiny=True, **changed)
    assert outcome(config.to_dict(), kept_by_transformers(config)) == expected
