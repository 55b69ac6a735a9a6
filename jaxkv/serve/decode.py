"""The two compiled programs of a generation: prefill one chunk, decode a few tokens.

Prefill finds the first tokens of answers too, where a model gives logits of one place alone; else
decode begins with the last token of each prompt. Both take the cache donated. Their shapes depend
on the batch and the context alone, so any mix of prompt lengths compiles each once.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxkv.attention.observed import observed
from jaxkv.cache.axes import Spread
from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.shards import everywhere
from jaxkv.cache.verbs import padded_after
from jaxkv.counts import ceil_div
from jaxkv.devices import platform_of
from jaxkv.drafts.draft import HiddenStateDraft
from jaxkv.serve.model_step import GivesNextLogits, Model, ModelStep, Weights
from jaxkv.serve.sampling import Sampling, sample

# Tokens of a prompt that one prefill step takes on a CPU, where so few are bound by arithmetic.
PREFILL_CHUNK = 128
# An accelerator reads a weight in the time in which it multiplies it with 150 to 400 rows (an H200:
# 990 TFLOP/s over 4.8 TB/s), and a step reads them all.
_ROWS_TO_READ = 256
_MOST_ROWS = 16384  # of all prompts in a step, whose activations are held at once
# Decode steps that run on the device before the host sees their tokens.
TOKENS_PER_DISPATCH = 16
# On a GPU the host waits for a loop's condition at each iteration, but not for one that counts: so
# the condition is looked at once for so many steps. Those after the end find nothing.
_STEPS_AT_ONCE = 4
# What stands for a token where the model's logits are no distribution; the sequence ends there.
NOT_A_NUMBER = -2


def prefill_chunk(longest: int, batch: int, platform: str) -> int:
    """Tokens of each prompt that a prefill step takes, a power of two, to compute the least.

    Args:
      longest: tokens of the longest prompt; all are padded to whole chunks of it.
      batch: prompts.
    """
    if platform == "cpu":
        return PREFILL_CHUNK
    sizes = [PREFILL_CHUNK]
    while 2 * sizes[-1] * batch <= _MOST_ROWS:
        sizes.append(2 * sizes[-1])
    return min(sizes, key=lambda size: ceil_div(longest, size) * (size * batch + _ROWS_TO_READ))


class Chunk(NamedTuple):
    """Some tokens of every prompt.

    Attributes:
      tokens: ``[batch, chunk]``, padded on the right. For a draft that takes prompts too there is
        one token more, that after the chunk.
      num_tokens: ``[batch]``, how many of the chunk are real.
      ends: ``[batch]``, whether the last of them is the prompt's last.
    """

    tokens: np.ndarray
    num_tokens: np.ndarray
    ends: np.ndarray


class State(NamedTuple):
    """Where each sequence stands between dispatches of decode; all ``[batch]`` int32."""

    last: Array  # token, whose successor is next
    remaining: Array  # tokens that may still come; 0 when done
    seeds: Array


class New(NamedTuple):
    """What a dispatch of decode found, ``[steps, batch]``; tokens are -1 after the end."""

    tokens: Array
    logprobs: Array
    guessed: Array | None = None  # with a draft, which tokens it had guessed

    def guesses_of(self, row: int) -> list[bool]:
        """Which of a sequence's tokens a draft had guessed."""
        found = self.tokens[:, row] >= 0
        if self.guessed is None:
            return [False] * int(found.sum())
        guesses: list[bool] = self.guessed[found, row].tolist()
        return guesses

    def of(self, row: int) -> tuple[list[int], list[float], bool]:
        """The tokens of a sequence and their log-probabilities; did its logits fail after them?"""
        tokens, logprobs = self.tokens[:, row], self.logprobs[:, row]
        found = tokens >= 0
        failed = bool((tokens == NOT_A_NUMBER).any())
        return tokens[found].tolist(), logprobs[found].tolist(), failed


class Prefilled(NamedTuple):
    """What a chunk of prefill gives beside the cache.

    Attributes:
      lengths: the cache's once more, to wait for while the next step has the cache.
      queries: of the chunk, if they are observed.
      new: first tokens of answers, of a model that gives `next_logits`.
    """

    lengths: Array
    queries: Any = None
    new: New | None = None


@functools.partial(ModelStep, donated=[0, 2])
def _prefill(
    model: Any,
    state: Any,
    chunk: Chunk,
    cache: AnyCache,
    *,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
    draws: bool,
    observe: bool,
    draft: HiddenStateDraft | None,
) -> tuple[Any, AnyCache, Prefilled]:
    """Take one chunk of every prompt, without its padding.

    Args:
      draws: whether answers begin here, where their prompts end.
      observe: whether the chunk's queries are given.
      draft: takes it too, and then ``tokens`` has one more, that after the chunk.
    """
    tokens, num_tokens, ends = map(jnp.asarray, chunk)
    cache, queries = padded_after(cache, num_tokens), None
    if draws:
        logits, cache = model.next_logits(tokens, cache, num_tokens=num_tokens)
        cache = padded_after(cache, None)
        state, found = _drawn(state, logits, ends, cache, sampling, stop_tokens)
        state, new = everywhere(cache, (state, New(*(each[None] for each in found))))
        return state, cache, Prefilled(cache.lengths, new=new)
    if draft is not None:
        model = draft.filling(model)
    if observe:
        _, cache, queries = observed(model)(tokens, cache)
    else:
        _, cache = model(tokens, cache)
    cache = padded_after(cache, None)
    return state, cache, Prefilled(cache.lengths, queries)


def _drawn(
    state: State,
    logits: Float[Array, "batch vocab"],
    wanted: Bool[Array, " batch"],
    cache: AnyCache,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
) -> tuple[State, tuple[Array, Array]]:
    """Draw the next token of those sequences that want one, and have any remaining.

    Returns:
      Where each stands then, and its token and log-probability; -1 for one without.
    """
    last, remaining, seeds = state
    active = wanted & (remaining > 0)
    token, logprob = sample(logits, sampling, seeds=seeds, positions=cache.lengths)
    failed = jnp.isnan(logprob)
    stopped = failed | jnp.isin(token, jnp.asarray(stop_tokens, jnp.int32))
    left = jnp.where(stopped, 0, remaining - 1)
    found = jnp.where(failed, NOT_A_NUMBER, token)
    state = State(jnp.where(active, token, last), jnp.where(active, left, remaining), seeds)
    return state, (jnp.where(active, found, -1), logprob)


@functools.partial(ModelStep, donated=[0, 1], few_rows=True)
def _decode(
    model: Model,
    state: State,
    cache: AnyCache,
    *,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
    num_steps: int,
    at_once: int,
) -> tuple[State, AnyCache, New]:
    """Up to ``num_steps`` tokens of each sequence that has any remaining."""

    def unfinished(carry: Any) -> Any:
        step, state, *_ = carry
        return (step < num_steps) & (state.remaining > 0).any()

    def one_step(carry: Any) -> Any:
        step, state, cache, new = carry
        active = state.remaining > 0
        # A finished sequence goes through the model with the others, as padding.
        cache = padded_after(cache, active.astype(jnp.int32))
        logits, cache = model(state.last[:, None], cache)
        cache = padded_after(cache, None)
        state, (token, logprob) = _drawn(state, logits[:, -1], active, cache, sampling, stop_tokens)
        new = New(new.tokens.at[step].set(token), new.logprobs.at[step].set(logprob))
        return step + 1, state, cache, new

    def some_steps(carry: Any) -> Any:
        return lax.fori_loop(0, at_once, lambda _, carry: one_step(carry), carry)

    shape = (num_steps, len(state.last))
    new = New(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))
    begun = (0, state, cache, new)
    _, state, cache, new = lax.while_loop(unfinished, some_steps, begun)
    state, new = everywhere(cache, (state, new))
    return state, cache, new


@dataclasses.dataclass(frozen=True)
class Program:
    """The two compiled functions of a generation, with what stays the same over it."""

    weights: Weights
    sampling: Sampling
    stop_tokens: tuple[int, ...]
    num_steps: int
    at_once: int
    draws: bool  # in prefill
    observe: bool
    draft: HiddenStateDraft | None = None

    @classmethod
    def of(
        cls,
        model: Model,
        sampling: Sampling,
        stop_tokens: Sequence[int],
        *,
        num_steps: int = TOKENS_PER_DISPATCH,
        most_steps: int | None = None,
        draws: bool = True,
        observe: bool = False,
        draft: Any = None,
        on: Spread | None = None,
    ) -> "Program":
        """With the model's arrays where the cache is going to be.

        Args:
          num_steps: of decode between two looks of the host.
          most_steps: of decode at all, if that is known.
          draws: may answers begin in prefill, over all of their prompts?
          observe: does prefill give the prompts' queries?
          draft: who guesses, and may take the prompts too.
          on: the mesh.
        """
        weights = Weights.of(model) if on is None else Weights.of(model).spread_over(on.mesh)
        stops = tuple(int(token) for token in stop_tokens)
        num_steps = 1 if most_steps == 1 else num_steps
        at_once = _steps_at_once(weights, num_steps, most_steps or num_steps)
        takes_prompts = draft if isinstance(draft, HiddenStateDraft) else None
        draws = draws and draft is None and isinstance(model, GivesNextLogits)
        return cls(weights, sampling, stops, num_steps, at_once, draws, observe, takes_prompts)

    # Compiled first, so that timings of the steps do not include XLA's.
    def compile_prefill(self, state: Any, chunks: list[Chunk], cache: AnyCache) -> None:
        if chunks:
            _prefill.compilation(self.weights, state, chunks[0], cache, **self._of_prefill())()

    def compile_decode(self, state: State, cache: AnyCache) -> None:
        _decode.compilation(self.weights, state, cache, **self._of_decode())()

    def prefill(self, state: Any, chunk: Chunk, cache: AnyCache) -> tuple[Any, AnyCache, Prefilled]:
        given = jax.device_put(chunk)
        return _prefill(self.weights, state, given, cache, **self._of_prefill())

    def decode(self, state: State, cache: AnyCache) -> tuple[State, AnyCache, New]:
        return _decode(self.weights, state, cache, **self._of_decode())

    def _of_prefill(self) -> dict[str, Any]:
        own = {"draws": self.draws, "observe": self.observe, "draft": self.draft}
        return own | {"sampling": self.sampling, "stop_tokens": self.stop_tokens}

    def _of_decode(self) -> dict[str, Any]:
        own = {"num_steps": self.num_steps, "at_once": self.at_once}
        return own | {"sampling": self.sampling, "stop_tokens": self.stop_tokens}


def _steps_at_once(weights: Weights, num_steps: int, most_steps: int) -> int:
    """One where a step is the slower part, or where fewer are wanted than a dispatch has."""
    if platform_of(*weights.arrays) != "gpu" or most_steps < num_steps:
        return 1
    return math.gcd(num_steps, _STEPS_AT_ONCE)
