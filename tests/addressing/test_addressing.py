"""The addressing contract, for every row of `ADDRESSINGS`: what is written is what is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.addressing import ADDRESSINGS

CAPACITY, LENGTHS = 6, np.array([4, 0, 6], np.int32)

addressings = pytest.mark.parametrize("addressing", ADDRESSINGS.values(), ids=ADDRESSINGS)
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
    assert (index.key_positions(index.lengths, 0, CAPACITY) == -1).all()


@addressings
@batches
def test_every_token_has_a_slot_of_its_own(addressing, batch_size):
    index = index_of(addressing, batch_size)
    positions = np.broadcast_to(np.arange(CAPACITY), (*index.lengths.shape, CAPACITY))
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
    positions = np.asarray(index.key_positions(index.lengths, 0, CAPACITY))
    read = np.asarray(index.read(leaf, 1, 0, CAPACITY))
    assert read.shape == (2, *index.lengths.shape, CAPACITY, 2, 1)
    written = np.asarray(index.slots(jnp.asarray(positions)))
    held = positions >= 0
    for part in read:  # keys, values
        np.testing.assert_array_equal(part[..., 0, 0][held], written[held])
    for row, length in zip(positions.reshape(-1, CAPACITY), np.ravel(index.lengths), strict=True):
        assert sorted(row[row >= 0]) == list(range(length))


@addressings
@batches
@pytest.mark.parametrize("start", [0, 1, 4])
def test_a_part_is_a_slice_of_the_whole(addressing, batch_size, start):
    index, leaf = index_of(addressing, batch_size), slot_numbers(addressing, batch_size)
    part = slice(start, start + 2)
    whole = index.read(leaf, 1, 0, CAPACITY)[..., part, :, :]
    traced = jax.jit(lambda start: index.read(leaf, 1, start, 2))(start)
    np.testing.assert_array_equal(traced, whole)
    positions = index.key_positions(index.lengths, 0, CAPACITY)[..., part]
    np.testing.assert_array_equal(index.key_positions(index.lengths, start, 2), positions)
