"""The frequencies of each rope type: what a position turns each pair of numbers by."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from jaxkv.models.rope import RopeConfig

Frequencies = Float[np.ndarray, " pairs"]


def _default(rope: "RopeConfig", context: int) -> Frequencies:
    return _geometric(rope, rope.theta)


def _linear(rope: "RopeConfig", context: int) -> Frequencies:
    """Position interpolation (Chen et al., 2023)."""
    return _geometric(rope, rope.theta) / rope.factor


def _dynamic(rope: "RopeConfig", context: int) -> Frequencies:
    """NTK-aware scaling: the base grows with the text once that is beyond the trained context."""
    return _geometric(rope, _stretched_theta(rope, context))


def _stretched_theta(rope: "RopeConfig", context: int) -> float:
    stretch = rope.factor * max(context, rope.max_position_embeddings)
    ratio = stretch / rope.max_position_embeddings - (rope.factor - 1)
    return rope.theta * ratio ** (rope.rotary_dim / (rope.rotary_dim - 2))


def _llama3(rope: "RopeConfig", context: int) -> Frequencies:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between mixed."""
    frequencies = _geometric(rope, rope.theta)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


def _yarn(rope: "RopeConfig", context: int) -> Frequencies:
    """YaRN (Peng et al., 2023): a ramp over pairs between kept and stretched frequencies."""
    frequencies, dim = _geometric(rope, rope.theta), rope.rotary_dim

    def pair_that_turns(times: float) -> float:
        wavelengths = rope.original_max_position_embeddings / (times * 2 * math.pi)
        return dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    stretched = np.clip((np.arange(dim // 2) - first) / (last - first), 0, 1)
    return frequencies / rope.factor * stretched + frequencies * (1 - stretched)


def _longrope(rope: "RopeConfig", context: int) -> Frequencies:
    """LongRoPE (Ding et al., 2024): a searched divisor a pair; one set for short texts."""
    return _geometric(rope, rope.theta) / np.asarray(_divisors(rope, context))


def _divisors(rope: "RopeConfig", context: int) -> tuple[float, ...]:
    is_long = context > rope.original_max_position_embeddings
    return rope.long_factor if is_long else rope.short_factor


def _geometric(rope: "RopeConfig", theta: float) -> Frequencies:
    return theta ** -(np.arange(0, rope.rotary_dim, 2) / rope.rotary_dim)


def temperature(stretch: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(stretch) + 1.0


class RopeType(NamedTuple):
    """A row.

    Attributes:
      frequencies: of a text of so many tokens.
      needs: the fields that it cannot do without.
      trained: the field that says up to how many tokens they are the same; None: always.
      fixed: the fields of a rope that has, for texts of any length, those of so many tokens.
    """

    frequencies: Callable[["RopeConfig", int], Frequencies]
    needs: tuple[str, ...] = ()
    trained: str | None = None
    fixed: Callable[["RopeConfig", int], dict[str, Any]] = lambda rope, context: {}


ROPE_TYPES: dict[str, RopeType] = {
    "default": RopeType(_default),
    "linear": RopeType(_linear, ("factor",)),
    "dynamic": RopeType(
        _dynamic,
        ("factor", "max_position_embeddings"),
        trained="max_position_embeddings",
        fixed=lambda rope, context: {
            "rope_type": "default",
            "theta": _stretched_theta(rope, context),
            "factor": 0.0,
        },
    ),
    "llama3": RopeType(
        _llama3,
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    ),
    "yarn": RopeType(
        _yarn, ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings")
    ),
    "longrope": RopeType(
        _longrope,
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        trained="original_max_position_embeddings",
        fixed=lambda rope, context: dict.fromkeys(
            ("short_factor", "long_factor"), _divisors(rope, context)
        ),
    ),
}
