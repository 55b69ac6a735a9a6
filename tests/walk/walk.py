"""A cache and the history of what it was given, moved by the same verbs.

Each method is a verb, and checks what it gives. Where jaxkv refuses, its error is passed on, and
nothing has changed.
"""

import copy
import itertools
import pathlib
import tempfile
import traceback
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.addressing import KeptIndex, PagedIndex
from jaxkv.compression.scoring import held_positions
from tests.oracle import OPTIONS, jit, padded
from tests.walk.caches import (
    CONVERTED,
    HEADS,
    KV_HEADS,
    LAYERS,
    MOST_ROWS,
    MOST_TOKENS,
    empty,
    free_pages,
    is_pool,
    table_of,
)
from tests.walk.history import History, part_of


class Call(NamedTuple):
    """How a step is taken. Each kind is compiled, so there are not too many.

    Attributes:
      padded: some of the tokens may not be real.
      jitted: inside jit, with the cache donated.
    """

    tokens: int = 1
    implementation: str | None = None
    options: str = "plain"
    padded: bool = False
    jitted: bool = False


_OPTIONS = ("implementation", "scale", "softcap", "window")
COMPILED = {
    "append": jit(jaxkv.append, donate_argnames="cache"),
    "append to a static layer": jit(jaxkv.append, donate_argnames="cache", static_argnames="layer"),
    "attend": jit(jaxkv.attend, static_argnames=_OPTIONS),
    "attend to a static layer": jit(jaxkv.attend, static_argnames=("layer", *_OPTIONS)),
    "advance": jit(jaxkv.advance, donate_argnames="cache"),
    "truncate": jit(jaxkv.truncate, donate_argnames="cache"),
    "select": jit(jaxkv.select),
    "evict": jit(
        jaxkv.evict,
        donate_argnames="cache",
        static_argnames=("policy", "tokens", "sinks", "recent"),
    ),
}


def largest_coordinate(keys, values, queries, positions):
    """A policy that scores tokens by what they are."""
    return keys[..., 0].T


POLICIES = {  # and what they say of a token, for each head
    largest_coordinate: lambda token, position: token.key[:, 0],
    jaxkv.policies.SinksAndRecent(sinks=2): lambda token, position: np.full(
        KV_HEADS, np.inf if position < 2 else position
    ),
}


def refused_by_jaxkv(error):
    """Whether an error was raised on purpose, and not somewhere deep in jax."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return pathlib.Path(last.filename).is_relative_to(pathlib.Path(jaxkv.__file__).parent)


class Walk:
    def __init__(self, config, seed=0):
        self.rng = np.random.default_rng(seed)
        self.cache, self.history = empty(config, self.rng), History(config)

    def copy(self):
        """The same cache, which is a value, and a history of its own."""
        walk = copy.copy(self)
        walk.history, walk.rng = self.history.copy(), copy.deepcopy(self.rng)
        return walk

    @property
    def batch_size(self):
        return self.cache.config.batch_size

    @property
    def num_rows(self):
        return self.batch_size or 1

    def of_batch(self, numbers):
        """An array with an element for each sequence, or a scalar for a single one."""
        numbers = np.asarray(numbers, np.int32)
        return numbers if self.batch_size else numbers[0]

    def run(self, verb, *arguments, jitted=False, **options):
        if not jitted:
            return getattr(jaxkv, verb)(self.cache, *arguments, **options)
        if "layer" in options and isinstance(self.cache, jaxkv.HybridCache):
            verb += " to a static layer"
        return COMPILED[verb](self.cache, *arguments, **options)

    def check(self):
        """What holds at any time."""
        jaxkv.check(self.cache)
        assert np.ravel(self.cache.lengths).tolist() == self.history.lengths
        assert self.cache.size_bytes == self.cache.config.size_bytes

    # The next tokens.

    def vectors(self, layer, tokens):
        """Queries, keys and values."""
        config = part_of(self.cache, layer)[0].config
        shapes = (
            (*config.batch_shape, tokens, heads, config.head_dim)
            for heads in (HEADS, config.num_kv_heads, config.num_kv_heads)
        )
        return [self.rng.standard_normal(shape, np.float32) for shape in shapes]

    def step(self, call, missing=(0,) * MOST_ROWS, or_another=False):
        """One step of a model: each layer in turn, and then the length moves once.

        Args:
          or_another: implementation, where the one that is named cannot serve.
          missing: of each sequence, tokens that are padding, beside those that there is no room
            for.
        """
        counts, room = np.full(self.num_rows, call.tokens), self.history.rooms
        room -= self.history.lengths
        if call.padded:
            counts = np.maximum(np.minimum(counts, room) - missing[: self.num_rows], 0)
        elif (counts > room).any():
            return self._overfill(call.tokens)
        num_tokens = self.of_batch(counts) if call.padded else None
        how = {"num_tokens": num_tokens, "jitted": call.jitted}
        options = OPTIONS[call.options]
        for layer in range(LAYERS):
            real = queries, keys, values = self.vectors(layer, call.tokens)
            given = [padded(array, self.of_batch(counts), np.nan) for array in real]
            self.cache = self.run("append", *given[1:], layer=layer, **how)
            arguments = {"queries": given[0], "layer": layer, **how, **options}
            output = self._attend(call.implementation, or_another, **arguments)
            self.history.add(self.cache, layer, keys, values, counts)
            expected = self.history.attend(layer, queries, counts, **options)
            np.testing.assert_allclose(output, expected, rtol=2e-5, atol=2e-5)
        added = call.tokens if num_tokens is None else num_tokens
        self.cache = self.run("advance", added, jitted=call.jitted)
        return None

    def _attend(self, implementation, or_another, **arguments):
        try:
            return self.run("attend", implementation=implementation, **arguments)
        except ValueError as error:
            if not or_another or "cannot serve this call" not in str(error):
                raise
            return self.run("attend", **arguments)

    def _overfill(self, tokens):
        """More than there is room for: refused or, inside jit, dropped, noticed and taken back."""
        lengths = self.history.lengths
        for layer in range(LAYERS):
            _, *new = self.vectors(layer, tokens)
            with pytest.raises(jaxkv.CacheFullError):
                jaxkv.append(self.cache, *new, layer=layer)
            counts = self.of_batch([tokens] * self.num_rows)
            how = {"num_tokens": counts, "jitted": True}
            self.cache = self.run("append", *new, layer=layer, **how)
            self.history.add(self.cache, layer, *new, [tokens] * self.num_rows)
        self.cache = self.run("advance", counts, jitted=True)
        with pytest.raises(jaxkv.CacheFullError):
            jaxkv.check(self.cache)
        self.truncate(lengths)

    def read(self):
        """What slots say that they hold is what was written, and all that can be seen is held."""
        for layer, rows in enumerate(self.history.rows):
            vectors = [np.asarray(side, np.float64) for side in jaxkv.layer(self.cache, layer)]
            keys, values = (side.reshape(len(rows), *side.shape[-3:]) for side in vectors)
            claims = self.positions(layer)
            for sequence, head in itertools.product(range(len(rows)), range(KV_HEADS)):
                claimed = claims[sequence, head]
                slots = np.flatnonzero(claimed >= 0)
                tokens = [rows[sequence].tokens[position] for position in claimed[slots]]
                for side, array in enumerate((keys, values)):
                    expected = [token[side][head] for token in tokens]
                    found = array[sequence, slots, head]
                    np.testing.assert_allclose(found, np.reshape(expected, found.shape), rtol=1e-5)

    def positions(self, layer):
        """What each slot of each head says it holds, ``[rows, heads, slots]``."""
        part, number = part_of(self.cache, layer)
        positions = np.asarray(held_positions(part, number))
        return positions.reshape(self.num_rows, -1, positions.shape[-1])

    # Fewer of them.

    def truncate(self, lengths, jitted=False):
        """Inside jit only what is sure to be possible, for nothing can be refused there."""
        sure = all(map(self.history.can_roll_back, self.history.rows[0], lengths))
        try:
            self.cache = self.run("truncate", self.of_batch(lengths), jitted=jitted and sure)
        except ValueError:
            assert not sure
            raise
        self.history.truncate(lengths)
        self._assign_anew()

    def reset(self):
        self.cache = jaxkv.reset(self.cache)
        self.history.truncate([0] * self.num_rows)
        self._assign_anew()

    def compress(self, keep, new=5, policy=largest_coordinate, in_pool=False):
        """Keep so many tokens: one number, or one a layer, or one a layer and head.

        Args:
          in_pool: whether in free pages of the pool that the cache is in.
        """
        options = {"keep": keep, "new": new, "sinks": 1, "recent": 1}
        if in_pool:
            options["pages"] = self._free_pages(new + keep)
        self.cache = jaxkv.compress(self.cache, policy, **options)
        of_layers = np.broadcast_to(np.transpose(keep), (KV_HEADS, LAYERS)).T
        for layer, limits in enumerate(of_layers):
            part, _ = part_of(self.cache, layer)
            if isinstance(part.index, KeptIndex):
                self.history.limit(layer, part.config.addressing, limits)
        self._chosen([True] * self.num_rows, policy)

    def _free_pages(self, slots):
        shape = self.cache.config.batch_shape
        if not is_pool(self.cache):
            return np.zeros((*shape, 1), np.int32)
        pages = -(-slots // self.cache.index.page_size)
        return free_pages(self.cache, self.rng, (*shape, pages))

    def evict(self, jitted=False):
        """Wherever there is no room for the most that a step brings."""
        options = {"policy": largest_coordinate, "sinks": 1, "recent": 1}
        self.cache = self.run("evict", **options, tokens=MOST_TOKENS, jitted=jitted)
        self._chosen(self.history.full(MOST_TOKENS), largest_coordinate)

    def _chosen(self, full, policy):
        held = {
            layer: [
                [set(head[head >= 0].tolist()) for head in row] for row in self.positions(layer)
            ]
            for layer in range(LAYERS)
            if isinstance(part_of(self.cache, layer)[0].index, KeptIndex)
        }
        self.history.choose(held, full, POLICIES[policy], sinks=1, recent=1)

    # Whole sequences.

    def select(self, rows, jitted=False):
        self._rearranged(self.run("select", np.asarray(rows, np.int32), jitted=jitted), rows)

    def fork(self, copies):
        rows = np.repeat(np.arange(self.num_rows), copies)
        self._rearranged(jaxkv.fork(self.cache, copies), rows)

    def _rearranged(self, cache, rows):
        self.cache = cache
        self.history.select(rows)
        if is_pool(cache):  # sequences go on in pages of their own
            old = cache.index.table
            new = jnp.where(old < 0, -1, free_pages(cache, self.rng, old.shape))
            self.cache = jaxkv.copy_pages(cache, old.ravel(), new.ravel())
            self._assign(new)

    def _assign(self, table):
        shape = self.cache.index.table.shape
        first = jnp.asarray(self.of_batch(self.history.fine_from))
        table = jnp.asarray(table, jnp.int32).reshape(shape)
        self.cache = self.cache.with_pages(table, self.cache.lengths, first)

    def give_back(self):
        """Of a pool, the pages that are before the window of all queries to come."""
        if not self._gives_back():
            return
        index, table = self.cache.index, table_of(self.cache)
        ends = (np.arange(table.shape[-1]) + 1) * index.page_size
        passed = ends <= np.array(self.history.lengths)[:, None] - (index.window - 1)
        self._assign(np.where(passed, -1, table))
        for rows in self.history.rows:
            for row, number in zip(rows, passed.sum(-1), strict=True):
                row.lost_before = max(row.lost_before, number * index.page_size)

    def _gives_back(self):
        return is_pool(self.cache) and self.cache.index.window is not None

    def _assign_anew(self):
        """Pages that were given back before a rollback to them."""
        if not self._gives_back():
            return
        table = table_of(self.cache)
        next_page = np.array(self.history.lengths)[:, None] // self.cache.index.page_size
        missing = (table < 0) & (np.arange(table.shape[-1]) >= next_page)
        free = np.asarray(free_pages(self.cache, self.rng, table.shape))
        self._assign(np.where(missing, free, table))

    def copy_pages(self, page):
        """From the first sequence over the same page of the last, if both hold the same."""
        index, sources = getattr(self.cache, "index", None), jnp.zeros(1, jnp.int32)
        destinations = sources
        if isinstance(index, PagedIndex) and self._same_tokens(page * index.page_size, index):
            table = table_of(self.cache)
            sources, destinations = jnp.asarray(table[[0, -1], page])[:, None]
        self.cache = jaxkv.copy_pages(self.cache, sources, destinations)

    def _same_tokens(self, start, index):
        pages = [
            [id(token) for token in row.tokens[start : start + index.page_size]]
            for rows in self.history.rows
            for row in (rows[0], rows[-1])
        ]
        return pages[::2] == pages[1::2] and all(len(page) == index.page_size for page in pages)

    # Elsewhere and back.

    def offload(self):
        self.cache = jaxkv.offload(self.cache)

    def prefetch(self):
        self.cache = jaxkv.prefetch(self.cache)

    def save_and_load(self, into=False, order=None, convert=False):
        """To a new cache, or to rows of one that was full of other things.

        Args:
          order: the row of the other cache that each sequence goes to.
          convert: to another addressing that holds as much, where there is one.
        """
        config, options, order = self.cache.config, {}, order or range(self.num_rows)
        if into:
            options = {"into": self._other(order), "rows": list(order)}
        elif convert:
            options = {"addressing": CONVERTED.get(getattr(config, "addressing", None))}
        with tempfile.TemporaryDirectory() as folder:
            jaxkv.save(self.cache, f"{folder}/cache")
            self.cache = jaxkv.load(f"{folder}/cache", **options)
        if into:
            self.history.select(np.argsort(order))
        elif is_pool(self.cache):  # it was empty, and a new pool has no pages yet
            self._assign(free_pages(self.cache, self.rng, self.cache.index.table.shape))

    def _other(self, order):
        """A cache of the same kind, with pages for what this one holds in another order."""
        other = empty(self.cache.config, self.rng)
        if is_pool(self.cache):
            table = np.where(table_of(self.cache) < 0, -1, table_of(other)[order])
            table = table[np.argsort(order)].reshape(other.index.table.shape)
            other = other.with_pages(jnp.asarray(table, jnp.int32), other.lengths)
        return other
