"""A compressed cache goes on from its file, bit for bit, while it decodes and evicts."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import jaxkv
from jaxkv.addressing import KeptByHead
from jaxkv.policies import HeavyHitters, KeyDiff
from jaxkv.snapshot import container, inspect
from tests.compression.layouts import HEADS, Filled, positions_of
from tests.oracle import jit, random_step, step

EVEN, UNEVEN = 4, [[[5, 2], [1, 6]], [[3, 3], [7, 1]]]  # [layers, batch, kv_heads]
EVICTING = "evicting from the first token on"
COMPRESSED = {
    "one number and the newest": ({"batch_size": 2, "newest": 3}, KeyDiff(), EVEN),
    "one number": ({"codec": "int8", "batch_size": 2}, KeyDiff(), EVEN),
    "pages": ({"codec": "bfloat16", "addressing": "paged"}, KeyDiff(), EVEN),
    "a number a layer": ({"codec": "rotated3/int8", "head_dim": 8}, KeyDiff(), (6, 3)),
    "a number a head": ({"batch_size": 2}, KeyDiff(), UNEVEN),
}
KEPT = jaxkv.Kept(EVEN, new=3, num_layers=1, num_kv_heads=2, sums=True)
CONFIG = jaxkv.KVCacheConfig(1, 16, 2, 8, 2, jaxkv.Dense("float32"), KEPT)


@functools.cache
def small(case):
    """Of a case, after a few tokens."""
    if case == EVICTING:
        cache, _ = run(jaxkv.create(CONFIG), 0, HeavyHitters(), tokens=9)
        return jaxkv.truncate(cache, np.array([9, 8]))
    fields, policy, keep = COMPRESSED[case]
    cache = jaxkv.compress(Filled(**fields).cache, policy, keep=keep, new=3, sinks=1)
    cache, _ = run(cache, 10)
    return jaxkv.truncate(cache, cache.lengths - 1)


@functools.cache
def compiled(policy):
    """A step, after an eviction where there is a policy for it."""

    def one(cache, *arrays):
        if policy is not None:
            cache = jaxkv.evict(cache, policy, queries=arrays[0], sinks=1)
        return step(cache, *arrays)

    return jit(one)


def run(cache, seed, policy=None, tokens=2):
    shape, outputs = cache.config, []
    if isinstance(shape, jaxkv.HybridConfig):
        shape = shape.groups[0].replace(num_layers=2, addressing=jaxkv.Contiguous())
    for token in range(tokens):
        arrays = random_step(shape, 1, heads=HEADS, seed=seed + token)
        cache, output = compiled(policy)(cache, *arrays)
        outputs.append(np.asarray(output).tobytes())
    return cache, outputs


@pytest.mark.slow
@pytest.mark.parametrize("case", [EVICTING, *COMPRESSED])
def test_going_on_from_a_file_is_bitwise_going_on(tmp_path, case):
    cache, policy = small(case), HeavyHitters() if case == EVICTING else None
    jaxkv.save(cache, tmp_path / "file", model="mine")
    loaded = jaxkv.load(tmp_path / "file", model="mine")
    assert loaded.config == cache.config
    layers = range(cache.config.num_layers)
    for layer in layers:
        np.testing.assert_array_equal(positions_of(loaded, layer), positions_of(cache, layer))
    # What is held and no more: no free slots.
    held = sum(sum(group.held) for group in inspect(tmp_path / "file").groups)
    assert held == sum((positions_of(cache, layer) >= 0).sum() for layer in layers)
    (cache, expected), (loaded, outputs) = (run(each, 20, policy) for each in (cache, loaded))
    assert outputs == expected
    assert loaded.lengths.tolist() == cache.lengths.tolist()


@pytest.mark.slow
def test_rows_of_a_batch_and_more_room(tmp_path):
    jaxkv.save(small(EVICTING), tmp_path / "file")
    wider = CONFIG.replace(batch_size=4, addressing=dataclasses.replace(KEPT, new=9))
    batch = jaxkv.advance(jaxkv.create(wider), np.array([2, 1, 0, 0]))
    loaded = jaxkv.load(tmp_path / "file", into=batch, rows=[3, 1])
    assert loaded.lengths.tolist() == [2, 8, 0, 9]
    num_new = np.asarray(small(EVICTING).index.within.lengths)
    assert loaded.index.within.lengths.tolist() == [2, num_new[1], 0, num_new[0]]
    before, after = (positions_of(cache, 0) for cache in (small(EVICTING), loaded))
    np.testing.assert_array_equal(after[[3, 1], :, 9:], before[..., 3:])
    np.testing.assert_array_equal(after[[3, 1], :, :3], before[..., :3])
    assert after[0, 0, :3].tolist() == [0, 1, -1]
    for each in zip(jaxkv.layer(loaded, 0), jaxkv.layer(small(EVICTING), 0), strict=True):
        np.testing.assert_array_equal(each[0][[3, 1], 9:], each[1][:, 3:])


@pytest.mark.slow
def test_what_does_not_fit_is_refused(tmp_path):
    uneven = CONFIG.replace(addressing=KeptByHead(4, 4, 3, num_layers=1, num_kv_heads=2))
    plain = CONFIG.replace(addressing=jaxkv.Contiguous())
    for name, config in {"plain": plain, "uneven": uneven}.items():
        jaxkv.save(jaxkv.create(config), tmp_path / name, model="mine")
    jaxkv.save(small(EVICTING), tmp_path / "even", model="mine")

    def load(name, **options):
        with pytest.raises(jaxkv.JaxkvError) as raised:
            jaxkv.load(tmp_path / name, **options)
        return str(raised.value)

    assert "saved before jaxkv.compress" in load("plain", addressing=KEPT)
    assert "saved after jaxkv.compress, with kept" in load("even", addressing=jaxkv.Contiguous())
    assert "holds 4 kept tokens of one head" in load(
        "even", addressing=dataclasses.replace(KEPT, tokens=3)
    )
    assert "num_layers and num_kv_heads must be those of Kept" in load(
        "even", addressing=dataclasses.replace(KEPT, num_layers=3)
    )
    batch = jaxkv.create(uneven.replace(batch_size=3))
    assert "loaded whole" in load("uneven", into=batch, rows=[1, 2])
    pages = jaxkv.paging.PageAllocator(20, page_size=4)
    pool = jaxkv.create(plain.replace(addressing=jaxkv.Paged(4, num_pages=20)))
    with pytest.raises(jaxkv.SnapshotError, match=r"saved after jaxkv\.compress"):
        jaxkv.load_prefix(tmp_path / "even", pool, pages, model="mine")
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((batch, pool)))


FORGERIES = {
    "counts": (lambda array: array + 1, "its heads do not hold"),
    "first_new": (lambda array: array + 8, r"its new tokens begin at 1\d of 9"),
    "positions": (lambda array: array + 9, "at positions that cannot be"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_numbers_that_no_cache_has_are_refused(tmp_path, name):
    """A file that agrees with itself but for what the index says."""
    path, (forge, message) = tmp_path / "file", FORGERIES[name]
    jaxkv.save(small(EVICTING), path)
    manifest, layout = container.read_manifest(path), inspect(path).layout()
    with container.opened(path, lambda _: layout) as (_, tensors):
        forged = {key: np.array(tensor) for key, tensor in tensors.items()}
    forged[f"0.0.{name}"] = np.asarray(forge(forged[f"0.0.{name}"]), np.int32)
    container.write(path, manifest, layout, lambda key: [forged[key]])
    with pytest.raises(jaxkv.SnapshotError, match=message):
        jaxkv.load(path)


def test_it_may_be_in_host_memory(tmp_path):
    jaxkv.save(small(EVICTING), tmp_path / "file")
    jaxkv.save(jaxkv.offload(small(EVICTING)), tmp_path / "again")
    assert (tmp_path / "file").read_bytes() == (tmp_path / "again").read_bytes()
