import numpy as np
import pytest

import jaxkv
from jaxkv.cache.hybrid import HybridCache, HybridConfig
from jaxkv.integrations.transformers import from_hf, to_dynamic_cache, to_hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LAYERS, BATCH, HEADS, TOKENS, HEAD_DIM = 2, 2, 3, 5, 4


def dynamic_cache(dtype, batch=BATCH):
    torch.manual_seed(0)
    cache = transformers.DynamicCache()
    for layer in range(LAYERS):
        for tokens in (TOKENS - 1, 1):  # it appends
            keys, values = torch.randn(2, batch, HEADS, tokens, HEAD_DIM).to(dtype)
            cache.update(keys, values, layer)
    return cache


def assert_same(actual, expected):
    assert actual.get_seq_length() == expected.get_seq_length() == TOKENS
    for ours, theirs in zip(actual.layers, expected.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("addressing", [jaxkv.Contiguous(), jaxkv.Paged(2), jaxkv.Ring(4, chunk=2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_is_exact(dtype, addressing):
    original = dynamic_cache(getattr(torch, dtype))
    cache = from_hf(original, max_context_length=8, addressing=addressing)
    assert cache.config.codec == jaxkv.Dense(dtype)
    assert cache.lengths.tolist() == [TOKENS] * BATCH
    assert_same(to_dynamic_cache(cache), original)


def test_a_single_sequence_and_plain_arrays():
    layers = dynamic_cache(torch.float32, batch=1).layers
    pairs = [(layer.keys.numpy(), layer.values.numpy()) for layer in layers]
    cache = from_hf(pairs, max_context_length=8, single=True)
    assert cache.config.batch_size is None
    keys, values = jaxkv.layer(cache, 1)
    np.testing.assert_array_equal(keys[:TOKENS], np.swapaxes(pairs[1][0][0], 0, 1))
    np.testing.assert_array_equal(values[:TOKENS], np.swapaxes(pairs[1][1][0], 0, 1))
    np.testing.assert_array_equal(to_hf(cache), pairs)


def test_a_quantized_cache_is_decoded():
    original = dynamic_cache(torch.float32)
    cache = from_hf(original, max_context_length=8, codec=jaxkv.Int8())
    for (keys, _), layer in zip(to_hf(cache), original.layers, strict=True):
        np.testing.assert_allclose(keys, layer.keys, atol=0.02)


def test_what_does_not_fit_is_said():
    pairs = [(layer.keys, layer.values) for layer in dynamic_cache(torch.float32).layers]
    with pytest.raises(ValueError, match="same in all layers"):
        from_hf([pairs[0], [part[:, :, :3] for part in pairs[1]]], max_context_length=8)
    with pytest.raises(ValueError, match=r"must be \[1, kv_heads"):
        from_hf(pairs, max_context_length=8, single=True)
    with pytest.raises(jaxkv.CacheFullError):
        from_hf(pairs, max_context_length=4)
    cache = from_hf(pairs, max_context_length=8)
    with pytest.raises(ValueError, match=r"one length, got \[3, 5\]"):
        to_hf(jaxkv.truncate(cache, np.array([3, 5], np.int32)))
    ring = from_hf(pairs, max_context_length=8, addressing=jaxkv.Ring(2, chunk=1))
    with pytest.raises(ValueError, match="keeps 2 of its 5 tokens"):
        to_hf(ring)


def test_each_sequence_of_a_ring_has_lost_tokens_of_its_own():
    """Both are 4 tokens long, and one was rolled back from 8: two of its tokens are gone."""
    config = jaxkv.KVCacheConfig(
        1, 16, HEADS, HEAD_DIM, batch_size=2, addressing=jaxkv.Ring(3, chunk=4)
    )
    cache = jaxkv.advance(jaxkv.create(config), 4)
    cache = jaxkv.truncate(jaxkv.advance(cache, np.array([0, 4], np.int32)), 4)
    with pytest.raises(ValueError, match="keeps 2 of its 4 tokens"):
        to_hf(cache)
    assert to_hf(jaxkv.select(cache, np.array([0])))[0][0].shape == (1, HEADS, 4, HEAD_DIM)


def test_a_hybrid_cache_goes_there_layer_by_layer():
    pairs = [(layer.keys, layer.values) for layer in dynamic_cache(torch.float32).layers]
    groups = [from_hf([pair], max_context_length=8) for pair in pairs]
    config = HybridConfig([group.config for group in groups], group_of_layer=(1, 0))
    for pair, expected in zip(to_hf(HybridCache(groups, config)), pairs[::-1], strict=True):
        np.testing.assert_array_equal(pair, expected)
