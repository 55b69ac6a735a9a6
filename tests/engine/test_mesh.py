"""An engine over a mesh: what one device answers, whichever rank a request runs on."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import jaxkv
from jaxkv.serve import steps
from jaxkv.serve.model_step import Weights
from tests.decoders import sharp_decoder
from tests.engine.requests import CHUNK, CONTEXT, HOT, PAGE, PAGES, PROMPTS, run
from tests.test_mesh import collective_bytes

pytestmark = pytest.mark.devices(8)

NEW, MOST = 10, 24  # tokens of most answers, and of those that take pages from others
# Axis sizes by what they split; 4 KV heads, so 8 devices hold each twice.
SPLITS = {
    "batch 2 x heads 4": {"batch": 2, "heads": 4},
    "batch 8": {"batch": 8},
    "heads 8": {"heads": 8},
}


@pytest.fixture(scope="module")
def model():
    return sharp_decoder(num_heads=8, num_kv_heads=4)


@pytest.fixture(scope="module")
def alone(model):
    """Tokens of each prompt by `generate`, one at a time, on one device."""

    @functools.cache
    def generated(number, seed, sampling):
        options = {"max_new_tokens": MOST, "max_context_length": CONTEXT, "sampling": sampling}
        return jaxkv.generate(model, [PROMPTS[number]], seed=seed, **options).tokens[0]

    def tokens(number, seed, sampling, new=NEW):
        return generated(number, seed, sampling)[:new]

    return tokens


def engine(model, split, axis_type=AxisType.Auto, num_rows=8, num_pages=PAGES, **options):
    """With so many pages on each rank."""
    sizes = SPLITS[split]
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(axis_type,) * len(sizes))
    config = model.cache_config(
        max_context_length=CONTEXT,
        batch_size=num_rows,
        codec=jaxkv.Dense("float32"),
        addressing=jaxkv.Paged(PAGE, num_pages * sizes.get("batch", 1)),
    )
    options = {"prefill_chunk": CHUNK, "decode_steps": 4, "token_budget": 48} | options
    axes = jaxkv.Axes(**{what: what for what in sizes})
    return jaxkv.Engine(model, config, mesh=mesh, axes=axes, **options)


@pytest.mark.slow_cases("heads 8|heads 4-Auto|batch 8-Explicit")
@pytest.mark.parametrize(
    ("axis_type", "sampling"),
    [(AxisType.Auto, HOT), (AxisType.Explicit, jaxkv.Sampling())],
    ids=["Auto, seeded", "Explicit, greedy"],
)
@pytest.mark.parametrize("split", SPLITS)
def test_tokens_are_those_of_each_request_alone(model, alone, split, axis_type, sampling):
    with engine(model, split, axis_type, sampling=sampling) as running:
        requests = [
            running.submit(prompt, max_new_tokens=NEW, seed=seed)
            for seed, prompt in enumerate(PROMPTS)
        ]
        run(running)
        expected = [alone(number, number, sampling) for number in range(len(PROMPTS))]
        assert [request.tokens for request in requests] == expected
        assert {request.rank for request in requests} == set(range(len(running.pages)))


def answers(requests):
    return [(request.tokens, request.logprobs) for request in requests]


@pytest.mark.slow_cases("batch 8|heads 8")
@pytest.mark.parametrize("split", SPLITS)
def test_a_hit_equals_a_miss_and_a_prompt_is_computed_once_per_rank(model, split):
    """Bit for bit, whichever rank computed it."""

    def run_all(running):
        requests = [running.submit(PROMPTS[1], max_new_tokens=3, seed=n) for n in range(12)]
        run(running)
        return requests

    with engine(model, split, sampling=HOT, sharing=False) as fresh:
        misses = run_all(fresh)
        assert fresh.figures.prefilled_tokens == 12 * 42
    with engine(model, split, sampling=HOT) as used:
        hits = run_all(used)
        assert answers(hits) == answers(misses)
        num_ranks = len(used.pages)
        for rank in range(num_ranks):
            cached = [request.num_cached for request in hits if request.rank == rank]
            assert cached == [0] + [42] * (len(cached) - 1)
        assert used.figures.prefilled_tokens == num_ranks * 42
        assert used.pages.usage().hit_tokens == (12 - num_ranks) * 42


def test_a_request_goes_to_the_longest_hit_and_then_to_the_emptiest_rank(model):
    with engine(model, "batch 2 x heads 4", num_rows=4) as running:

        def rank_of(number, new=NEW):
            request = running.submit(PROMPTS[number], max_new_tokens=new)
            running.step()
            return request.rank

        long = running.submit(PROMPTS[4], max_new_tokens=60)
        running.step()
        assert long.rank == 0
        assert rank_of(1) == 1  # where more pages are free
        running.run()
        assert [rank_of(number, new=1) for number in (4, 3, 5)] == [0, 1, 1]
        stay = [running.submit(PROMPTS[1], max_new_tokens=60) for _ in range(3)]
        running.step()
        running.step()
        assert [request.rank for request in stay] == [1, 1, 0]  # its rows are taken
        running.pages.check()


@pytest.mark.parametrize(
    "swap_space", [pytest.param(0, marks=pytest.mark.slow), 1 << 20], ids=["again", "swapped"]
)
def test_preemption_forks_cancelling_and_stops_are_those_of_one_device(model, alone, swap_space):
    expected = [alone(number, 0, jaxkv.Sampling(), MOST) for number in range(len(PROMPTS))]
    with engine(
        model, "batch 2 x heads 4", num_rows=6, num_pages=12, swap_space=swap_space
    ) as running:
        requests = [running.submit(prompt, max_new_tokens=MOST) for prompt in PROMPTS]
        stopped = running.submit(PROMPTS[2], max_new_tokens=MOST, stop_tokens=[expected[2][4]])
        cancelled, streamed = requests[7], requests[6]
        running.step()
        running.cancel(cancelled)
        assert list(running.stream(streamed)) == expected[6]
        run(running)
        for number, request in enumerate(requests):
            assert request.tokens == expected[number][: len(request.tokens)]
            assert (request is cancelled) or len(request.tokens) == MOST
        end = expected[2].index(expected[2][4]) + 1
        assert (stopped.tokens, stopped.finish_reason) == (expected[2][:end], "stop")
        figures = running.figures
        assert figures.preemptions > 0
        assert (figures.swaps > 0) == bool(swap_space)
        assert figures.swapped_bytes == 0
        parent = running.submit(PROMPTS[1], max_new_tokens=MOST)
        while len(parent.tokens) < 4:
            running.step()
        fork = running.fork(parent, seed=0)
        assert fork.rank == parent.rank
        run(running)
        assert fork.tokens == parent.tokens == expected[1]


@pytest.mark.slow_cases("batch 8|heads 8")
@pytest.mark.parametrize("split", SPLITS)
def test_a_saved_prompt_is_found_on_every_rank(model, alone, split, tmp_path):
    config = model.cache_config(max_context_length=CONTEXT, codec=jaxkv.Dense("float32"))
    saved, prompt = PROMPTS[1][:-1], jaxkv.create(config)
    _, prompt = model(jax.numpy.array(saved), prompt)
    jaxkv.save(prompt, tmp_path / "file", tokens=saved, model="mine")
    with engine(model, split, num_pages=64) as running:  # so many that none is taken again
        old = running.submit(PROMPTS[4], max_new_tokens=NEW)
        running.step()
        shardings = [leaf.sharding for leaf in jax.tree.leaves(running.cache)]
        for _ in range(2):  # the second time it is there
            running.cache = jaxkv.load_prefix(
                tmp_path / "file", running.cache, running.pages, model="mine"
            )
            running.pages.check()
        for leaf, sharding in zip(jax.tree.leaves(running.cache), shardings, strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        requests = [running.submit(PROMPTS[1], max_new_tokens=NEW) for _ in range(8)]
        run(running)
        assert old.tokens == alone(4, 0, jaxkv.Sampling())
        assert [request.num_cached for request in requests] == [42] * 8
        assert {tuple(request.tokens) for request in requests} == {
            tuple(alone(1, 0, jaxkv.Sampling()))
        }
        assert running.figures.prefilled_tokens == 32


def test_steps_are_in_place_and_move_no_pages(model):
    mesh = jax.make_mesh((2, 4), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
    place = {"mesh": mesh, "axes": jaxkv.Axes(batch="batch", heads="heads")}
    pool = jaxkv.Paged(16, num_pages=4096)
    config = model.cache_config(max_context_length=1024, batch_size=4, addressing=pool)
    cache, weights = jaxkv.create(config, **place), Weights.of(model).spread_over(mesh)
    two, four = np.ones(2, np.int32), np.ones(4, np.int32)
    tables = (np.full((4, 64), -1, np.int32),)
    known = np.full((4, 4), -1, np.int32)
    rows = steps.Rows(four, four, four, four, four, four[:, None], known, tables)
    tokens, starts = np.zeros((2, 32), np.int32), (two, two, (tables[0][:2],), two)
    lowered = [
        steps.prefill.lower(weights, tokens, *starts, cache),
        steps.decode.lower(weights, rows, cache, sampling=HOT, num_steps=4),
        steps.copy.lower((two,), (two,), cache),
    ]
    for step in lowered:
        compiled = step.compile({"xla_backend_optimization_level": 0})
        memory, share = compiled.memory_analysis(), config.size_bytes / 8
        assert memory.alias_size_in_bytes >= share
        assert memory.temp_size_in_bytes < 0.2 * share
        assert collective_bytes(compiled.as_text()) < 0.05 * share
