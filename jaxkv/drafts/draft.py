"""What a draft is: a guess of the next tokens, from those so far."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkv.cache.hybrid import AnyCache

Tokens = Int[Array, "batch room"]
Lengths = Int[Array, " batch"]
Guesses = Int[Array, "batch k"]

# A guess that is none.
NO_GUESS = -1


@runtime_checkable
class Draft(Protocol):
    """Who guesses, for `jaxkv.generate` and `jaxkv.Engine` to check (Leviathan et al., 2023).

    A model takes all guesses in one step, and those are kept that it draws itself. So a draft
    decides how long an answer takes, and nothing of what it says. One of your own is a class with
    this method, which is traced under jit. Make it a frozen dataclass, so that equal ones share a
    program, and a pytree (`jax.tree_util.register_dataclass`) if it has arrays.

    >>> import dataclasses, jax, jax.numpy as jnp, jaxkv
    >>> @dataclasses.dataclass(frozen=True)
    ... class CountsOn:
    ...     def propose(self, tokens, lengths, k):
    ...         last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)
    ...         return last + 1 + jnp.arange(k, dtype=jnp.int32)
    >>> def count_up(tokens, cache):  # a "model" that answers token + 1
    ...     return jax.nn.one_hot(tokens + 1, 16), jaxkv.advance(cache, tokens.shape[-1])
    >>> config = jaxkv.KVCacheConfig(1, 16, 1, 4, batch_size=1)
    >>> result = jaxkv.generate(
    ...     count_up, [[3, 4]], max_new_tokens=8, config=config, draft=CountsOn(), num_guesses=3
    ... )
    >>> result.tokens, result.speculation.steps
    ([[5, 6, 7, 8, 9, 10, 11, 12]], 3)
    """

    def propose(self, tokens: Tokens, lengths: Lengths, k: int) -> Guesses:
        """Guess the next ``k`` tokens of each sequence.

        Args:
          tokens: of each sequence so far, int32; anything after them.
          lengths: how many those are; 0 for a row without a sequence, whose guesses mean nothing.

        Returns:
          int32. -1 where there is no guess; those after it in the row are not looked at.
        """
        ...


@runtime_checkable
class StatefulDraft(Protocol):
    """A draft that remembers: a pytree goes from each call to the next, donated.

    A row may be given another sequence, and tokens may be taken back, without a word.
    """

    def state(self, batch_size: int, max_context_length: int) -> Any:
        """What it remembers of ``batch_size`` empty sequences."""
        ...

    def propose_from(
        self, state: Any, tokens: Tokens, lengths: Lengths, k: int
    ) -> tuple[Guesses, Any]:
        """As `Draft.propose`, and what it remembers now."""
        ...


@runtime_checkable
class HiddenStateDraft(Protocol):
    """A draft that goes on from hidden states of the model that it is of, and in its cache.

    It takes every token that the model takes, with the token after it, and keeps what it needs in
    a layer more of the cache. So pages, prefixes and files have that, and rows may be given other
    sequences without a word. A frozen dataclass without arrays: these are the model's, which has
    `hidden` and `logits` as `jaxkv.drafts.mtp.PredictsAhead` says.
    """

    def check_model(self, who: str, model: Any) -> None:
        """Refuse a model that does not give what the draft goes on from.

        Raises:
          ConfigError: naming it.
        """
        ...

    def begin(self, model: Any, batch_size: int) -> Any:
        """What it remembers of sequences of which it took no token."""
        ...

    def filling(self, model: Any) -> Callable[[Array, AnyCache], tuple[Any, AnyCache]]:
        """A model of prompts that takes one token more than goes into the cache, for the draft."""
        ...

    def follow(
        self,
        model: Any,
        remembered: Any,
        hidden: Float[Array, "batch tokens hidden"],
        tokens: Int[Array, "batch tokens"],
        cache: AnyCache,
        count: Lengths,
    ) -> tuple[Any, AnyCache]:
        """Take what a step of the model has found, and say what is remembered now.

        Args:
          hidden: of the step's tokens, of which the first ``count`` are the newest of the cache.
          tokens: the ones after each.
        """
        ...

    def propose_in(
        self, model: Any, remembered: Any, cache: AnyCache, k: int, wanted: Int[Array, ""]
    ) -> tuple[Guesses, AnyCache]:
        """As `Draft.propose`, and the cache with the lengths that it has.

        Args:
          wanted: so many of the ``k`` guesses are looked at.
        """
        ...


AnyDraft = Draft | StatefulDraft | HiddenStateDraft


def state_of(draft: AnyDraft, model: Any, batch_size: int, max_context_length: int) -> Any:
    """What a draft remembers before its first guess; an empty tuple for one that does not."""
    if isinstance(draft, HiddenStateDraft):
        return draft.begin(model, batch_size)
    if isinstance(draft, StatefulDraft):
        return draft.state(batch_size, max_context_length)
    return ()


def proposed(
    draft: Draft | StatefulDraft, state: Any, tokens: Tokens, lengths: Lengths, k: int
) -> tuple[Guesses, Any]:
    """The guesses, and what the draft remembers now.

    Raises:
      ValueError: they are not ``[batch, k]`` whole numbers.
    """
    if isinstance(draft, StatefulDraft):
        guesses, state = draft.propose_from(state, tokens, lengths, k)
    else:
        guesses = draft.propose(tokens, lengths, k)
    expected = (len(lengths), k)
    if guesses.shape != expected or not jnp.issubdtype(guesses.dtype, jnp.integer):
        raise ValueError(
            f"{type(draft).__name__} must propose int32 [batch, k] = {list(expected)}, got "
            f"{guesses.dtype} {list(guesses.shape)}."
        )
    return guesses.astype(jnp.int32), state
