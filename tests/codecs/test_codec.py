"""The codec contract, for every row of `CODECS`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.codecs import (
    CODECS,
    bitcast,
    bytes_per_token,
    container_dtype,
    leaf_specs,
    out_of_containers,
)
from tests.oracle import KINDS, decode, encode

# The largest error of one number, as a share of the largest number of its vector.
TOLERANCES = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.006, "float8": 0.065}
TOLERANCES |= {"rotated4": 0.2, "rotated3": 0.4, "rotated2": 0.7, "rotated3/int8": 0.4}
TOLERANCES |= {"stair4": 0.45, "stair3": 0.8}

# A Centred one stores by the codec inside; what it adds is in test_centred.py.
ALONE = {
    name: codec for name, codec in (CODECS | KINDS).items() if not isinstance(codec, jaxkv.Centred)
}
codecs = pytest.mark.parametrize("codec", ALONE.values(), ids=ALONE)
head_dims = pytest.mark.parametrize("head_dim", [1, 64])


def random_vectors(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def test_the_tables_agree():
    assert set(TOLERANCES) == set(ALONE), "give a new codec its row in TOLERANCES"
    assert {name: codec.name for name, codec in CODECS.items()} == {name: name for name in CODECS}
    assert len(set(CODECS.values())) == len(CODECS)


@codecs
@head_dims
def test_leaves_are_as_announced(codec, head_dim):
    encoded = encode(codec, random_vectors(2, 6, 2, head_dim))
    announced = leaf_specs(codec, head_dim)
    assert encoded.keys() == announced.keys()
    for name, (shape, dtype, sides) in announced.items():
        assert encoded[name].shape == (sides, 6, 2, *shape)
        assert encoded[name].dtype == jnp.dtype(dtype)
    held = sum(leaf.nbytes for leaf in encoded.values())
    assert held == 6 * 2 * bytes_per_token(codec, head_dim)


@pytest.mark.parametrize("magnitude", [0.1, 1.0, 100.0])
@codecs
@head_dims
def test_round_trip(codec, head_dim, magnitude):
    vectors = magnitude * random_vectors(2, 6, 2, head_dim)
    decoded = decode(codec, encode(codec, vectors), head_dim, jnp.dtype("float32"))
    assert decoded.dtype == jnp.float32
    error = np.abs(decoded - vectors).max(axis=-1)
    assert (error <= TOLERANCES[codec.name] * np.abs(vectors).max(axis=-1)).all()


@pytest.mark.slow_cases(r"^1-|rotated[23]$")
@codecs
@head_dims
def test_one_token_at_a_time_gives_bitwise_what_bulk_gives(codec, head_dim):
    vectors = jnp.asarray(random_vectors(2, 6, 2, head_dim))
    one = jax.jit(codec.encode)
    one_at_a_time = [one(vectors[:, token]) for token in range(6)]
    in_a_program = jax.jit(lambda vectors: codec.encode(vectors.swapaxes(1, 2)))
    for bulk in (codec.encode(vectors), in_a_program(vectors.swapaxes(1, 2))):
        for name, leaf in bulk.items():
            for token, one in enumerate(one_at_a_time):
                assert leaf[:, token].tobytes() == one[name].tobytes()


@codecs
def test_decodes_to_the_dtype_asked_for(codec):
    encoded = encode(codec, random_vectors(2, 3, 8))
    exact = decode(codec, encoded, 8, jnp.dtype("float32"))
    decoded = decode(codec, encoded, 8, jnp.dtype("bfloat16"))
    assert decoded.dtype == jnp.bfloat16
    np.testing.assert_allclose(decoded.astype(jnp.float32), exact, rtol=2**-7, atol=1e-6)


@codecs
def test_zero_buffers_decode_to_zeros(codec):
    stored = {
        name: jnp.zeros((sides, 3, *shape), container_dtype(dtype, "cpu"))
        for name, (shape, dtype, sides) in leaf_specs(codec, 8).items()
    }
    decoded = codec.decode(out_of_containers(codec, stored, 8), 8, jnp.dtype("float32"))
    np.testing.assert_array_equal(decoded, np.zeros((2, 3, 8)))


@codecs
def test_a_container_keeps_the_bits(codec):
    encoded = encode(codec, random_vectors(2, 3, 8))
    contained = {
        name: bitcast(leaf, container_dtype(leaf.dtype.name, "cpu"))
        for name, leaf in encoded.items()
    }
    for name, leaf in encoded.items():
        assert contained[name].nbytes == leaf.nbytes
    np.testing.assert_array_equal(
        codec.decode(out_of_containers(codec, contained, 8), 8, jnp.dtype("float32")),
        codec.decode(encoded, 8, jnp.dtype("float32")),
    )


@pytest.mark.parametrize(
    ("dtype", "platform", "container"),
    [
        ("bfloat16", "cpu", "uint16"),
        ("float8_e4m3fn", "cpu", "uint8"),
        ("float16", "cpu", "float16"),
        ("float32", "cpu", "float32"),
        ("int8", "cpu", "int8"),
        ("bfloat16", "gpu", "bfloat16"),
        ("float8_e4m3fn", "tpu", "float8_e4m3fn"),
    ],
)
def test_container_dtype(dtype, platform, container):
    assert container_dtype(dtype, platform) == jnp.dtype(container)


def mixed(codec, queries, vectors):
    """What attention over two tokens gives, as one number."""
    config = jaxkv.KVCacheConfig(1, 4, 1, 8, codec=codec)
    cache = jaxkv.append(jaxkv.create(config), vectors, vectors**2, layer=0)
    return jaxkv.attend(cache, queries, layer=0, implementation="reference").sum()


ROUNDED = {name: codec for name, codec in KINDS.items() if not isinstance(codec, jaxkv.Dense)}
ROUNDED["keys alone"] = jaxkv.KeysValues(jaxkv.Int8(), jaxkv.Dense("float32"))


@pytest.mark.parametrize("codec", ROUNDED.values(), ids=ROUNDED)
def test_a_gradient_that_rounding_would_lose_is_an_error(codec):
    vectors = jax.random.normal(jax.random.key(0), (2, 1, 8))
    with pytest.raises(TypeError, match=rf"values stored as {re.escape(codec.name)}: .*rounded"):
        jax.grad(mixed, 2)(codec, vectors, vectors)


def test_queries_have_a_gradient_over_codes():
    vectors = jax.random.normal(jax.random.key(0), (2, 1, 8))
    gradient = jax.jit(jax.grad(mixed, 1), static_argnums=0)
    exact, over_codes = (
        gradient(codec, vectors, vectors) for codec in (jaxkv.Dense("float32"), jaxkv.Int8())
    )
    np.testing.assert_allclose(over_codes, exact, atol=0.02)


def test_a_gradient_that_a_container_would_lose_is_an_error():
    """On a CPU bfloat16 is held as bits, which carry no gradient."""
    cache = jaxkv.create(jaxkv.KVCacheConfig(1, 4, 1, 2))
    queries = jnp.ones((1, 1, 2))

    def loss(keys):
        written = jaxkv.append(cache, keys, queries, layer=0)
        return jaxkv.attend(written, queries, layer=0).sum()

    with pytest.raises(TypeError, match=r'bits are stored as integers.*Dense\("float32"\)'):
        jax.grad(loss)(queries)
