"""Errors of a live cache, of samples, and the suite that compares codecs, in its short form."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from benchmarks.quality import vectors
from benchmarks.quality.kivi import GROUP, kivi_flushed
from jaxkv.cli.main import main
from jaxkv.codecs import CODECS
from jaxkv.quality import sample_error
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
    few = {name: CODECS[name] for name in ("bfloat16", "int8")}
    monkeypatch.setattr("jaxkv.cli.plan.CODECS", few)
    assert main(["plan", "Llama-3-8B", "--device", "80GB", "--quality"]) == 0
    printed = capsys.readouterr().out
    assert "error on Gaussian keys" in printed
    assert "0.65%" in printed


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
