import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.errors import ConfigError
from jaxkv.models.rope import ROPE_TYPES, RopeConfig, rotate, rotation

# What each type needs, beside a head of 8 numbers.
NEEDED = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {"short_factor": (1.0,) * 4, "long_factor": (2.0,) * 4},
}


def rope(rope_type="default", **fields):
    return RopeConfig(8, rope_type=rope_type, **NEEDED[rope_type] | fields)


def test_every_type_is_here_and_in_the_goldens():
    assert NEEDED.keys() == ROPE_TYPES.keys()


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    generator = np.random.default_rng(0)
    query, key = generator.standard_normal((2, 1, 1, 8)).astype(np.float32)

    def score(query_position, key_position):
        positions = jnp.array([query_position, key_position])
        turned = rotate(jnp.concatenate([query, key]), rotation(rope(), positions, 64))
        np.testing.assert_allclose(jnp.linalg.norm(turned[1]), np.linalg.norm(key), rtol=1e-6)
        return float(jnp.vdot(turned[0], turned[1]))

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


def test_partial_rotation_turns_the_first_numbers_as_a_smaller_head():
    vectors = jnp.asarray(np.random.default_rng(0).standard_normal((5, 2, 8)), jnp.float32)
    positions = jnp.arange(5)
    partial = rotate(vectors, rotation(rope(partial_rotary_factor=0.5), positions, 5))
    whole = rotate(vectors[..., :4], rotation(RopeConfig(head_dim=4), positions, 5))
    np.testing.assert_array_equal(partial[..., :4], whole)
    np.testing.assert_array_equal(partial[..., 4:], vectors[..., 4:])


def test_dynamic_and_longrope_follow_the_context_and_no_other_does():
    for rope_type in ROPE_TYPES:
        config = rope(rope_type, max_position_embeddings=64)
        same = np.array_equal(config.frequencies(64), config.frequencies(65))
        assert same == (rope_type not in ("dynamic", "longrope")), rope_type
        np.testing.assert_array_equal(config.frequencies(8), config.frequencies(64))
        for context in (64, 65):
            fixed = config.for_context(context)
            for length in (1, 64, 100):
                np.testing.assert_array_equal(
                    fixed.frequencies(length), config.frequencies(context)
                )


def test_long_positions_keep_float32_precision_in_bfloat16():
    vectors = jnp.ones((1, 1, 8), jnp.bfloat16)
    positions = jnp.array([100_001])
    narrow = rotate(vectors, rotation(rope(), positions, 1))
    wide = rotate(vectors.astype(jnp.float32), rotation(rope(), positions, 1))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


def test_yarn_factor_defaults_to_the_ratio_of_contexts():
    config = rope("yarn", factor=0, max_position_embeddings=256)
    assert config.factor == 4.0
    assert config.vector_factor == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_written_config_reads_back(rope_type):
    config = rope(rope_type, theta=500.0, max_position_embeddings=128)
    assert RopeConfig.from_hf(config.to_hf(), 8) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "fancy"}, "rope type 'fancy' is not supported; known are default, linear"),
        ({"rope_type": "linear"}, "rope type linear: factor must be a positive number, got 0"),
        ({"rope_type": "linear", "factor": -1}, "factor must be a positive number, got -1"),
        ({"theta": "big"}, "theta must be a positive number, got 'big'"),
        ({"partial_rotary_factor": 0.4}, "must be even .* got 8 x 0.4"),
        ({"partial_rotary_factor": 2.0}, "at most head_dim, got 8 x 2.0"),
        (
            {"rope_type": "longrope", "short_factor": (1.0,), "long_factor": (1.0,) * 4},
            "short_factor must be 4 numbers, got 1",
        ),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        RopeConfig(8, **fields)


def test_config_is_hashable_and_frozen():
    assert hash(rope("longrope")) == hash(rope("longrope"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        rope().theta = 1.0
