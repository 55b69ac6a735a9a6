"""Dense codecs: plain rounding."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounds_to_nearest(dtype):
    vectors = np.random.default_rng(0).standard_normal((50, 8), np.float32)
    encoded = jaxkv.Dense(dtype).encode(jnp.asarray(vectors))
    np.testing.assert_array_equal(encoded["data"], vectors.astype(jnp.dtype(dtype)))


@pytest.mark.parametrize("spelling", ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")])
def test_a_dtype_in_any_spelling(spelling):
    codec = jaxkv.Dense(spelling)
    assert codec == jaxkv.Dense()
    assert hash(codec) == hash(jaxkv.Dense())
    assert codec.name == "bfloat16"


@pytest.mark.parametrize(
    ("dtype", "got"),
    [("float64", "float64"), ("int8", "int8"), ("half-ish", "half-ish"), (jnp.int4, "int4")],
)
def test_other_dtypes_are_refused(dtype, got):
    message = f"dtype must be one of float32, float16, bfloat16, got '{got}'"
    with pytest.raises(ValueError, match=message):
        jaxkv.Dense(dtype)
