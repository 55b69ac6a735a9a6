"""From logits to the next token, seeded so that a sequence does not depend on its batch."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

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


@promotes_ranks
def sample(
    logits: Float[Array, "batch vocabulary"],
    sampling: Sampling,
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
    if sampling.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], jnp.float32))
        # Less the highest first, or a low temperature makes it infinite.
        scaled = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
        kept = _filtered(scaled, sampling)
        tokens = jnp.argmax(kept + noise(keys(seeds, positions)), axis=-1)
    tokens = tokens.astype(jnp.int32)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=-1)
    return tokens, logprobs[:, 0]


def _filtered(
    logits: Float[Array, "batch vocabulary"], sampling: Sampling
) -> Float[Array, "batch vocabulary"]:
    """Minus infinity where a filter forbids the token. The most likely one always stays."""
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        lowest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if sampling.top_p < 1:
        descending = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(descending)
        # A token stays while the tokens before it have not reached top_p yet.
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.where(before < sampling.top_p, descending, descending[:, :1])
        logits = jnp.where(logits < kept.min(axis=-1, keepdims=True), -jnp.inf, logits)
    if sampling.min_p > 0:
        lowest = logits.max(axis=-1, keepdims=True) + math.log(sampling.min_p)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return logits
