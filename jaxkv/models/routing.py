"""Which experts a token takes, and with what weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxkv.counts import check_fields
from jaxkv.errors import ConfigError
from jaxkv.models.families import Routed

# What each expert contributes to each token: zero for most.
Shares = Float[Array, "*batch tokens experts"]

# How experts are chosen -> what makes scores of logits. The highest scores (`greedy`); those among
# the groups whose best expert is highest; with a learned bias, of groups whose best two are.
METHODS = {
    "greedy": "softmax",
    "greedy_sigmoid": "sigmoid",
    "group_limited_greedy": "softmax",
    "noaux_tc": "sigmoid",
}
_GROUPED = ("group_limited_greedy", "noaux_tc")


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts (Shazeer et al., 2017) in place of MLPs.

    Args:
      num_experts, experts_per_token: how many there are, and how many a token takes.
      intermediate_size: numbers in a token's vector inside one.
      shared_experts: experts that all tokens take (DeepSeekMoE, 2024), as one of their size.
      shared_size: numbers in a token's vector inside all of these together, if that is not so.
      shared_gate: what they give is multiplied by the sigmoid of a gate (Qwen3-Next).
      method: a name in `METHODS` (DeepSeek-V2, section 2.2; DeepSeek-V3, section 2.1.2).
      scores: that of the method, or None for it.
      normalized: a token's weights add up to one.
      scaling: what weights are multiplied by.
      num_groups, groups_per_token: experts in groups, of which a token sees some.
      first_layer, every, dense_layers: layers before the first, those but every n-th and the named
        ones have a plain MLP.
      layers: those that have experts, in place of all this; None where they are not named.
      weighs_inputs: weights multiply what an expert is given, not what it gives (Llama 4).

    Raises:
      ConfigError: a number that cannot be.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_experts: int = 0
    method: str = "greedy"
    scores: str | None = None
    normalized: bool = False
    scaling: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    first_layer: int = 0
    every: int = 1
    dense_layers: tuple[int, ...] = ()
    shared_size: int = 0
    shared_gate: bool = False
    layers: tuple[int, ...] | None = None
    weighs_inputs: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        counts = ("num_experts", "experts_per_token", "intermediate_size", "num_groups")
        check_fields(self, *counts, "groups_per_token", "every", error=ConfigError)
        if self.method not in METHODS:
            raise ConfigError(
                f"ExpertsConfig: method must be one of {', '.join(METHODS)}, got {self.method!r}."
            )
        if self.scores not in (None, METHODS[self.method]):
            raise ConfigError(
                f"ExpertsConfig: scores of {self.method} must be {METHODS[self.method]}, got "
                f"{self.scores!r}."
            )
        object.__setattr__(self, "scores", METHODS[self.method])
        seen = self.num_experts // self.num_groups * self.groups_per_token
        fits = self.experts_per_token <= seen and self.groups_per_token <= self.num_groups
        if self.num_experts % self.num_groups or not fits:
            raise ConfigError(
                f"ExpertsConfig: {self.experts_per_token} experts per token are not among "
                f"{self.groups_per_token} of {self.num_groups} groups of {self.num_experts} "
                "experts in all."
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], routed: Routed) -> "ExpertsConfig":
        """Read the fields of a ``config.json``.

        Raises:
          ConfigError: as the class does, or a field is missing.
        """
        given = {
            field: config[name]
            for name, field in routed.fields.items()
            if config.get(name) is not None
        }
        needed = {"num_experts", "experts_per_token", "intermediate_size"} - given.keys()
        if missing := [name for name, field in routed.fields.items() if field in needed]:
            raise ConfigError(f"{' or '.join(missing)} is missing.")
        return cls(**given | dict(routed.always))

    def to_hf(self, routed: Routed) -> dict[str, Any]:
        """The fields of a ``config.json``."""
        written = {name: getattr(self, field) for name, field in routed.fields.items()}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in written.items()
        }

    def is_in(self, layer: int) -> bool:
        """Whether a layer has experts."""
        if self.layers is not None:
            return layer in self.layers
        named = layer < self.first_layer or layer in self.dense_layers
        return not named and (layer + 1) % self.every == 0

    @property
    def is_corrected(self) -> bool:
        """Whether a learned bias enters what is chosen, and no weight."""
        return self.method == "noaux_tc"


def shares_of(
    config: ExpertsConfig,
    logits: Float[Array, "*batch tokens experts"],
    correction: Float[Array, " experts"] | None,
) -> Shares:
    """The weight of each expert for each token, float32.

    Args:
      logits: float32.
      correction: of the scores by which experts are chosen.
    """
    scores = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax}[METHODS[config.method]](logits)
    ranked = scores if correction is None else scores + correction
    if config.method in _GROUPED and config.num_groups > 1:
        ranked = jnp.where(_in_groups(config, ranked), ranked, -jnp.inf)
    _, chosen = lax.top_k(ranked, config.experts_per_token)
    taken = jax.nn.one_hot(chosen, config.num_experts, dtype=scores.dtype).sum(axis=-2)
    shares = scores * taken
    if config.normalized:
        shares /= shares.sum(axis=-1, keepdims=True) + 1e-20
    return shares * config.scaling


def _in_groups(config: ExpertsConfig, ranked: Array) -> Array:
    """Whether an expert is in one of the groups that its token sees."""
    groups = ranked.reshape(*ranked.shape[:-1], config.num_groups, -1)
    best = min(2 if config.is_corrected else 1, groups.shape[-1])
    highest = lax.top_k(groups, best)[0].sum(axis=-1)
    _, chosen = lax.top_k(highest, config.groups_per_token)
    seen = jax.nn.one_hot(chosen, config.num_groups, dtype=jnp.float32).sum(axis=-2) > 0
    return jnp.repeat(seen, groups.shape[-1], axis=-1)
