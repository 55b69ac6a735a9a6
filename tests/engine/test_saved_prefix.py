"""A prompt that was saved is found by requests, bit for bit as if the engine had computed it."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxkv
from tests.engine.pools import POOLS, engine
from tests.engine.requests import PAGE, PROMPTS, run

SAVED = PROMPTS[1][:-1]  # all tokens of a prompt that a hit may have


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


@pytest.mark.slow
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
        early = 0 if kind == "windows" else 32  # a window there begins before what the file holds
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


CENTRED = "rotated4-centred"
REFUSALS = {
    "another model": ({"model": "other"}, jaxkv.SnapshotError, "of another model: name"),
    "another codec": ({"codec": "int8"}, jaxkv.SnapshotError, "has codec .*Dense"),
    "another dtype": ({"codec": "bfloat16"}, jaxkv.SnapshotError, "has codec .*float32"),
    "other means": (
        {"saved": CENTRED, "codec": CENTRED},
        jaxkv.SnapshotError,
        "saved with other means",
    ),
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
        "saved": "float32",
        "codec": "float32",
        "model": "mine",
        "tokens": SAVED,
        "pages": 18,
        "rows": None,
    } | given
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 4}
    codec = jaxkv.codecs.CODECS[given["saved"]]
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
    filled = jax.tree.map(lambda leaf: leaf + 1, (pool.storage, pool.codec_state))
    pool = dataclasses.replace(pool, storage=filled[0], codec_state=filled[1])
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
