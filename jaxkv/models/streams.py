"""Several streams in place of one, and inputs per layer, as a ``config.json`` says."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxkv.counts import check_fields
from jaxkv.errors import ConfigError

# Name in a config.json -> name here.
HF_FIELDS = {
    "altup_num_inputs": "count",
    "altup_active_idx": "active",
    "altup_correct_scale": "scales_output",
    "laurel_rank": "laurel_rank",
    "hidden_size_per_layer_input": "layer_size",
    "vocab_size_per_layer_input": "layer_vocab_size",
}


@dataclasses.dataclass(frozen=True)
class StreamsConfig:
    """Alternating updates (Baykal et al., 2023), with inputs per layer (Gemma 3n, 2025).

    Args:
      count: streams, each as wide as the model.
      active: the one that layers read; the others are guessed from it.
      scales_output: what a layer made of it is scaled before its own input is added to the others.
      laurel_rank: of the product beside each layer's attention (LAuReL, Menghani et al., 2024).
      layer_size: numbers of a token's own input to each layer.
      layer_vocab_size: token ids that have such inputs.

    Raises:
      ConfigError: a number that cannot be.

    >>> StreamsConfig(laurel_rank=64, layer_size=256, layer_vocab_size=262_144).count
    4
    """

    laurel_rank: int
    layer_size: int
    layer_vocab_size: int
    count: int = 4
    active: int = 0
    scales_output: bool = True

    def __post_init__(self) -> None:
        numbers = ("laurel_rank", "layer_size", "layer_vocab_size", "count")
        check_fields(self, *numbers, error=ConfigError)
        check_fields(self, "active", least=0, error=ConfigError)
        if self.active >= self.count:
            raise ConfigError(
                f"StreamsConfig: active must be one of {self.count} streams, got {self.active}."
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "StreamsConfig":
        """Read the fields of a ``config.json``, and of its family's defaults."""
        return cls(**{field: config[name] for name, field in HF_FIELDS.items()})

    def to_hf(self) -> dict[str, Any]:
        """The fields of a ``config.json``."""
        return {name: getattr(self, field) for name, field in HF_FIELDS.items()}
