"""From logits to the next token, seeded so that a sequence does not depend on its batch."""

import dataclasses
import math
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxkv.programs import promotes_ranks

# Temperatures that float32 can multiply and divide by.
_COLDEST = float(np.finfo(np.float32).tiny)
_HOTTEST = 1 / _COLDEST


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The filters apply in the order of the arguments.

    Args:
      temperature: logits are divided by it; 0 is greedy, the most likely token.
      top_k: keep the k most likely tokens, and those as likely as the last; None keeps all.
      top_p: keep the fewest tokens whose probabilities sum to at least this (Holtzman et al.
        2020, "nucleus sampling"); 1 keeps all.
      min_p: keep tokens at least this share as likely as the most likely (Nguyen et al. 2024).

    Raises:
      TypeError: a value that is no number.
      ValueError: naming each value out of range.

    >>> import jaxkv
    >>> jaxkv.Sampling(temperature=0.8, top_p=0.95)
    Sampling(temperature=0.8, top_k=None, top_p=0.95, min_p=0.0)
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, Real) and not (name == "top_k" and value is None):
                raise TypeError(f"Sampling: {name} must be a number, got {value!r}.")
        problems = []
        if self.temperature != 0 and not _COLDEST <= self.temperature <= _HOTTEST:
            problems.append(
                f"temperature must be 0, or from {_COLDEST:.2g} to {_HOTTEST:.2g}, got "
                f"{self.temperature}"
            )
        if self.top_k is not None and (self.top_k < 1 or self.top_k % 1):
            problems.append(f"top_k must be an int of at least 1, or None, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            problems.append(f"min_p must be between 0 and 1, got {self.min_p}")
        if problems:
            raise ValueError("Sampling: " + "; ".join(problems) + ".")


class RowSampling(NamedTuple):
    """A `Sampling` of each row: arrays, so that others are no other program."""

    temperatures: Float[Array, " batch"]
    top_ks: Int[Array, " batch"]  # the vocabulary or more keeps all
    top_ps: Float[Array, " batch"]
    log_min_ps: Float[Array, " batch"]

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> "RowSampling":
        """On the device, whose programs take them."""
        most = np.iinfo(np.int32).max
        columns = (
            np.array([own.temperature for own in samplings], np.float32),
            np.array([min(own.top_k or most, most) for own in samplings], np.int32),
            np.array([own.top_p for own in samplings], np.float32),
            np.array([_log(own.min_p) for own in samplings], np.float32),
        )
        return cls(*jax.device_put(columns))


def repeated(sampling: Sampling | RowSampling, number: int) -> Sampling | RowSampling:
    """For rows that are repeated so often, each beside its own."""
    if isinstance(sampling, Sampling):
        return sampling
    return RowSampling(*(jnp.repeat(array, number) for array in sampling))


@promotes_ranks
def sample(
    logits: Float[Array, "batch vocabulary"],
    sampling: Sampling | RowSampling,
    *,
    seeds: Int[Array, " batch"],
    positions: Int[Array, " batch"],
) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
    """Draw one token per sequence.

    Args:
      logits: of the next token.
      sampling: how to draw.
      seeds: one per sequence.
      positions: of the token being drawn. The randomness of a draw is a function of its
        seed and position, so neither batch nor chunking changes a sequence.

    Returns:
      The tokens, and the log-probability of each under the model (before any filter). It is NaN
      where the logits are no distribution: one of them is NaN or infinity, or all are minus
      infinity. The token means nothing there.

    >>> import jax.numpy as jnp, jaxkv
    >>> one = jnp.zeros(1, jnp.int32)
    >>> token, logprob = jaxkv.sample(
    ...     jnp.array([[0.0, 9.0]]), jaxkv.Sampling(), seeds=one, positions=one
    ... )
    >>> token.tolist()
    [1]
    """
    logits = logits.astype(jnp.float32)
    if isinstance(sampling, RowSampling):
        tokens = _chosen_by_row(logits, sampling, seeds, positions)
    else:
        tokens = _chosen(logits, sampling, seeds, positions)
    tokens = tokens.astype(jnp.int32)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=-1)
    return tokens, logprobs[:, 0]


Logits = Float[Array, "batch vocabulary"]
Rows = Int[Array, " batch"]


def _chosen(logits: Logits, sampling: Sampling, seeds: Rows, positions: Rows) -> Rows:
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    scaled = _scaled(logits, sampling.temperature)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        scaled = _at_least(scaled, lax.top_k(scaled, sampling.top_k)[0][:, -1:])
    if sampling.top_p < 1:
        scaled = _at_least(scaled, _last_of_nucleus(-jnp.sort(-scaled, axis=-1), sampling.top_p))
    if sampling.min_p > 0:
        scaled = _at_least(scaled, scaled.max(axis=-1, keepdims=True) + _log(sampling.min_p))
    return jnp.argmax(scaled + _noise(logits, seeds, positions), axis=-1)


def _chosen_by_row(logits: Logits, rows: RowSampling, seeds: Rows, positions: Rows) -> Rows:
    """The same tokens; what no row asks for is not computed."""
    greedy = jnp.argmax(logits, axis=-1)
    draws = rows.temperatures > 0
    temperatures, top_ps, log_min_ps = (
        array[:, None]
        for array in (jnp.where(draws, rows.temperatures, 1), rows.top_ps, rows.log_min_ps)
    )
    is_cut = rows.top_ks[:, None] < logits.shape[-1]

    def filtered(scaled: Logits) -> Logits:
        descending = -jnp.sort(-scaled, axis=-1)
        last = jnp.clip(rows.top_ks - 1, 0, logits.shape[-1] - 1)[:, None]
        lowest = jnp.take_along_axis(descending, last, axis=-1)
        descending, scaled = (
            jnp.where(is_cut, _at_least(each, lowest), each) for each in (descending, scaled)
        )
        nucleus = _at_least(scaled, _last_of_nucleus(descending, top_ps))
        return jnp.where(top_ps < 1, nucleus, scaled)

    def drawn() -> Rows:
        scaled = _scaled(logits, temperatures)
        sorts: Bool[Array, ""] = (draws[:, None] & (is_cut | (top_ps < 1))).any()
        scaled = lax.cond(sorts, filtered, lambda same: same, scaled)
        scaled = _at_least(scaled, scaled.max(axis=-1, keepdims=True) + log_min_ps)
        tokens = jnp.argmax(scaled + _noise(logits, seeds, positions), axis=-1)
        return jnp.where(draws, tokens, greedy)

    return lax.cond(draws.any(), drawn, lambda: greedy)


def _scaled(logits: Logits, temperature: float | Float[Array, "batch 1"]) -> Logits:
    """Less the highest first, or a low temperature makes it infinite."""
    return (logits - logits.max(axis=-1, keepdims=True)) / temperature


def _at_least(logits: Logits, lowest: Float[Array, "batch 1"]) -> Logits:
    """Minus infinity for those below."""
    return jnp.where(logits < lowest, -jnp.inf, logits)


def _last_of_nucleus(
    descending: Logits, top_p: float | Float[Array, "batch 1"]
) -> Float[Array, "batch 1"]:
    """The least likely token that stays, as the most likely one always does."""
    probabilities = jax.nn.softmax(descending)
    # A token stays while the tokens before it have not reached top_p yet.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.where(before < top_p, descending, descending[:, :1])
    return kept.min(axis=-1, keepdims=True)


def _noise(logits: Logits, seeds: Rows, positions: Rows) -> Logits:
    def of_row(seed: Int[Array, ""], position: Int[Array, ""]) -> Float[Array, " vocabulary"]:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    return jax.vmap(of_row)(seeds, positions)


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf
