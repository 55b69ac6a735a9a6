import importlib

import jax
import pytest
from jax.errors import JaxRuntimeError

import jaxkv
from jaxkv.memory import allocate

allocate_module = importlib.import_module("jaxkv.memory.allocate")
plan_module = importlib.import_module("jaxkv.memory.plan")

LLAMA3 = jaxkv.KVCacheConfig(32, 4096, num_kv_heads=8, head_dim=128)
TINY = jaxkv.KVCacheConfig(2, 16, num_kv_heads=1, head_dim=4)
OUT_OF_MEMORY = JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 536870912 bytes.")


class Int8(jaxkv.Dense):
    """The bytes of an int8 codec with a float32 scale, at head_dim 128: 132 a vector."""

    name = "int8"

    def leaves(self, head_dim):
        return {"data": ((head_dim,), "int8"), "scale": ((), "float32")}


@pytest.fixture
def codecs(monkeypatch):
    def only(*codecs):
        monkeypatch.setattr(plan_module, "CODECS", {codec.name: codec for codec in codecs})

    return only


@pytest.fixture
def created(monkeypatch):
    """Fail the test if memory is touched."""

    def create(config, *, device):
        raise AssertionError("create was called for a cache that cannot fit")

    monkeypatch.setattr(allocate_module, "create", create)


def _message(config, **options):
    with pytest.raises(jaxkv.CacheAllocationError) as caught:
        allocate(config, **options)
    return str(caught.value)


def test_what_fits_is_created_where_it_should_be():
    cache = allocate(TINY, device=jax.devices()[3])
    assert all(leaf.devices() == {jax.devices()[3]} for leaf in jax.tree.leaves(cache))
    assert cache.size_bytes == TINY.size_bytes
    assert not any(leaf.any() for leaf in cache.storage.values())


@pytest.mark.usefixtures("created")
def test_the_message_says_what_would_fit(fake_stats, codecs):
    fake_stats(bytes_limit=24 * 10**9, bytes_in_use=24 * 10**9 - 412 * 10**6)
    codecs(jaxkv.Dense("float32"), jaxkv.Dense("bfloat16"), Int8())
    assert _message(LLAMA3) == (
        "Failed to allocate KV cache (536.9 MB: 4096 tokens x 32 layers x 8 KV heads x 128, "
        "bfloat16) on cpu:0: 412.0 MB free of 24.0 GB; 3143 tokens would fit, 6096 as int8."
    )


@pytest.mark.usefixtures("created")
def test_no_smaller_codec_and_a_batch(fake_stats, codecs):
    fake_stats(bytes_limit=10**9, bytes_in_use=0)
    codecs(jaxkv.Dense("float32"), jaxkv.Dense("bfloat16"))
    config = jaxkv.KVCacheConfig(32, 4096, num_kv_heads=8, head_dim=128, batch_size=4)
    assert _message(config, device=jax.devices()[2]) == (
        "Failed to allocate KV cache (2.1 GB: 4 sequences x 4096 tokens x 32 layers x 8 KV heads "
        "x 128, bfloat16) on cpu:2: 1.0 GB free of 1.0 GB; 1907 tokens a sequence would fit."
    )


@pytest.mark.usefixtures("created")
def test_not_even_one_token(fake_stats, codecs):
    codecs(jaxkv.Dense("bfloat16"), Int8())
    fake_stats(bytes_limit=100_000, bytes_in_use=0)
    assert _message(LLAMA3).endswith("100.0 kB free of 100.0 kB; 1 token would fit as int8.")
    fake_stats(bytes_limit=1000, bytes_in_use=0)
    assert _message(LLAMA3).endswith("1.0 kB free of 1.0 kB; not even one token would fit.")


def test_a_request_larger_than_this_machine(created):
    config = jaxkv.KVCacheConfig(1000, 10**9, num_kv_heads=100, head_dim=128)
    assert "tokens would fit" in _message(config)


def test_xlas_own_refusal_is_turned_and_leaves_nothing(fake_stats, live_arrays):
    fake_stats(bytes_limit=2**60, bytes_in_use=0)
    before = live_arrays()
    config = jaxkv.KVCacheConfig(2**10, 2**20, num_kv_heads=2**7, head_dim=2**10)  # 2^49 bytes
    with pytest.raises(jaxkv.CacheAllocationError, match="yet the allocator ran out") as caught:
        allocate(config)
    assert isinstance(caught.value.__cause__, JaxRuntimeError)
    assert live_arrays() == before


def test_what_the_allocator_gave_before_it_failed_is_given_back(monkeypatch, live_arrays):
    def create(config, *, device):
        half = jax.device_put(jax.numpy.zeros(1000), device)
        assert half.size
        raise OUT_OF_MEMORY

    monkeypatch.setattr(allocate_module, "create", create)
    before = live_arrays()
    with pytest.raises(jaxkv.CacheAllocationError) as caught:
        allocate(TINY)
    assert caught.value.__cause__ is OUT_OF_MEMORY
    assert live_arrays() == before  # while the error, and so its traceback, is alive


def test_a_failure_that_shows_only_when_the_memory_is_waited_for(monkeypatch, live_arrays):
    before = live_arrays()

    def wait(cache):
        raise OUT_OF_MEMORY

    with monkeypatch.context() as patch:
        patch.setattr(jax, "block_until_ready", wait)
        with pytest.raises(jaxkv.CacheAllocationError):
            allocate(TINY)
    assert live_arrays() == before


def test_other_errors_pass_as_they_are(monkeypatch):
    def create(config, *, device):
        raise JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(allocate_module, "create", create)
    with pytest.raises(JaxRuntimeError, match="something else"):
        allocate(TINY)


@pytest.mark.parametrize("device", ["24GB", 24 * 10**9, "cpu"])
def test_a_size_is_no_device_to_allocate_on(device):
    with pytest.raises(TypeError, match=r"must be a jax\.Device or None, got"):
        allocate(TINY, device=device)


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, MemoryError()])
def test_create_says_what_would_fit_too(monkeypatch, fake_stats, codecs, error):
    def fail(config, device):
        raise error

    monkeypatch.setattr(importlib.import_module("jaxkv.cache.create"), "_create", fail)
    fake_stats(bytes_limit=24 * 10**9, bytes_in_use=24 * 10**9 - 412 * 10**6)
    codecs(jaxkv.Dense("float32"), jaxkv.Dense("bfloat16"), Int8())
    with pytest.raises(jaxkv.CacheAllocationError, match=r"free of 24.0 GB; 3143 tokens would fit"):
        jaxkv.create(LLAMA3)
