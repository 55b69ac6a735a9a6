"""Caches planned from a config.json: what transformers keeps for it, or refused by name."""

import collections
import gzip
import json

import pytest

import jaxkv
from tests.models.hf_caches import GOLDENS, HELPED, config_of, kept_by_transformers

RECORDS = json.loads(gzip.decompress(GOLDENS.read_bytes()))["caches"]
DEFAULTS = [record for record in RECORDS if record["size"] == "default" and not record["changed"]]
OUTCOMES = {"right": 105, "refused": 102, "not run": 0}  # families
# What a plan is read from, under any family's names.
READ = (
    *("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_attention_heads", "n_head"),
    *("num_heads", "n_heads", "attention_heads", "hidden_size", "n_embd", "d_model", "head_dim"),
    *("num_key_value_heads", "num_kv_heads", "kv_channels", "multi_query", "layer_types"),
    *("new_decoder_architecture", "sliding_window", "use_sliding_window", "max_window_layers"),
    *("sliding_window_pattern", "global_attn_every_n_layers"),
)


def planned(config):
    """KV heads, head_dim and window of each layer, or the message of the refusal."""
    try:
        cache = jaxkv.cache_config(config, max_context_length=16)
    except jaxkv.ConfigError as refusal:
        return str(refusal)
    kinds = [
        (group.num_kv_heads, group.head_dim, getattr(group.addressing, "window", None))
        for group in cache.groups
    ]
    layers = [kinds[number] for number in cache.group_of_layer or [0] * cache.num_layers]
    per_token = sum(2 * 2 * heads * size for heads, size, _ in layers)  # bfloat16, two vectors
    assert sum(group.bytes_per_token for group in cache.groups) == per_token
    assert cache.size_bytes == 16 * per_token  # no window is smaller with its chunk
    return layers


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
        ("qwen3_next", {}, "refused"),
    ],
)
def test_the_transformers_that_is_installed(model_type, changed, expected):
    """Made anew as the recorded caches were, of tiny models on the CPU."""
    pytest.importorskip("torch", reason="transformers makes its caches of torch's tensors")
    pytest.importorskip("transformers", minversion="5", reason="caches of transformers 5")
    config = config_of(model_type, tiny=True, **changed)
    assert outcome(config.to_dict(), kept_by_transformers(config)) == expected
