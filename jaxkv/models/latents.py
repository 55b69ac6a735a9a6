"""The shape of multi-head latent attention, as a ``config.json`` has it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxkv.counts import check_fields
from jaxkv.errors import ConfigError
from jaxkv.models.shape import Shape

# Name in a config.json -> name here.
HF_FIELDS = {
    "kv_lora_rank": "rank",
    "qk_rope_head_dim": "rope_dim",
    "qk_nope_head_dim": "plain_dim",
    "v_head_dim": "value_dim",
    "q_lora_rank": "query_rank",
    "rope_interleave": "interleaved",
}


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Latents in place of keys and values (DeepSeek-V2, 2024, section 2.1).

    Args:
      rank: numbers in a token's latent, from which keys and values of all heads are made.
      rope_dim: numbers beside it that the rope rotates, one vector for all heads.
      plain_dim: numbers of a head's query that meet the latent.
      value_dim: numbers in a head's value.
      query_rank: numbers that queries are made from; None for the token's vector itself.
      interleaved: the rope rotates neighbours together, not halves.

    Raises:
      ConfigError: a number that is none.

    >>> LatentConfig(rank=512, rope_dim=64, plain_dim=128, value_dim=128).head_dim
    192
    """

    rank: int
    rope_dim: int
    plain_dim: int
    value_dim: int
    query_rank: int | None = None
    interleaved: bool = True

    def __post_init__(self) -> None:
        numbers = ["rank", "rope_dim", "plain_dim", "value_dim"]
        numbers += ["query_rank"] * (self.query_rank is not None)
        check_fields(self, *numbers, error=ConfigError)

    @property
    def head_dim(self) -> int:
        """Numbers in a head's query, and in the key that it meets."""
        return self.plain_dim + self.rope_dim

    def shape(self, num_layers: int) -> Shape:
        """Of the cache."""
        return Shape.latent(num_layers, self.rank, self.rope_dim)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LatentConfig":
        """Read the fields of a ``config.json``.

        Raises:
          ConfigError: one is missing.
        """
        given = {field: config[name] for name, field in HF_FIELDS.items() if name in config}
        if missing := {"rank", "rope_dim", "plain_dim", "value_dim"} - given.keys():
            names = [name for name, field in HF_FIELDS.items() if field in missing]
            raise ConfigError(f"{', '.join(names)} is missing.")
        return cls(**given)

    def to_hf(self) -> dict[str, Any]:
        """The fields of a ``config.json``."""
        return {name: getattr(self, field) for name, field in HF_FIELDS.items()}
