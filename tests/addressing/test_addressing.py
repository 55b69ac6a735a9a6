"""The addressing contract, for every row of `ADDRESSINGS`: what is written is what is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv.addressing import ADDRESSINGS
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


STEPS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), max_size=8)


@settings(max_examples=60, deadline=None)
@given(addressing=st.sampled_from(list(SMALL.values())), steps=STEPS)
def test_appends_and_rollbacks_keep_what_can_be_seen(addressing, steps):
    """A dictionary of slots beside the index: no slot is ever said to hold what it does not."""
    index, contents = addressing.init(20, None), {}
    for appended, rolled_back in steps:
        length = int(index.lengths)
        positions = np.arange(length, min(length + appended, 20), dtype=np.int32)
        contents |= dict(zip(np.asarray(index.slots(positions)).tolist(), positions, strict=True))
        index = index.with_lengths(jnp.int32(length + len(positions)))
        shorter = index.with_lengths(jnp.maximum(index.lengths - rolled_back, 0))
        index = shorter if np.all(shorter.intact) else index
        held = np.asarray(index.key_positions(0, index.lengths, 0, index.extent))
        slots = np.asarray(index.slots(jnp.arange(20, dtype=jnp.int32)))
        for position in held[held >= 0]:
            assert contents[int(slots[position])] == position
        assert set(held[held >= 0]) >= visible_positions(index, int(index.lengths))


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
