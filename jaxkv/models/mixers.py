"""What layers that keep a state are made of, as a ``config.json`` has it; and what they keep."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from jaxkv.counts import check_fields
from jaxkv.errors import ConfigError
from jaxkv.models.shape import Kept


@dataclasses.dataclass(frozen=True)
class MixerConfig(abc.ABC):
    """Layers that mix tokens by a state and not by attention. The fields are whole numbers.

    Attributes:
      hf_fields: name in a ``config.json`` -> field here.
      hf_unused: further fields of a ``config.json`` that change nothing.
    """

    hf_fields: ClassVar[Mapping[str, str]]
    hf_unused: ClassVar[tuple[str, ...]] = ()

    @property
    @abc.abstractmethod
    def kept(self) -> tuple[Kept, ...]:
        """The arrays that a layer keeps of each sequence."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Read the fields of a ``config.json``.

        Raises:
          ConfigError: one is missing, or cannot be.
        """
        given = {field: config[name] for name, field in cls.hf_fields.items() if name in config}
        needed = {
            field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING
        }
        if missing := needed - given.keys():
            names = [name for name, field in cls.hf_fields.items() if field in missing]
            raise ConfigError(f"{', '.join(names)} is missing.")
        return cls(**given)

    def to_hf(self) -> dict[str, Any]:
        """The fields of a ``config.json``."""
        return {name: getattr(self, field) for name, field in self.hf_fields.items()}


@dataclasses.dataclass(frozen=True)
class ShortConvConfig(MixerConfig):
    """A gated convolution over the newest tokens (LFM2, Liquid AI, 2025).

    Args:
      channels: numbers in a token's vector.
      width: tokens that it sees, the query itself included.
      bias: of the convolution and of the projections.

    >>> ShortConvConfig(channels=2048, width=3).kept
    (Kept(name='conv', shape=(2, 2048), dtype=None, by_head=False),)
    """

    channels: int
    width: int
    bias: bool = False

    hf_fields = {"hidden_size": "channels", "conv_L_cache": "width", "conv_bias": "bias"}  # noqa: RUF012

    def __post_init__(self) -> None:
        check_fields(self, "channels", "width", error=ConfigError)

    @property
    def kept(self) -> tuple[Kept, ...]:
        return _conv(self.width, self.channels)


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(MixerConfig):
    """A gated delta net (Yang et al., 2025, "Gated Delta Networks", section 3), as Qwen3-Next's.

    Args:
      num_key_heads, num_value_heads: heads of queries and keys, and of values.
      key_dim, value_dim: numbers in a vector of each.
      width: tokens that the convolution before it sees.

    >>> DeltaNetConfig(16, 32, 128, 128, 4).kept[1]
    Kept(name='recurrent', shape=(32, 128, 128), dtype='float32', by_head=True)
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    width: int

    hf_fields = {  # noqa: RUF012
        "linear_num_key_heads": "num_key_heads",
        "linear_num_value_heads": "num_value_heads",
        "linear_key_head_dim": "key_dim",
        "linear_value_head_dim": "value_dim",
        "linear_conv_kernel_dim": "width",
    }

    def __post_init__(self) -> None:
        numbers = (field.name for field in dataclasses.fields(self))
        check_fields(self, *numbers, error=ConfigError)
        if self.num_value_heads % self.num_key_heads:
            raise ConfigError(
                "DeltaNetConfig: num_value_heads must be a multiple of num_key_heads, got "
                f"{self.num_value_heads} and {self.num_key_heads}."
            )

    @property
    def keys(self) -> int:
        """Numbers in the keys of all heads."""
        return self.num_key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Numbers in the values of all heads."""
        return self.num_value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return 2 * self.keys + self.values

    @property
    def kept(self) -> tuple[Kept, ...]:
        recurrent = (self.num_value_heads, self.key_dim, self.value_dim)
        return (
            *_conv(self.width, self.channels),
            Kept("recurrent", recurrent, "float32", by_head=True),
        )


@dataclasses.dataclass(frozen=True)
class MambaConfig(MixerConfig):
    """A Mamba-2 layer (Dao and Gu, 2024, "Transformers are SSMs", section 7).

    Args:
      num_heads, head_dim: of what is mixed.
      state_size: numbers that each of a head's is kept as.
      num_groups: of heads that share what is written and read by ("B" and "C").
      width: tokens that the convolution before it sees.
      conv_bias, bias: of the convolution, and of the projections.
      step_limits: least and largest step of time ("dt").

    >>> MambaConfig(128, 64, 128, 1, 4).kept[0]
    Kept(name='conv', shape=(3, 8448), dtype=None, by_head=False)
    """

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    width: int
    conv_bias: bool = True
    bias: bool = False
    step_limits: tuple[float, float] = (0.0, float("inf"))

    hf_fields = {  # noqa: RUF012
        "mamba_n_heads": "num_heads",
        "mamba_d_head": "head_dim",
        "mamba_d_state": "state_size",
        "mamba_n_groups": "num_groups",
        "mamba_d_conv": "width",
        "mamba_conv_bias": "conv_bias",
        "mamba_proj_bias": "bias",
        "time_step_limit": "step_limits",
    }
    hf_unused = ("mamba_expand", "mamba_chunk_size", "time_step_min", "time_step_max")

    def __post_init__(self) -> None:
        numbers = ("num_heads", "head_dim", "state_size", "num_groups", "width")
        check_fields(self, *numbers, error=ConfigError)
        least, largest = self.step_limits
        object.__setattr__(self, "step_limits", (float(least), float(largest)))
        if self.num_heads % self.num_groups:
            raise ConfigError(
                "MambaConfig: num_heads must be a multiple of num_groups, got "
                f"{self.num_heads} and {self.num_groups}."
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """With heads as wide as ``mamba_expand`` times the stream, divided among them, make it."""
        inner = config["mamba_expand"] * config["hidden_size"]
        heads, head_dim = config["mamba_n_heads"], config["mamba_d_head"]
        head_dim = inner // heads if head_dim == "auto" else head_dim
        if head_dim * heads != inner:
            raise ConfigError(
                f"mamba_n_heads x mamba_d_head must be mamba_expand x hidden_size = {inner}, got "
                f"{heads} x {head_dim}."
            )
        return super().from_hf({**config, "mamba_d_head": head_dim})

    @property
    def inner(self) -> int:
        """Numbers in what is mixed, of all heads."""
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of the convolution: what is mixed, and what it is written and read by."""
        return self.inner + 2 * self.num_groups * self.state_size

    @property
    def kept(self) -> tuple[Kept, ...]:
        recurrent = (self.num_heads, self.state_size, self.head_dim)
        return (
            *_conv(self.width, self.channels),
            Kept("recurrent", recurrent, "float32", by_head=True),
        )


def _conv(width: int, channels: int) -> tuple[Kept, ...]:
    """A convolution keeps its newest inputs, all but the one that a step brings."""
    return (Kept("conv", (width - 1, channels)),) if width > 1 else ()
