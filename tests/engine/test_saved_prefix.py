"""A prompt that was saved is found by requests, bit for bit as if the engine had computed it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.model_shape import Shape
from tests.engine.requests import CHUNK, PAGE, PROMPTS, run

SAVED = PROMPTS[1][:-1]  # all tokens of a prompt that a hit may have


embedding = jnp.asarray(np.random.default_rng(0).standard_normal((64, 32)), jnp.float32)


def model(tokens, cache):
    x = embedding[tokens]
    for layer in range(2):
        heads = x.reshape(*x.shape[:-1], 2, 16)
        cache = jaxkv.append(cache, heads, heads, layer=layer)
        x = x + 0.5 * jaxkv.attend(cache, heads, layer=layer).reshape(x.shape)
    return x @ embedding.T, jaxkv.advance(cache, tokens.shape[-1])


SHAPE = {"num_kv_heads": 2, "head_dim": 16}
FIELDS = {"max_context_length": 96, "batch_size": 2, "addressing": jaxkv.Paged(PAGE, 24)}
POOLS = {
    "int8": jaxkv.KVCacheConfig(2, codec=jaxkv.Int8(), **SHAPE, **FIELDS),
    # Of layers that see 20 tokens the file and the pool have the end alone; means come along.
    "windows, centred": Shape(2, **SHAPE)
    .sliding(20, full_every=2)
    .cache_config(codec=jaxkv.Centred(jaxkv.Int8()), chunk=CHUNK, **FIELDS),
}


def engine(config, **options):
    options = {"prefill_chunk": CHUNK, "decode_steps": 4} | options
    return jaxkv.Engine(model, config, **options)


def save(running, path, prompt):
    """What a request has in its pages of its prompt."""
    request = running.submit(prompt, max_new_tokens=9)
    while not request.tokens:
        running.step()
    row = jaxkv.select(running.cache, [running._batch.rows.index(request)])
    row = jaxkv.truncate(row, len(prompt) - 1)
    jaxkv.save(row, path, tokens=[prompt[:-1]], model="mine")
    running.run()


def load(running, path):
    running.cache = jaxkv.load_prefix(path, running.cache, running.pages, model="mine")
    running.pages.check()


@pytest.mark.parametrize("kind", POOLS)
def test_a_hit_on_a_file_equals_a_miss_bit_for_bit(tmp_path, kind):
    config = POOLS[kind]

    def answers(running, numbers):
        requests = {n: running.submit(PROMPTS[n], max_new_tokens=9, seed=n) for n in numbers}
        run(running)
        return {n: (request.tokens, request.logprobs) for n, request in requests.items()}, [
            request.num_cached for request in requests.values()
        ]

    with engine(config, sharing=False) as fresh:
        save(fresh, tmp_path / "file", PROMPTS[1])
        expected, _ = answers(fresh, (1, 3, 4, 5))
    with engine(config) as used:
        load(used, tmp_path / "file")
        assert used.pages.usage().by_use["sequences"] == 0
        got, num_cached = answers(used, (1, 5, 3))
        early = 32 if kind == "int8" else 0  # a window there begins before what the file holds
        assert num_cached == [42, early, 40]
        assert used.figures.prefilled_tokens == 50 - early
        assert got.items() <= expected.items()
        # Once more, among pages that others hold.
        used.pages.forget()
        running = used.submit(PROMPTS[4], max_new_tokens=9, seed=4)
        used.step()
        load(used, tmp_path / "file")
        load(used, tmp_path / "file")  # it is there: nothing is written
        got, num_cached = answers(used, (3, 1))
        assert num_cached == [40, 42]
        assert got.items() <= expected.items()
        assert (running.tokens, running.logprobs) == expected[4]


def bits(cache):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(cache)]


REFUSALS = {
    "another model": ({"model": "other"}, jaxkv.SnapshotError, "of another model: name"),
    "another codec": ({"codec": "int8"}, jaxkv.SnapshotError, "has codec .*Dense"),
    "another dtype": ({"codec": "bfloat16"}, jaxkv.SnapshotError, "has codec .*float32"),
    "no tokens": ({"tokens": None}, jaxkv.SnapshotError, "1 sequences, without their tokens"),
    "two sequences": (
        {"rows": 2, "tokens": [SAVED, SAVED]},
        jaxkv.SnapshotError,
        "holds 2 sequences",
    ),
    "a small pool": ({"pages": 5}, jaxkv.CacheFullError, "the whole pool has 5"),
    "a short context": ({"context": 40}, jaxkv.CacheFullError, "longer than the context of 40"),
    "a pool in use": ({"held": 15}, jaxkv.PoolFullError, "3 of 18 pages are free: no room for 43"),
    "no sharing": ({"sharing": False}, ValueError, "sharing=False"),
    "other books": ({"books": 17}, TypeError, r"shared pools of \[17\] pages"),
}


@pytest.mark.parametrize("change", REFUSALS.values(), ids=REFUSALS)
def test_what_is_refused_leaves_the_pool_as_it_was(tmp_path, change):
    given, error, message = change
    given = {
        "codec": "float32",
        "model": "mine",
        "tokens": SAVED,
        "pages": 18,
        "rows": None,
    } | given
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 4}
    codec = jaxkv.Dense("float32")
    saved = jaxkv.KVCacheConfig(
        **shape, max_context_length=64, codec=codec, batch_size=given["rows"]
    )
    prompt = jaxkv.advance(jaxkv.create(saved), len(SAVED))
    jaxkv.save(prompt, tmp_path / "file", tokens=given["tokens"], model="mine")

    config = jaxkv.KVCacheConfig(
        **shape,
        max_context_length=given.get("context", 64),
        batch_size=2,
        codec=jaxkv.codecs.CODECS[given["codec"]],
        addressing=jaxkv.Paged(PAGE, given["pages"]),
    )
    pool = jaxkv.create(config)
    pool = dataclasses.replace(pool, storage=jax.tree.map(lambda leaf: leaf + 1, pool.storage))
    pages = jaxkv.paging.PageAllocator(
        given.get("books", given["pages"]), page_size=PAGE, sharing=given.get("sharing", True)
    )
    if "held" in given:
        pages.admit("held", pages.prompt(range(given["held"] * PAGE)))
    before = bits(pool), pages.usage()
    with pytest.raises(error, match=message):
        jaxkv.load_prefix(tmp_path / "file", pool, pages, model=given["model"])
    assert (bits(pool), pages.usage()) == before
    pages.check()


def test_other_means_are_refused(tmp_path):
    config = POOLS["windows, centred"]
    with engine(config) as running, engine(config) as other:
        save(running, tmp_path / "file", PROMPTS[1])
        other.submit(PROMPTS[4], max_new_tokens=1)
        other.run()
        usage = other.pages.usage()
        with pytest.raises(jaxkv.SnapshotError, match="centred by other means"):
            load(other, tmp_path / "file")
        assert other.pages.usage().held_pages == usage.held_pages
        other.pages.check()
