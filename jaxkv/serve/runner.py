"""What a round computes: the weights and the cache, and the compiled steps that take them."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jaxkv.cache.axes import Spread
from jaxkv.cache.create import create
from jaxkv.drafts.draft import AnyDraft, HiddenStateDraft, state_of
from jaxkv.errors import ModelChangedError
from jaxkv.memory.session import Session
from jaxkv.paging import Copy, Pools
from jaxkv.serve import steps
from jaxkv.serve.calibration import Constants, one_sequence, with_constants
from jaxkv.serve.decode import New
from jaxkv.serve.figures import Figures
from jaxkv.serve.model_step import Model, ModelStep, Watch, Weights, spread_over
from jaxkv.serve.rank import Rank
from jaxkv.serve.request import MOST_STOP_TOKENS, Request
from jaxkv.serve.sampling import RowSampling, Sampling
from jaxkv.serve.snapshots import StateSnapshots
from jaxkv.serve.speculate import Pace, Static, padded

if TYPE_CHECKING:  # loaded when it is asked for
    from jaxkv.serve.choice import Choice


class Chunk(NamedTuple):
    """Tokens of a prompt that go through the model together."""

    request: Request
    start: int
    end: int


class Runner:
    """The steps of an engine, told of requests: which row has which, and which pages.

    Args:
      model: of every step.
      sampling: of steps until a request has another.
      session: holds the cache.
      pages: its books.
      figures: where steps are counted.
      prefill_chunk, decode_steps: tokens of a request that a step takes.
      prefill_rows: chunks that a step of prefill takes, on each data rank.
      draft, num_guesses: who guesses tokens that a step checks, and how many.
      snapshots: of states, where layers keep some.
      choice: of a policy, which tokens of prompts stay; None for all.
    """

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        session: Session,
        pages: Pools,
        figures: Figures,
        *,
        prefill_chunk: int,
        prefill_rows: int,
        decode_steps: int,
        spread: Spread | None = None,
        constants: Constants | None = None,
        draft: AnyDraft | None = None,
        num_guesses: int = 0,
        snapshots: StateSnapshots,
        choice: "Choice | None" = None,
    ):
        self.session, self.pages = session, pages
        self.snapshots, self.choice = snapshots, choice
        self.prefill_chunk, self.prefill_rows = prefill_chunk, prefill_rows
        self.decode_steps = decode_steps
        self.num_rows = session.config.batch_size or 1
        self._model, self._figures = model, figures
        self._sampling, self._by_row = sampling, False
        self._watch = Watch(Weights.of(model))
        self._spread = spread
        self._constants, self._calibrated = constants, False
        self._copies: tuple[Watch, Weights] | None = None
        self._compiled = False
        self._draft = draft if spread is None else spread_over(spread.mesh, draft)
        self._num_guesses = num_guesses
        if draft is not None:
            room = session.config.max_context_length
            remembered = state_of(draft, model, self.num_rows, room)
            self._drafting = steps.Drafting(Pace.begin(), remembered)

    @contextlib.contextmanager
    def weights_as_they_are(self, begun: Sequence[Request]) -> Iterator[None]:
        """Rounds in here use the model's weights of now, which nothing keeps between them.

        Args:
          begun: the requests that something was computed for.

        Raises:
          ModelChangedError: they were exchanged since requests have begun.
        """
        weights = Weights.of(self._model)
        if not self._watch.sees(weights):
            if begun:
                raise ModelChangedError(
                    f"the model's weights were exchanged, and {len(begun)} requests have "
                    "begun with the old ones. Call Engine.update(model, restart=True) to begin "
                    "these anew, or cancel them."
                )
            self._forget(weights)
        self._weights = weights if self._spread is None else self._copied(weights, self._spread)
        if not self._calibrated:
            self._calibrate()
        try:
            yield
        finally:
            del self._weights

    def _calibrate(self) -> None:
        """Before anything is computed: with constants of this model, not of the first request."""
        mesh = None if self._spread is None else self._spread.mesh
        cache = with_constants(self._weights, self.session.cache, self._constants, mesh)
        self.session.cache, self._calibrated = cache, True

    def _copied(self, weights: Weights, spread: Spread) -> Weights:
        """The weights on all devices of the mesh, copied anew only where they were exchanged."""
        if self._copies is None or not self._copies[0].sees(weights):
            self._copies = Watch(weights), weights.spread_over(spread.mesh)
        return self._copies[1]

    def exchange(self, model: Model) -> None:
        """Another model, or other weights of this one. No request may have pages."""
        self._model = model
        self._forget(Weights.of(model))

    def _forget(self, weights: Weights) -> None:
        """What was computed with others, of which nothing is in use."""
        self._compiled = False
        self.pages.forget()
        self.session.cache = steps.without_codec_state(self.session.cache)
        self._constants, self._calibrated = None, False  # they were of the old ones
        self._watch = Watch(weights)

    def expect(self, sampling: Sampling) -> None:
        """A request that is drawn so: the first unlike the engine's takes programs by row."""
        if not self._by_row and sampling != self._sampling:
            self._by_row, self._compiled = True, False

    def compile(self) -> None:
        """The programs of a round, before the first: one is traced while XLA compiles the other."""
        if self._compiled:
            return
        given = self._given([None] * (self.prefill_rows * len(self.pages)))
        given = (*given, self.session.cache)
        decode, arguments, options = self._decoding([None] * self.num_rows)
        with ThreadPoolExecutor() as pool:
            compiling = [
                pool.submit(steps.prefill.compilation(self._weights, *given, **self._prefilling)),
                pool.submit(decode.compilation(self._weights, *arguments, **options)),
            ]
        for each in compiling:
            each.result()
        self._compiled = True

    @property
    def _takes_prompts(self) -> HiddenStateDraft | None:
        """The draft, if it goes over prompts with the model."""
        return self._draft if isinstance(self._draft, HiddenStateDraft) else None

    @property
    def _prefilling(self) -> dict[str, Any]:
        """Options of a step of prefill."""
        window = 0 if self.choice is None else self.choice.window
        return {"draft": self._takes_prompts, "window": window}

    @property
    def chunks_of_one(self) -> int:
        """Chunks of one prompt that a step takes; a state must be there before the next one."""
        return 1 if self.session.config.states else self.prefill_rows

    def prefill(self, chunks: Sequence[Sequence[Chunk]]) -> None:
        """The chunks of each rank, all in one step; rows without one rest."""
        rows = [
            chunk for own in chunks for chunk in (*own, *[None] * (self.prefill_rows - len(own)))
        ]
        given = self._given(rows)
        self.session.cache, queries = steps.prefill(
            self._weights, *given, self.session.cache, **self._prefilling
        )
        self._figures.prefill_steps += 1
        if self.choice is not None and queries is not None:
            for number, chunk in enumerate(rows):
                if chunk is not None:
                    self.choice.see(chunk.request, queries, number, chunk.start, chunk.end)

    def choose(self, request: Request, before: np.ndarray, now: np.ndarray) -> None:
        """Let the policy choose of a prompt, which is in pages, what stays in others."""
        assert self.choice is not None, "or there is nothing to choose"
        self.session.cache = self.choice.choose(request, before, now, self.session.cache)

    def _given(self, rows: Sequence[Chunk | None]) -> tuple[Any, ...]:
        """What a step of prefill is told: tokens, how many are real, where they begin, pages."""
        more = int(self._takes_prompts is not None)
        tokens = np.zeros((len(rows), self.prefill_chunk + more), np.int32)
        num_tokens, start = np.zeros((2, len(rows)), np.int32)
        for row, chunk in enumerate(rows):
            if chunk is not None:
                start[row], num_tokens[row] = chunk.start, chunk.end - chunk.start
                own = chunk.request.prompt.tokens[chunk.start : chunk.end + more]
                tokens[row, : len(own)] = own
        requests = [None if chunk is None else chunk.request for chunk in rows]
        of_rows = np.array([-1 if r is None else r.row for r in requests], np.int32)
        return jax.device_put((tokens, num_tokens, start, self._tables(requests), of_rows))

    def decode(self, rows: Sequence[Request | None]) -> New:
        """What a dispatch of decode finds."""
        step, arguments, options = self._decoding(rows)
        results = step(self._weights, *arguments, **options)
        if self._draft is None:
            self.session.cache, new = results
            return jax.device_get(new)
        self.session.cache, new, self._drafting, counts = results
        new, (num_steps, num_guesses) = jax.device_get((new, counts))
        self._figures.checked_guesses += int(num_guesses)
        self._figures.right_guesses += int((new.guessed & (new.tokens >= 0)).sum())
        self._figures.steps += int(num_steps)
        return new

    def _decoding(
        self, rows: Sequence[Request | None]
    ) -> tuple[ModelStep, tuple[Any, ...], dict[str, Any]]:
        """The step that decodes, what it is told, and its options."""
        options = {"sampling": self._sampling, "num_steps": self.decode_steps}
        given, cache = jax.device_put(self._dispatch(rows)), self.session.cache
        if self.choice is not None:
            options["kept"] = self.choice.kept
        if self._draft is None:
            return steps.decode, (given, cache), options
        static, arrays = Static.of(self._draft)
        texts: list[Sequence[int]] = [
            () if row is None else [*row.prompt.tokens, *row.tokens] for row in rows
        ]
        text = jax.device_put(padded(texts, self.session.config.max_context_length))
        options |= {"draft": static, "num_guesses": self._num_guesses}
        return steps.speculate, (given, self._drafting, arrays, cache, text), options

    def _dispatch(self, rows: Sequence[Request | None]) -> steps.Rows:
        def column(value: Any) -> np.ndarray:
            return np.array([0 if r is None else value(r) for r in rows], np.int32)

        def padded(values: Iterable[Sequence[int]], width: int) -> np.ndarray:
            array = np.full((len(rows), width), -1, np.int32)
            for row, some in zip(array, values, strict=True):
                row[: len(some)] = some[:width]
            return array

        known = [() if r is None else r.tokens[r.num_decoded :][: self.decode_steps] for r in rows]
        return steps.Rows(
            last=column(lambda r: r.next_input),
            remaining=column(lambda r: r.max_new_tokens - r.num_decoded),
            seeds=column(lambda r: r.seed),
            lengths=column(lambda r: r.length),
            stop_tokens=padded(
                (() if r is None else r.stop_tokens for r in rows), MOST_STOP_TOKENS
            ),
            known=padded(known, self.decode_steps),
            prompts=column(lambda r: r.prompt.num_shareable),
            tables=self._tables(rows)
            if self.choice is None
            else self.choice.tables(rows, self.pages[0]),
            sampling=RowSampling.of([Sampling() if r is None else r.sampling for r in rows])
            if self._by_row
            else None,
            chosen=None if self.choice is None else self.choice.of_rows(rows),
        )

    def _tables(self, rows: Sequence[Request | None]) -> steps.Tables:
        """The page tables of these rows, a table a group; rows that rest have no pages."""
        tables = []
        for number, group in enumerate(self.session.cache.groups):
            assert group.pages is not None, "check_config saw it"
            table = np.full((len(rows), group.pages.table.shape[-1]), -1, np.int32)
            for row, request in zip(table, rows, strict=True):
                if request is not None:
                    assert request.rank is not None, "it has a row"
                    pages = self.pages[request.rank].table(request.number, number)
                    row[: len(pages)] = pages
            tables.append(table)
        return tuple(tables)

    def prepare(self, request: Request) -> None:
        """Let cross-attention of a request's row read what was written for it, and no other's."""
        cache = self.session.cache
        if not cache.cross:
            return
        config, one = one_sequence(self.session.config), None
        if request.prepare is not None:
            prepared = request.prepare(create(config, device=self._device))
            if getattr(prepared, "config", None) != config:
                raise ValueError(
                    f"request {request.number}: prepare must give back the cache that it was "
                    f"given, with what it wrote, got {prepared!r:.200}."
                )
            one = prepared.cross
        row = jax.device_put(np.int32(request.row))
        cross = steps.seat_cross(cache.cross, row, one)
        self.session.cache = cache.with_groups(cache.groups, cache.states, cross)

    @property
    def _device(self) -> Any:
        """Where the cache is bound to, for what is made beside it; None where it is not."""
        lengths = self.session.cache.lengths
        return next(iter(lengths.devices())) if lengths.committed else None

    def keep_states(self, rows: Mapping[int, int]) -> None:
        """Take snapshots of the states of rows, by their slots."""
        if rows:
            self.snapshots.keep(rows, self.session.cache)

    def restore_state(self, slot: int, row: int) -> None:
        """Let a row go on from a snapshot."""
        self.session.cache = self.snapshots.bring_back(slot, row, self.session.cache)

    def copy_state(self, source: int, row: int) -> None:
        """Let a row go on from where another one is, with what is of its row."""
        cache = self.session.cache
        if self.choice is not None:
            self.choice.copy(source, row)
        if cache.states:
            numbers = jax.device_put((np.int32(source), np.int32(row)))
            states = steps.copy_state(cache.states, *numbers)
            self.session.cache = cache.with_groups(cache.groups, states)

    def copy(self, rank: Rank, copies: list[Copy], rows: tuple[int, int] = (-1, -1)) -> None:
        """Pages and, from row to row, newest tokens. Before the next step; padded to one shape."""
        num_groups = len(rank.pages.groups)
        num_pools = len(steps.pools_of(self.session.cache))
        if not copies and (num_pools == num_groups or rows[1] < 0):
            return
        pairs = np.full((2, num_pools, len(self.pages)), -1, np.int32)
        pairs[:, num_groups:, rank.number] = np.array(rows)[:, None]
        for copy in copies:
            pairs[:, copy.group, rank.number] = copy.source, copy.destination
        sources, destinations = jax.device_put((tuple(pairs[0]), tuple(pairs[1])))
        self.session.cache = steps.copy(sources, destinations, self.session.cache)
