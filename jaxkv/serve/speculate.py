"""Decode with a draft: a step checks several guesses, and keeps those that it draws itself.

A draw is a function of seed and position (`sample`), so what is kept is what plain decode says,
token for token.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxkv.cache.axes import Spread
from jaxkv.cache.hybrid import AnyCache, AnyConfig
from jaxkv.cache.shards import everywhere
from jaxkv.cache.verbs import padded_after, truncate
from jaxkv.counts import check_count
from jaxkv.drafts.draft import NO_GUESS, AnyDraft, HiddenStateDraft, proposed, state_of
from jaxkv.errors import ConfigError
from jaxkv.serve.decode import NOT_A_NUMBER, Chunk, New, Prefilled, Program, State
from jaxkv.serve.model_step import Model, ModelStep, Weights, spread_over
from jaxkv.serve.sampling import RowSampling, Sampling, repeated, sample

# With the last token a step of 8, as many as the native kernel reads for.
NUM_GUESSES = 7
# Guesses are checked on credit, in steps of one token: a check costs what it takes longer than such
# a step (measured on a CPU), and earns the tokens that it brings. Without income a step in so many
# goes into checks, which is all that a text may lose in which nothing is guessed.
_COST_OF_A_GUESS = 0.25
_STEPS_PER_CREDIT = 64
_MOST_CREDIT = 4.0


class Pace(NamedTuple):
    """How many guesses the next step may check.

    Attributes:
      credit: for checks; none is made below 0.
      wide: whether it checks all, or half of them: did as many come true the last time?
    """

    credit: Float[Array, ""]
    wide: Bool[Array, ""]

    @classmethod
    def begin(cls) -> "Pace":
        return cls(*jax.device_put((np.float32(1), np.bool_(False))))


class Speculating(NamedTuple):
    """Where a generation with a draft stands between dispatches.

    Attributes:
      state: of its sequences.
      text: tokens of each so far, ``cache.lengths + 1`` of them.
      pace: of checks.
      draft: what the draft remembers.
      steps: of each sequence so far, those that checked guesses and others.
      num_guesses: that were checked so far.
    """

    state: State
    text: Int[Array, "batch room"]
    pace: Pace
    draft: Any
    steps: Int[Array, " batch"]
    num_guesses: Int[Array, " batch"]

    @classmethod
    def begin(cls, state: State, text: Array, pace: Pace, remembered: Any) -> "Speculating":
        zeros = np.zeros(len(text), np.int32)
        return cls(state, text, pace, remembered, *jax.device_put((zeros, zeros.copy())))

    @property
    def remaining(self) -> Array:
        return self.state.remaining


class Checked(NamedTuple):
    """What a step drew at each place, ``[batch, 1 + guesses]``, and how many of them count."""

    tokens: Array
    logprobs: Array
    num_new: Int[Array, " batch"]  # tokens of the answer
    num_checked: Int[Array, " batch"]  # guesses that were taken
    num_right: Int[Array, " batch"]  # of them

    def at_places(self, number: Int[Array, " batch"]) -> Bool[Array, "batch places"]:
        """Is a place among the first ``number`` of its row?"""
        return jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None] < number[:, None]


def check(
    model: Model,
    cache: AnyCache,
    last: Int[Array, " batch"],
    guesses: Int[Array, "batch guesses"],
    most: Int[Array, " batch"],
    seeds: Int[Array, " batch"],
    stop_tokens: Int[Array, "#batch stops"],
    known: Int[Array, "batch places"],
    sampling: Sampling | RowSampling,
    draft: AnyDraft,
) -> tuple[AnyCache, Checked, Array | None]:
    """Take the last token of each sequence and its guesses; the cache keeps what is the answer's.

    Args:
      guesses: right or wrong; from the first `NO_GUESS` of a row on they are padding.
      most: tokens that a sequence may be given, none where it is 0.
      stop_tokens: nothing comes after one of them, nor after logits that are no distribution.
      known: tokens that stand for the draws at their places; -1 where a draw counts.

    Returns:
      Last, the model's hidden states, for a draft that reads them.
    """
    batch, width = len(last), 1 + guesses.shape[1]
    is_guess = jnp.cumprod(guesses >= 0, axis=1, dtype=jnp.int32)
    real = jnp.minimum(1 + is_guess.sum(1, dtype=jnp.int32), most)
    taken = jnp.concatenate([last[:, None], jnp.maximum(guesses, 0)], axis=1)
    lengths = cache.lengths
    logits, hidden, cache = _stepped(model, draft, taken, padded_after(cache, real))
    cache = padded_after(cache, None)
    positions = lengths[:, None] + 1 + jnp.arange(width, dtype=jnp.int32)[None]
    tokens, logprobs = sample(
        logits.reshape(batch * width, -1),
        repeated(sampling, width),
        seeds=jnp.repeat(seeds, width),
        positions=positions.reshape(-1),
    )
    tokens, logprobs = tokens.reshape(batch, width), logprobs.reshape(batch, width)
    tokens = jnp.where(known >= 0, known, tokens)
    failed = jnp.isnan(logprobs)
    ends = failed | (tokens[:, :, None] == stop_tokens[:, None]).any(-1)
    right = (tokens[:, :-1] == guesses) & ~ends[:, :-1]
    num_right = jnp.cumprod(right, axis=1, dtype=jnp.int32).sum(1, dtype=jnp.int32)
    num_checked = jnp.maximum(real - 1, 0)
    num_right = jnp.minimum(num_right, num_checked)
    count = jnp.minimum(1 + num_right, real)
    tokens = jnp.where(failed, NOT_A_NUMBER, tokens)
    cache = truncate(cache, lengths + count)
    return cache, Checked(tokens, logprobs, count, num_checked, num_right), hidden


def _stepped(
    model: Any, draft: AnyDraft, tokens: Array, cache: AnyCache
) -> tuple[Array, Array | None, AnyCache]:
    """Logits, hidden states if the draft reads them, and the cache."""
    if isinstance(draft, HiddenStateDraft):
        hidden, cache = model.hidden(tokens, cache)
        return model.logits(hidden), hidden, cache
    logits, cache = model(tokens, cache)
    return logits, None, cache


def ended(checked: Checked, stop_tokens: Int[Array, "#batch stops"]) -> Bool[Array, " batch"]:
    """Is the last token that a step gave a sequence the last of all?"""
    last = jnp.take_along_axis(checked.tokens, jnp.maximum(checked.num_new[:, None] - 1, 0), axis=1)
    return (last[:, 0] == NOT_A_NUMBER) | (last == stop_tokens).any(-1)


def when(wanted: Bool[Array, ""], function: Callable[[Any], Any], value: Any) -> Any:
    """``function(value)`` if it is wanted, else the value; in place, as loops are."""
    once = lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.zeros_like(wanted), function(carry[1])),
        (wanted, value),
    )
    return once[1]


def _guessed(
    model: Any, draft: AnyDraft, now: Speculating, cache: AnyCache, k: int
) -> tuple[Array, Speculating, AnyCache]:
    """Guesses, if there is credit for checks, and what they have changed."""
    none = jnp.full((len(now.text), k), NO_GUESS, jnp.int32)
    if isinstance(draft, HiddenStateDraft):
        wanted = jnp.where(now.pace.wide, k, half_of(k))

        def propose_in(value: Any) -> Any:
            return draft.propose_in(model, now.draft, value[1], k, wanted)

        guesses, cache = when(now.pace.credit >= 0, propose_in, (none, cache))
        return guesses, now, cache
    lengths = cache.lengths + 1

    def propose(value: Any) -> Any:
        return proposed(draft, value[1], now.text, lengths, k)

    guesses, remembered = when(now.pace.credit >= 0, propose, (none, now.draft))
    return guesses, now._replace(draft=remembered), cache


def half_of(num_guesses: int) -> int:
    """As many guesses as a step checks until these come true."""
    return max(1, num_guesses // 2)


def decode(
    model: Any,
    speculating: Speculating,
    guesser: AnyDraft,
    cache: AnyCache,
    stops: Int[Array, "#batch stops"],
    known: Int[Array, "batch tokens"],
    *,
    num_guesses: int,
    sampling: Sampling | RowSampling,
    num_steps: int,
) -> tuple[Speculating, AnyCache, New]:
    """Up to ``num_steps`` steps of each sequence that has any tokens remaining.

    Args:
      known: the next tokens of each sequence, as far as they are; -1 where they are not.
    """
    width, room = 1 + num_guesses, speculating.text.shape[1]
    half = half_of(num_guesses)
    rows = jnp.arange(len(speculating.text), dtype=jnp.int32)[:, None]
    begin = cache.lengths
    known = jnp.pad(known, ((0, 0), (0, width)), constant_values=-1)

    def known_next(cache: AnyCache) -> Array:
        places = (cache.lengths - begin)[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
        return jnp.take_along_axis(known, places, axis=1, mode="fill", fill_value=-1)

    def unfinished(carry: Any) -> Any:
        step, now, *_ = carry
        return (step < num_steps) & (now.remaining > 0).any()

    def take(step: Array, guesses: Array, number: int, value: Any) -> Any:
        """A step that checks the first ``number`` guesses."""
        now, cache, new = value
        (last, remaining, seeds), lengths = now.state, cache.lengths
        guesses, forced = guesses[:, :number], known_next(cache)[:, : 1 + number]
        cache, checked, hidden = check(
            model, cache, last, guesses, remaining, seeds, stops, forced, sampling, guesser
        )
        remembered = now.draft
        if isinstance(guesser, HiddenStateDraft) and hidden is not None:
            following = jnp.maximum(checked.tokens, 0)
            remembered, cache = guesser.follow(
                model, remembered, hidden, following, cache, checked.num_new
            )
        done = ended(checked, stops) | (remaining == 0)
        is_new = checked.at_places(checked.num_new)
        at = lengths[:, None] + 1 + jnp.arange(1 + number, dtype=jnp.int32)[None]
        text = now.text.at[rows, jnp.where(is_new, at, room)].set(checked.tokens, mode="drop")
        newest = jnp.take_along_axis(text, jnp.minimum(cache.lengths, room - 1)[:, None], axis=1)
        state = State(newest[:, 0], jnp.where(done, 0, remaining - checked.num_new), seeds)
        places = slice(0, 1 + number)
        new = New(
            new.tokens.at[step, places].set(jnp.where(is_new, checked.tokens, -1).T),
            new.logprobs.at[step, places].set(checked.logprobs.T),
            new.guessed.at[step, places].set(checked.at_places(checked.num_right).T),
        )
        active = remaining > 0
        earned = jnp.where(active, checked.num_new - 1, 0).sum() / jnp.maximum(active.sum(), 1)
        earned = earned.astype(jnp.float32)
        spent = number * _COST_OF_A_GUESS if number else -1 / _STEPS_PER_CREDIT
        credit = jnp.minimum(now.pace.credit + earned - spent, _MOST_CREDIT)
        now = now._replace(
            state=state,
            text=text,
            pace=Pace(credit, earned >= half if number else now.pace.wide),
            draft=remembered,
            steps=now.steps + active.astype(jnp.int32),
            num_guesses=now.num_guesses + checked.num_checked,
        )
        return now, cache, new

    def one_step(carry: Any) -> Any:
        step, now, cache, new = carry
        guesses, now, cache = _guessed(model, guesser, now, cache, num_guesses)
        sure = known_next(cache)[:, :num_guesses]
        guesses = jnp.where(sure >= 0, sure, guesses)
        guesses = jnp.where(now.remaining[:, None] > 1, guesses, NO_GUESS)
        checks = (guesses[:, 0] >= 0).any()
        value = now, cache, new
        wide = now.pace.wide
        cases = {0: ~checks, half: checks & ~wide, num_guesses: checks & wide}
        if half == num_guesses:
            cases[half] = checks
        for number, wanted in cases.items():
            value = when(wanted, functools.partial(take, step, guesses, number), value)
        return step + 1, *value

    shape = num_steps, width, len(rows)
    new = New(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool))
    _, now, cache, new = lax.while_loop(
        unfinished, one_step, (jnp.int32(0), speculating, cache, new)
    )
    new = jax.tree.map(lambda array: array.reshape(-1, len(rows)), new)
    now, new = everywhere(cache, (now, new))
    return now, cache, new


@functools.partial(ModelStep, donated=[0, 2], few_rows=True)
def _decode(
    model: Model,
    speculating: Speculating,
    arrays: Sequence[Array],
    cache: AnyCache,
    *,
    draft: "Static",
    num_guesses: int,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
    num_steps: int,
) -> tuple[Speculating, AnyCache, New]:
    stops = jnp.asarray(stop_tokens, jnp.int32)[None]
    none_known = jnp.zeros((len(speculating.text), 0), jnp.int32)
    return decode(
        model,
        speculating,
        draft.whole(arrays),
        cache,
        stops,
        none_known,
        num_guesses=num_guesses,
        sampling=sampling,
        num_steps=num_steps,
    )


@dataclasses.dataclass(frozen=True)
class Static:
    """A draft without its arrays."""

    treedef: Any
    others: tuple[Any, ...]  # leaves that are no arrays, None for those that are

    @classmethod
    def of(cls, draft: AnyDraft) -> "tuple[Static, list[Any]]":
        """And the arrays."""
        leaves, treedef = jax.tree.flatten(draft)
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array | np.ndarray)]
        others = [None if isinstance(leaf, jax.Array | np.ndarray) else leaf for leaf in leaves]
        return cls(treedef, tuple(others)), arrays

    def whole(self, arrays: Sequence[Array]) -> Any:
        rest = iter(arrays)
        leaves = [next(rest) if leaf is None else leaf for leaf in self.others]
        return self.treedef.unflatten(leaves)


@dataclasses.dataclass(frozen=True)
class DraftProgram:
    """The programs of a generation with a draft, used as those without."""

    plain: Program
    draft: AnyDraft
    num_guesses: int

    @classmethod
    def of(
        cls,
        plain: Program,
        draft: AnyDraft,
        num_guesses: int,
        *,
        on: Spread | None = None,
    ) -> "DraftProgram":
        """With the draft's arrays where the cache is going to be."""
        return cls(plain, draft if on is None else spread_over(on.mesh, draft), num_guesses)

    @property
    def weights(self) -> Weights:
        return self.plain.weights

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        return self.plain.stop_tokens

    def start(self, state: State, prompts: Sequence[np.ndarray], config: AnyConfig) -> Speculating:
        """Where a generation with these prompts begins."""
        text = padded(prompts, config.max_context_length)
        remembered = state_of(self.draft, self.plain.weights.model, *text.shape)
        return Speculating.begin(state, jax.device_put(text), Pace.begin(), remembered)

    def compile_prefill(self, state: Speculating, chunks: list[Chunk], cache: AnyCache) -> None:
        self.plain.compile_prefill(state, chunks, cache)

    def compile_decode(self, state: Speculating, cache: AnyCache) -> None:
        options, arrays = self._options()
        _decode.compilation(self.plain.weights, state, arrays, cache, **options)()

    def prefill(
        self, state: Speculating, chunk: Chunk, cache: AnyCache
    ) -> tuple[Speculating, AnyCache, Prefilled]:
        return self.plain.prefill(state, chunk, cache)

    def decode(self, state: Speculating, cache: AnyCache) -> tuple[Speculating, AnyCache, New]:
        options, arrays = self._options()
        return _decode(self.plain.weights, state, arrays, cache, **options)

    def _options(self) -> tuple[dict[str, Any], list[Any]]:
        static, arrays = Static.of(self.draft)
        options = {
            "draft": static,
            "num_guesses": self.num_guesses,
            "sampling": self.plain.sampling,
            "stop_tokens": self.plain.stop_tokens,
            "num_steps": self.plain.num_steps,
        }
        return options, arrays


def padded(texts: Sequence[Sequence[int] | np.ndarray], room: int) -> np.ndarray:
    """``[texts, room]``, with anything after each."""
    array = np.zeros((len(texts), room), np.int32)
    for row, text in zip(array, texts, strict=True):
        row[: len(text)] = text
    return array


def check_draft(
    who: str, draft: AnyDraft, model: Model, config: AnyConfig, num_guesses: int
) -> None:
    """Refuse caches that could not go back to what plain decode would have.

    Raises:
      ConfigError: such a cache, or a model that has not what the draft goes on from.
      ValueError: a number of guesses that is none.
    """
    check_count(f"{who}: num_guesses", num_guesses)
    if isinstance(draft, HiddenStateDraft):
        draft.check_model(who, model)
    if config.states:
        raise ConfigError(
            f"{who}: a draft's wrong guesses are taken back, and layers with a state cannot go "
            "back. Leave draft out."
        )
    for group in config.groups:
        chunk = group.addressing.chunk
        if chunk is not None and chunk <= num_guesses:
            raise ConfigError(
                f"{who}: a step with a draft takes {num_guesses + 1} tokens, and a "
                f"{group.addressing.name} cache takes back {chunk}. Make its chunk larger or "
                "num_guesses smaller."
            )
        if group.newest is not None:
            raise ConfigError(
                f"{who}: draft= and newest= do not go together: wrong guesses would write over "
                "newest tokens. Leave one of them out."
            )
        if group.placement is not None and group.placement.blocks_per_query is not None:
            raise ConfigError(
                f"{who}: draft= and blocks_per_query= do not go together: wrong guesses would "
                "enter the bounds by which blocks are chosen. Leave one of them out."
            )
