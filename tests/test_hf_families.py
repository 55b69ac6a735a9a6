"""Caches planned from a config.json: what transformers keeps for it, or refused by name."""

import gzip
import json

import pytest

import jaxkv
from jaxkv.hf_families import BY_MODEL_TYPE
from tests.hf_caches import GOLDENS, HELPED, config_of, kept_by_transformers, model_types

RECORDS = json.loads(gzip.decompress(GOLDENS.read_bytes()))["caches"]
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
    groups = getattr(cache, "groups", [cache])
    of_layer = getattr(cache, "group_of_layer", [0] * cache.num_layers)
    kinds = [(g.num_kv_heads, g.head_dim, getattr(g.addressing, "window", None)) for g in groups]
    assert sum(g.bytes_per_token for g in groups) == sum(
        2 * 2 * kinds[number][0] * kinds[number][1] for number in of_layer
    )
    return [kinds[number] for number in of_layer]


def kept(record):
    """The same as transformers has it; a few words where it is something else."""
    layers = []
    for layer, count in record["layers"] or []:
        layers += [tuple(layer) if isinstance(layer, list) else layer] * count
    return layers


def check(config, expected):
    """Whether the plan is right; if not, it is a refusal that names the family."""
    plan = planned(config)
    if not isinstance(plan, str):
        assert plan == expected
        return True
    kind = (config.get("text_config") or config).get("model_type")
    assert kind in plan or any(field in plan for field in config)
    return False


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["of"])
def test_a_plan_is_what_transformers_keeps_or_refused(record):
    check(record["config"], kept(record))


def test_how_many_are_planned():
    """A family that was planned, and is refused now, is seen here."""
    defaults = [record for record in RECORDS if not record["changed"]]
    right = {r["of"] for r in defaults if not isinstance(planned(r["config"]), str)}
    assert (len(right), len(defaults) - len(right)) == (0, 0)
    assert right >= BY_MODEL_TYPE.keys() - {None, "emu3_text_model", "ernie4_5_vl_moe_text"}


@pytest.mark.parametrize(
    "record",
    [r for r in RECORDS if not r["changed"] and r["of"] not in HELPED],
    ids=lambda record: record["of"],
)
def test_a_config_that_is_silent_means_what_transformers_takes(record):
    config, expected = record["config"], kept(record)
    for field in READ:
        check({name: value for name, value in config.items() if name != field}, expected)
    check({"model_type": config["model_type"]}, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_decoder_of_the_transformers_that_is_installed(capsys):
    pytest.importorskip("transformers", minversion="5", reason="caches of transformers 5")
    pytest.importorskip("torch", reason="transformers makes its caches of torch's tensors")
    right, refused, failed = [], [], []
    for model_type in model_types():
        try:
            config = config_of(model_type, layers=6)
        except Exception:
            failed.append(model_type)  # transformers' own defaults
            continue
        fields = config.to_dict()
        expected = None if isinstance(planned(fields), str) else kept_by_transformers(config)
        (right if check(fields, expected) else refused).append(model_type)
    with capsys.disabled():
        print(f"\n{len(right)} right, {len(refused)} refused, {len(failed)} without a config")
    assert len(right) > 80
