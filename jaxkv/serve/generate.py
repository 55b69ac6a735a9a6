"""From prompts to new tokens: the loop that a user calls."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkv.cache.axes import Axes, Spread
from jaxkv.cache.checks import checked_prompt
from jaxkv.cache.hybrid import AnyConfig
from jaxkv.codecs import Codec
from jaxkv.counts import check_count
from jaxkv.devices import platform_at
from jaxkv.drafts.draft import AnyDraft, HiddenStateDraft
from jaxkv.memory import MemoryTracker, session
from jaxkv.memory.session import holding
from jaxkv.serve.calibration import Constants, with_constants
from jaxkv.serve.decode import TOKENS_PER_DISPATCH, Chunk, Program, State
from jaxkv.serve.decode import prefill_chunk as best_chunk
from jaxkv.serve.ending import Ending
from jaxkv.serve.generating import Answer, Generating
from jaxkv.serve.model_step import Model
from jaxkv.serve.request import Prepare
from jaxkv.serve.sampling import Sampling
from jaxkv.serve.speculate import NUM_GUESSES, DraftProgram, Speculating, check_draft
from jaxkv.show.stop_strings import StopStrings

if TYPE_CHECKING:  # loaded when they are asked for
    from jaxkv.compression.budgets import Keep
    from jaxkv.policies import Policy
    from jaxkv.serve.compressed import Compression

_SMALLEST_CONTEXT = 512
# A layer with a window keeps a chunk beside it: no longer a one than that, or than the window.
_MOST_BESIDE_A_WINDOW = 1024


@dataclasses.dataclass(frozen=True)
class Timings:
    """Wall time of one `generate` in seconds, and the tokens it went into (over all prompts).

    >>> import jaxkv
    >>> timings = jaxkv.Timings(1.5, 0.2, 100, 2.0, 64)
    >>> timings.prefill_tokens_per_second, timings.decode_tokens_per_second
    (500.0, 32.0)
    """

    compile_seconds: float
    prefill_seconds: float
    prefill_tokens: int
    decode_seconds: float
    decode_tokens: int

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclasses.dataclass(frozen=True)
class Speculation:
    """What a draft was worth.

    Attributes:
      steps: of the model, over all prompts: each takes a token and the guesses of the next ones.
      guesses: of the draft that were checked.
      guessed: for each prompt, which of its new tokens the draft had guessed.

    >>> import jaxkv
    >>> worth = jaxkv.Speculation(steps=2, guesses=4, guessed=[[True, True, False, True, False]])
    >>> worth.accepted, worth.tokens_per_step
    (3, 2.5)
    """

    steps: int
    guesses: int
    guessed: list[list[bool]]

    @property
    def accepted(self) -> int:
        """Guesses that were right."""
        return sum(map(sum, self.guessed))

    @property
    def tokens_per_step(self) -> float:
        return sum(map(len, self.guessed)) / self.steps if self.steps else 0.0


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns; lists are in the order of the prompts.

    Attributes:
      tokens: the new tokens, a stop token included, and those that complete a stop string.
      logprobs: of each new token under the model, before temperature and filters.
      finish_reasons: ``"stop"`` for a stop token or string, ``"length"`` for ``max_new_tokens``,
        ``"nan"`` where the model's next logits were no distribution, see `sample`.
      config: of the cache that was used; its ``size_bytes`` were held. With a policy, of the
        smaller one that decode used.
      texts: of the answers, before a stop string; None without a tokenizer.
      speculation: what the draft was worth; None without one.

    >>> import jax, jaxkv
    >>> def count_up(tokens, cache):  # a "model" that answers token + 1
    ...     return jax.nn.one_hot(tokens + 1, 64), jaxkv.advance(cache, tokens.shape[-1])
    >>> config = jaxkv.KVCacheConfig(1, 64, 1, 4, batch_size=1)
    >>> result = jaxkv.generate(count_up, [[5, 6]], max_new_tokens=3, config=config)
    >>> result.tokens, result.finish_reasons
    ([[7, 8, 9]], ['length'])
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish_reasons: list[str]
    timings: Timings
    config: AnyConfig
    texts: list[str] | None = None
    speculation: Speculation | None = None


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int | Sequence[int] = 0,
    stop_tokens: Sequence[int] | None = None,
    tokenizer: Any = None,
    stop_strings: str | Sequence[str] = (),
    max_context_length: int | None = None,
    codec: Codec | str | Sequence[Codec | str] | None = None,
    config: AnyConfig | None = None,
    constants: Constants | None = None,
    policy: "Policy | str | None" = None,
    keep: "Keep | None" = None,
    prefill_chunk: int | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    stream_every: int = TOKENS_PER_DISPATCH,
    tracker: MemoryTracker | None = None,
    device: Any = None,
    mesh: Mesh | None = None,
    axes: Axes | None = None,
    draft: AnyDraft | None = None,
    num_guesses: int = NUM_GUESSES,
    prepare: Prepare | None = None,
) -> Generation:
    """Continue a ragged batch of prompts.

    Args:
      model: any ``model(tokens, cache) -> (logits, cache)``. One that is a pytree of arrays (an
        nnx module) is passed to jit as such; a plain function closes over its own. With a method
        ``next_logits(tokens, cache, *, num_tokens)``, as those of `jaxkv.models` have, prefill
        finds the first tokens, and they are there a step sooner.
      prompts: token ids, at least one a prompt.
      max_new_tokens: tokens to add to each prompt, at most.
      sampling: how a token is drawn; greedy unless said, whatever a checkpoint's files say:
        ``jaxkv.models.load_sampling(folder)`` is what these do.
      seed: of the draws, an int32: one for all, or one per prompt. A sequence's tokens depend on
        its own seed and prompt, so equal prompts need different seeds to differ.
      stop_tokens: ids that end a sequence; the model's own ``stop_tokens`` if None, which those of
        `jaxkv.models` have.
      tokenizer: a `tokenizers.Tokenizer`, for stop strings and the answers' texts.
      stop_strings: texts that end a sequence, also where they begin or end within a token. The
        answer's text ends before them.
      max_context_length: slots per sequence; the next power of two that holds the longest if
        None. Keep it the same over calls to compile once.
      codec: of the cache, one or one per layer, by value or by name; the model's choice if None.
      config: the whole cache config, for a model without a ``cache_config`` method; instead of
        ``max_context_length`` and ``codec``.
      constants: what a codec with state has learned, from `jaxkv.calibrate`; if None, what it
        learns from 128 tokens that have nothing to do with the prompts.
      policy: which tokens of the prompts stay, by value or by a name of `jaxkv.policies.POLICIES`:
        after the prefill the cache is compressed, as by `jaxkv.compress`, and decode goes on over
        what was kept. See `jaxkv.policies.Policy` for the queries that it is shown.
      keep: how many; an int compiles decode once, a share once for each longest prompt.
      prefill_chunk: tokens of each prompt that are computed at once. If None, what suits the device
        and the prompts: 128 on a CPU, elsewhere up to 16,384 of all prompts together, but beside
        a window no more than that or 1,024. Layers with a window have room for it in their rings.
      on_tokens: called as ``on_tokens(prompt_number, new_tokens)`` as they arrive, some at a
        time. No progress bar is shown then. `jaxkv.models.TextStream` makes text of them.
      stream_every: tokens of a prompt that arrive at once, at most; 1 for each by itself. With a
        draft, steps whose tokens do.
      tracker: a ledger that the cache is entered in.
      device: where the cache lives; where the model is bound to, if None.
      mesh, axes: the devices over which the cache is spread and how, as in `jaxkv.create`.
        Arrays of the model that are on one device are copied to all of the mesh.
      draft: who guesses tokens, as `jaxkv.drafts.NGram` does, for the model to check several in one
        step; the answer is the same as without. But where a step of more tokens rounds otherwise, a
        draw between two tokens that are as likely to the last bits may fall the other way.
      num_guesses: that a step takes per sequence, at most. Where guesses do not come true, most
        steps take none.
      prepare: called with the empty cache, of which row i is for prompt i; gives the one to begin
        with. Of models with cross-attention it calls `write_cross`, for what an encoder made of
        each prompt's audio, image or text; best as ``jax.jit(prepare, donate_argnums=0)``.

    Raises:
      ValueError: an empty prompt, a token outside the vocabulary, a context too short, stop strings
        without a tokenizer, a policy without ``keep``, or for a cache over a mesh.
      ConfigError: with a draft, a cache that could not take guesses back.
      CacheAllocationError: the cache does not fit.

    >>> import jax, jax.numpy as jnp, jaxkv
    >>> def count_up(tokens, cache):  # a "model" that answers token + 1
    ...     return jax.nn.one_hot(tokens + 1, 16), jaxkv.advance(cache, tokens.shape[-1])
    >>> config = jaxkv.KVCacheConfig(1, 16, 1, 4, batch_size=2)
    >>> jaxkv.generate(count_up, [[3], [5, 6]], max_new_tokens=3, config=config).tokens
    [[4, 5, 6], [7, 8, 9]]
    """
    if len(prompts) == 0:
        raise ValueError("generate: no prompts were given.")
    vocabulary = getattr(model, "vocab_size", None)
    checked = [
        checked_prompt(prompt, vocabulary, f"generate: prompt {number}")
        for number, prompt in enumerate(prompts)
    ]
    check_count("generate: max_new_tokens", max_new_tokens)
    stops = getattr(model, "stop_tokens", ()) if stop_tokens is None else stop_tokens
    check_count("generate: stream_every", stream_every)
    spread = Spread.of(mesh, axes)
    if spread is not None:
        mesh = spread.automatic.mesh
    compression = _compression(policy, keep, spread)
    program: Any = Program.of(
        model,
        sampling,
        stops,
        num_steps=stream_every,
        most_steps=max_new_tokens,
        draws=compression is None,
        observe=compression is not None and compression.window != 0,
        draft=draft,
        on=spread and spread.automatic,
    )
    if device is None and mesh is None:
        device = program.weights.home
    chunk = prefill_chunk
    if chunk is None:
        chunk = _chunk_size(model, checked, config, device, mesh)
    check_count("generate: prefill_chunk", chunk)
    config = _cache_config(model, checked, max_new_tokens, max_context_length, codec, chunk, config)
    strings = StopStrings.of(stop_strings, tokenizer)
    if draft is not None:
        check_draft("generate", draft, model, config, num_guesses)
    left = _left_for_decode(checked, chunk, draws=program.draws)
    more = int(isinstance(draft, HiddenStateDraft))
    chunks = list(_chunks(checked, chunk, left=left, more=more))
    place = device if mesh is None else NamedSharding(mesh, PartitionSpec())
    state: Any = _start(checked, max_new_tokens, seed, place)
    if draft is not None:
        program = DraftProgram.of(program, draft, num_guesses, on=spread and spread.automatic)
        state = program.start(state, checked, config)
    ending = Ending(max_new_tokens, program.stop_tokens, strings, tokenizer)
    answers = [Answer(prompt, ending) for prompt in checked]
    generating = Generating(program, state, chunks, answers, on_tokens)
    ends_in_prefill = left == 0 and max_new_tokens == 1

    def worth() -> Speculation:
        return _worth(generating.state, answers)

    with contextlib.ExitStack() as stack:
        live = stack.enter_context(
            session(config, tracker=tracker, device=device, mesh=mesh, axes=axes)
        )
        with generating.runs("compile"):
            live.cache = with_constants(program.weights, live.cache, constants, mesh)
            if prepare is not None:
                live.cache = prepare(live.cache)
            generating.compile_prefill(live)
            if compression is None and not ends_in_prefill:
                generating.compile_decode(live)
        with generating.runs("prefill"):
            generating.prefill(live, compression)
            if compression is not None and chunks:
                small = compression.apply(live.cache, new=max_new_tokens)
                stack.close()
                live = stack.enter_context(holding(small, tracker=tracker))
        if compression is not None:
            with generating.runs("compile"):
                generating.compile_decode(live)
        with generating.runs("decode"):
            per_step = None if draft is None else lambda: worth().tokens_per_step
            generating.decode(live, len(checked) * max_new_tokens, per_step)
        config = live.config

    num_decoded = sum(len(answer.tokens) for answer in answers) - generating.num_first
    return Generation(
        tokens=[answer.tokens for answer in answers],
        logprobs=[answer.logprobs for answer in answers],
        finish_reasons=[answer.finish_reason or "length" for answer in answers],
        timings=Timings(
            generating.seconds["compile"],
            generating.seconds["prefill"],
            generating.num_prefilled,
            generating.seconds["decode"],
            num_decoded,
        ),
        config=config,
        texts=None if tokenizer is None else [answer.text() for answer in answers],
        speculation=None if draft is None else worth(),
    )


def _compression(
    policy: "Policy | str | None", keep: "Keep | None", spread: Spread | None
) -> "Compression | None":
    if policy is None and keep is None:
        return None
    from jaxkv.serve.compressed import Compression

    return Compression.of(policy, keep, spread)


def _worth(state: Speculating, answers: list[Answer]) -> Speculation:
    steps, guesses = (int(each.sum()) for each in jax.device_get((state.steps, state.num_guesses)))
    return Speculation(steps, guesses, [answer.guessed for answer in answers])


def _start(
    prompts: list[np.ndarray], max_new_tokens: int, seed: int | Sequence[int], place: Any
) -> State:
    # Where prefill draws nothing, decode takes the last token of each prompt first, for its logits.
    last = [prompt[-1] for prompt in prompts]
    seeds = np.asarray([seed] * len(prompts) if np.ndim(seed) == 0 else seed)
    if seeds.shape != (len(prompts),):
        raise ValueError(f"generate: {len(prompts)} prompts need as many seeds, got {seeds.size}.")
    limits = np.iinfo(np.int32)
    whole = np.issubdtype(seeds.dtype, np.integer)
    if not whole or seeds.min() < limits.min or seeds.max() > limits.max:
        raise ValueError(f"generate: a seed must be an int32, got {seed!r}.")
    remaining = [max_new_tokens] * len(prompts)
    values = [np.asarray(each, np.int32) for each in (last, remaining, seeds)]
    return State(*jax.device_put(values, place))


def _chunk_size(
    model: Model,
    prompts: list[np.ndarray],
    config: AnyConfig | None,
    device: Any,
    mesh: Mesh | None,
) -> int:
    """Tokens of each prompt that are computed at once, as far as windows have room."""
    longest = max(len(prompt) for prompt in prompts) - 1
    platform = platform_at(device) if mesh is None else mesh.devices.flat[0].platform
    size = best_chunk(longest, len(prompts), platform)
    if config is not None:
        return min(size, *(group.addressing.chunk or size for group in config.groups))
    windows = getattr(getattr(model, "config", None), "windows", None) or (None,)
    seen = min(window or size for window in windows)
    return min(size, max(seen, _MOST_BESIDE_A_WINDOW))


def _left_for_decode(prompts: list[np.ndarray], size: int, *, draws: bool) -> int:
    """Tokens of each prompt that prefill does not take: the last, if it does not draw what is next.

    Nor where that would be one more chunk for a single token.
    """
    longest = max(len(prompt) for prompt in prompts)
    return 0 if draws and (longest - 1) % size else 1


def _chunks(prompts: list[np.ndarray], size: int, *, left: int, more: int) -> Iterator[Chunk]:
    """All but so many tokens of each prompt; in each chunk, so many more that come after it."""
    whole = np.asarray([len(prompt) for prompt in prompts])
    lengths = whole - left
    for start in range(0, lengths.max(), size):
        tokens = np.zeros((len(prompts), size + more), np.int32)
        num_tokens = np.clip(lengths - start, 0, size).astype(np.int32)
        for row, prompt, count in zip(tokens, prompts, num_tokens, strict=True):
            some = prompt[start : start + count + more] if count else ()
            row[: len(some)] = some
        ends = (num_tokens > 0) & (start + num_tokens == whole)
        yield Chunk(tokens, num_tokens, ends)


def _cache_config(
    model: Model,
    prompts: list[np.ndarray],
    max_new_tokens: int,
    max_context_length: int | None,
    codec: Codec | str | Sequence[Codec | str] | None,
    chunk: int,
    config: AnyConfig | None,
) -> AnyConfig:
    needed = max(len(prompt) for prompt in prompts) + max_new_tokens
    if config is None:
        if not hasattr(model, "cache_config"):
            raise ValueError("generate: this model has no cache_config method; pass config=.")
        context = max_context_length
        if context is None:
            context = max(_SMALLEST_CONTEXT, 1 << (needed - 1).bit_length())
            learned = getattr(getattr(model, "config", None), "max_positions", context)
            context = min(context, max(learned, needed))
        config = model.cache_config(
            max_context_length=context, batch_size=len(prompts), codec=codec, chunk=chunk
        )
    elif max_context_length is not None or codec is not None:
        raise ValueError("generate: give config= alone, or max_context_length= and codec=.")
    if config.batch_size != len(prompts):
        raise ValueError(
            f"generate: {len(prompts)} prompts need a config with batch_size={len(prompts)}, got "
            f"{config.batch_size}."
        )
    if needed > config.max_context_length:
        raise ValueError(
            f"generate: the longest prompt and {max_new_tokens} new tokens are {needed} tokens, "
            f"and the context holds {config.max_context_length}. Ask for fewer new tokens or a "
            "larger max_context_length."
        )
    return config
