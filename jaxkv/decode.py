"""The two compiled programs of a generation: prefill one chunk, decode a few tokens.

Both take the cache donated. Their shapes depend on the batch and the context alone, so any mix
of prompt lengths compiles each once.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jaxkv.cache import truncate
from jaxkv.hybrid import AnyCache
from jaxkv.sampling import Sampling, sample

# ``model(tokens [batch, tokens], cache) -> (logits [batch, tokens, vocabulary], cache)``
Model = Callable[[Array, AnyCache], tuple[Array, AnyCache]]
# ``(tokens [batch, chunk], num_tokens [batch])``, padded on the right.
Chunk = tuple[np.ndarray, np.ndarray]

# Tokens of a prompt that one prefill step takes on a CPU, where so few are bound by arithmetic.
PREFILL_CHUNK = 128
# An accelerator reads a weight in the time in which it multiplies it with 150 to 400 rows (an H200:
# 990 TFLOP/s over 4.8 TB/s), and a step reads them all.
_ROWS_TO_READ = 256
_MOST_ROWS = 16384  # of all prompts in a step, whose activations are held at once
# Decode steps that run on the device before the host sees their tokens.
TOKENS_PER_DISPATCH = 16


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
    return min(sizes, key=lambda size: -(-longest // size) * (size * batch + _ROWS_TO_READ))


@dataclasses.dataclass(frozen=True)
class Structure:
    """What jit compares of a model: its treedef, or the function itself where it has no arrays."""

    static: Any

    @classmethod
    def split(cls, model: Model) -> tuple["Structure", list[Array]]:
        leaves, treedef = jax.tree.flatten(model)
        is_function = jax.tree_util.treedef_is_leaf(treedef)
        return (cls(model), []) if is_function else (cls(treedef), leaves)

    def __call__(
        self, leaves: list[Array], tokens: Array, cache: AnyCache
    ) -> tuple[Array, AnyCache]:
        model = self.static.unflatten(leaves) if leaves else self.static
        return model(tokens, cache)


class State(NamedTuple):
    """Where each sequence stands between dispatches of decode; all ``[batch]`` int32."""

    last: Array  # token, whose successor is next
    remaining: Array  # tokens that may still come; 0 when done
    seeds: Array


class New(NamedTuple):
    """What a dispatch of decode found, ``[steps, batch]``; tokens are -1 after the end."""

    tokens: Array
    logprobs: Array


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _prefill(
    model: Structure,
    leaves: list[Array],
    tokens: Int[Array, "batch chunk"],
    num_tokens: Int[Array, " batch"],
    cache: AnyCache,
) -> tuple[AnyCache, Array]:
    """Take one chunk of every prompt. Padding is appended too, then rolled back.

    Returns:
      The cache, and the lengths once more, to wait for while the next step has the cache.
    """
    _, appended = model(leaves, tokens, cache)
    lengths = cache.lengths + num_tokens
    return truncate(appended, lengths), lengths


@functools.partial(
    jax.jit,
    static_argnames=("model", "sampling", "stop_tokens", "num_steps"),
    donate_argnames=("state", "cache"),
)
def _decode(
    model: Structure,
    leaves: list[Array],
    state: State,
    cache: AnyCache,
    *,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
    num_steps: int,
) -> tuple[State, AnyCache, New]:
    """Up to ``num_steps`` tokens of each sequence that has any remaining."""

    def unfinished(carry):
        step, state, *_ = carry
        return (step < num_steps) & (state.remaining > 0).any()

    def one_step(carry):
        step, (last, remaining, seeds), cache, new = carry
        active = remaining > 0
        logits, appended = model(leaves, last[:, None], cache)
        # A finished sequence goes through the model with the others, and is rolled back.
        cache = truncate(appended, cache.lengths + active.astype(jnp.int32))
        token, logprob = sample(logits[:, -1], sampling, seeds=seeds, positions=cache.lengths)
        stopped = jnp.isin(token, jnp.asarray(stop_tokens, jnp.int32))
        remaining = jnp.where(active & ~stopped, remaining - 1, 0)
        new = New(
            new.tokens.at[step].set(jnp.where(active, token, -1)),
            new.logprobs.at[step].set(logprob),
        )
        return step + 1, State(jnp.where(active, token, last), remaining, seeds), cache, new

    shape = (num_steps, len(state.last))
    new = New(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))
    _, state, cache, new = lax.while_loop(unfinished, one_step, (0, state, cache, new))
    return state, cache, new


@dataclasses.dataclass(frozen=True)
class Program:
    """The two compiled functions of a generation, with what stays the same over it."""

    model: Structure
    leaves: list[Array]
    sampling: Sampling
    stop_tokens: tuple[int, ...]

    @classmethod
    def of(cls, model: Model, sampling: Sampling, stop_tokens: Sequence[int]) -> "Program":
        return cls(*Structure.split(model), sampling, tuple(int(token) for token in stop_tokens))

    def compile(self, chunks: list[Chunk], state: State, cache: AnyCache) -> None:
        """So that the timings of the steps are not those of XLA."""
        if chunks:
            _prefill.lower(self.model, self.leaves, *chunks[0], cache).compile()
        _decode.lower(self.model, self.leaves, state, cache, **self._options()).compile()

    def prefill(self, chunk: Chunk, cache: AnyCache) -> tuple[AnyCache, Array]:
        return _prefill(self.model, self.leaves, *jax.device_put(chunk), cache)

    def decode(self, state: State, cache: AnyCache) -> tuple[State, AnyCache, New]:
        return _decode(self.model, self.leaves, state, cache, **self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "sampling": self.sampling,
            "stop_tokens": self.stop_tokens,
            "num_steps": TOKENS_PER_DISPATCH,
        }
