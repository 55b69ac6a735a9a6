"""The two compiled programs of a generation: prefill one chunk, decode a few tokens.

Both take the cache donated. Their shapes depend on the batch and the context alone, so any mix
of prompt lengths compiles each once.
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
from jaxtyping import Array, Int

from jaxkv.attention.observed import observed
from jaxkv.cache.axes import Spread
from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.shards import everywhere
from jaxkv.cache.verbs import padded_after
from jaxkv.counts import ceil_div
from jaxkv.devices import platform_of
from jaxkv.drafts.draft import HiddenStateDraft
from jaxkv.serve.model_step import Model, ModelStep, Weights
from jaxkv.serve.sampling import Sampling, sample

# ``(tokens [batch, chunk], num_tokens [batch])``, padded on the right. For a draft that takes
# prompts too there is one token more, that after the chunk.
Chunk = tuple[np.ndarray, np.ndarray]

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


@functools.partial(ModelStep, donated=[2])
def _prefill(
    model: Model,
    tokens: Int[Array, "batch chunk"],
    num_tokens: Int[Array, " batch"],
    cache: AnyCache,
    *,
    observe: bool,
    draft: HiddenStateDraft | None = None,
) -> tuple[AnyCache, Array, Any]:
    """Take one chunk of every prompt, without its padding.

    Args:
      draft: takes it too, and then ``tokens`` has one more, that after the chunk.

    Returns:
      The cache, the lengths once more, to wait for while the next step has the cache, and the
      chunk's queries if they are to be observed.
    """
    cache, queries = padded_after(cache, num_tokens), None
    if draft is not None:
        model = draft.filling(model)
    if observe:
        _, cache, queries = observed(model)(tokens, cache)
    else:
        _, cache = model(tokens, cache)
    cache = padded_after(cache, None)
    return cache, cache.lengths, queries


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
        step, (last, remaining, seeds), cache, new = carry
        active = remaining > 0
        # A finished sequence goes through the model with the others, as padding.
        cache = padded_after(cache, active.astype(jnp.int32))
        logits, cache = model(last[:, None], cache)
        cache = padded_after(cache, None)
        token, logprob = sample(logits[:, -1], sampling, seeds=seeds, positions=cache.lengths)
        failed = jnp.isnan(logprob)
        stopped = failed | jnp.isin(token, jnp.asarray(stop_tokens, jnp.int32))
        remaining = jnp.where(active & ~stopped, remaining - 1, 0)
        found = jnp.where(failed, NOT_A_NUMBER, token)
        new = New(
            new.tokens.at[step].set(jnp.where(active, found, -1)),
            new.logprobs.at[step].set(logprob),
        )
        return step + 1, State(jnp.where(active, token, last), remaining, seeds), cache, new

    def some_steps(carry: Any) -> Any:
        return lax.fori_loop(0, at_once, lambda _, carry: one_step(carry), carry)

    shape = (num_steps, len(state.last))
    new = New(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))
    begun = (0, state, cache, new)
    # A GPU's loop holds the thread that calls it until it ends, and one step needs none.
    steps = (
        one_step if num_steps == 1 else functools.partial(lax.while_loop, unfinished, some_steps)
    )
    _, state, cache, new = steps(begun)
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
        observe: bool = False,
        draft: Any = None,
        on: Spread | None = None,
    ) -> "Program":
        """With the model's arrays where the cache is going to be.

        Args:
          num_steps: of decode between two looks of the host.
          most_steps: of decode at all, if that is known.
          observe: does prefill give the prompts' queries?
          draft: who guesses, and may take the prompts too.
          on: the mesh.
        """
        weights = Weights.of(model) if on is None else Weights.of(model).spread_over(on.mesh)
        stops = tuple(int(token) for token in stop_tokens)
        num_steps = 1 if most_steps == 1 else num_steps
        at_once = _steps_at_once(weights, num_steps, most_steps or num_steps)
        takes_prompts = draft if isinstance(draft, HiddenStateDraft) else None
        return cls(weights, sampling, stops, num_steps, at_once, observe, takes_prompts)

    @property
    def returns_at_once(self) -> bool:
        """Whether a dispatch of decode is only begun when it returns."""
        return self.num_steps == 1

    # Compiled first, so that timings of the steps do not include XLA's.
    def compile_prefill(self, chunks: list[Chunk], cache: AnyCache) -> None:
        if chunks:
            options = {"observe": self.observe, "draft": self.draft}
            _prefill.compilation(self.weights, *chunks[0], cache, **options)()

    def compile_decode(self, state: State, cache: AnyCache) -> None:
        _decode.compilation(self.weights, state, cache, **self._options())()

    def prefill(self, chunk: Chunk, cache: AnyCache) -> tuple[AnyCache, Array, Any]:
        options = {"observe": self.observe, "draft": self.draft}
        return _prefill(self.weights, *jax.device_put(chunk), cache, **options)

    def decode(self, state: State, cache: AnyCache) -> tuple[State, AnyCache, New]:
        return _decode(self.weights, state, cache, **self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "sampling": self.sampling,
            "stop_tokens": self.stop_tokens,
            "num_steps": self.num_steps,
            "at_once": self.at_once,
        }


def _steps_at_once(weights: Weights, num_steps: int, most_steps: int) -> int:
    """One where a step is the slower part, or where fewer are wanted than a dispatch has."""
    if platform_of(*weights.arrays) != "gpu" or most_steps < num_steps:
        return 1
    return math.gcd(num_steps, _STEPS_AT_ONCE)
