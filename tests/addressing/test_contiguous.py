"""Contiguous addressing: sequence b from slot b * max_context_length on."""

import jax.numpy as jnp

import jaxkv


def test_slots_of_a_single_sequence():
    index = jaxkv.Contiguous().init(5, None)
    assert index.slots(jnp.array([-1, 0, 4, 5])).tolist() == [-1, 0, 4, -1]


def test_slots_of_a_batch():
    index = jaxkv.Contiguous().init(5, 2)
    positions = jnp.array([[0, 4], [5, 1]])
    assert index.slots(positions).tolist() == [[0, 4], [-1, 6]]


def test_key_positions_stop_at_each_length():
    index = jaxkv.Contiguous().init(5, 2)
    assert index.key_positions(0, jnp.array([2, 9]), 1, 3).tolist() == [[1, -1, -1], [1, 2, 3]]
