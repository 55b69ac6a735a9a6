"""Rotated codecs: how near they come, how they are laid out, and what they do with extremes."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.codecs import hadamard
from jaxkv.codecs.packing import pack, packed_bytes, unpack
from tests.oracle import decode, encode

FLOAT32 = jnp.dtype("float32")

# Relative error of 128 Gaussian numbers, and how far from Shannon's limit at these bits.
GAUSSIAN = {4: (0.0897, 1.57), 3: (0.1795, 1.57), 2: (0.339, 1.48)}


def gaussian(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def decoded(codec, vectors):
    return np.asarray(decode(codec, encode(codec, vectors), vectors.shape[-1], FLOAT32))


@pytest.mark.parametrize("bits", GAUSSIAN)
def test_error_on_gaussian_vectors(bits):
    vectors = gaussian(1000, 128)
    error = np.linalg.norm(decoded(jaxkv.Rotated(bits), vectors) - vectors) / np.linalg.norm(
        vectors
    )
    most, times_the_limit = GAUSSIAN[bits]
    assert error < most
    assert error < times_the_limit * 2.0 ** -(bits + 16 / 128)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_one_huge_channel_is_spread(head_dim):
    """The rotation makes it as any other vector; in blocks it is still no worse than its block."""
    vectors = gaussian(200, head_dim) + 100 * (np.arange(head_dim) == 3)
    error = np.linalg.norm(decoded(jaxkv.Rotated(4), vectors) - vectors) / np.linalg.norm(vectors)
    assert error < 0.11


@pytest.mark.parametrize("head_dim", [1, 12, 64])
def test_the_rotation_is_orthogonal(head_dim):
    matrix = np.asarray(hadamard.rotate(jnp.eye(head_dim)))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(head_dim), atol=1e-6)
    vectors = jnp.asarray(gaussian(3, head_dim))
    np.testing.assert_allclose(hadamard.unrotate(hadamard.rotate(vectors)), vectors, atol=1e-5)
    numbers, unit = hadamard.rotate_to_whole_numbers(vectors)
    whole = np.asarray(numbers) * np.asarray(unit)
    np.testing.assert_allclose(whole, hadamard.rotate(vectors), atol=4e-3)


@pytest.mark.parametrize(
    ("bits", "head_dim"), list(itertools.product([1, 2, 3, 4, 5, 6], [5, 8, 64]))
)
def test_packing(bits, head_dim):
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, head_dim)).astype(np.uint8)
    packed = pack(jnp.asarray(codes), bits)
    assert packed.shape == (3, packed_bytes(head_dim, bits))
    np.testing.assert_array_equal(unpack(packed, bits, head_dim), codes)


def test_the_documented_layout():
    codes = np.random.default_rng(0).integers(0, 8, 16).astype(np.uint8)
    low = [sum((codes[byte + 4 * part] & 3) << 2 * part for part in range(4)) for byte in range(4)]
    high = [sum(codes[byte + 2 * part] >> 2 << part for part in range(8)) for byte in range(2)]
    assert pack(jnp.asarray(codes), 3).tolist() == [*low, *high]


EXTREMES = {
    "zeros": np.zeros(16),
    "denormals": np.full(16, 1e-42),
    "large": 1e30 * gaussian(16),
    "one huge channel": np.eye(16)[3] * 1e30,
    "NaN": np.where(np.arange(16) == 3, np.nan, 1),
    "infinite": np.where(np.arange(16) == 3, -np.inf, 1),
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("centred", [False, True])
def test_an_extreme_vector_changes_no_other(extreme, centred):
    """Nor, in the first tokens of a centred cache, do the means go where it is."""
    codec = jaxkv.Centred(jaxkv.Rotated(4)) if centred else jaxkv.Rotated(4)
    config = jaxkv.KVCacheConfig(1, 8, 1, 16, codec=codec)
    usual = np.float32(1 + gaussian(8, 1, 16))
    vectors = usual.copy()
    vectors[2] = EXTREMES[extreme]
    keys, values = (
        np.asarray(side)
        for side in jaxkv.layer(
            jaxkv.advance(jaxkv.append(jaxkv.create(config), vectors, vectors, layer=0), 8), 0
        )
    )
    others = np.delete(np.arange(8), 2)
    assert np.abs(keys[others] - usual[others]).max() < 0.7
    assert (keys[others] == values[others]).all()
    if not centred:
        np.testing.assert_array_equal(keys[others], decoded(codec, usual)[others])
    if extreme in ("zeros", "denormals"):
        assert np.abs(keys[2]).max() < 0.5 * centred + 1e-30
    elif np.isfinite(vectors[2]).all():
        assert np.linalg.norm(keys[2] / 1e30 - vectors[2] / 1e30) < 0.3 * np.linalg.norm(
            vectors[2] / 1e30
        )


def test_other_bits_are_refused():
    with pytest.raises(ValueError, match="bits must be 4, 3, 2 or 1, got 8"):
        jaxkv.Rotated(8)
