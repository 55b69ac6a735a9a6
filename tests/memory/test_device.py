import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxkv.memory import DeviceMemory, device_memory
from jaxkv.memory.device import default_device, live_array_bytes


def test_a_device_with_stats_speaks_for_itself(fake_stats):
    fake_stats(bytes_limit=1000, bytes_in_use=300, peak_bytes_in_use=700, num_allocs=2)
    memory = device_memory(jax.devices()[2])
    assert memory == DeviceMemory("cpu:2", "memory_stats", 1000, 700, 300, 700)
    assert memory.describe_use() == "300 B in use, 700 B at peak, 1.0 kB in all (memory_stats)"


def test_every_key_is_optional(fake_stats):
    fake_stats(bytes_limit=1_000_000)
    held = jax.device_put(jnp.ones(100, jnp.float32), jax.devices()[3])
    memory = device_memory(jax.devices()[3])
    assert memory.in_use_bytes == live_array_bytes(jax.devices()[3]) >= held.nbytes
    assert memory.free_bytes == 1_000_000 - memory.in_use_bytes
    assert memory.peak_bytes is None

    fake_stats(bytes_in_use=5)
    memory = device_memory()
    assert (memory.source, memory.limit_bytes, memory.free_bytes) == ("unknown", None, None)
    assert memory.describe_free() == "free memory unknown"


def test_more_in_use_than_the_limit_leaves_nothing(fake_stats):
    fake_stats(bytes_limit=10, bytes_in_use=30)
    assert device_memory().free_bytes == 0


def test_a_cpu_has_its_machines_memory():
    memory = device_memory(jax.devices()[1])
    assert memory.device == "cpu:1"
    assert memory.source in ("physical memory", "cgroup limit", "RLIMIT_AS")
    assert 0 < memory.free_bytes <= memory.limit_bytes
    assert 0 < memory.process_bytes <= memory.process_peak_bytes
    assert memory.in_use_source == "live arrays"


@pytest.mark.parametrize("refusal", [NotImplementedError(), jax.errors.JaxRuntimeError("no")])
def test_an_accelerator_that_says_nothing_is_unknown(monkeypatch, refusal):
    class Accelerator:
        platform = "npu"

        def memory_stats(self):
            raise refusal

        def __str__(self):
            return "npu:0"

    monkeypatch.setattr(jax, "live_arrays", lambda platform: [])
    assert device_memory(Accelerator()) == DeviceMemory("npu:0", "unknown", in_use_bytes=0)


def test_sizes_given():
    assert device_memory("24GB") == device_memory(24 * 10**9)
    assert device_memory("24GiB").free_bytes == 24 * 2**30
    assert device_memory(0).source == "given"


@pytest.mark.parametrize("bad", [1.5, True, b"24GB", object()])
def test_not_a_device(bad):
    with pytest.raises(TypeError, match=r"device must be a jax\.Device, None, bytes"):
        device_memory(bad)


def test_negative_size():
    with pytest.raises(ValueError, match="at least 0 bytes, got -1"):
        device_memory(-1)


def test_default_device_is_jaxs():
    assert default_device() == jax.devices()[0]
    with jax.default_device(jax.devices()[4]):
        assert default_device() == jax.devices()[4]
        assert device_memory().device == "cpu:4"


def test_live_bytes_count_a_shared_buffer_once_and_shards_where_they_are():
    sixth, seventh = jax.devices()[6:8]
    before = live_array_bytes(sixth), live_array_bytes(seventh)
    one = jax.device_put(jnp.ones((4, 256), jnp.float32), sixth)
    same = jax.device_put(one, sixth)
    assert same is not one
    assert live_array_bytes(sixth) - before[0] == one.nbytes
    mesh = jax.sharding.Mesh([sixth, seventh], ("x",))
    rows = jax.device_put(jnp.ones((6, 10), jnp.float32), NamedSharding(mesh, PartitionSpec("x")))
    copies = jax.device_put(jnp.ones(5, jnp.float32), NamedSharding(mesh, PartitionSpec()))
    assert live_array_bytes(seventh) - before[1] == rows.nbytes // 2 + copies.nbytes
    del one, same, rows, copies
    assert (live_array_bytes(sixth), live_array_bytes(seventh)) == before
