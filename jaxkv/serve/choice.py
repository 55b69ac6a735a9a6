"""Which tokens of their prompts the rows of an engine keep, by a policy."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxkv.addressing import Kept, Paged
from jaxkv.cache.axes import Spread
from jaxkv.cache.hybrid import AnyCache, AnyConfig
from jaxkv.cache.rearrange import select
from jaxkv.compression.budgets import share_of
from jaxkv.compression.gather import gathered
from jaxkv.compression.scoring import for_all_slots, scores_of
from jaxkv.counts import ceil_div
from jaxkv.drafts.draft import AnyDraft, HiddenStateDraft
from jaxkv.errors import ConfigError
from jaxkv.paging import PageAllocator
from jaxkv.policies import Policy, named_policy
from jaxkv.serve.compressed import one_without_the_other
from jaxkv.serve.request import Request
from jaxkv.serve.steps import Chosen

# Of the tokens that each row keeps, and of one row; -1 for none.
Positions = Int[Array, "layers batch kv_heads kept"]
OfRow = Int[Array, "layers kv_heads kept"]

# What stays whatever a policy says, as in `jaxkv.compress`.
_PROTECTED = {"sinks": 4, "recent": 0}


class Choice:
    """A policy, and the tokens that it chose of each row's prompt.

    Once a prompt is computed, the tokens that stay are copied to pages of their own, and its other
    pages are free. A row's answer begins in a page after them. Where they stand in its table, and
    what each slot holds, is as `Kept` says. A prompt of no more tokens than stay is left where it
    is: its row chose nothing, and all of it is what came since.

    Args:
      policy, keep: as an `Engine` takes them.
      cache: the pool.

    Attributes:
      kept: how decode addresses the pool.
      window: newest tokens of a prompt whose queries the policy looks at.
    """

    def __init__(self, policy: Policy | str, keep: float, cache: AnyCache):
        (pool,) = cache.config.groups
        self.policy = named_policy(policy)
        self._keep = float(keep) if _is_share(keep) else int(keep)
        self.window: int = self.policy.window  # type: ignore[attr-defined]
        page_size, num_pages = pool.addressing.page_size, pool.addressing.num_pages
        assert page_size is not None, "check_config saw it"
        context, self._page_size = pool.max_context_length, page_size
        self.kept = Kept(
            tokens=min(self._count(context), context),
            new=ceil_div(context, page_size) * page_size,
            num_layers=pool.num_layers,
            num_kv_heads=pool.num_kv_heads,
            within=Paged(page_size, num_pages),
        )
        shape = pool.num_layers, pool.batch_size, pool.num_kv_heads, self.kept.tokens
        positions = jnp.full(shape, -1, jnp.int32)
        lengths = cache.lengths  # bound to a device where the cache is
        self._positions = (
            jax.device_put(positions, lengths.sharding) if lengths.committed else positions
        )

    @property
    def size_bytes(self) -> int:
        """Of device memory, for the positions of what is kept."""
        return self._positions.nbytes

    @property
    def bytes_per_row(self) -> int:
        """Of them, for each row."""
        return self._positions.nbytes // self._positions.shape[1]

    def close(self) -> None:
        """Free them."""
        self._positions.delete()

    def num_kept(self, num_tokens: int) -> int | None:
        """Of so many tokens of a prompt, how many stay; None for all."""
        count = self._count(num_tokens)
        return count if count < num_tokens else None

    def _count(self, num_tokens: int) -> int:
        return int(share_of(self._keep, num_tokens) if _is_share(self._keep) else self._keep)

    def see(
        self,
        request: Request,
        queries: Float[Array, "layers chunks window heads head_dim"],
        number: int,
        start: int,
        end: int,
    ) -> None:
        """Take the queries of a chunk of its prompt, if they are among the newest.

        Args:
          queries: of all chunks of a step; its own are those at ``number``.
          start, end: of the chunk.
        """
        if request.num_kept is None or end <= request.prompt.num_findable:
            return
        if request.queries is None:
            layers, _, _, *vector = queries.shape
            request.queries = jnp.zeros((layers, self.window, *vector), queries.dtype)
        own = jax.device_put(np.array([number, end - start], np.int32))
        request.queries = joined(request.queries, queries, own)

    def choose(
        self, request: Request, before: np.ndarray, now: np.ndarray, cache: AnyCache
    ) -> AnyCache:
        """The cache, donated, with what stays of a prompt in other pages.

        Args:
          before: the pages that hold it, in order.
          now: those for what stays; some may be among the others.
        """
        assert request.num_kept is not None, "or all stays"
        (pool,) = cache.groups
        assert pool.pages is not None, "check_config saw it"
        held = np.full(pool.pages.table.shape[-1], -1, np.int32)
        held[: len(before)] = before
        numbers = np.array([request.row, request.length, request.num_kept], np.int32)
        given = jax.device_put((numbers, held, self._table(now, len(now))))
        cache, self._positions = choose(
            cache, self._positions, *given, request.queries, policy=self.policy, kept=self.kept
        )
        request.queries = None
        return cache

    def copy(self, source: int, row: int) -> None:
        """Let a row keep what another one does."""
        numbers = jax.device_put((np.int32(source), np.int32(row)))
        own = row_of(self._positions, numbers[0])
        self._positions = with_row(self._positions, numbers[1], own)

    def read(self, row: int) -> np.ndarray:
        """What a row keeps, in host memory."""
        return np.array(row_of(self._positions, jax.device_put(np.int32(row))))

    def write(self, row: int, positions: np.ndarray) -> None:
        """Let a row keep what another one did."""
        given = jax.device_put((np.int32(row), positions))
        self._positions = with_row(self._positions, *given)

    def of_rows(self, rows: Sequence[Request | None]) -> Chosen:
        """What a dispatch is told of it."""
        first = [r.prompt.num_shareable if r is not None and r.has_chosen else 0 for r in rows]
        return Chosen(self._positions, np.array(first, np.int32))

    def tables(self, rows: Sequence[Request | None], books: PageAllocator) -> tuple[np.ndarray]:
        """The page table of these rows; those that rest have no pages."""
        tables = []
        for request in rows:
            if request is None:
                tables.append(self._table(np.zeros(0, np.int32), 0))
            else:
                tables.append(self._table(books.table(request.number), request.kept_pages))
        return (np.stack(tables),)

    def _table(self, pages: np.ndarray, num_kept: int) -> np.ndarray:
        """A row of the page table, of pages whose first ones hold what was chosen."""
        table = np.full(ceil_div(self.kept.slots_per_sequence, self._page_size), -1, np.int32)
        table[: len(pages) - num_kept] = pages[num_kept:]
        first = self.kept.new // self._page_size
        table[first : first + num_kept] = pages[:num_kept]
        return table


@functools.partial(
    jax.jit, static_argnames=("policy", "kept"), donate_argnames=("cache", "positions")
)
def choose(
    cache: AnyCache,
    positions: Positions,
    numbers: Int[Array, "3"],
    held: Int[Array, " pages"],
    table: Int[Array, " kept_pages"],
    queries: Float[Array, "layers window heads head_dim"] | None,
    *,
    policy: Policy,
    kept: Kept,
) -> tuple[AnyCache, Positions]:
    """Let a policy choose of one row's tokens, and copy what it chose to other pages of the pool.

    Args:
      numbers: of the row, of its tokens, and of those that stay.
      held, table: its pages now, and for what stays.
    """
    (pool,), (row, length, most) = cache.groups, numbers
    (one,) = select(cache, [0]).groups
    one = one.with_pages(held[None], length[None])
    scores, _ = scores_of(one, policy, None if queries is None else queries[:, None])
    config = one.config
    layers = jnp.arange(config.num_layers, dtype=jnp.int32)
    small: Any = gathered(
        dataclasses.replace(one, storage={}),
        for_all_slots(one, scores),
        None,
        layers,
        jnp.broadcast_to(most, (config.num_layers, 1, config.num_kv_heads)),
        pool=one.storage,
        pages=table[None],
        config=config.replace(addressing=kept),
        **_PROTECTED,
    )
    positions = positions.at[:, row].set(small.index.positions[:, 0])
    return cache.with_groups([dataclasses.replace(pool, storage=small.storage)]), positions


@functools.partial(jax.jit, donate_argnames="old")
def joined(
    old: Float[Array, "layers window heads head_dim"],
    new: Float[Array, "layers chunks some heads head_dim"],
    numbers: Int[Array, "2"],
) -> Float[Array, "layers window heads head_dim"]:
    """The newest queries after those of a chunk.

    Args:
      numbers: of the chunk, and of its tokens.
    """
    chunk, num_tokens = numbers
    window, own = old.shape[1], new[:, chunk]
    missing = window - own.shape[1]
    own = jnp.pad(own, ((0, 0), (missing, 0), (0, 0), (0, 0)))
    stay = window - jnp.minimum(num_tokens, window)
    is_old = (jnp.arange(window, dtype=jnp.int32) < stay)[:, None, None]
    return jnp.where(is_old, jnp.roll(old, stay - window, axis=1), own)


@jax.jit
def row_of(positions: Positions, row: Int[Array, ""]) -> OfRow:
    return positions[:, row]


@functools.partial(jax.jit, donate_argnames="positions")
def with_row(positions: Positions, row: Int[Array, ""], own: OfRow) -> Positions:
    return positions.at[:, row].set(own)


def _is_share(keep: object) -> bool:
    return isinstance(keep, float | np.floating)


def check_policy(
    policy: Policy | str | None,
    keep: float | None,
    config: AnyConfig,
    *,
    spread: Spread | None,
    draft: AnyDraft | None,
) -> None:
    """Refuse what an engine cannot do with a policy.

    Raises:
      ConfigError: a cache, or something beside it, that goes with no policy.
      ValueError: one without the other, a name or a number that there is not, or a policy that
        looks at all queries of a prompt.
    """
    if policy is None or keep is None:
        raise one_without_the_other("Engine", policy, keep)
    window = getattr(named_policy(policy), "window", None)
    if window is None:
        raise ValueError(
            f"Engine: the policy {policy!r} looks at the queries of whole prompts, and those of "
            "pages that were found are not computed. Give one that looks at some of the newest and "
            "says at how many, in an attribute window, such as 'snapkv'; or take generate."
        )
    is_count = isinstance(keep, int | np.integer) and keep >= 1
    if not is_count and not (_is_share(keep) and 0 < keep <= 1):
        raise ValueError(
            "Engine: keep must be one number of tokens, at least 1, or a share of each prompt's in "
            f"(0, 1], got {keep!r}. generate takes a number for each layer."
        )
    for is_there, why in _reasons(config, spread, draft):
        if is_there:
            raise ConfigError(f"Engine: with a policy {why}")


def _reasons(
    config: AnyConfig, spread: Spread | None, draft: AnyDraft | None
) -> Iterator[tuple[Any, str]]:
    """What cannot be beside a policy, whether it is there, and what to do."""
    pool = config.groups[0]
    yield (
        spread is not None,
        "the cache must be on one device, where what was chosen is. Leave mesh= and axes= out; "
        "jaxkv.compress takes a cache that is spread, in a loop of your own.",
    )
    yield (
        isinstance(draft, HiddenStateDraft),
        "a draft must not be a module of the model, whose keys are in the cache's pages beside "
        "layers that attend, as MTP's are. Take jaxkv.drafts.NGram() or a DraftModel.",
    )
    yield (
        config.states or config.cross,
        "layers must keep nothing but keys and values of the text, and these keep a state or what "
        "an encoder made. Leave policy= and keep= out.",
    )
    yield (
        len(config.groups) > 1 or pool.addressing.window is not None,
        "all layers must be in one pool without a window, got "
        f"{[group.addressing for group in config.groups]}: what is kept would need other pages "
        "than what is not chosen from. generate takes a policy for such a model.",
    )
    yield (
        pool.newest is not None,
        f"the cache must have no newest tokens beside it, got {pool.newest}: they are of answers "
        "here, and generate's of prompts too. Leave newest= out.",
    )
