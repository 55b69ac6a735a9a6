"""What a decode step is lowered to, for platforms of which none is needed to know."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.attention.mosaic import attend as mosaic
from jaxkv.models import layers
from jaxkv.native import unavailable

CODECS = (jaxkv.Dense("bfloat16"), jaxkv.Int8(), jaxkv.Rotated(bits=4))
ADDRESSINGS = (jaxkv.Contiguous(), jaxkv.Paged(16, num_pages=20), jaxkv.Ring(window=64, sinks=4))


@pytest.mark.parametrize(
    ("codec", "addressing"),
    [*itertools.product(CODECS[:1], ADDRESSINGS), *itertools.product(CODECS[1:], ADDRESSINGS[:1])],
    ids=lambda part: part.name,
)
def test_a_step_lowers_for_a_tpu(codec, addressing):
    config = jaxkv.KVCacheConfig(2, 128, 2, 64, batch_size=2, codec=codec, addressing=addressing)
    cache = jax.eval_shape(lambda: jaxkv.create(config))
    dtypes = {name: spec[1] for name, spec in codec.leaves(64).items()}
    storage = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtypes[name]) for name, leaf in cache.storage.items()
    }
    queries = jax.ShapeDtypeStruct((2, 1, 4, 64), jnp.bfloat16)
    text = lowered(dataclasses.replace(cache, storage=storage), queries, "tpu")
    assert "stablehlo.dynamic_update_slice" in text or "stablehlo.scatter" in text
    assert not custom_calls(text)


def step(cache, queries, implementation=None):
    vectors = queries[..., : cache.config.num_kv_heads, :]
    cache = jaxkv.append(cache, vectors, vectors, layer=1)
    output = jaxkv.attend(cache, queries, layer=1, implementation=implementation)
    return jaxkv.advance(cache, 1), output


def lowered(cache, queries, platform, **options):
    traced = jax.jit(functools.partial(step, **options), donate_argnums=0).trace(cache, queries)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def custom_calls(text):
    return set(re.findall(r"custom_call @(?!Sharding)(\w+)", text))


def small():
    config = jaxkv.KVCacheConfig(2, 64, 8, 64, batch_size=2, codec=jaxkv.Int8())
    return jaxkv.create(config), jnp.ones((2, 1, 8, 64))


class Hopper:
    compute_capability, device_kind, core_count = "9.0", "a GPU", 132


@pytest.fixture
def beside_a_gpu(monkeypatch):
    """As in a process whose first backend is a Hopper GPU, whose CPU arrays were made or moved."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("jaxkv.attention.mosaic.attend.local_gpu", Hopper)
    mosaic._wrong_device.cache_clear()
    yield
    mosaic._wrong_device.cache_clear()


def test_beside_a_gpu_a_cache_on_the_cpu_is_the_cpus(beside_a_gpu):
    cache, queries = small()
    expected = step(cache, queries, "reference")[1]
    assert "mosaic: not used, it runs on a GPU, and this is for a CPU" in jaxkv.explain(cache)
    np.testing.assert_allclose(step(cache, queries)[1], expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(step)(cache, queries)[1], expected, atol=1e-6)
    assert "mosaic_gpu" in str(custom_calls(lowered(cache, queries, "cuda")))


# The kernel in a program for each platform, and whether XLA's own form is a matrix product.
PLATFORMS = {"cpu": {"jaxkv_decode"}, "cuda": set(), "rocm": set(), "tpu": set()}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_kernel_is_that_of_the_platform_lowered_for(platform):
    kernels = set() if unavailable() else PLATFORMS[platform]
    text = lowered(*small(), platform)
    assert custom_calls(text) == kernels
    if not kernels:  # few rows are sums of products on a GPU, and a TPU has matrix units
        assert ("dot_general" in text) == (platform in ("cpu", "tpu"))


def test_a_kernel_that_is_named_is_not_lowered_for_another_platform():
    if reason := unavailable():
        pytest.skip(reason)
    with pytest.raises(NotImplementedError, match="platform tpu"):
        lowered(*small(), "tpu", implementation="native")


def test_products_of_weights_are_those_of_the_platform():
    x, weight = jnp.ones((1, 1, 256), jnp.bfloat16), jnp.ones((256, 256), jnp.bfloat16)
    traced = jax.jit(layers.matmul).trace(x, weight)
    texts = {each: traced.lower(lowering_platforms=(each,)).as_text() for each in PLATFORMS}
    kernels = {each: custom_calls(text) for each, text in texts.items()}
    expected = set() if unavailable() else {"jaxkv_products"}
    assert kernels == {"cpu": expected, "cuda": set(), "rocm": set(), "tpu": set()}
