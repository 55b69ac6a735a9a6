"""The addressing contract, for every row of `ADDRESSINGS`: what is written is what is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import jaxkv
from jaxkv import KVCacheConfig
from jaxkv.addressing import ADDRESSINGS, KeptByHead, Paged, Ring
from jaxkv.addressing.rows import read_rows
from tests.oracle import SMALL

CAPACITY, LENGTHS = 6, np.array([4, 0, 6], np.int32)

addressings = pytest.mark.parametrize("addressing", SMALL.values(), ids=SMALL)
batches = pytest.mark.parametrize("batch_size", [None, 3], ids=["single", "batch"])


def index_of(addressing, batch_size):
    """An index of `LENGTHS`, or of the first of them."""
    lengths = LENGTHS[0] if batch_size is None else LENGTHS
    return addressing.init(CAPACITY, batch_size).with_lengths(jnp.asarray(lengths))


def slot_numbers(addressing, batch_size):
    """A buffer that holds the number of each slot, in layer 1; keys and values alike."""
    slots = jnp.arange(addressing.num_slots(CAPACITY, batch_size), dtype=jnp.int32)
    layer = jnp.broadcast_to(slots[:, None, None], (2, slots.size, 2, 1))
    return jnp.stack([jnp.full_like(layer, -7), layer])


def visible_positions(index, length):
    """What the next token of a sequence sees, itself not included."""
    window = length if index.window is None else index.window - 1
    if index.aligned:
        window = length % index.window
    return {p for p in range(length) if p >= length - window or p < index.sinks}


def test_the_table_names_its_rows():
    assert all(addressing.name == name for name, addressing in ADDRESSINGS.items())


@addressings
@batches
def test_a_new_index_is_empty_and_has_the_bytes_announced(addressing, batch_size):
    index = addressing.init(CAPACITY, batch_size)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(index))
    assert held == addressing.index_bytes(CAPACITY, batch_size)
    assert index.capacity == CAPACITY
    assert not index.lengths.any()
    assert np.all(index.intact)
    assert (index.key_positions(0, index.lengths, 0, index.extent) == -1).all()


@addressings
@batches
def test_tokens_that_can_be_seen_together_have_slots_of_their_own(addressing, batch_size):
    index = index_of(addressing, batch_size)
    positions = np.arange(index.sinks, CAPACITY)[-index.extent :]
    positions = np.r_[: index.sinks, positions]
    positions = np.broadcast_to(positions, (*index.lengths.shape, len(positions)))
    slots = np.asarray(index.slots(jnp.asarray(positions)))
    assert len(set(slots.ravel())) == slots.size
    assert slots.min() >= 0
    assert slots.max() < addressing.num_slots(CAPACITY, batch_size)


@addressings
@batches
def test_positions_that_do_not_exist_have_no_slot(addressing, batch_size):
    index = index_of(addressing, batch_size)
    positions = np.broadcast_to([-1, -5, CAPACITY, CAPACITY + 9], (*index.lengths.shape, 4))
    assert (index.slots(jnp.asarray(positions)) == -1).all()


@addressings
@batches
def test_what_is_read_was_written_there(addressing, batch_size):
    index, leaf = index_of(addressing, batch_size), slot_numbers(addressing, batch_size)
    positions = np.asarray(index.key_positions(1, index.lengths, 0, index.extent))
    read = np.asarray(index.read(leaf, 1, 0, index.extent))
    assert read.shape == (2, *index.lengths.shape, index.extent, 2, 1)
    written = np.asarray(index.slots(jnp.asarray(positions)))
    held = positions >= 0
    for part in read:  # keys, values
        np.testing.assert_array_equal(part[..., 0, 0][held], written[held])
    rows = positions.reshape(-1, index.extent)
    for row, length in zip(rows, np.ravel(index.lengths), strict=True):
        assert set(row[row >= 0]) >= visible_positions(index, length)


@addressings
@batches
@pytest.mark.parametrize("start", [0, 1, 4])
def test_a_part_is_a_slice_of_the_whole(addressing, batch_size, start):
    index, leaf = index_of(addressing, batch_size), slot_numbers(addressing, batch_size)
    part = slice(start, start + 2)
    whole = index.read(leaf, 1, 0, index.extent)[..., part, :, :]
    traced = jax.jit(lambda start: index.read(leaf, 1, start, 2))(start)
    np.testing.assert_array_equal(traced, whole)
    positions = index.key_positions(0, index.lengths, 0, index.extent)[..., part]
    np.testing.assert_array_equal(index.key_positions(0, index.lengths, start, 2), positions)


STEPS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), max_size=8)
# What a rollback may reach in a ring: only its sinks, or with a window of 1 nothing at all.
RINGS = [Ring(window=4, sinks=4, chunk=2), Ring(window=1, chunk=2), Ring(window=1, sinks=3)]


@settings(max_examples=50, deadline=None)
@given(addressing=st.sampled_from([*SMALL.values(), *RINGS]), steps=STEPS)
@example(RINGS[0], [(9, 0), (9, 14), (6, 0)])
@example(RINGS[1], [(9, 2), (1, 0)])
@example(SMALL["ring"], [(9, 0), (9, 0), (9, 9)])
def test_appends_and_rollbacks_keep_what_can_be_seen(addressing, steps):
    """A dictionary of slots beside the index: no slot is ever said to hold what it does not.

    Tokens past the end are dropped, and rolled back.
    """
    index, contents = addressing.init(18, None), {}  # the last page reaches beyond
    for appended, rolled_back in steps:
        length = int(index.lengths)
        positions = np.arange(length, length + 9, dtype=np.int32)  # always as many: one program
        slots = np.asarray(index.slots(positions)).tolist()
        contents |= dict(zip(slots[:appended], positions, strict=False))
        index = index.with_lengths(jnp.int32(length + appended))
        shorter = index.with_lengths(jnp.maximum(index.lengths - rolled_back, 0))
        index = shorter if np.all(shorter.intact) else index
        held = np.asarray(index.key_positions(0, index.lengths, 0, index.extent))
        slots = np.asarray(index.slots(jnp.arange(18, dtype=jnp.int32)))
        for position in held[held >= 0]:
            assert contents[int(slots[position])] == position
        assert set(held[held >= 0]) >= visible_positions(index, int(index.lengths)) & set(range(18))
        if index.lengths >= 18:  # as `check` promises
            assert index.with_lengths(jnp.int32(18)).intact


def test_pages_that_were_given_back_are_missed_after_a_rollback():
    config = KVCacheConfig(1, 12, 1, 4, batch_size=2, addressing=Paged(2, num_pages=9, window=3))
    table = jnp.array([[-1, -1, 3, 4, -1, -1], [0, 1, 2, 5, 6, -1]], jnp.int32)
    cache = jaxkv.create(config).with_pages(table, jnp.array([8, 9]))
    assert jaxkv.check(jaxkv.truncate(cache, 6)).lengths.tolist() == [6, 6]  # which sees 4 and 5
    with pytest.raises(ValueError, match=r"roll back to \[5, 9\] tokens: the paged cache has lost"):
        jaxkv.truncate(cache, jnp.array([5, 9]))
    rolled_back = jax.jit(jaxkv.truncate)(cache, jnp.array([5, 9]))
    assert rolled_back.index.intact.tolist() == [False, True]


@pytest.mark.parametrize("kept_by_head", [False, True])
def test_rows_that_int32_cannot_number_are_read_too(monkeypatch, kept_by_head):
    """Of all layers, keys and values together; what is numbered is a layer's alone."""
    addressing = Paged(page_size=1 << 20, num_pages=1 << 9)
    if kept_by_head:
        addressing = KeptByHead(places=1 << 29, longest=4, new=4, num_layers=2, num_kv_heads=2)
    index = jax.eval_shape(lambda: addressing.init(1 << 29, None))
    huge = jax.ShapeDtypeStruct((2, 2, 1 << 29, 2, 1), jnp.int8)
    read = jax.eval_shape(lambda index, leaf: index.read(leaf, 1, 0, 8), index, huge)
    assert read.shape == (2, 8, 2, 1)
    leaf, rows = np.arange(2 * 2 * 6).reshape(2, 2, 6), np.array([[5, 0], [3, 3]])
    for most in (1, 24, 25):
        monkeypatch.setattr("jaxkv.addressing.rows._INT32", most)
        np.testing.assert_array_equal(read_rows(jnp.asarray(leaf), 1, rows), leaf[1][:, rows])


@addressings
def test_selected_rows_take_their_slots_along(addressing):
    index, leaf = index_of(addressing, 3), slot_numbers(addressing, 3)
    rows = np.array([2, 0, 2, 1], np.int32)
    selected, slots = index.select(jnp.asarray(rows))
    assert len(slots) == addressing.num_slots(CAPACITY, 4)
    before = np.asarray(index.read(leaf, 1, 0, index.extent))
    after = np.asarray(selected.read(leaf[:, :, slots], 1, 0, index.extent))
    np.testing.assert_array_equal(after, before[:, rows])
    assert selected.lengths.tolist() == LENGTHS[rows].tolist()
