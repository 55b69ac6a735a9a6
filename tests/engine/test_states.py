"""Models whose layers keep a state, in an engine: a prompt that is found equals one computed."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import jaxkv
from jaxkv.paging import PageAllocator, Snapshots
from tests.models.variants import model_of

CHUNK = 8
FAST = pytest.mark.parametrize(
    "variant",
    ["lfm2", *(pytest.param(v, marks=pytest.mark.slow) for v in ("bamba", "qwen3_next"))],
)


def prompts_with_common_starts(count=14):
    """Two texts, cut anywhere, with ends of their own; one twice."""
    rng = np.random.default_rng(1)
    texts = rng.integers(0, 64, (2, 30))
    prompts = []
    for _ in range(count):
        start = texts[rng.integers(2), : rng.integers(1, 31)]
        prompts.append([*start, *rng.integers(0, 64, rng.integers(1, 4))])
    prompts[-1] = prompts[-3]
    return [list(map(int, prompt)) for prompt in prompts]


def config_for(model):
    pool = jaxkv.Paged(page_size=4, num_pages=20)
    return model.cache_config(max_context_length=48, batch_size=3, addressing=pool)


def engine_for(model, config, **options):
    return jaxkv.Engine(
        model, config, prefill_chunk=CHUNK, prefill_rows=2, decode_steps=2, **options
    )


def answers(model, prompts, **options):
    """What an engine says, and what it counted."""
    with engine_for(model, config_for(model), **options) as engine:
        requests = []
        for prompt in prompts:  # some wait, some come later
            requests.append(engine.submit(prompt, max_new_tokens=12))
            engine.step()
            engine.pages.check()
        engine.run()
        engine.pages.check()
        found = [(request.tokens, request.logprobs) for request in requests]
        return found, engine.pages.usage(), engine.figures


@FAST
def test_a_hit_equals_a_miss_bit_for_bit_whatever_is_evicted(variant):
    """Beside an engine that shares nothing, which says what the model says without a cache."""
    model, prompts = model_of(variant), prompts_with_common_starts()
    expected, alone, _ = answers(model, prompts, sharing=False)
    assert alone.hit_tokens == 0
    uncached = jax.jit(lambda tokens: model(tokens)[0])
    for prompt, (tokens, _) in zip(prompts, expected, strict=True):
        text = np.array(prompt + tokens)
        logits = uncached(np.resize(text, 48))[: len(text)]
        assert jnp.argmax(logits[len(prompt) - 1 : -1], axis=-1).tolist() == tokens
    each = config_for(model).states[0].bytes_per_sequence
    found, usage, figures = answers(
        model, prompts, snapshot_space=5 * each + 1, snapshot_every=2 * CHUNK
    )
    assert found == expected
    assert (figures.snapshot_bytes, usage.snapshots) == (5 * each, 5)
    counts = usage.hit_tokens, usage.evictions, usage.snapshot_evictions, figures.preemptions
    assert 0 not in counts


def test_snapshots_are_taken_where_prompts_part():
    """The second prompt shows where the third will find the first."""
    model = model_of("bamba")
    text = list(range(40))  # at the end of its last chunk, at its own end, and where pages ended
    with engine_for(model, config_for(model), snapshot_every=5 * CHUNK) as engine:

        def cached(prompt):
            request = engine.submit(prompt, max_new_tokens=1)
            engine.run()
            return request.num_cached

        assert [cached([*text[:20], 1, end]) for end in (60, 61, 62)] == [0, 21, 21]
        assert [cached([*text[:20], end, 1, 2]) for end in (60, 61, 62)] == [16, 16, 16]
        assert [cached([*text[:12], end, 7]) for end in (60, 61, 62)] == [0, 8, 8]
        assert engine.pages.usage().snapshots == 8  # as many as there is room for
    with engine_for(model, config_for(model), snapshot_space=0) as engine:
        assert [cached(text[:20]), cached(text[:20])] == [0, 0]


def test_a_fork_and_other_weights():
    model, prompt = model_of("lfm2"), list(range(21))
    with engine_for(model, config_for(model)) as engine:
        request = engine.submit(prompt, max_new_tokens=8)
        engine.step()
        engine.step()
        assert len(request.tokens) < 8
        child = engine.fork(request, seed=1)
        assert child.row >= 0, "it runs at once"
        engine.run()
        assert child.tokens == request.tokens
        assert child.logprobs[len(request.logprobs) - 2 :] == request.logprobs[-2:]
        engine.update(model)
        again = engine.submit(prompt, max_new_tokens=8)
        engine.run()
        assert (again.num_cached, again.logprobs) == (0, request.logprobs)


REFUSED = {
    "swap_space": ("bamba", {"swap_space": 1 << 20}, "swap_space must be 0"),
    "draft": ("bamba", {"draft": jaxkv.drafts.NGram()}, "layers with a state cannot go back"),
    "every": ("bamba", {"snapshot_every": CHUNK + 1}, "must be a multiple of prefill_chunk, 8"),
    "space": ("bamba", {"snapshot_space": -1}, "at least 0 bytes"),
    "stateless": ("llama", {"snapshot_space": 1}, "keep no state"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_by_name(what):
    variant, options, message = REFUSED[what]
    model = model_of(variant)
    with pytest.raises(jaxkv.ConfigError, match=message):
        engine_for(model, config_for(model), **options)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12), st.booleans()), max_size=40),
)
def test_the_least_recently_used_snapshot_makes_room(num_slots, calls):
    """Beside a list in the order of use: names of starts, and which slot has which."""
    pages = PageAllocator(8, page_size=4)
    prompts = [pages.prompt([first, *range(12)]) for first in range(3)]
    books = Snapshots(num_slots, every=4, chunk=2)
    used, slots, evictions = [], {}, 0
    for first, length, keeps in calls:
        start = (first, *range(12))[:length]
        assert books.has(prompts[first], length) == (start in slots)
        if keeps:
            slot = books.keep(prompts[first], length)
            assert (slot is None) == (start in slots)
            if slot is not None:
                if len(slots) == num_slots:
                    assert slots.pop(used.pop(0)) == slot
                    evictions += 1
                assert slot not in slots.values()
                slots[start] = slot
        elif start in slots:
            assert books.use(prompts[first], length) == slots[start]
        if start in slots:
            used = [*(each for each in used if each != start), start]
        assert (books.num_held, books.num_evictions) == (len(slots), evictions)
