"""The compiled programs of an engine: prefill a chunk, decode a few tokens, move pages.

Each takes the cache donated, and the page tables from the host, which keeps the books. Shapes
depend on the engine alone, so it compiles each once in its life.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxkv.addressing import Kept
from jaxkv.attention.observed import observed
from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.kv_cache import KVCache
from jaxkv.cache.rearrange import copied, select, slots_of_pages
from jaxkv.cache.shards import by_row, everywhere, in_each_shard
from jaxkv.cache.state import StateCache
from jaxkv.cache.verbs import padded_after
from jaxkv.codecs import Leaves
from jaxkv.drafts.draft import HiddenStateDraft
from jaxkv.placement import scatter
from jaxkv.serve.decode import NOT_A_NUMBER, New, State
from jaxkv.serve.model_step import Model, ModelStep
from jaxkv.serve.sampling import RowSampling, Sampling, sample
from jaxkv.serve.speculate import Pace, Speculating, Static
from jaxkv.serve.speculate import decode as decode_with

# From the host, or traced.
Ints = Array | np.ndarray
# A page table for each group of layers.
Tables = tuple[Int[Ints, "rows pages"], ...]


class Chosen(NamedTuple):
    """Of each row, the tokens of its prompt that a policy chose; it holds no others of it."""

    positions: Int[Array, "layers batch kv_heads kept"]  # -1 for none
    # The position that its answer begins at; 0 for a row whose prompt stays whole.
    first: Int[Ints, " batch"]


class Rows(NamedTuple):
    """What a dispatch of decode starts from; rows without a request have no pages and no tokens."""

    last: Int[Ints, " batch"]  # token, whose successor is next
    remaining: Int[Ints, " batch"]  # tokens that may still come; 0 for a row that rests
    seeds: Int[Ints, " batch"]
    lengths: Int[Ints, " batch"]
    prompts: Int[Ints, " batch"]  # tokens that were prefilled; `Newest` ones come after
    stop_tokens: Int[Ints, "batch stops"]  # -1 for none
    known: Int[Ints, "batch steps"]  # tokens that came before a preemption; -1 where not known
    tables: Tables
    sampling: RowSampling | None = None  # of each; None where all are drawn as the step says
    chosen: Chosen | None = None  # None without a policy


@functools.partial(ModelStep, donated=[5])
def prefill(
    model: Model,
    tokens: Int[Ints, "chunks chunk"],
    num_tokens: Int[Array, " chunks"],
    start: Int[Ints, " chunks"],
    tables: Tables,
    of_rows: Int[Ints, " chunks"],
    cache: AnyCache,
    *,
    draft: HiddenStateDraft | None = None,
    window: int = 0,
) -> tuple[AnyCache, Float[Array, "layers chunks window heads head_dim"] | None]:
    """Compute chunks of prompts, as many on each data rank, each padded on the right.

    A chunk goes through the model as a sequence of its own. Several may be of one prompt: in each
    layer all write before any reads. Each begins at a multiple of the chunk, and all steps have
    one shape: so a page's bits depend on the tokens up to it and on nothing else, and a page found
    is a page computed. That is also why it neither reads nor writes `Newest` tokens, which stand
    in no page. State is of the chunk's request, and goes back to its row; where layers keep some,
    no two chunks are of one prompt. A draft that takes prompts too is given one more token, that
    after the chunk.

    Args:
      window: newest tokens of each chunk whose queries are wanted.

    Returns:
      The cache, and these queries; None if there is no window. The last is that of a chunk's last
      token; of a shorter chunk the first ones mean nothing.
    """
    tokens, num_tokens, start = by_row(cache, tuple(map(jnp.asarray, (tokens, num_tokens, start))))
    rows = _rows_for(cache, len(tokens))
    of_rows = jnp.asarray(of_rows)
    chosen = _plain(select(cache, rows))
    states = [each.of_rows(jnp.maximum(of_rows, 0)) for each in cache.states]
    cross = [each.of_rows(jnp.maximum(of_rows, 0)) for each in cache.cross]
    sequences = _placed(chosen.with_groups(chosen.groups, states, cross), tables, start, start)
    if draft is not None:
        model = draft.filling(model)
    sequences, queries = padded_after(sequences, num_tokens), None
    if window:
        _, sequences, of_layers = observed(model, window=window)(tokens, sequences)
        queries = jnp.stack([of_layers[layer] for layer in cache.config.layers_of(0)])
    else:
        _, sequences = model(tokens, sequences)
    groups = [
        dataclasses.replace(group, storage=written.storage).with_codec_state(written.codec_state)
        for group, written in zip(cache.groups, sequences.groups, strict=True)
    ]
    every = jnp.arange(len(of_rows), dtype=jnp.int32)
    states = [
        each.with_rows(of_rows, written, every)
        for each, written in zip(cache.states, sequences.states, strict=True)
    ]
    return cache.with_groups(groups, states), queries


@functools.partial(ModelStep, donated=[1], few_rows=True)
def decode(
    model: Model,
    rows: Rows,
    cache: AnyCache,
    *,
    sampling: Sampling,
    num_steps: int,
    kept: Kept | None = None,
) -> tuple[AnyCache, New]:
    """Up to ``num_steps`` tokens of each row that has any remaining.

    Args:
      kept: how rows are addressed of which some tokens were ``chosen``.
    """
    rows = by_row(cache, jax.tree.map(jnp.asarray, rows))
    seeds, how = jnp.asarray(rows.seeds), _asked(rows, sampling)

    def unfinished(carry: Any) -> Any:
        step, _, remaining, *_ = carry
        return (step < num_steps) & (remaining > 0).any()

    def one_step(carry: Any) -> Any:
        step, last, remaining, cache, new = carry
        active = remaining > 0
        # A row that rests goes through the model with the others, as padding.
        cache = padded_after(cache, active.astype(jnp.int32))
        logits, cache = model(last[:, None], cache)
        cache = padded_after(cache, None)
        token, logprob = sample(logits[:, -1], how, seeds=seeds, positions=cache.lengths)
        known = rows.known[:, step]
        token = jnp.where(known >= 0, known, token)
        failed = jnp.isnan(logprob)
        stopped = failed | (token[:, None] == rows.stop_tokens).any(axis=-1)
        found = jnp.where(failed, NOT_A_NUMBER, token)
        new = New(
            new.tokens.at[step].set(jnp.where(active, found, -1)),
            new.logprobs.at[step].set(logprob),
        )
        remaining = jnp.where(active & ~stopped, remaining - 1, 0)
        return step + 1, jnp.where(active, token, last), remaining, cache, new

    shape = (num_steps, len(rows.last))
    new = New(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))
    begun = _as_rows_see_it(cache, rows, kept)
    *_, decoded, new = lax.while_loop(unfinished, one_step, (0, *rows[:2], begun, new))
    return _as_pool(decoded, cache, kept), everywhere(cache, new)


def _as_rows_see_it(cache: AnyCache, rows: Rows, kept: Kept | None) -> AnyCache:
    """The pool with the sequences of these rows: whole, or what was chosen and what came since."""
    if kept is None:
        return _placed(cache, rows.tables, rows.lengths, rows.prompts)
    (pool,), (table,), chosen = cache.groups, rows.tables, rows.chosen
    assert chosen is not None, "it comes with an addressing for it"
    lengths = jnp.asarray(rows.lengths)
    index = kept.init(pool.config.max_context_length, pool.config.batch_size)
    assert index.pages is not None
    since = index.pages.with_table(jnp.asarray(table)).with_lengths(lengths - chosen.first)
    index = dataclasses.replace(index, lengths=lengths, positions=chosen.positions, within=since)
    config = pool.config.replace(addressing=kept)
    return cache.with_groups([dataclasses.replace(pool, index=index, config=config)])


def _as_pool(cache: AnyCache, pool: AnyCache, kept: Kept | None) -> AnyCache:
    """The other way round: the pool, with what rows wrote."""
    if kept is None:
        return cache
    (group,), (written,) = pool.groups, cache.groups
    return pool.with_groups([dataclasses.replace(group, storage=written.storage)])


def _asked(rows: Rows, sampling: Sampling) -> Sampling | RowSampling:
    """How tokens of these rows are drawn."""
    return sampling if rows.sampling is None else rows.sampling


class Drafting(NamedTuple):
    """What an engine with a draft knows from one dispatch to the next."""

    pace: Pace
    draft: Any  # what it remembers


@functools.partial(ModelStep, donated=[1, 3], few_rows=True)
def speculate(
    model: Model,
    rows: Rows,
    drafting: Drafting,
    arrays: Sequence[Array],
    cache: AnyCache,
    text: Int[Array, "batch room"],
    *,
    draft: Static,
    num_guesses: int,
    sampling: Sampling,
    num_steps: int,
    kept: Kept | None = None,
) -> tuple[AnyCache, New, Drafting, tuple[Array, Array]]:
    """`decode` with a draft: as many tokens, in as many steps or fewer.

    Args:
      arrays: of the draft.
      text: tokens of each row so far.
      kept: as for `decode`.

    Returns:
      Last, how many steps and guesses there were.
    """
    rows, text = by_row(cache, (jax.tree.map(jnp.asarray, rows), text))
    last, remaining, seeds, stop_tokens, known = map(
        jnp.asarray, (rows.last, rows.remaining, rows.seeds, rows.stop_tokens, rows.known)
    )
    state = State(last, jnp.minimum(remaining, num_steps), seeds)
    begun = Speculating.begin(state, text, drafting.pace, drafting.draft)
    now, decoded, new = decode_with(
        model,
        begun,
        draft.whole(arrays),
        _as_rows_see_it(cache, rows, kept),
        stop_tokens,
        known,
        num_guesses=num_guesses,
        sampling=_asked(rows, sampling),
        num_steps=num_steps,
    )
    counts = everywhere(cache, (now.steps.sum(), now.num_guesses.sum()))
    return _as_pool(decoded, cache, kept), new, Drafting(now.pace, now.draft), counts


@functools.partial(jax.jit, donate_argnames="cache")
def copy(
    sources: Sequence[Int[Ints, " copies"]],
    destinations: Sequence[Int[Ints, " copies"]],
    cache: AnyCache,
) -> AnyCache:
    """Copy pages within each of the cache's `pools_of`; a destination of -1 is skipped.

    Of arrays of pages, here and below, each data rank has its part, in order.
    """
    pools = [
        copied(pool, *map(jnp.asarray, pages))
        for pool, *pages in zip(pools_of(cache), sources, destinations, strict=True)
    ]
    return _with_pools(cache, pools)


@functools.partial(jax.jit, donate_argnames="cross")
def seat_cross(
    cross: tuple[KVCache, ...], row: Int[Ints, ""], ones: tuple[KVCache, ...] | None
) -> tuple[KVCache, ...]:
    """What cross-attention of a row reads from now on: that of a batch of one; nothing if None."""
    row = jnp.asarray(row)

    def seated(each: KVCache, one: KVCache | None) -> KVCache:
        if one is None:
            return each.with_lengths(each.lengths.at[row].set(0))
        first = row * each.index.extent
        storage = {
            name: lax.dynamic_update_slice_in_dim(leaf, one.storage[name], first, axis=2)
            for name, leaf in each.storage.items()
        }
        lengths = each.lengths.at[row].set(one.lengths[0])
        return dataclasses.replace(each.with_lengths(lengths), storage=storage)

    return tuple(map(seated, cross, ones or (None,) * len(cross)))


States = tuple[StateCache, ...]


@functools.partial(jax.jit, donate_argnames="to")
def move_states(
    source: States, sources: Int[Ints, " copies"], to: States, rows: Int[Ints, " copies"]
) -> States:
    """States of one batch into rows of another; a row of -1 is skipped."""
    sources, rows = jnp.asarray(sources), jnp.asarray(rows)
    pairs = zip(to, source, strict=True)
    return tuple(each.with_rows(rows, other, sources) for each, other in pairs)


@functools.partial(jax.jit, donate_argnames="states")
def copy_state(states: States, source: Int[Ints, ""], row: Int[Ints, ""]) -> States:
    """The state of one row in another too."""
    one, other = jnp.asarray(source)[None], jnp.asarray(row)[None]
    return tuple(each.with_rows(other, each, one) for each in states)


@jax.jit
def read(pages: Sequence[Int[Ints, " pages"]], cache: AnyCache) -> tuple[Leaves, ...]:
    """What pages of each pool hold, ``[layers, sides, pages * page_size, ...]``; any for -1."""
    return tuple(
        _read(pool, jnp.asarray(own)) for pool, own in zip(pools_of(cache), pages, strict=True)
    )


@in_each_shard((None, None, "batch", "heads"))
def _read(pool: KVCache, numbers: Int[Array, " pages"]) -> Leaves:
    slots = slots_of_pages(pool, jnp.maximum(numbers, 0))
    return {name: leaf.at[:, :, slots].get(mode="clip") for name, leaf in pool.storage.items()}


@functools.partial(jax.jit, donate_argnames="cache")
def write(
    pages: Sequence[Int[Ints, " pages"]], contents: Sequence[Leaves], cache: AnyCache
) -> AnyCache:
    """The inverse of `read`, of one rank's contents; a page of -1 is skipped."""
    given = zip(pools_of(cache), pages, contents, strict=True)
    return _with_pools(cache, [_written(pool, jnp.asarray(own), each) for pool, own, each in given])


@in_each_shard()
def _written(pool: KVCache, numbers: Int[Array, " pages"], contents: Leaves) -> KVCache:
    slots = slots_of_pages(pool, numbers)
    storage = {name: scatter(leaf, slots, contents[name]) for name, leaf in pool.storage.items()}
    return dataclasses.replace(pool, storage=storage)


def without_codec_state(cache: AnyCache) -> AnyCache:
    """A pool whose codec's state was never set."""

    def unset(group: KVCache) -> KVCache:
        newest = None if group.newest is None else unset(group.newest)
        state = jax.tree.map(jnp.zeros_like, group.codec_state)
        return dataclasses.replace(group, codec_state=state, newest=newest)

    return cache.with_groups([unset(group) for group in cache.groups])


def pools_of(cache: AnyCache) -> tuple[KVCache, ...]:
    """The pool of each group, and then their `Newest` tokens, where a page is that of a row."""
    newest = [
        dataclasses.replace(group.newest, spread=group.spread)
        for group in cache.groups
        if group.newest is not None
    ]
    return *cache.groups, *newest


def _with_pools(cache: AnyCache, pools: Sequence[KVCache]) -> AnyCache:
    num_groups = len(cache.groups)
    newest = (dataclasses.replace(each, spread=None) for each in pools[num_groups:])
    groups = [
        group if group.newest is None else dataclasses.replace(group, newest=next(newest))
        for group in pools[:num_groups]
    ]
    return cache.with_groups(groups)


def _plain(cache: AnyCache) -> AnyCache:
    """The cache without its `Newest` tokens."""
    groups = [
        dataclasses.replace(group, config=group.config.replace(newest=None), newest=None)
        for group in cache.groups
    ]
    return cache.with_groups(groups)


def _rows_for(cache: AnyCache, count: int) -> list[int]:
    """Rows of the cache that stand for this many chunks, each on its data rank."""
    spread, batch = cache.groups[0].spread, cache.config.batch_size or 1
    ranks = 1 if spread is None else spread.size("batch")
    own, each = batch // ranks, count // ranks
    return [rank * own + chunk % own for rank in range(ranks) for chunk in range(each)]


def _placed(
    cache: AnyCache, tables: Tables, lengths: Int[Ints, " rows"], prompts: Int[Ints, " rows"]
) -> AnyCache:
    """The cache with the sequences that the host says."""
    groups = [
        group.with_pages(*map(jnp.asarray, (table, lengths, prompts)))
        for group, table in zip(cache.groups, tables, strict=True)
    ]
    return cache.with_groups(
        groups, [each.standing_at(jnp.asarray(lengths)) for each in cache.states]
    )
