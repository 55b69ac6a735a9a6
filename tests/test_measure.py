"""Errors of a live cache, of samples, and the suite that compares codecs, in its short form."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from benchmarks import codecs_real
from benchmarks.quality import vectors
from benchmarks.quality.kivi import GROUP, kivi_flushed
from benchmarks.quality.kvquant import KVQuant, calibrated
from benchmarks.quality.quantized_cache import WINDOW, hqq_flushed, quanto_flushed
from benchmarks.report import Pieces, Table
from jaxkv.cli.main import main
from jaxkv.codecs import CODECS
from jaxkv.quality import BY_PREFERENCE, MEASURED, sample_error
from tests.oracle import random_step, step

HYBRID = jaxkv.HybridConfig(
    (
        jaxkv.KVCacheConfig(1, 8, 2, 8, addressing=jaxkv.Ring(window=3, chunk=6)),
        jaxkv.KVCacheConfig(1, 8, 2, 8, addressing=jaxkv.Paged(page_size=4)),
    ),
    group_of_layer=(1, 0),
)


def filled(config, seed=0):
    arrays = random_step(HYBRID.groups[0].replace(num_layers=2), 6, heads=2, seed=seed)
    return step(jaxkv.create(config), *arrays)[0]


@pytest.mark.slow
def test_error_is_that_of_the_tokens_held():
    exact = filled(HYBRID.replace(codec=jaxkv.Dense("float32")))
    assert jaxkv.measure_error(exact, exact) == ((0, 0), (0, 0))
    for error in jaxkv.measure_error(filled(HYBRID.replace(codec=jaxkv.Int8())), exact):
        assert 0.003 < error.keys < 0.01
        assert 0.003 < error.values < 0.01
    for error in jaxkv.measure_error(filled(HYBRID, seed=1), exact):
        assert 1 < error.keys < 2


def test_caches_of_other_tokens_are_refused():
    cache = filled(HYBRID)
    with pytest.raises(ValueError, match="got 2 and 2 layers, 6 and 5 tokens"):
        jaxkv.measure_error(cache, jaxkv.truncate(cache, 5))


@pytest.mark.slow
def test_samples_are_what_they_are_said_to_be():
    assert 0.006 < sample_error(jaxkv.Int8(), 128, outliers=False).keys < 0.007
    with_outliers = sample_error(jaxkv.Int8(), 128, outliers=True)
    assert with_outliers.keys > 0.01
    assert sample_error(jaxkv.Centred(jaxkv.Int8()), 128, outliers=True).keys < 0.005
    assert sample_error(jaxkv.Dense("float32"), 4, outliers=True) == (0, 0)


@pytest.mark.slow
def test_a_plan_with_errors(capsys, monkeypatch):
    few = {name: CODECS[name] for name in ("bfloat16", "int8", "float16")}
    monkeypatch.setattr("jaxkv.cli.plan.CODECS", few)
    assert main(["plan", "Llama-3-8B", "--device", "80GB", "--quality"]) == 0
    printed = capsys.readouterr().out
    assert "error on Gaussian keys" in printed
    assert "0.65%" in printed
    lines = {line.split()[0]: line.split() for line in printed.splitlines() if line}
    assert lines["int8"][-2:] == ["0.73", "97.6%"]
    assert lines["float16"][-2:] == ["-", "-"]  # it was not measured


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("80GB", "bfloat16 is the first that fits"),
        ("32GB", "int8-centred is the first that fits"),
        ("21GB", "stair4 is the first that fits"),
        ("18GB", "none fits"),
    ],
)
def test_a_plan_names_the_first_codec_that_fits(capsys, monkeypatch, device, said):
    """Of 16.1 GB of weights and 17.2 GB of bfloat16; the order is that of what codecs lose."""
    monkeypatch.setattr("jaxkv.cli.plan.CODECS", {"bfloat16": CODECS["bfloat16"]})
    main(["plan", "Llama-3-8B", "--context", "128k", "--device", device, "--quality"])
    assert capsys.readouterr().out.splitlines()[-1].endswith(said + ".")


def test_the_rule_is_the_one_of_the_readme():
    """Same codecs, in the same order, with the same figures."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r'^\| `"(\S+)"` \| \S+ \| (\.\d+) \| ([\d.]+) % \|', readme, re.MULTILINE)
    assert tuple(name for name, *_ in rows) == BY_PREFERENCE
    for name, divergence, same in rows:
        assert float(divergence) == pytest.approx(MEASURED[name].divergence, rel=0.02), name
        assert float(same) == pytest.approx(100 * MEASURED[name].same, abs=0.06), name
    losses = [MEASURED[name].divergence for name in BY_PREFERENCE]
    assert losses == sorted(losses)


@pytest.mark.slow
def test_vectors_in_the_short_form():
    (table,) = vectors.run(quick=True)
    errors = {row["store"]: row for row in table.rows}
    assert not [note for note in table.notes if "NOT MET" in note]
    assert errors["1 bit (control)"]["Gauss out"] > 0.7
    ours, kivi = errors["rotated2-centred"], errors["KIVI-2 (emulated)"]
    assert ours["bits"] < kivi["bits"] / 1.3
    assert ours["outlier keys"] < kivi["outlier keys"]
    assert all(row["Gauss keys"] > row["limit"] for row in table.rows if row["bits"] < 8)


@pytest.mark.slow
def test_kivi_rounds_whole_groups_once():
    config = jaxkv.KVCacheConfig(1, 4 * GROUP, 2, GROUP, codec=jaxkv.Dense("float32"))
    keys, values = np.random.default_rng(0).standard_normal((2, 50, 2, GROUP), np.float32)
    exact = jaxkv.append(jaxkv.create(config), jnp.asarray(keys), jnp.asarray(values), layer=0)
    exact = jaxkv.advance(exact, 50)
    once = kivi_flushed(exact, 50, bits=2)
    before, after = (np.asarray(cache.storage["data"][0]) for cache in (exact, once))
    np.testing.assert_array_equal(after[:, GROUP:], before[:, GROUP:])
    for channel in range(GROUP):
        assert len(np.unique(after[0, :GROUP, 0, channel])) <= 4
    again = kivi_flushed(once, 0, bits=2)
    np.testing.assert_allclose(again.storage["data"], once.storage["data"], atol=0.02)


# Of transformers 5.24 with hqq 0.2.8 and optimum-quanto 0.2.7: `QuantizedCache` of one layer, given
# 128 tokens of 2 heads, standard normal of seed 0 times exp(channel / 32), at 4 bits. The relative
# error of keys, and four of them.
_THEIRS = {
    hqq_flushed: (0.0853122, [0.304889, -0.676419, -1.017537, 0.774912]),
    quanto_flushed: (0.1110130, [0.107318, -0.331425, -0.558636, 0.0461988]),
}


@pytest.mark.parametrize("flushed", _THEIRS)
def test_transformers_quantized_cache_rounds_alike(flushed):
    vectors = _window()
    config = jaxkv.KVCacheConfig(1, 2 * WINDOW, 2, 64, codec=jaxkv.Dense("float32"))
    cache = jaxkv.append(jaxkv.create(config), jnp.asarray(vectors), jnp.asarray(vectors), layer=0)
    keys, values = flushed(jaxkv.advance(cache, WINDOW), WINDOW, bits=4).storage["data"][0]
    np.testing.assert_array_equal(keys, values)
    error, some = _THEIRS[flushed]
    found = np.linalg.norm(keys[:WINDOW] - vectors) / np.linalg.norm(vectors)
    assert found == pytest.approx(error, rel=1e-4)
    np.testing.assert_allclose(np.asarray(keys)[[0, 1, 64, 127], [0, 1, 0, 1], 5], some, rtol=1e-4)
    assert not np.asarray(keys[WINDOW:]).any()


def _window():
    stretch = np.exp(np.arange(64) / 32)
    return (np.random.default_rng(0).standard_normal((WINDOW, 2, 64)) * stretch).astype(np.float32)


def test_kvquant_keeps_outliers_and_the_first_token():
    """Keys are rounded before their rope, to a few levels of each channel."""
    rng = np.random.default_rng(0)
    rope = jaxkv.Rope.of(10_000, 64)
    codec = KVQuant(2, kv_heads=2, rope=rope)
    both = jnp.asarray(rng.standard_normal((2, 400, 2, 64)), jnp.float32)
    positions = jnp.arange(400)

    state = calibrated(both[None], codec)
    of_layer = {name: array[0] for name, array in state.items()}
    keys, values = codec.encode_tokens(both, of_layer, positions)["data"]
    np.testing.assert_array_equal(keys[0], both[0, 0])
    np.testing.assert_array_equal(values[0], both[1, 0])
    exact = np.asarray(values[1:]) == np.asarray(both[1, 1:])
    assert (exact.reshape(399, -1).sum(axis=1) == 2).all()  # the largest and the smallest of 128
    rounded = np.asarray(rope.unturned(keys, positions[:, None]))[1:, 0, 7]
    levels = np.unique(np.round(rounded, 2))
    assert 4 <= len(levels) <= 4 + 2 * 400 * 0.005 + 1
    assert 0.2 < np.linalg.norm(keys - both[0]) / np.linalg.norm(both[0]) < 0.5


def test_a_run_in_pieces_measures_what_is_named_and_not_yet_known():
    """As `python -m benchmarks codecs-real --table prose --row KIVI --known FILE` asks."""
    known = (Table("prose", [{"store": "KIVI-2", "KL": 0.3}]), Table("code", []))
    pieces = Pieces(("prose",), ("KIVI", "stair"), known)
    assert [title for title in ("long prose", "code") if pieces.has_table(title)] == ["long prose"]
    assert [name for name in ("KIVI-2", "stair4", "int8") if pieces.has_row(name)] == [
        *("KIVI-2", "stair4")
    ]
    assert pieces.known_rows("prose") == known[0].rows
    assert Pieces().has_table("any")
    assert Pieces().has_row("any")


def test_a_peer_is_compared_at_equal_bits():
    """Half-way between two widths its KL is their geometric mean; past the widest its own."""
    widths = [
        {"bits": 1.5, "+ constants": 0.5, "KL": 0.4},
        {"bits": 4.0, "+ constants": 0.0, "KL": 0.1},
    ]
    assert codecs_real._kl_at(3.0, widths) == pytest.approx(0.2)
    assert codecs_real._kl_at(1.0, widths) == pytest.approx(0.8)
    assert codecs_real._kl_at(9.0, widths) == 0.1
    assert codecs_real._kl_at(3.0, widths[1:]) == float("inf")
