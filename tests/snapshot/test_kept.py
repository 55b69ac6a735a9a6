"""A compressed cache goes on from its file, bit for bit, while it decodes and evicts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.policies import HeavyHitters, KeyDiff
from jaxkv.snapshot import container, inspect
from tests.compression.layouts import HEADS, LENGTHS, Filled, positions_of
from tests.oracle import jit, random_step, step

EVEN, UNEVEN = 4, [[[5, 2], [1, 6]], [[3, 3], [7, 1]]]  # [layers, batch, kv_heads]
SUMS = "sums of attention"
CASES = {
    "one number": ({"codec": "int8", "batch_size": 2}, KeyDiff(), EVEN),
    "pages": ({"codec": "bfloat16", "addressing": "paged"}, KeyDiff(), EVEN),
    "a number a layer": ({"codec": "rotated3/int8", "head_dim": 8}, KeyDiff(), (6, 3)),
    "a number a head": ({"batch_size": 2}, KeyDiff(), UNEVEN),
    SUMS: ({"batch_size": 2}, HeavyHitters(), EVEN),
}


@functools.cache
def compressed(case):
    fields, policy, keep = CASES[case]
    full = Filled(**fields)
    queries = full.queries if isinstance(policy, HeavyHitters) else None
    return jaxkv.compress(full.cache, policy, keep=keep, new=3, queries=queries, sinks=1)


@functools.cache
def compiled(policy):
    """A step, after an eviction where there is a policy for it."""

    def one(cache, *arrays):
        if policy is not None:
            cache = jaxkv.evict(cache, policy, queries=arrays[0], sinks=1)
        return step(cache, *arrays)

    return jit(one)


def run(cache, seed, policy=None):
    shape, outputs = cache.config, []
    if isinstance(shape, jaxkv.HybridConfig):
        shape = shape.groups[0].replace(num_layers=2, addressing=jaxkv.Contiguous())
    for token in range(2):
        arrays = random_step(shape, 1, heads=HEADS, seed=seed + token)
        cache, output = compiled(policy)(cache, *arrays)
        outputs.append(np.asarray(output).tobytes())
    return cache, outputs


@pytest.mark.parametrize("case", CASES)
def test_going_on_from_a_file_is_bitwise_going_on(tmp_path, case):
    evicting = CASES[case][1] if case == SUMS else None
    small, _ = run(compressed(case), 10, evicting)
    small = jaxkv.truncate(small, small.lengths - 1)
    jaxkv.save(small, tmp_path / "file", model="mine")
    loaded = jaxkv.load(tmp_path / "file", model="mine")
    assert loaded.config == small.config
    for layer in range(small.config.num_layers):
        np.testing.assert_array_equal(positions_of(loaded, layer), positions_of(small, layer))
    # What is held and no more: no free slots.
    held = sum(sum(group.held) for group in inspect(tmp_path / "file").groups)
    assert held == sum((positions_of(small, layer) >= 0).sum() for layer in range(2))
    (small, expected), (loaded, outputs) = (run(each, 20, evicting) for each in (small, loaded))
    assert outputs == expected
    assert loaded.lengths.tolist() == small.lengths.tolist()


def test_rows_of_a_batch_and_more_room(tmp_path):
    small = compressed(SUMS)
    jaxkv.save(small, tmp_path / "file")
    wider = dataclasses.replace(small.config.addressing, new=9)
    batch = jaxkv.create(small.config.replace(batch_size=4, addressing=wider))
    batch = jaxkv.advance(batch, np.array([2, 1, 0, 0]))
    loaded = jaxkv.load(tmp_path / "file", into=batch, rows=[3, 1])
    for layer in range(2):
        before, after = (positions_of(cache, layer) for cache in (small, loaded))
        np.testing.assert_array_equal(after[[3, 1], :, 9:], before[..., 3:])
        assert (after[[3, 1], :, :9] == -1).all()
        assert after[0, 0, :3].tolist() == [0, 1, -1]
        for each in zip(jaxkv.layer(loaded, layer), jaxkv.layer(small, layer), strict=True):
            np.testing.assert_array_equal(each[0][[3, 1], 9:], each[1][:, 3:])
    assert loaded.lengths.tolist() == [2, LENGTHS[1], 0, LENGTHS[0]]
    assert loaded.index.within.lengths.tolist() == [2, 0, 0, 0]


def test_what_does_not_fit_is_refused(tmp_path):
    even, uneven = compressed(SUMS), compressed("a number a head")
    plain = jaxkv.create(even.config.replace(addressing=jaxkv.Contiguous()))
    for name, cache in {"plain": plain, "even": even, "uneven": uneven}.items():
        jaxkv.save(cache, tmp_path / name, model="mine")
    full = even.config.addressing

    def load(name, **options):
        with pytest.raises(jaxkv.JaxkvError) as raised:
            jaxkv.load(tmp_path / name, **options)
        return str(raised.value)

    assert "saved before jaxkv.compress" in load("plain", addressing=full)
    assert "saved after jaxkv.compress, with kept" in load("even", addressing=jaxkv.Contiguous())
    assert "holds 4 kept tokens of one head" in load(
        "even", addressing=dataclasses.replace(full, tokens=3)
    )
    assert "num_layers must be that of Kept" in load(
        "even", addressing=dataclasses.replace(full, num_layers=3)
    )
    batch = jaxkv.create(uneven.config.replace(batch_size=3))
    assert "loaded whole" in load("uneven", into=batch, rows=[1, 2])
    pages = jaxkv.paging.PageAllocator(20, page_size=4)
    pool = jaxkv.create(plain.config.replace(addressing=jaxkv.Paged(4, num_pages=20)))
    with pytest.raises(jaxkv.SnapshotError, match=r"saved after jaxkv\.compress"):
        jaxkv.load_prefix(tmp_path / "even", pool, pages, model="mine")
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((batch, pool)))


FORGERIES = {
    "counts": (lambda array: array + 1, "its heads do not hold"),
    "first_new": (lambda array: array + 8, r"its new tokens begin at 1\d of 11"),
    "positions": (lambda array: array + 9, "at positions that cannot be"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_numbers_that_no_cache_has_are_refused(tmp_path, name):
    """A file that agrees with itself but for what the index says."""
    path, (forge, message) = tmp_path / "file", FORGERIES[name]
    jaxkv.save(compressed(SUMS), path)
    manifest, layout = container.read_manifest(path), inspect(path).layout()
    with container.opened(path, lambda _: layout) as (_, tensors):
        forged = {key: np.array(tensor) for key, tensor in tensors.items()}
    forged[f"0.0.{name}"] = np.asarray(forge(forged[f"0.0.{name}"]), np.int32)
    container.write(path, manifest, layout, lambda key: [forged[key]])
    with pytest.raises(jaxkv.SnapshotError, match=message):
        jaxkv.load(path)


def test_it_may_be_in_host_memory(tmp_path):
    small = compressed(SUMS)
    jaxkv.save(jaxkv.offload(small), tmp_path / "file")
    loaded = jaxkv.load(tmp_path / "file")
    for layer in range(2):
        for one, other in zip(jaxkv.layer(loaded, layer), jaxkv.layer(small, layer), strict=True):
            held = jnp.asarray(positions_of(small, layer) >= 0).swapaxes(1, 2)[..., None]
            np.testing.assert_array_equal(jnp.where(held, one, 0), jnp.where(held, other, 0))
