"""Continuous batching over one paged pool: many requests, each with an answer of its own."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

from jax.sharding import Mesh

from jaxkv.cache.axes import Axes, Spread
from jaxkv.cache.checks import checked_prompt
from jaxkv.cache.create import config_of_a_device
from jaxkv.cache.hybrid import AnyCache, AnyConfig
from jaxkv.devices import platform_at
from jaxkv.drafts.draft import AnyDraft
from jaxkv.errors import ConfigError, ModelChangedError, PoolFullError, UnknownRequestError
from jaxkv.memory import MemoryTracker, Purpose, session
from jaxkv.memory.session import Session
from jaxkv.paging import PageAllocator, Pools, Prompt, Snapshots
from jaxkv.serve.batch import Arrived, Batch
from jaxkv.serve.calibration import Constants
from jaxkv.serve.checks import check_config, check_request
from jaxkv.serve.figures import Figures
from jaxkv.serve.model_step import Model, Weights
from jaxkv.serve.request import Prepare, Request
from jaxkv.serve.runner import Runner
from jaxkv.serve.sampling import Sampling
from jaxkv.serve.snapshots import StateSnapshots, checked_space
from jaxkv.serve.speculate import NUM_GUESSES, check_draft
from jaxkv.show.progress import progress_bar
from jaxkv.show.stop_strings import StopStrings

if TYPE_CHECKING:  # loaded when they are asked for
    from jaxkv.policies import Policy
    from jaxkv.serve.choice import Choice


class Engine:
    """Runs requests together on one paged cache; Yu et al., "Orca" (2022), Kwon et al. (2023).

    A round (`step`) admits waiting requests in their order while rows and pages last, computes
    chunks of their prompts within a token budget, and decodes a few tokens of all that are ready.
    When the pool runs dry, the request admitted last gives its pages back and waits; later it is
    computed again, or its pages come back from host memory, and its answer goes on where it was.

    What a request answers depends on its prompt and its seed, and on no other request. Pages that
    prompts have in common are computed once; a page found holds the same bits as a page computed.

    Args:
      model: any ``model(tokens, cache) -> (logits, cache)``, as for `generate`.
      config: of the cache: ``batch_size`` is how many requests run at once, ``addressing`` a
        `Paged` with ``num_pages``.
      sampling: how tokens of requests are drawn that do not say it; greedy unless said.
      stop_tokens: ids that end any request; the model's own ``stop_tokens`` if None, which those
        of `jaxkv.models` have.
      tokenizer: a `tokenizers.Tokenizer`, for stop strings and `Request.text`.
      stop_strings: texts that end any request; its ``text`` ends before them.
      prefill_chunk: tokens of a prompt that are computed together; pages are found again in
        multiples of it.
      prefill_rows: chunks that a step of prefill takes on each data rank, of several prompts or of
        one. Steps have one shape, whatever there is to compute, so that the bits of a chunk depend
        on its own prompt alone. If None, 1 on a CPU and 8 elsewhere, where weights are read in the
        time in which some hundred tokens are multiplied with them.
      decode_steps: tokens of an answer between two looks of the host; 1 to stream each as it comes.
      token_budget: tokens, prefilled and decoded, that a round is to stay within on each data
        rank; at least one step is prefilled. If None, 512 on a CPU and 8,192 elsewhere.
      sharing: False to compute every prompt anew.
      swap_space: bytes of host memory in which preempted requests may keep their pages; those
        that find no room there are computed again. `Figures` reports what is used.
      constants: what a codec with state has learned, from `jaxkv.calibrate`; if None, and after an
        `update`, what it learns from 128 tokens that have nothing to do with the requests.
      tracker: a ledger that the cache is entered in.
      device: where the cache lives; where the model is bound to, if None.
      mesh, axes: the devices over which requests and KV heads are spread, as in `jaxkv.create`.
        Each part of the batch, a data rank, has a pool of pages of its own: requests share what
        they have in common there. One goes where most of its prompt is found, and then where most
        pages are free. Arrays of the model that are on one device are copied to all of the mesh.
      draft, num_guesses: who guesses tokens that a step checks, and how many, as for `generate`. A
        dispatch brings ``decode_steps`` tokens, in fewer steps.
      snapshot_space: bytes of device memory, beside the cache, for snapshots of the state of models
        whose layers keep one: what a prompt shares with another is found up to where one was taken.
        The least recently used makes room. If None, for one per row, or 8.
      snapshot_every: tokens from one snapshot of a prompt to the next, a multiple of
        ``prefill_chunk``; 1,024 if None. Others are taken at the end of a prompt, and where an
        earlier prompt parted from it.
      policy: which tokens of a prompt stay, once it is computed, by value or by a name of
        `jaxkv.policies.POLICIES`. Those that do are copied to pages of their own as they are
        stored, and the prompt's other pages are free for other requests, or to be found again. The
        answer goes on over what stayed: the one that `jaxkv.generate` gives of the same policy and
        ``keep``. One that looks at queries must say at how many of the newest, in ``window``: these
        tokens are computed even where they were found.
      keep: how many, one number of tokens or a share of each prompt's. A shorter prompt than that
        stays where it is.

    Attributes:
      pages: the books, of the pool of each data rank, see `jaxkv.paging.Pools`; of one unless the
        batch is split. ``pages.usage()`` and ``pages.check()`` may be called any time.
      figures: what the engine did so far.

    Raises:
      ConfigError: a cache that is no shared paged pool, or that the axes cannot split; or, with a
        policy, a mesh, a draft that is a module of the model, layers with windows, states or
        cross-attention, or newest tokens.
      ValueError: a policy without ``keep``, one that is not there, or that looks at all queries.
      CacheAllocationError: it does not fit.

    >>> import jax, jaxkv
    >>> def count_up(tokens, cache):  # a "model" that answers token + 1
    ...     return jax.nn.one_hot(tokens + 1, 64), jaxkv.advance(cache, tokens.shape[-1])
    >>> pool = jaxkv.Paged(page_size=4, num_pages=16)
    >>> config = jaxkv.KVCacheConfig(1, 32, 1, 4, batch_size=2, addressing=pool)
    >>> with jaxkv.Engine(count_up, config) as engine:
    ...     one, two, three = (engine.submit([n], max_new_tokens=3) for n in (5, 20, 40))
    ...     list(engine.stream(three)), two.tokens
    ([41, 42, 43], [21, 22, 23])
    """

    def __init__(
        self,
        model: Model,
        config: AnyConfig,
        *,
        sampling: Sampling = Sampling(),
        stop_tokens: Sequence[int] | None = None,
        tokenizer: Any = None,
        stop_strings: str | Sequence[str] = (),
        prefill_chunk: int = 128,
        prefill_rows: int | None = None,
        decode_steps: int = 8,
        token_budget: int | None = None,
        sharing: bool = True,
        swap_space: int = 0,
        constants: Constants | None = None,
        tracker: MemoryTracker | None = None,
        device: Any = None,
        mesh: Mesh | None = None,
        axes: Axes | None = None,
        draft: AnyDraft | None = None,
        num_guesses: int = NUM_GUESSES,
        snapshot_space: int | None = None,
        snapshot_every: int | None = None,
        policy: "Policy | str | None" = None,
        keep: float | None = None,
    ):
        spread = _checked_spread(mesh, axes, swap_space, config)
        if device is None and spread is None:
            device = Weights.of(model).home
        on_cpu = (platform_at(device) if spread is None else spread.platform) == "cpu"
        prefill_rows = (1 if on_cpu else 8) if prefill_rows is None else prefill_rows
        token_budget = (512 if on_cpu else 8192) if token_budget is None else token_budget
        local = config_of_a_device(config, spread)
        groups, page_size = check_config(
            local, prefill_chunk, prefill_rows, decode_steps, token_budget, swap_space
        )
        if draft is not None:
            check_draft("Engine", draft, model, config, num_guesses)
        if policy is not None or keep is not None:
            from jaxkv.serve.choice import check_policy

            check_policy(policy, keep, config, spread=spread, draft=draft)
        self._draft, self._num_guesses = draft, num_guesses
        space, every = checked_space(config, snapshot_space, snapshot_every, prefill_chunk, sharing)
        snapshots = StateSnapshots(config, space, prefill_rows, device)
        self.config = config
        self._vocabulary = getattr(model, "vocab_size", None)
        stops = getattr(model, "stop_tokens", ()) if stop_tokens is None else stop_tokens
        self._stop_tokens, self._budget = tuple(stops), token_budget
        self._sampling = sampling
        self._tokenizer = tokenizer
        self._stop_strings = StopStrings.of(stop_strings, tokenizer)
        self._num_submitted = 0
        books = functools.partial(
            PageAllocator,
            groups,
            page_size=page_size,
            chunk=prefill_chunk,
            # For the tokens that each running request will need next.
            reserve=min(local.batch_size or 1, min(group.num_pages for group in groups) // 8),
            fingerprint=f"{type(model).__qualname__} {config}".encode(),
            sharing=sharing,
        )
        if config.states:
            kept = Snapshots(snapshots.num_slots, every, prefill_chunk)
            books = functools.partial(books, snapshots=kept)
        self.pages = Pools(books() for _ in range(1 if spread is None else spread.size("batch")))
        self._stack = contextlib.ExitStack()
        self._held = self._stack.enter_context(
            session(
                config,
                tracker=tracker,
                device=device,
                mesh=None if spread is None else spread.mesh,
                axes=axes,
            )
        )
        self.figures = Figures(snapshot_bytes=snapshots.size_bytes)
        self._stack.enter_context(_counted(self._held, snapshots, "snapshots of state"))
        self._choice = _choice_of(policy, keep, self._held.cache)
        if self._choice is not None:
            self._stack.enter_context(_counted(self._held, self._choice, "positions that stay"))
        self._runner = Runner(
            model,
            sampling,
            self._held,
            self.pages,
            self.figures,
            prefill_chunk=prefill_chunk,
            prefill_rows=prefill_rows,
            decode_steps=decode_steps,
            spread=spread,
            constants=constants,
            draft=draft,
            num_guesses=num_guesses,
            snapshots=snapshots,
            choice=self._choice,
        )
        self._batch = Batch(self._runner, self.figures, swap_space=swap_space)

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        seed: int = 0,
        sampling: Sampling | None = None,
        stop_tokens: Sequence[int] = (),
        stop_strings: str | Sequence[str] = (),
        salt: bytes | str = b"",
        prepare: Prepare | None = None,
    ) -> Request:
        """Put a prompt in the queue.

        Args:
          prompt: token ids, at least one.
          max_new_tokens: of the answer, at most.
          seed: of its draws, an int32.
          sampling: how they are made; as the engine's if None. The first of another kind compiles
            programs that take each row's.
          stop_tokens: ids that end it, besides the engine's.
          stop_strings: texts that end it, likewise; for an engine with a tokenizer.
          salt: requests share pages with those of the same salt only. Give each tenant one of
            its own, chosen by the server, or one could learn from timing what others asked.
          prepare: of models with cross-attention: called with an empty cache of one sequence (a
            batch of one) whenever the request is given a row, to `write_cross` what an encoder made
            for it, and give it back. Shares no pages then, but with those of its salt, if it has
            one: say the same for the same audio or image alone. None for a text without any.

        Raises:
          CacheFullError: prompt and answer can never fit.
          TypeError: a sampling that is none.
          ValueError: an empty prompt, a token outside the vocabulary, a bad limit or seed, stop
            strings without a tokenizer, or ``prepare`` for a model without cross-attention.
        """
        if prepare is not None and not self.config.cross:
            raise ValueError(
                "Engine.submit: prepare is for models with cross-attention, and this cache has "
                "none. Leave it out."
            )
        if prepare is not None and not salt:  # no other text is about the same, as far as is known
            salt = b"\0prepared " + str(self._num_submitted).encode()
        ids = checked_prompt(prompt, self._vocabulary)
        named, stops = self.pages[0].prompt(ids, salt=salt), (*self._stop_tokens, *stop_tokens)
        own = StopStrings.of(stop_strings, self._tokenizer).strings
        strings = StopStrings((*self._stop_strings.strings, *own))
        sampling = self._sampling if sampling is None else sampling
        request = self._new_request(named, max_new_tokens, seed, stops, sampling, strings)
        request.prepare = prepare
        self._batch.waiting.append(request)
        return request

    def fork(self, request: Request, *, seed: int) -> Request:
        """Another request that goes on from where this one is, with draws of its own.

        It shares all full pages at once if a row and pages for it are free on the same devices,
        and waits otherwise.

        Raises:
          UnknownRequestError: not a request of this engine, or one that has ended.
          ValueError: a bad seed.
        """
        self._check_alive(request)
        child = self._new_request(
            request.prompt,
            request.max_new_tokens,
            seed,
            request.stop_tokens,
            request.sampling,
            request.stop_strings,
        )
        child.prepare = request.prepare
        child.tokens, child.logprobs = list(request.tokens), list(request.logprobs)
        running = request in self._batch.rows and not request.is_prefilling
        if running and not self._batch.waiting:
            with contextlib.suppress(PoolFullError):
                if self._batch.fork(request, child):
                    return child
        self._batch.waiting.append(child)
        return child

    def cancel(self, request: Request) -> None:
        """End a request now; what it answered so far stays in it. One that has ended stays so.

        Raises:
          UnknownRequestError: not a request of this engine.
        """
        if request.done:
            return
        self._check_alive(request)
        request.finish_reason = "cancelled"
        self._batch.leave(request)

    @property
    def busy(self) -> bool:
        """Is any request not over?"""
        return bool(self._batch.waiting or self._batch.running)

    def update(self, model: Model, *, restart: bool = False) -> None:
        """Answer with other weights from now on; what was computed with the old ones is forgotten.

        Weights that are exchanged in place, as an optimizer does in an nnx module, are seen at the
        next round and need no call while no request has begun. Of a plain function they are seen
        where it names the arrays itself, or what holds them; see `generate`.

        Args:
          model: which takes the cache that the old one took.
          restart: True to begin anew those requests that have begun. Their answers so far are
            dropped; a fork begins at its prompt.

        Raises:
          ConfigError: a model that has not what the draft goes on from. Nothing was changed.
          ModelChangedError: requests have begun, and restart is False. Neither.
          ValueError: a model with another vocabulary. Neither.
        """
        if self._batch.begun and not restart:
            raise ModelChangedError(
                f"{len(self._batch.begun)} requests have begun with the old weights. Run them to "
                "their end or cancel them first, or begin them anew with restart=True."
            )
        vocabulary = getattr(model, "vocab_size", self._vocabulary)
        if vocabulary != (self._vocabulary or vocabulary):
            raise ValueError(
                f"Engine.update: a model with a vocabulary of {vocabulary} tokens cannot take the "
                f"place of one with {self._vocabulary}. Make another Engine."
            )
        if self._draft is not None:
            check_draft("Engine.update", self._draft, model, self.config, self._num_guesses)
        self._vocabulary = vocabulary
        self._batch.exchange(model)

    def step(self) -> Arrived:
        """One round. Returns the new tokens of each request that got any.

        Raises:
          ModelChangedError: the model's weights were deleted, or exchanged since requests have
            begun.
        """
        with self._runner.weights_as_they_are(self._batch.begun):
            return self._round()

    def _round(self) -> Arrived:
        self._runner.compile()
        self._batch.admit_waiting()
        budget = self._budget - self._batch.most_decoding * self._runner.decode_steps
        self._batch.prefill(budget // self._runner.prefill_chunk)
        return self._batch.decode()

    def stream(self, request: Request) -> Iterator[int]:
        """The tokens of a request as they come. Runs the engine, for all requests, meanwhile.

        Raises:
          ModelChangedError: see `step`; or `update` began the request anew after tokens were sent.
          UnknownRequestError: not a request of this engine, or it was closed.
        """
        sent, answer = 0, request.tokens
        while True:
            if request.tokens is not answer and sent:
                raise ModelChangedError(
                    f"request {request.number} was begun anew with other weights after {sent} "
                    "tokens of its old answer had been streamed. Stream it again."
                )
            answer = request.tokens
            if sent < len(answer):
                yield answer[sent]
                sent += 1
                continue
            if request.done:
                return
            self._check_alive(request)
            self.step()

    def run(self) -> None:
        """Run until every request is over, with a progress bar over the tokens that may come."""
        requests = [*self._batch.waiting, *self._batch.running]
        wanted = sum(request.max_new_tokens - len(request.tokens) for request in requests)
        with (
            progress_bar("tokens", wanted) as advance_bar,
            self._runner.weights_as_they_are(self._batch.begun),
        ):
            while self.busy:
                advance_bar(sum(len(tokens) for _, tokens in self._round()))

    def close(self) -> None:
        """Cancel what runs and free the cache."""
        for request in [*self._batch.waiting, *self._batch.running]:
            self.cancel(request)
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def cache(self) -> AnyCache:
        """The pool. Tables and lengths are the last dispatch's.

        Set it to what a function between two rounds gives back, as `jaxkv.load_prefix`.
        """
        return self._held.cache

    @cache.setter
    def cache(self, cache: AnyCache) -> None:
        self._held.cache = cache

    def _new_request(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        seed: int,
        stop_tokens: Sequence[int],
        sampling: Sampling,
        stop_strings: StopStrings,
    ) -> Request:
        stops = tuple(dict.fromkeys(map(int, stop_tokens)))
        num_kept = None
        if self._choice is not None:
            num_kept = self._choice.num_kept(prompt.num_shareable)
            fresh = 0 if num_kept is None else self._choice.window
            prompt = dataclasses.replace(prompt, fresh=fresh)
        pages = self.pages[0]
        check_request(
            self.config, pages, len(prompt), max_new_tokens, seed, stops, sampling, num_kept
        )
        self._runner.expect(sampling)
        request = Request(
            self._num_submitted,
            prompt,
            max_new_tokens,
            seed,
            stops,
            sampling,
            stop_strings,
            self._tokenizer,
            num_kept=num_kept,
        )
        self._num_submitted += 1
        return request

    def _check_alive(self, request: Request) -> None:
        if request not in self._batch.rows and request not in self._batch.waiting:
            raise UnknownRequestError(
                f"request {request.number} is not in this engine: it has ended "
                f"({request.finish_reason}), or belongs to another."
            )


def _choice_of(
    policy: "Policy | str | None", keep: float | None, cache: AnyCache
) -> "Choice | None":
    if policy is None or keep is None:
        return None
    from jaxkv.serve.choice import Choice

    return Choice(policy, keep, cache)


@contextlib.contextmanager
def _counted(held: Session, what: "StateSnapshots | Choice", name: str) -> Iterator[None]:
    """What is beside the cache in the ledger that has it, for as long as the engine is open."""
    receipt = held.tracker.track(what.size_bytes, purpose=Purpose.KV_CACHE, name=name)
    try:
        yield
    finally:
        what.close()
        held.tracker.release(receipt)


def _checked_spread(
    mesh: Mesh | None, axes: Axes | None, swap_space: int, config: AnyConfig
) -> Spread | None:
    """How the cache is spread, unless the engine cannot have it so."""
    spread = Spread.of(mesh, axes)
    if spread is None:
        return None
    if config.states or config.cross:
        raise ConfigError(
            "Engine: layers that keep a state or have cross-attention are on one device, since "
            f"snapshots and what requests bring are; got {axes}. Leave them out; generate takes "
            "such a model over a mesh."
        )
    if spread.size("context") > 1:
        raise ConfigError(
            f"Engine: axes must name batch and heads alone, got {axes}: a page whose tokens are "
            "split by context is not one page of the books. generate takes a split context."
        )
    if swap_space and len(spread.mesh.local_devices) < spread.mesh.size:
        raise ConfigError(
            f"Engine: swap_space must be 0 where devices are in several processes, got "
            f"{swap_space}: a process cannot read the pages of another. Preempted requests are "
            "computed again."
        )
    return spread.automatic
