"""A decode step lowers for a TPU, with XLA's own operations alone: no TPU is needed to know."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import pytest

import jaxkv

CODECS = (jaxkv.Dense("bfloat16"), jaxkv.Int8(), jaxkv.Rotated(bits=4))
ADDRESSINGS = (jaxkv.Contiguous(), jaxkv.Paged(16, num_pages=20), jaxkv.Ring(window=64, sinks=4))


@pytest.mark.parametrize(
    ("codec", "addressing"),
    [*itertools.product(CODECS[:1], ADDRESSINGS), *itertools.product(CODECS[1:], ADDRESSINGS[:1])],
    ids=lambda part: part.name,
)
def test_a_step_lowers_for_a_tpu(monkeypatch, codec, addressing):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    config = jaxkv.KVCacheConfig(2, 128, 2, 64, batch_size=2, codec=codec, addressing=addressing)
    cache = jax.eval_shape(lambda: jaxkv.create(config))
    dtypes = {name: spec[1] for name, spec in codec.leaves(64).items()}
    storage = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtypes[name]) for name, leaf in cache.storage.items()
    }
    assert "native: not used" in jaxkv.explain(cache)

    def step(cache, queries):
        vectors = queries[..., :2, :]
        cache = jaxkv.append(cache, vectors, vectors, layer=1)
        return jaxkv.advance(cache, 1), jaxkv.attend(cache, queries, layer=1)

    queries = jax.ShapeDtypeStruct((2, 1, 4, 64), jnp.bfloat16)
    traced = jax.jit(step, donate_argnums=0).trace(
        dataclasses.replace(cache, storage=storage), queries
    )
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.dynamic_update_slice" in text or "stablehlo.scatter" in text
    assert not re.findall(r"custom_call @(?!Sharding)\w+", text)
