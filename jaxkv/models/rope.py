"""Rotary position embedding (Su et al., RoFormer, 2021) and the scalings of Llama and Qwen configs.

Every scaling is a choice of frequencies, and for some a factor on the rotated vectors.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxkv.errors import ConfigError

# The fields of a config.json that `RopeConfig.from_hf` reads.
HF_FIELDS = (
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
    *("max_position_embeddings", "original_max_position_embeddings"),
)


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
    rotations = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = np.clip((rotations - low) / (high - low), 0, 1)
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


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """The rope of a model, as `DecoderConfig.rope` holds it.

    Args:
      head_dim: numbers in a query or key vector.
      theta: base of the geometric series of wavelengths.
      rope_type: one of `ROPE_TYPES`; the other fields are read as it needs them, and mean what
        they mean in a Hugging Face config. 0 stands for one that is not given.
      max_position_embeddings: the context that the model is made for, in tokens.
      original_max_position_embeddings: the context before it was extended, in tokens.

    Raises:
      ConfigError: an unknown type, or a field that it needs and that is absent or not positive.

    >>> RopeConfig(head_dim=4, theta=100.0).frequencies(context=8).tolist()
    [1.0, 0.10000000149011612]
    """

    head_dim: int
    theta: float = 10000.0
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0
    max_position_embeddings: int = 2048
    original_max_position_embeddings: int = 0
    factor: float = 0.0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ConfigError(
                f"rope type {self.rope_type!r} is not supported; known are {', '.join(ROPE_TYPES)}."
            )
        if not self.original_max_position_embeddings:
            object.__setattr__(
                self, "original_max_position_embeddings", self.max_position_embeddings
            )
        if not self.factor and self.rope_type in ("yarn", "longrope"):
            stretch = self.max_position_embeddings / self.original_max_position_embeddings
            object.__setattr__(self, "factor", stretch)
        if self.rotary_dim < 2 or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ConfigError(
                f"rope rotates pairs of numbers: head_dim x partial_rotary_factor must be even and "
                f"at most head_dim, got {self.head_dim} x {self.partial_rotary_factor}."
            )
        for field in ("theta", *ROPE_TYPES[self.rope_type].needs):
            self._check_field(field)

    def _check_field(self, field: str) -> None:
        value = getattr(self, field)
        if field.endswith("_factor") and isinstance(value, tuple):
            if len(value) != self.rotary_dim // 2:
                raise ConfigError(
                    f"rope type {self.rope_type}: {field} must be {self.rotary_dim // 2} numbers, "
                    f"got {len(value)}."
                )
        elif not isinstance(value, int | float) or value <= 0:
            raise ConfigError(
                f"rope type {self.rope_type}: {field} must be a positive number, got {value!r}."
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], head_dim: int) -> "RopeConfig":
        """Read ``rope_theta`` and ``rope_scaling``, or the newer ``rope_parameters``.

        Raises:
          ConfigError: as the class does.

        Warns:
          UserWarning: a parameter of the scaling that no rope type here reads.
        """
        scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        scaling.setdefault("rope_type", scaling.get("type", "default"))
        scaling.setdefault("rope_theta", config.get("rope_theta"))
        # These stand beside the scaling in most configs, and win over what it says itself.
        for name in ("max_position_embeddings", "original_max_position_embeddings"):
            scaling[name] = config.get(name) or scaling.get(name)
        scaling.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
        scaling["theta"] = scaling.pop("rope_theta")
        scaling.pop("type", None)
        fields = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(name for name in scaling.keys() - fields if scaling[name] is not None)
        if unknown:
            warnings.warn(
                f"config.json: no rope type here reads {', '.join(unknown)}. If that changes how "
                "the model rotates its keys, its logits are wrong here.",
                stacklevel=4,
            )
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in scaling.items()
            if name in fields and value is not None
        }
        return cls(**given | {"head_dim": head_dim})

    def to_hf(self) -> dict[str, Any]:
        """The part of a ``config.json`` that `from_hf` reads as this."""
        beside = {
            "rope_theta": self.theta,
            "partial_rotary_factor": self.partial_rotary_factor,
            "max_position_embeddings": self.max_position_embeddings,
        }
        return beside | ({"rope_scaling": scaling} if (scaling := self._scaling()) else {})

    def parameters(self) -> dict[str, Any]:
        """The same as newer files write it, an entry of ``rope_parameters`` a kind of layer."""
        beside = {"rope_theta": self.theta, "partial_rotary_factor": self.partial_rotary_factor}
        return {"rope_type": self.rope_type} | beside | self._scaling()

    def _scaling(self) -> dict[str, Any]:
        if self.rope_type == "default":
            return {}
        elsewhere = ("head_dim", "theta", "partial_rotary_factor", "max_position_embeddings")
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in elsewhere and getattr(self, field.name) != field.default
        }

    @property
    def rotary_dim(self) -> int:
        """How many of a head's numbers are rotated; the rest pass."""
        return int(self.head_dim * self.partial_rotary_factor)

    def frequencies(self, context: int) -> Frequencies:
        """Radians a position, for each pair of numbers.

        Args:
          context: tokens of the text. Only the types ``dynamic`` and ``longrope`` depend on it.
        """
        return ROPE_TYPES[self.rope_type].frequencies(self, context).astype(np.float32)

    def for_context(self, context: int) -> "RopeConfig":
        """The rope that has the frequencies of a text of this length for texts of any length."""
        return dataclasses.replace(self, **ROPE_TYPES[self.rope_type].fixed(self, context))

    @property
    def unscaled(self) -> "RopeConfig":
        """The plain rope of the same base."""
        return RopeConfig(
            self.head_dim,
            self.theta,
            partial_rotary_factor=self.partial_rotary_factor,
            max_position_embeddings=self.max_position_embeddings,
        )

    @property
    def vector_factor(self) -> float:
        """What rotated vectors are multiplied with; the yarn and longrope papers' temperature."""
        stretch = self.factor
        if self.rope_type not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor or stretch <= 1:
            return self.attention_factor or 1.0
        if self.rope_type == "longrope":
            original = math.log(self.original_max_position_embeddings)
            return math.sqrt(1 + math.log(stretch) / original)
        if self.mscale and self.mscale_all_dim:
            return temperature(stretch, self.mscale) / temperature(stretch, self.mscale_all_dim)
        return temperature(stretch, 1.0)


def check_room(ropes: Iterable[RopeConfig | None], max_context_length: int) -> None:
    """Refuse room for texts that have another rope than shorter ones.

    Keys are cached as they were rotated: how a text's are must not depend on room that it does not
    use, and those of its beginning cannot be rotated anew once it has grown.

    Raises:
      ValueError: it says what to do.
    """
    for rope in set(ropes) - {None}:
        assert rope is not None
        if np.array_equal(rope.frequencies(1), rope.frequencies(max_context_length)):
            continue
        trained = getattr(rope, ROPE_TYPES[rope.rope_type].trained or "")
        raise ValueError(
            f"rope type {rope.rope_type}: texts of more than {trained} tokens have other "
            f"frequencies than shorter ones, and max_context_length is {max_context_length}. Give "
            f"at most {trained}, or one rope to all texts: model.for_context({max_context_length}) "
            f"or model.for_context({trained})."
        )


def rotation(
    rope: RopeConfig, positions: Int[Array, "*batch tokens"], context: int
) -> Float[Array, "2 *batch tokens 1 pairs"]:
    """Cosines and sines of the angles of these positions, float32, for `rotate`.

    >>> import jax.numpy as jnp
    >>> rotation(RopeConfig(head_dim=4), jnp.arange(3), context=3).shape
    (2, 3, 1, 2)
    """
    angles = positions[..., None, None].astype(jnp.float32) * rope.frequencies(context)
    both = jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * rope.vector_factor
    return lax.optimization_barrier(both)  # or each layer's kernels would compute them again


def unpaired(
    vectors: Float[Array, "*batch tokens heads head_dim"],
    rotation: Float[Array, "2 *batch tokens 1 pairs"],
) -> Float[Array, "*batch tokens heads head_dim"]:
    """What a rope of neighbours rotates, in halves for `rotate`: first numbers of all pairs first.

    Queries and keys are both in this order, so that no score is another.
    """
    rotated, rest = jnp.split(vectors, [2 * rotation.shape[-1]], axis=-1)
    return jnp.concatenate([rotated[..., ::2], rotated[..., 1::2], rest], axis=-1)


def rotate(
    vectors: Float[Array, "*batch tokens heads head_dim"],
    rotation: Float[Array, "2 *batch tokens 1 pairs"],
) -> Float[Array, "*batch tokens heads head_dim"]:
    """Rotate number i of the first half of each vector with number i of the second.

    With a partial rotation the halves are those of the first ``2 * pairs`` numbers. Computed
    in float32.
    """
    cos, sin = rotation
    pairs = cos.shape[-1]
    first, second, rest = jnp.split(vectors, [pairs, 2 * pairs], axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([part.astype(vectors.dtype) for part in (*rotated, rest)], axis=-1)
