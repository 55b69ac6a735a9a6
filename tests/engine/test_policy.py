"""An engine with a policy against `generate` with it, of each prompt alone."""

import dataclasses
import logging
from collections import Counter
from typing import ClassVar

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jaxkv
from jaxkv.policies import HeavyHitters, KeyDiff, QueryWindow
from jaxkv.serve import steps
from jaxkv.serve.choice import choose, joined
from jaxkv.serve.model_step import Weights
from tests.compiled import assert_in_place, compiled_as_users_do
from tests.drafts.ahead import TOY, config_of
from tests.engine.pools import POOLS, embedding
from tests.engine.requests import (
    CHUNK,
    CONTEXT,
    HOT,
    PAGE,
    PROMPTS,
    START,
    contents,
    engine,
    poison_blank,
    run,
)

NEW = 24
TIGHT = 9  # pages: what the longest prompt takes is 7
# Its tail is looked at by windows of one chunk and of more; its start is shared.
LONG = [*START, *range(11, 25)]
TEXTS = [*PROMPTS[:6], LONG, PROMPTS[7]]


@dataclasses.dataclass(frozen=True)
class LastHits(HeavyHitters):
    """A policy that remembers, shown a few queries."""

    window: ClassVar[int] = 6


def loudest(keys, values, queries, positions):
    return jnp.linalg.norm(values, axis=-1).T


loudest.window = 0

CASES = {
    "no queries": ("keydiff", 16, "float32", {}),
    "a share, within a chunk": (QueryWindow(window=5, pool=3), 0.5, "int8", {}),
    "over chunks": (QueryWindow(window=20, pool=3), 24, "bfloat16", {"prefill_rows": 3}),
    "one query": ("tova", 9, "rotated4-centred", {"prefill_rows": 3}),
    "longer than most prompts": ("snapkv", 0.3, "float16", {}),
    "less than is protected": ("streaming_llm", 3, "int8-centred", {}),
    "a draft": ("keydiff", 0.4, "float32", {"draft": jaxkv.drafts.NGram()}),
    "remembers": (LastHits(), 12, "float32", {"decode_steps": 1}),
    "a function": (loudest, 0.25, "rotated2", {"prefill_chunk": 24}),
}


def alone(model, policy, keep, codec, chunk=CHUNK, sampling=HOT):
    """What `generate` answers to each text by itself."""
    results = [
        jaxkv.generate(
            model,
            [text],
            max_new_tokens=NEW,
            seed=seed,
            sampling=sampling,
            max_context_length=CONTEXT,
            codec=codec,
            prefill_chunk=chunk,
            policy=policy,
            keep=keep,
        )
        for seed, text in enumerate(TEXTS)
    ]
    return [(result.tokens[0], result.logprobs[0]) for result in results]


def submit(running, number, **options):
    options = {"max_new_tokens": NEW, "seed": number} | options
    return running.submit(TEXTS[number], **options)


def assert_answers(requests, expected):
    for request, (tokens, logprobs) in zip(requests, expected, strict=True):
        assert request.tokens == tokens
        np.testing.assert_allclose(request.logprobs, logprobs, atol=2e-5)


@pytest.mark.slow_cases("share|one query|longer|less|remembers|draft|function")
@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_generate(model, case):
    policy, keep, codec, options = CASES[case]
    chunk = options.get("prefill_chunk", CHUNK)
    expected = alone(model, policy, keep, codec, chunk)
    options = {"policy": policy, "keep": keep, "codec": codec, "sampling": HOT} | options
    with engine(model, TIGHT, **options) as running:
        requests = [submit(running, number) for number in range(len(TEXTS))]
        run(running)
        assert_answers(requests, expected)
        assert running.figures.preemptions > 0
        again = [submit(running, number) for number in range(len(TEXTS))]
        run(running)
        assert_answers(again, expected)
    with engine(model, 64, sharing=False, **options) as running:
        fresh = [submit(running, number) for number in reversed(range(len(TEXTS)))][::-1]
        run(running)
        assert running.figures.preemptions == 0
        for one, other, third in zip(requests, again, fresh, strict=True):
            assert one.tokens == other.tokens == third.tokens
            if "draft" not in options:  # whose steps are of one token or several, as it comes
                assert one.logprobs == other.logprobs == third.logprobs, "to the bit"


def stored(running, request):
    """What a row holds of its prompt, bytes and positions."""
    slots = request.kept_pages * PAGE
    kept = {
        name: leaf[:, :, : request.num_kept].tobytes()
        for name, leaf in contents(running, request, slots).items()
    }
    return kept, np.asarray(running._choice._positions[:, request.row]).tobytes()


@pytest.mark.parametrize("window", [0, 20])
def test_a_hit_equals_a_miss_bit_for_bit(model, window):
    policy = QueryWindow(window=window) if window else KeyDiff()
    outcomes, hits = [], []
    for sharing in (False, True):
        options = {"policy": policy, "keep": 11, "sampling": HOT, "sharing": sharing}
        with engine(model, codec="int8", **options) as running:
            for number in (1, 1, 5, 6, 1):
                request = submit(running, number)
                while not request.tokens:
                    running.step()
                outcome = stored(running, request)
                run(running)
                hits.append(request.num_cached)
                outcomes.append((number, outcome, request.tokens, request.logprobs))
    assert outcomes[:5] == outcomes[5:]
    assert hits[:5] == [0] * 5
    # The newest queries must be computed: of 42, 50 and 53 tokens all but 20 are found, in chunks.
    assert hits[5:] == ([0, 16, 16, 32, 16] if window else [0, 42, 32, 48, 42])


def test_pages_of_what_is_not_kept_are_free_for_others(model):
    most, preemptions = {}, {}
    for policy in (None, "keydiff"):
        options = {} if policy is None else {"policy": policy, "keep": 8}
        with engine(model, 28, token_budget=96, **options) as running:
            requests = [running.submit(LONG[n:], max_new_tokens=24) for n in range(4)]
            held = []
            while running.busy:
                running.step()
                if policy:
                    assert_books_exact(running)
                held.append(len([r for r in running._batch.running if r.tokens]))
            most[policy], preemptions[policy] = max(held), running.figures.preemptions
            assert all(len(request.tokens) == 24 for request in requests)
            usage = running.pages.usage()
            assert (usage.held_pages, usage.num_requests) == (0, 0)
    assert most == {None: 3, "keydiff": 4}
    assert preemptions["keydiff"] == 0


def assert_books_exact(running):
    """Each request holds pages for what it keeps, in whole pages, and for what came since."""
    running.pages.check()
    for request in running._batch.running:
        if request.is_prefilling:
            continue
        pages = running.pages[0].table(request.number)
        if request.num_kept is None:
            known = len(request.prompt) + len(request.tokens)  # for which it was admitted
            assert -(-request.length // PAGE) <= len(pages) <= -(-known // PAGE)
        else:
            kept = -(-request.num_kept // PAGE)
            assert len(pages) == kept + -(-request.num_decoded // PAGE)


class Found:
    """Bytes of each page that can be found, which must never change."""

    def __init__(self):
        self.seen = {}

    def look(self, running):
        (pool,) = (group.pool for group in running.pages[0].groups)
        leaves = [np.asarray(leaf) for leaf in running.cache.storage.values()]
        for page, content in pool.index.contents.items():
            length = len(content.tokens) // 4
            first = page * PAGE
            now = [leaf[:, :, first : first + length].tobytes() for leaf in leaves]
            assert self.seen.setdefault((content.parent, content.tokens), now) == now


@pytest.fixture(scope="module")
def many(model):
    """One engine for all examples, and what each text is to get."""
    policy, keep = QueryWindow(window=5, pool=3), 10
    options = {"policy": policy, "keep": keep, "codec": "int8", "sampling": HOT}
    with engine(model, TIGHT, **options) as running:
        yield running, alone(model, policy, keep, "int8"), Found(), Counter()


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    order=st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=7),
    gaps=st.lists(st.integers(0, 3), min_size=7, max_size=7),
    cancelled=st.sets(st.integers(0, 6), max_size=2),
    forked=st.sets(st.integers(0, 6), max_size=2),
)
def test_no_neighbour_and_no_order_matters(many, order, gaps, cancelled, forked):
    running, expected, found, count = many
    requests, before = [], running.figures.preemptions

    def one_round():
        poison_blank(running)
        running.step()
        assert_books_exact(running)
        found.look(running)

    for place, (number, gap) in enumerate(zip(order, gaps, strict=False)):
        requests.append((number, submit(running, number)))
        for _ in range(gap):
            one_round()
        if place in forked and not requests[-1][1].done:
            requests.append((number, running.fork(requests[-1][1], seed=number)))
    for place in cancelled & set(range(len(requests))):
        running.cancel(requests[place][1])
    while running.busy:
        one_round()
    for number, request in requests:
        tokens, logprobs = expected[number]
        if request.finish_reason == "cancelled":
            tokens, logprobs = (each[: len(request.tokens)] for each in (tokens, logprobs))
        assert request.tokens == tokens
        np.testing.assert_allclose(request.logprobs, logprobs, atol=2e-5)
    assert running.pages.usage().held_pages == 0
    count["preemptions"] += running.figures.preemptions - before


def test_what_stays_may_be_copied_over_what_it_is_copied_from(model):
    policy, keep, overlaps = KeyDiff(), 33, []
    (tokens, logprobs) = alone(model, policy, keep, "float32", sampling=jaxkv.Sampling())[6]
    with engine(model, 7, policy=policy, keep=keep) as running:
        runner = running._runner
        inner = runner.choose

        def watched(request, before, now):
            overlaps.append(set(before.tolist()) & set(now.tolist()))
            inner(request, before, now)

        runner.choose = watched
        request = submit(running, 6, max_new_tokens=16)
        run(running)
        assert [len(pages) for pages in overlaps] == [5]
        assert request.tokens == tokens[:16]
        np.testing.assert_allclose(request.logprobs, logprobs[:16], atol=2e-5)


def test_forks_share_what_was_kept(model):
    with engine(model, 32, policy="keydiff", keep=16, sampling=HOT) as running:
        parent = running.submit(LONG, max_new_tokens=20, seed=1)
        while len(parent.tokens) < 9:
            running.step()
        held = running.pages.usage().held_pages
        twin, other = running.fork(parent, seed=1), running.fork(parent, seed=2)
        assert running.pages.usage().shared_pages >= 2
        assert running.pages.usage().held_pages <= held + 2 * 2
        run(running)
        late = running.submit(LONG, max_new_tokens=20, seed=1)
        run(running)
    for request in (twin, late):
        assert (request.tokens, request.logprobs) == (parent.tokens, parent.logprobs)
    assert other.tokens[:9] == parent.tokens[:9]
    assert other.tokens != parent.tokens


@pytest.mark.parametrize("policy", [KeyDiff(), QueryWindow(window=40)])
def test_what_was_chosen_comes_back_from_host_memory(model, policy):
    options = {"policy": policy, "keep": 12, "codec": "int8", "sampling": HOT}

    def answers(running):
        requests = [submit(running, number) for number in range(len(TEXTS))]
        while running.busy:
            poison_blank(running)
            running.step()
            assert_books_exact(running)
        assert running.pages.usage().held_pages == running.figures.swapped_bytes == 0
        return [(request.tokens, request.logprobs) for request in requests], running.figures

    with engine(model, 64, **options) as running:
        expected, figures = answers(running)
        assert figures.preemptions == 0
    with engine(model, TIGHT, swap_space=1 << 20, **options) as running:
        got, figures = answers(running)
        assert got == expected
        assert figures.swaps > 0
        assert figures.repeated_tokens == 0
        most = figures.most_swapped_bytes
        # Pages, and positions of what requests chose that have, of two layers and two heads.
        page = PAGE * running.config.bytes_per_token
        assert most in [
            n * page + 2 * 2 * 4 * 12 * count for n in range(1, 9) for count in range(3)
        ]
    with engine(model, TIGHT, swap_space=most - 1, **options) as running:
        got, figures = answers(running)
        assert got == expected
        assert figures.most_swapped_bytes < most


def test_who_makes_room_before_choosing_is_shown_all_queries_again(model):
    options = {"policy": QueryWindow(window=40), "keep": 12, "token_budget": 1, "decode_steps": 8}
    answers = []
    for num_pages in (32, 11):
        with engine(model, num_pages, swap_space=1 << 20, **options) as running:
            one, two = running.submit([3] * 7, max_new_tokens=40), submit(running, 6)
            lengths = []
            while running.busy:
                running.step()
                lengths.append(two.length)
            answers.append((one.tokens, two.tokens, two.logprobs))
    assert two.num_preemptions == 1
    assert lengths[:4] == [0, 16, 32, 0], "in the middle of its prompt"
    assert answers[0] == answers[1]


def test_what_could_never_run_is_refused_and_what_can_runs(model):
    with engine(model, 7, policy="keydiff", keep=16) as running:
        with pytest.raises(jaxkv.CacheFullError, match="57 tokens need 8 pages of 8"):
            running.submit([1] * 57, max_new_tokens=1)
        with pytest.raises(jaxkv.CacheFullError, match="57 tokens need 8 pages of 8"):
            running.submit([1] * 50, max_new_tokens=41)
        request = running.submit([1] * 56, max_new_tokens=40)  # 96 tokens of 56 slots
        run(running)
        assert len(request.tokens) == 40


def test_numbers_that_are_none_are_shared_no_more(model):
    failing = [*PROMPTS[1], 63, 3]
    seen = {token for text in TEXTS for token in text}
    assert 63 not in seen
    weight = model.embed_tokens.weight[...]
    model.embed_tokens.weight[...] = weight.at[63].set(np.nan)
    try:
        with engine(model, policy="keydiff", keep=16) as running:
            before = running.submit(PROMPTS[1], max_new_tokens=NEW)
            run(running)
            requests = [running.submit(failing, max_new_tokens=NEW) for _ in range(2)]
            after = running.submit(PROMPTS[1], max_new_tokens=NEW)
            run(running)
            assert running.pages[0].find(running.pages[0].prompt(failing)) < 40
    finally:
        model.embed_tokens.weight[...] = weight
    assert [(request.finish_reason, request.tokens) for request in requests] == [("nan", [])] * 2
    assert after.tokens == before.tokens


def test_an_update_begins_them_anew(model):
    with engine(model, policy=QueryWindow(window=20), keep=16) as running:
        requests = [submit(running, number) for number in (1, 4, 6)]
        running.step()
        running.step()
        running.update(model, restart=True)
        run(running)
        again = [submit(running, number) for number in (1, 4, 6)]
        run(running)
    assert [request.tokens for request in requests] == [request.tokens for request in again]


def test_a_policy_that_fails_leaves_nothing_half_done(model):
    def too_few(keys, values, queries, positions):
        return jnp.zeros((2, 3, 4))

    too_few.window = 0
    with engine(model, policy=too_few, keep=16) as running:
        request, short = submit(running, 6), submit(running, 2)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"a policy must give \[kv_heads, tokens\]"):
                running.run()
            running.pages.check()
            assert (request.tokens, request.length, request.finish_reason) == ([], 0, None)
        running.cancel(request)
        run(running)
        assert len(short.tokens) == NEW


def test_the_ledger_has_what_stands_beside_the_cache(model):
    tracker = jaxkv.MemoryTracker()
    with engine(model, policy="keydiff", keep=16, tracker=tracker) as running:
        plain = running.config.size_bytes + running.config.index_bytes
        assert tracker.total_usage() == plain + 4 * 2 * 4 * 2 * 16
    assert tracker.total_usage() == 0


@pytest.mark.parametrize("num_tokens", [1, 3, 4])
def test_newest_queries_are_joined(num_tokens):
    """A window of 6 over chunks of 4, whose last query is that of the last token."""
    old = np.arange(6.0).reshape(1, 6, 1, 1)
    new = 10 + np.arange(8.0).reshape(1, 2, 4, 1, 1)
    numbers = jnp.array([1, num_tokens], jnp.int32)
    got = joined(jnp.asarray(old), jnp.asarray(new), numbers)
    expected = np.concatenate([old[0], new[0, 1][4 - num_tokens :]])[-6:]
    np.testing.assert_array_equal(got[0], expected)


def test_choosing_and_decoding_are_in_place(model):
    paged = jaxkv.Paged(16, num_pages=4096)
    config = model.cache_config(max_context_length=1024, batch_size=4, addressing=paged)
    cache = jax.eval_shape(lambda: jaxkv.create(config))
    kept = jaxkv.Kept(tokens=128, new=1024, num_layers=2, num_kv_heads=2, within=paged)

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    given = ints(2, 4, 2, 128), ints(3), ints(64), ints(72), None
    chooses = choose.lower(cache, *given, policy=KeyDiff(), kept=kept)
    four, chosen = ints(4), steps.Chosen(ints(2, 4, 2, 128), ints(4))
    rows = four, four, four, four, four, ints(4, 1), ints(4, 8), (ints(4, 72),), None, chosen
    decodes = steps.decode.lower(
        Weights.of(model), steps.Rows(*rows), cache, sampling=HOT, num_steps=8, kept=kept
    )
    for lowered in (chooses, decodes):
        assert_in_place(compiled_as_users_do(lowered), cache, temp_share=0.1)


def test_each_program_is_compiled_once_for_its_life(model, caplog):
    options = {"policy": QueryWindow(window=7), "keep": 13, "decode_steps": 3}
    with (
        jax.log_compiles(),
        caplog.at_level(logging.WARNING),
        engine(model, 23, **options) as running,  # shapes that no other test has
    ):
        for number in (1, 4, 0, 5):
            submit(running, number)
        run(running)
    compiled = [record.message for record in caplog.records if "Compiling jit(" in record.message]
    counts = {
        name: sum(f"jit({name})" in message for message in compiled)
        for name in ("prefill", "joined", "choose", "decode")
    }
    assert counts == dict.fromkeys(counts, 1), compiled


def test_layers_that_read_what_another_keeps():
    """Three layers, of which the second reads the first; the policy sees queries of two."""
    kept = jaxkv.KVCacheConfig(2, CONTEXT, 2, 16, codec=jaxkv.Dense("float32"))
    sources = {"group_of_layer": (0, 0, 0), "source_of_layer": (0, 0, 2)}

    def reads(tokens, cache):
        x = embedding[tokens]
        for layer in range(3):
            heads = x.reshape(*x.shape[:-1], 2, 16)
            if layer != 1:
                cache = jaxkv.append(cache, heads, heads, layer=layer)
            x = x + jaxkv.attend(cache, heads, layer=layer, scale=0.1).reshape(x.shape)
        return x @ embedding.T, jaxkv.advance(cache, tokens.shape[-1])

    policy = {"policy": QueryWindow(window=5, pool=3), "keep": 8}
    alone = jaxkv.HybridConfig((kept.replace(batch_size=1),), **sources)
    options = {"max_new_tokens": 9, "sampling": HOT, "config": alone, **policy}
    result = jaxkv.generate(reads, [LONG], prefill_chunk=CHUNK, **options)
    pool = kept.replace(batch_size=2, addressing=jaxkv.Paged(PAGE, 16))
    config = jaxkv.HybridConfig((pool,), **sources)
    with jaxkv.Engine(reads, config, prefill_chunk=CHUNK, sampling=HOT, **policy) as running:
        request = running.submit(LONG, max_new_tokens=9)
        running.run()
    assert request.tokens == result.tokens[0]
    np.testing.assert_allclose(request.logprobs, result.logprobs[0], atol=2e-5)


WINDOWS, NEWEST = POOLS["windows"], POOLS["newest too"]
REFUSALS = {
    "a policy alone": ({"policy": "snapkv"}, "Give both, such as policy='snapkv', keep=0.5"),
    "a number alone": ({"keep": 8}, "Engine: a policy says which tokens stay"),
    "no such name": ({"policy": "snapvk", "keep": 8}, "no policy 'snapvk'; there are"),
    "all queries": ({"policy": "h2o", "keep": 8}, "looks at the queries of whole prompts"),
    "none": ({"policy": "keydiff", "keep": 0}, "at least 1, or a share .* got 0"),
    "a share of more": ({"policy": "keydiff", "keep": 1.5}, "got 1.5"),
    "a number a layer": ({"policy": "keydiff", "keep": (8, 9)}, r"got \(8, 9\)"),
    "a module": (
        {
            "policy": "keydiff",
            "keep": 8,
            "draft": jaxkv.drafts.MTP(),
            "model": TOY,
            "config": config_of(4, addressing=jaxkv.Paged(PAGE, 16)),
        },
        "a draft must not be a module of the model",
    ),
    "windows": ({"policy": "keydiff", "keep": 8, "config": WINDOWS}, "one pool without a window"),
    "newest": ({"policy": "keydiff", "keep": 8, "config": NEWEST}, "no newest tokens beside it"),
    "a mesh": (
        {
            "policy": "keydiff",
            "keep": 8,
            "mesh": jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]),
            "axes": jaxkv.Axes(batch="data"),
        },
        "the cache must be on one device",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_goes_with_no_policy_is_refused(model, case):
    options, message = REFUSALS[case]
    options = {"model": model} | options
    config = options.pop("config", None) or model.cache_config(
        max_context_length=CONTEXT, batch_size=4, addressing=jaxkv.Paged(PAGE, 16)
    )
    with pytest.raises(ValueError, match=message):
        jaxkv.Engine(config=config, prefill_chunk=CHUNK, **options)
