import dataclasses
import importlib
import json

import jax
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxkv
from jaxkv.codecs import CODECS
from jaxkv.memory import plan
from jaxkv.memory.plan import MAX_COUNT, needed_bytes

plan_module = importlib.import_module("jaxkv.memory.plan")
LLAMA3 = jaxkv.KVCacheConfig(32, 8192, num_kv_heads=8, head_dim=128)


@dataclasses.dataclass(frozen=True)
class InPages(jaxkv.Contiguous):
    """Slots come in 64s: bytes grow in steps."""

    def num_slots(self, max_context_length, batch_size):
        return -(-max_context_length // 64) * 64 * (batch_size or 1)


@dataclasses.dataclass(frozen=True)
class Window(jaxkv.Contiguous):
    """A hundred slots at most: bytes stop growing."""

    def num_slots(self, max_context_length, batch_size):
        return min(max_context_length, 100) * (batch_size or 1)


def _configs(most_layers, most_tokens, most_heads):
    return st.builds(
        jaxkv.KVCacheConfig,
        num_layers=st.integers(1, most_layers),
        max_context_length=st.integers(1, most_tokens),
        num_kv_heads=st.integers(1, most_heads),
        head_dim=st.sampled_from([16, 64, 128]),
        batch_size=st.none() | st.integers(1, 9),
        codec=st.sampled_from(list(CODECS.values())),
        addressing=st.sampled_from([jaxkv.Contiguous(), InPages(), Window()]),
    )


@given(config=_configs(80, 5000, 32), free=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_the_largest_that_fits_is_exact(config, free):
    answer = plan(config, free)
    assert answer.needed_bytes == config.size_bytes + config.index_bytes
    assert answer.fits == (answer.needed_bytes <= free)
    for row in answer.codecs:
        codec = config.codec if row.codec == config.codec.name else CODECS[row.codec]
        stored = dataclasses.replace(config, codec=codec)
        for field in ("max_context_length", "batch_size"):
            most = row.max_batch_size if field == "batch_size" else row.max_context_length
            if most > 0:
                assert needed_bytes(dataclasses.replace(stored, **{field: most})) <= free
            if most < MAX_COUNT:
                assert needed_bytes(dataclasses.replace(stored, **{field: most + 1})) > free


@given(config=_configs(3, 70, 2))
@settings(max_examples=15, deadline=None)
def test_the_plan_equals_the_fact(config):
    cache = jaxkv.create(config)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert plan(config, "1GB").needed_bytes == held


def test_codecs_are_all_there_and_the_chosen_one_is_the_plans_own():
    answer = plan(LLAMA3, "1 GB")
    assert {row.codec for row in answer.codecs} >= {"float32", "float16", "bfloat16"}
    (chosen,) = [row for row in answer.codecs if row.codec == "bfloat16"]
    assert answer.fits is chosen.fits is False
    assert answer.needed_bytes == chosen.needed_bytes == 2**30 + 4
    assert answer.max_context_length == chosen.max_context_length == (10**9 - 4) // 2**17
    assert answer.max_batch_size == chosen.max_batch_size == 0


@dataclasses.dataclass(frozen=True)
class Bytes(jaxkv.Dense):
    """A codec of one byte a number, in groups of 16."""

    @property
    def name(self):
        return "bytes"

    def leaves(self, head_dim):
        if head_dim % 16:
            raise ValueError("head_dim must be a multiple of 16")
        return {"data": ((head_dim,), "uint8")}


def test_a_codec_outside_the_table_has_a_row_and_is_no_smaller_than_itself():
    config = dataclasses.replace(LLAMA3, codec=Bytes())
    answer = plan(config, "1GB")
    assert answer.codecs[-1].codec == "bytes"
    assert answer.fits
    smaller = answer.smaller_codec
    assert smaller is None or smaller.needed_bytes < answer.needed_bytes


def test_a_codec_that_cannot_store_this_head_dim_has_no_row(monkeypatch):
    monkeypatch.setattr(plan_module, "CODECS", {**CODECS, "bytes": Bytes()})
    assert "bytes" in {row.codec for row in plan(LLAMA3, 1).codecs}
    odd = dataclasses.replace(LLAMA3, head_dim=20)
    assert "bytes" not in {row.codec for row in plan(odd, 1).codecs}


def test_a_device_is_asked_what_is_free_and_nothing_is_allocated(fake_stats, live_arrays):
    fake_stats(bytes_limit=2 * 2**30, bytes_in_use=2**30)
    before = live_arrays()
    answer = plan(LLAMA3, jax.devices()[5])
    assert (answer.fits, answer.memory.device) == (False, "cpu:5")
    assert answer.max_context_length == 8191
    assert live_arrays() == before


def test_nobody_knows(fake_stats):
    fake_stats(bytes_in_use=1)
    answer = plan(LLAMA3)
    assert answer.fits
    assert answer.max_context_length is None
    assert answer.max_batch_size is None
    assert "unknown: the device does not say" in str(answer)


def test_text(monkeypatch):
    monkeypatch.setattr(plan_module, "CODECS", {"bfloat16": CODECS["bfloat16"], "bytes": Bytes()})
    config = dataclasses.replace(LLAMA3, batch_size=24)
    assert str(plan(config, "24GB")) == (
        "KV cache  24 sequences x 8192 tokens x 32 layers x 8 KV heads x 128, bfloat16\n"
        "needs     25.8 GB (25,769,803,872 bytes)\n"
        "device    24.0 GB, as given\n"
        "fits      no, 1.8 GB too large\n"
        "at most   7,629 tokens a sequence, or 22 sequences of 8,192\n"
        "streamed  12.9 GB on the device and 25.8 GB in host memory, with placement=HostMemory()\n"
        "\n"
        "codec                bytes  fits  max context  max batch\n"
        "bfloat16 (chosen)  25.8 GB    no        7,629         22\n"
        "bytes              12.9 GB   yes       15,258         44"
    )
    assert "fits      yes, in 4.5% of what is free" in str(plan(LLAMA3, "24GB"))
    windowed = plan(dataclasses.replace(LLAMA3, addressing=Window()), "24GB")
    assert "at most   any tokens, or 1,831 sequences" in str(windowed)


def test_json():
    answer = json.loads(plan(LLAMA3, "24GB").to_json())
    assert answer["config"] == {
        "num_layers": 32,
        "max_context_length": 8192,
        "num_kv_heads": 8,
        "head_dim": 128,
        "batch_size": None,
        "codec": "bfloat16",
        "addressing": "contiguous",
        "placement": None,
        "newest": None,
        "value_dim": None,
        "values_in_keys": False,
    }
    assert answer["fits"] is True
    assert answer["needed_bytes"] == 2**30 + 4
    assert answer["memory"]["free_bytes"] == answer["memory"]["limit_bytes"] == 24 * 10**9
    assert {"codec", "needed_bytes", "fits", "max_context_length", "max_batch_size"} == set(
        answer["codecs"][0]
    )
