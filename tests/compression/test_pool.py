"""A sequence of a shared pool, compressed into other pages of the same pool."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.paging import PageAllocator
from jaxkv.policies import KeyDiff, SinksAndRecent
from tests.compiled import assert_in_place, compiled_as_users_do
from tests.oracle import config_of, jit, random_step, step

PAGE, NUM_PAGES, KEEP, NEW = 4, 24, 6, 5
SHARED, PROMPT = list(range(8)), 13  # tokens of two full pages, and of each prompt
HEADS = 4


@functools.cache
def pool_of(codec, newest=None):
    """Two sequences that share two pages, and the books."""
    addressing = jaxkv.Paged(PAGE, NUM_PAGES)
    fields = {"num_layers": 1, "max_context_length": 24, "head_dim": 16, "newest": newest}
    pool = jaxkv.create(
        config_of(codec, "paged", batch_size=2, **fields).replace(addressing=addressing)
    )
    books = PageAllocator(NUM_PAGES, page_size=PAGE)
    rng = np.random.default_rng(0)
    append = jit(lambda row, *arrays: step(row, *arrays)[0])
    arrays = random_step(pool.config.replace(batch_size=1), PROMPT, heads=HEADS)
    for name in "ab":
        prompt = books.prompt([*SHARED, *rng.integers(9, 99, PROMPT + 3 - len(SHARED))])
        hit = books.admit(name, prompt).num_cached
        row = view(pool, books, [name], [0])  # the same vectors: the second's first are the first's
        pool = dataclasses.replace(pool, storage=append(row, *arrays).storage)
        books.advance(name, PROMPT)
        arrays = tuple(
            np.concatenate([array[:, :, : len(SHARED)], other[:, :, len(SHARED) :]], axis=2)
            for array, other in zip(
                arrays, random_step(row.config, PROMPT, heads=HEADS, seed=1), strict=True
            )
        )
    assert hit == len(SHARED)
    return pool, books


def view(pool, books, names, lengths):
    """Sequences of a pool, as a cache of their own over its buffers."""
    row = jaxkv.select(pool, [0] * len(names))
    table = np.full(row.index.table.shape, -1, np.int32)
    for own, name in zip(table, names, strict=True):
        pages = books.table(name)
        own[: len(pages)] = pages
    return row.with_pages(jnp.asarray(table), jnp.asarray(lengths, jnp.int32))


@functools.partial(jit, static_argnames="evicts")
def next_step(cache, *arrays, evicts):
    if evicts:
        cache = jaxkv.evict(cache, KeyDiff(), sinks=1)
    return step(cache, *arrays)


def fresh(books, name):
    """Pages for what is kept and what is new: of no prompt that others could find."""
    books.admit(name, books.prompt([0] * (KEEP + NEW), reuse=False))
    return books.table(name)


def copied(cache):
    return jax.tree.map(lambda leaf: leaf.copy(), cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codec", "evicts", "newest"),
    [("int8", False, None), ("bfloat16", True, None), ("int8", False, jaxkv.Newest(3))],
)
def test_it_goes_on_as_one_with_pages_of_its_own(codec, evicts, newest):
    pool, books = pool_of(codec, newest)
    pool = copied(pool)
    alone = view(pool, books, ["a"], [PROMPT])
    alone = jaxkv.compress(alone, KeyDiff(), keep=KEEP, new=NEW, sinks=1)
    held = books.usage().held_pages
    pages = fresh(books, "small")
    before = {name: np.array(leaf) for name, leaf in pool.storage.items()}
    row = view(pool, books, ["a"], [PROMPT])
    small = jaxkv.compress(row, KeyDiff(), keep=KEEP, new=NEW, sinks=1, pages=pages[None])
    assert next(iter(pool.storage.values())).is_deleted(), "it is the pool that is written"
    others = np.setdiff1d(np.arange(NUM_PAGES), pages)
    tokens = 2 * NEW if evicts else NEW
    for token in range(tokens):
        arrays = random_step(small.config, 1, heads=HEADS, seed=9 + token)
        (small, output), (alone, expected) = (
            next_step(each, *arrays, evicts=evicts) for each in (small, alone)
        )
        assert np.asarray(output).tobytes() == np.asarray(expected).tobytes()
    assert small.lengths.tolist() == [PROMPT + tokens]
    for name, leaf in small.storage.items():  # of nobody else, shared or not
        after = np.asarray(leaf).reshape(*leaf.shape[:2], NUM_PAGES, PAGE, *leaf.shape[3:])
        was = before[name].reshape(after.shape)
        assert after[:, :, others].tobytes() == was[:, :, others].tobytes()
    books.release("a")
    books.check()
    # b has the two shared pages and its own; a had three pages of its own.
    assert books.usage().held_pages == held - 2 + len(pages)
    books.release("small")
    books.admit("a", books.prompt([*SHARED, *range(9, 17)]))


def test_a_pool_in_host_memory_stays_there():
    pool, books = pool_of("int8")
    pages = np.array([[21, 20, 23]], np.int32)
    compress = jit(lambda row: jaxkv.compress(row, KeyDiff(), keep=KEEP, new=NEW, pages=pages))
    small = compress(view(pool, books, ["b"], [PROMPT]))
    away = compress(view(jaxkv.offload(pool), books, ["b"], [PROMPT]))
    for mine, other in zip(jax.tree.leaves(away), jax.tree.leaves(small), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert away.storage["codes"].sharding.memory_kind == "pinned_host"


REFUSALS = {
    "a page of its own": ({"pages": [[0, 21, 22]]}, r"do not have yet, got \[0, 21, 22\]"),
    "a page twice": ({"pages": [[21, 21, 22]]}, "different ones of 24"),
    "no such page": ({"pages": [[21, 22, 24]]}, "different ones of 24"),
    "too few": ({"pages": [[21, 22]]}, r"int32\[1, 3\], for 11 slots per sequence in pages of 4"),
    "a number a layer": ({"keep": (6, 5)}, "keep one number of tokens"),
    "a number a head": ({"keep": [[6, 5], [5, 6]]}, "keep one number of tokens"),
    "no pool": ({"addressing": jaxkv.Paged(PAGE)}, "pages are of a shared pool"),
}


@pytest.mark.parametrize("change", REFUSALS.values(), ids=REFUSALS)
def test_pages_that_do_not_fit_are_refused(change):
    given, message = {"pages": [[21, 22, 23]], "keep": KEEP} | change[0], change[1]
    config = jaxkv.KVCacheConfig(2, 24, 2, 16, batch_size=1)
    pool = jaxkv.create(
        config.replace(addressing=given.pop("addressing", jaxkv.Paged(PAGE, NUM_PAGES)))
    )
    index = pool.index.with_table(jnp.arange(6, dtype=jnp.int32)[None]).with_lengths(
        jnp.array([13])
    )
    row = dataclasses.replace(pool, index=index)
    with pytest.raises(ValueError, match=message):
        jaxkv.compress(row, jnp.zeros((2, 1, 2, 24)), new=NEW, **given)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(row))


def test_it_is_in_place():
    addressing = jaxkv.Paged(16, num_pages=4096)
    config = jaxkv.KVCacheConfig(2, 1024, 2, 32, 1, jaxkv.Dense("float32"), addressing)
    row = jax.eval_shape(lambda: jaxkv.create(config))
    pages = jax.ShapeDtypeStruct((1, 9), jnp.int32)

    @functools.partial(jax.jit, donate_argnums=0)
    def compress(storage, index, pages):
        row = jaxkv.KVCache(storage, index, config)
        return jaxkv.compress(row, SinksAndRecent(), keep=128, new=16, pages=pages)

    compiled = compiled_as_users_do(compress.lower(row.storage, row.index, pages))
    assert_in_place(compiled, row, temp_share=0.1)
