"""The two forms of a search for the way that errs least: one is a GPU's."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.codecs import least


@pytest.fixture
def on_gpu(monkeypatch):
    """The GPU's form, on the CPU."""
    monkeypatch.setattr(least, "by_platform", lambda runs: runs["gpu"]())
    jaxkv.Rotated.encode.clear_cache()
    yield
    jaxkv.Rotated.encode.clear_cache()


ERRORS = jnp.asarray(np.random.default_rng(0).integers(0, 4, (6, 50, 1)), jnp.int32)  # with ties


def found():
    worst = jnp.full(ERRORS.shape[1:], np.iinfo(np.int32).max)
    return least.number_of_least(lambda number: ERRORS[number], len(ERRORS), worst=worst)


def test_the_first_of_the_least_is_found_in_turn():
    np.testing.assert_array_equal(found(), ERRORS.argmin(axis=0))


def test_the_first_of_the_least_is_found_at_once(on_gpu):
    np.testing.assert_array_equal(found(), ERRORS.argmin(axis=0))


@pytest.mark.parametrize("bits", [4, 3, 2, 1])
def test_both_encode_to_the_same_bytes(bits, request):
    codec = jaxkv.Rotated(bits)
    vectors = np.random.default_rng(1).standard_normal((200, 64), np.float32)
    vectors[3], vectors[5, 7], vectors[6, 0] = 0, np.nan, -np.inf
    in_turn = codec.encode(vectors)
    request.getfixturevalue("on_gpu")
    at_once = codec.encode(vectors)
    for name, leaf in in_turn.items():
        both = (np.asarray(each).view(np.uint8) for each in (leaf, at_once[name]))
        np.testing.assert_array_equal(*both, strict=True)
    assert np.isnan(np.asarray(in_turn["scales"], np.float32)).nonzero()[0].tolist() == [5, 6]
