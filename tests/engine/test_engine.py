"""An engine that shares one pool among many requests, against each request run alone."""

import contextlib
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.models.shape import Shape
from jaxkv.serve import steps
from jaxkv.serve.model_step import Weights
from tests.decoders import sharp_decoder
from tests.engine.requests import (
    CHUNK,
    CONTEXT,
    HOT,
    NEW,
    PAGE,
    PAGES,
    PROMPTS,
    ROWS,
    engine,
    outcome,
    run,
    submit_all,
)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sampling", [jaxkv.Sampling(), HOT], ids=["greedy", "seeded"])
def test_tokens_are_those_of_each_request_alone(model, alone, sampling, rows):
    with engine(model, sampling=sampling, prefill_rows=rows) as running:
        requests = submit_all(running)
        run(running)
        assert [request.tokens for request in requests] == alone[sampling]
        assert all(request.finish_reason == "length" for request in requests)
        figures, usage = running.figures, running.pages.usage()
        assert figures.preemptions > 0
        assert figures.repeated_tokens > 0
        assert figures.generated_tokens == NEW * len(PROMPTS)
        assert sum(request.num_preemptions for request in requests) == figures.preemptions
        assert np.isfinite(np.concatenate([request.logprobs for request in requests])).all()
        assert usage.hit_tokens > 0
        assert usage.evictions > 0


def test_each_request_is_drawn_as_it_asks(model, alone):
    with engine(model) as running:
        first = running.submit(PROMPTS[0], max_new_tokens=NEW, seed=0)
        running.step()  # as the engine says, until one asks for another
        hot = [
            running.submit(prompt, max_new_tokens=NEW, seed=number, sampling=HOT)
            for number, prompt in enumerate(PROMPTS)
        ]
        cold = running.submit(PROMPTS[2], max_new_tokens=NEW, seed=2)
        running.step()
        child = running.fork(hot[0], seed=0)
        run(running)
        assert [first.tokens, cold.tokens] == [alone[jaxkv.Sampling()][n] for n in (0, 2)]
        assert [request.tokens for request in hot] == alone[HOT]
        assert child.tokens == hot[0].tokens
        with pytest.raises(TypeError, match=r"a sampling must be a jaxkv\.Sampling, got 'hot'"):
            running.submit([1], max_new_tokens=1, sampling="hot")


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_a_hit_equals_a_miss_bit_for_bit(model, codec):
    misses = {}
    for number in (1, 3, 5):
        with engine(model, codec=codec, sampling=HOT, sharing=False) as fresh:
            request, misses[number] = outcome(fresh, PROMPTS[number], number)
            assert request.num_cached == 0
    with engine(model, codec=codec, sampling=HOT) as used:
        hits = []
        # The same prompt again, one that goes on, one that parts early; then others take its
        # pages, a fork shares them, and it comes once more.
        for number in (1, 1, 5, 3, 4, 5, 1):
            if number == 4:
                parent = used.submit(PROMPTS[4], max_new_tokens=30)
                used.step()
                used.step()
                used.fork(parent, seed=8)
                used.run()
                continue
            request, got = outcome(used, PROMPTS[number], number)
            hits.append(request.num_cached)
            assert got[:2] == misses[number][:2]
            for name, leaf in misses[number][2].items():
                assert got[2][name].tobytes() == leaf.tobytes()
        assert hits[:4] == [0, 42, 32, 40]
        assert used.pages.usage().evictions > 0


def test_equal_prompts_at_once_are_computed_once(model):
    with engine(model) as running:
        requests = [running.submit(PROMPTS[1], max_new_tokens=4, seed=n) for n in range(4)]
        running.run()
        assert [request.num_cached for request in requests] == [0, 42, 42, 42]
        assert running.figures.prefilled_tokens == 42


def test_forks_go_on_from_where_they_parted(model, alone):
    with engine(model, sampling=HOT) as running:
        parent = running.submit(PROMPTS[1], max_new_tokens=NEW, seed=1)
        while len(parent.tokens) < 8:
            running.step()
        held = running.pages.usage().held_pages
        forks = [running.fork(parent, seed=seed) for seed in (1, 2, 3)]
        assert running.pages.usage().held_pages - held <= 2 * len(forks)
        late = running.fork(parent, seed=4)  # no row is free: it waits, and is computed again
        run(running)
        assert parent.tokens == forks[0].tokens == alone[HOT][1]
        assert all(fork.tokens[:8] == parent.tokens[:8] for fork in (*forks, late))
        assert len({tuple(request.tokens) for request in (*forks, late)}) == 4


def test_salts_keep_tenants_apart(model, alone):
    with engine(model) as running:
        for salt, cached in (("one", 0), ("two", 0), ("one", 42)):
            request = running.submit(PROMPTS[1], max_new_tokens=NEW, salt=salt)
            running.run()
            assert request.num_cached == cached
            assert request.tokens == alone[jaxkv.Sampling()][1]


def test_stop_tokens_limits_and_order_of_a_stream(model, alone):
    expected = alone[jaxkv.Sampling()][2]
    stop = next(token for token in expected if token != expected[0])
    end = expected.index(stop) + 1
    engines = next(token for token in range(64) if token not in expected)
    with engine(model, stop_tokens=[engines]) as running:
        stopped = running.submit(PROMPTS[2], max_new_tokens=NEW, stop_tokens=[stop])
        limited = running.submit(PROMPTS[2], max_new_tokens=3)
        free = running.submit(PROMPTS[2], max_new_tokens=NEW)
        assert list(running.stream(free)) == expected
        assert (stopped.tokens, stopped.finish_reason) == (expected[:end], "stop")
        assert (limited.tokens, limited.finish_reason) == (expected[:3], "length")
        assert list(running.stream(free)) == expected, "a stream may begin late"


def test_logits_that_are_no_numbers_end_their_own_request_alone(alone):
    expected = alone[jaxkv.Sampling()]
    seen = {token for tokens in (*PROMPTS, *expected) for token in tokens}
    bad = next(token for token in range(64) if token not in seen)
    model = sharp_decoder()
    model.embed_tokens.weight[...] = model.embed_tokens.weight[...].at[bad].set(np.nan)
    with engine(model) as running:
        failing = [running.submit([*PROMPTS[1], bad, 3], max_new_tokens=NEW) for _ in range(2)]
        requests = submit_all(running)
        run(running)
        assert [(request.finish_reason, request.tokens) for request in failing] == [("nan", [])] * 2
        assert list(running.stream(failing[0])) == []
        assert [request.tokens for request in requests] == expected
        assert running.figures.preemptions > 0, "pages with what is no number were taken again"


def test_cancelling_one_leaves_the_others(model, alone):
    with engine(model) as running:
        requests = submit_all(running)
        running.step()
        running.step()
        for number in (0, 3, 7):  # running, running, waiting
            running.cancel(requests[number])
        running.cancel(requests[0])  # it has ended: nothing to do
        run(running)
        for number, request in enumerate(requests):
            expected = alone[jaxkv.Sampling()][number]
            if number in (0, 3, 7):
                assert request.finish_reason == "cancelled"
                assert request.tokens == expected[: len(request.tokens)]
            else:
                assert request.tokens == expected


def test_three_compilations_for_its_life(model, caplog):
    with (
        jax.log_compiles(),
        caplog.at_level(logging.WARNING),
        engine(model, 13, decode_steps=5) as running,  # a shape that no other test has
    ):
        requests = submit_all(running)
        running.step()
        running.fork(requests[0], seed=5)
        running.run()
        running.submit(PROMPTS[1], max_new_tokens=2)
        running.run()
    compiled = [record.message for record in caplog.records if "Compiling jit(" in record.message]
    counts = {
        name: sum(f"jit({name})" in message for message in compiled)
        for name in ("prefill", "decode", "copy")
    }
    assert counts == {"prefill": 1, "decode": 1, "copy": 1}, compiled


def test_steps_are_in_place(model):
    config = model.cache_config(
        max_context_length=1024,
        batch_size=2,
        addressing=jaxkv.Paged(16, 1024),
        newest=jaxkv.Newest(16),
    )
    cache = jaxkv.create(config)
    weights = Weights.of(model)
    one, table = np.ones(1, np.int32), np.full((1, 64), -1, np.int32)
    two = np.ones(2, np.int32)
    known, tables = np.full((2, 4), -1, np.int32), (np.repeat(table, 2, 0),)
    rows = steps.Rows(two, two, two, two, two, two[:, None], known, tables)
    tokens = np.zeros((1, 32), np.int32)
    lowered = [
        steps.prefill.lower(weights, tokens, one, one, (table,), one, cache),
        steps.decode.lower(weights, rows, cache, sampling=HOT, num_steps=4),
        steps.copy.lower((one, one), (one, one), cache),
    ]
    for step in lowered:
        memory = step.compile({"xla_backend_optimization_level": 0}).memory_analysis()
        assert memory.alias_size_in_bytes >= config.size_bytes
        assert memory.temp_size_in_bytes < 0.2 * config.size_bytes


REFUSALS = {
    "an empty prompt": ({"prompt": []}, ValueError, "at least one token id, got an empty one"),
    "no integers": ({"prompt": [0.5]}, ValueError, "got float64"),
    "outside the vocabulary": (
        {"prompt": [1, 64]},
        ValueError,
        "token 64, outside the vocabulary of 64 tokens",
    ),
    "longer than the context": (
        {"prompt": [1] * 158},
        jaxkv.CacheFullError,
        "are 166 tokens, and the context holds 160",
    ),
    "longer than the pool": (
        {"prompt": [1] * 144},
        jaxkv.CacheFullError,
        "152 tokens need 19 pages of 8, and the whole pool has 18",
    ),
    "no new tokens": ({"max_new_tokens": 0}, ValueError, "at least 1, got 0"),
    "a bad seed": ({"seed": 2**31}, ValueError, "must be an int32, got 2147483648"),
    "many stops": ({"stop_tokens": range(17)}, ValueError, "at most 16 stop tokens, got 17"),
}


def test_bad_requests_leave_the_others_alone(model, alone):
    with engine(model) as running:
        good = running.submit(PROMPTS[4], max_new_tokens=NEW)
        for change, error, message in REFUSALS.values():
            with pytest.raises(error, match=message):
                running.submit(**({"prompt": [1], "max_new_tokens": 8} | change))
            running.step()
        run(running)
        assert good.tokens == alone[jaxkv.Sampling()][4]
        with pytest.raises(jaxkv.UnknownRequestError, match=r"has ended \(length\)"):
            running.fork(good, seed=1)
    with engine(model) as running, engine(model) as other:
        stranger = other.submit([1], max_new_tokens=1)
        with pytest.raises(jaxkv.UnknownRequestError, match="belongs to another"):
            running.cancel(stranger)
        with pytest.raises(jaxkv.UnknownRequestError, match="belongs to another"):
            next(running.stream(stranger))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"addressing": jaxkv.Contiguous()}, "needs a cache with a shared pool of pages"),
        ({"addressing": jaxkv.Paged()}, "needs a cache with a shared pool of pages"),
        ({"batch_size": None}, "and batch_size None"),
    ],
)
def test_what_is_no_pool_is_refused(model, fields, message):
    fields = {"batch_size": 2, "addressing": jaxkv.Paged(8, 16)} | fields
    with pytest.raises(jaxkv.ConfigError, match=message):
        jaxkv.Engine(model, model.cache_config(max_context_length=32, **fields))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode_steps": 0}, "decode_steps must be an int of at least 1, got 0"),
        ({"decode_steps": 17}, "decode_steps must be at most prefill_chunk, 16, got 17"),
        ({"token_budget": 0}, "token_budget must be an int of at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(model, options, message):
    with pytest.raises(jaxkv.ConfigError, match=message):
        engine(model, **options)


def test_it_leaves_nothing_behind(model):
    tracker = jaxkv.MemoryTracker()
    with contextlib.suppress(RuntimeError), engine(model, tracker=tracker) as running:
        config = running.config
        assert tracker.total_usage() == config.size_bytes + config.index_bytes
        submit_all(running)
        running.step()
        raise RuntimeError("the server is stopped")
    assert tracker.total_usage() == 0
    assert running.pages.usage().held_pages == 0
    with pytest.raises(jaxkv.CacheClosedError):
        _ = running.cache


@pytest.mark.slow
def test_layers_with_windows_have_pools_of_their_own():
    """The first layer sees 20 tokens: of a prompt it keeps, and a hit needs, its end alone."""
    rng = np.random.default_rng(0)
    embedding = jnp.asarray(rng.standard_normal((64, 16)), jnp.float32)

    def model(tokens, cache):
        x = embedding[tokens]
        for layer in range(2):
            heads = x.reshape(*x.shape[:-1], 2, 8)
            cache = jaxkv.append(cache, heads, heads, layer=layer)
            x = x + 0.5 * jaxkv.attend(cache, heads, layer=layer).reshape(x.shape)
        return 2 * x @ embedding.T, jaxkv.advance(cache, tokens.shape[-1])

    fields = {"max_context_length": CONTEXT, "codec": jaxkv.Dense("float32")}
    shape = Shape(2, num_kv_heads=2, head_dim=8).sliding(20, full_every=2)
    reference = shape.cache_config(batch_size=len(PROMPTS), **fields)
    pools = shape.cache_config(
        batch_size=ROWS, addressing=jaxkv.Paged(PAGE, 24), chunk=CHUNK, **fields
    )
    assert [group.addressing.name for group in reference.groups] == ["ring", "contiguous"]
    assert [group.addressing.window for group in pools.groups] == [20, None]
    seeds = list(range(len(PROMPTS)))
    options = {"max_new_tokens": NEW, "sampling": HOT, "seed": seeds, "config": reference}
    expected = jaxkv.generate(model, PROMPTS, **options).tokens
    with jaxkv.Engine(
        model, pools, sampling=HOT, prefill_chunk=CHUNK, decode_steps=4, token_budget=48
    ) as running:
        requests = submit_all(running)
        run(running)
        assert [request.tokens for request in requests] == expected
        again = running.submit(PROMPTS[1], max_new_tokens=NEW, seed=1)
        run(running)
        assert again.tokens == expected[1]
        assert sum(request.num_cached for request in (*requests, again)) > 0


def test_constants_are_of_no_prompt_and_pages_are_found_under_them():
    """A codec that centres has one state a pool: set before the first chunk, kept from then on."""
    codec = jaxkv.Centred(jaxkv.Rotated(bits=4))
    pool = jaxkv.Paged(PAGE, PAGES)
    config = jaxkv.KVCacheConfig(1, CONTEXT, 1, 16, 2, codec, addressing=pool)
    embedding = jnp.asarray(np.random.default_rng(0).standard_normal((64, 1, 16)), jnp.float32)

    def model(tokens, cache):
        heads = embedding[tokens]
        cache = jaxkv.append(cache, heads, heads, layer=0)
        mixed = jaxkv.attend(cache, heads, layer=0)
        logits = (heads + mixed).reshape(*tokens.shape, 16) @ embedding[:, 0].T
        return logits, jaxkv.advance(cache, tokens.shape[-1])

    with jaxkv.Engine(model, config, prefill_chunk=CHUNK, decode_steps=4) as running:
        first = running.submit(PROMPTS[1], max_new_tokens=4)
        running.run()
        means = np.asarray(running.cache.codec_state["means"])
        expected = jaxkv.calibrate(model, config=config)[0]["means"]
        np.testing.assert_allclose(means, expected, atol=1e-3)
        other, again = (running.submit(PROMPTS[n], max_new_tokens=4) for n in (4, 1))
        running.run()
        assert np.array_equal(running.cache.codec_state["means"], means)
        assert (again.num_cached, again.tokens, other.num_cached) == (42, first.tokens, 0)
