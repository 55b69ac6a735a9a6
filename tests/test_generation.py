"""`generate` against a loop anybody could write: one token at a time, no cache at all."""

import gc
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv.serve import decode
from jaxkv.serve import generate as generation
from tests.compiled import compiled_as_users_do
from tests.decoders import look_up, sharp_decoder

CONTEXT = 192
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9] * 140]


@pytest.fixture(scope="module")
def model():
    return sharp_decoder()


@pytest.fixture(scope="module")
def next_logits(model):
    """Logits of the token after a text, by the uncached forward over a padded text."""
    forward = jax.jit(lambda model, tokens: model(tokens, None)[0])

    def logits(text):
        padded = jnp.zeros(CONTEXT, jnp.int32).at[: len(text)].set(jnp.asarray(text, jnp.int32))
        return forward(model, padded)[len(text) - 1]

    return logits


def run(model, prompts=PROMPTS, **options):
    options = {"max_new_tokens": 20, **options}
    if "config" not in options:
        options = {"max_context_length": CONTEXT, **options}
    return jaxkv.generate(model, prompts, **options)


@pytest.mark.slow
def test_greedy_is_the_uncached_argmax(model, next_logits):
    result = run(model)
    for prompt, tokens, logprobs in zip(PROMPTS, result.tokens, result.logprobs, strict=True):
        text = list(prompt)
        for token, logprob in zip(tokens, logprobs, strict=True):
            logits = next_logits(text)
            assert token == int(logits.argmax())
            assert logprob == pytest.approx(float(jax.nn.log_softmax(logits)[token]), abs=1e-4)
            text.append(token)
    assert [len(tokens) for tokens in result.tokens] == [20, 20, 20]
    assert result.finish_reasons == ["length"] * 3


@pytest.mark.parametrize(
    "sampling",
    [
        jaxkv.Sampling(),
        jaxkv.Sampling(temperature=2.0, top_k=9, top_p=0.9, min_p=0.01),
    ],
)
def test_a_sequence_does_not_depend_on_its_batch(model, sampling):
    together = run(model, sampling=sampling, seed=[3, 4, 5]).tokens
    alone = [
        run(model, [prompt], sampling=sampling, seed=seed).tokens[0]
        for prompt, seed in zip(PROMPTS, (3, 4, 5), strict=True)
    ]
    assert together == alone


FIELDS = {"num_kv_heads": 2, "head_dim": 16, "batch_size": 1, "newest": jaxkv.Newest(3)}
PADDED = {
    "statistics": jaxkv.KVCacheConfig(
        1, 24, codec=jaxkv.Centred(jaxkv.Int8()), placement=jaxkv.HostMemory(4, 4, 2), **FIELDS
    ),
    "ring": jaxkv.KVCacheConfig(1, 200, addressing=jaxkv.Ring(4), **FIELDS),
}


@pytest.mark.parametrize("config", PADDED.values(), ids=PADDED)
def test_padding_leaves_no_trace(config):
    """Means, bounds of blocks, newest tokens and rings: each leaf is that of the prompt alone."""
    prompt = [3, 1, 4, 1, 5]
    chunk = np.zeros((1, decode.PREFILL_CHUNK), np.int32)
    chunk[0, :5] = prompt
    program = decode.Program.of(look_up, jaxkv.Sampling(), ())
    given = decode.Chunk(chunk, np.array([5], np.int32), np.array([False]))
    _, padded, _ = program.prefill(None, given, jaxkv.create(config))
    _, alone = jax.jit(look_up)(jnp.array([prompt]), jaxkv.create(config))
    for mine, other in zip(jax.tree.leaves(padded), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(mine, other)


class OneByOne(nnx.Module):
    """A model whose logits are of all places: decode takes the last token of each prompt."""

    def __init__(self, model):
        self.model, self.cache_config = model, model.cache_config

    def __call__(self, tokens, cache):
        return self.model(tokens, cache)


@pytest.mark.parametrize("sampling", [jaxkv.Sampling(), jaxkv.Sampling(temperature=3.0)])
@pytest.mark.parametrize("chunk", [33, 128])
def test_prefill_finds_the_first_tokens_that_decode_would(model, sampling, chunk):
    options = {"sampling": sampling, "prefill_chunk": chunk, "stop_tokens": (3, 7, 9)}
    found, by_decode = run(model, **options), run(OneByOne(model), **options)
    assert found.tokens == by_decode.tokens
    assert found.finish_reasons == by_decode.finish_reasons
    for mine, other in zip(found.logprobs, by_decode.logprobs, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)
    assert found.timings.prefill_tokens == by_decode.timings.prefill_tokens + len(PROMPTS)


def test_an_answer_that_its_first_token_ends(model):
    """The others go on, and nothing is decoded where all have ended."""
    free = run(model).tokens
    stop = free[2][0]
    ended = run(model, stop_tokens=[stop])
    assert ended.tokens[2] == [stop]
    assert ended.finish_reasons[2] == "stop"
    shortest = [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in free]
    assert ended.tokens == shortest
    arrived = []
    all_at_once = run(
        model, PROMPTS[2:], stop_tokens=[stop], on_tokens=lambda *new: arrived.append(new)
    )
    assert arrived == [(0, [stop])]
    assert all_at_once.timings.decode_tokens == 0


def test_one_token_compiles_no_decode(caplog):
    own = sharp_decoder(num_layers=3)  # a shape that no other test has
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        first = run(own, max_new_tokens=1).tokens
    compiled = "".join(record.message for record in caplog.records)
    assert "jit(_prefill)" in compiled
    assert "jit(_decode)" not in compiled
    assert first == [answer[:1] for answer in run(own).tokens]


def test_the_last_token_of_a_prompt_is_no_chunk_of_its_own(model):
    """It would cost as much as a whole one: decode takes it."""
    seen = [
        run(model, [[1] * length], prefill_chunk=16).timings.prefill_tokens
        for length in (1, 2, 16, 17, 18)
    ]
    assert seen == [0, 2, 16, 16, 18]


def test_seeds(model):
    hot = jaxkv.Sampling(temperature=3.0)
    same = run(model, [[7, 8]] * 2, sampling=hot, seed=1).tokens
    assert same[0] == same[1]
    different = run(model, [[7, 8]] * 2, sampling=hot, seed=[1, 2]).tokens
    assert different[0] == same[0]
    assert different[0] != different[1]


def test_stop_tokens_end_one_sequence_and_not_the_others(model):
    free = run(model).tokens
    stop = free[1][4]
    assert stop not in free[1][:4]
    stopped = run(model, stop_tokens=[stop])
    for tokens, answer, why in zip(free, stopped.tokens, stopped.finish_reasons, strict=True):
        end = tokens.index(stop) + 1 if stop in tokens else len(tokens)
        assert answer == tokens[:end]
        assert why == ("stop" if stop in tokens else "length")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_end_their_own_sequence_alone(bad):
    def fails_after_8(tokens, cache):
        logits = jnp.where(tokens[..., None] == 8, bad, 9 * jax.nn.one_hot(tokens + 1, 64))
        return logits, jaxkv.advance(cache, tokens.shape[-1])

    config = jaxkv.KVCacheConfig(1, 64, 1, 4, batch_size=3)
    result = jaxkv.generate(fails_after_8, [[5], [40], [8]], max_new_tokens=20, config=config)
    assert result.tokens == [[6, 7, 8], list(range(41, 61)), []]
    assert result.finish_reasons == ["nan", "length", "nan"]
    assert [len(logprobs) for logprobs in result.logprobs] == [3, 20, 0]
    assert np.isfinite(np.concatenate(result.logprobs)).all()


def test_steps_that_no_condition_stands_between_change_no_answer(model, monkeypatch):
    free = run(model).tokens
    asked = [{"max_new_tokens": 18}, {"stop_tokens": [free[0][2], free[1][9]]}]
    one_by_one = [run(model, **options) for options in asked]
    monkeypatch.setattr(decode, "_steps_at_once", lambda *_: 4)
    for options, expected in zip(asked, one_by_one, strict=True):
        together = run(model, **options)
        assert together.tokens == expected.tokens
        assert together.logprobs == expected.logprobs
        assert together.finish_reasons == expected.finish_reasons
    assert [each.finish_reasons[0] for each in one_by_one] == ["length", "stop"]


def test_one_step_at_a_time_where_few_are_wanted(monkeypatch):
    weights = decode.Weights.of(sharp_decoder())
    assert decode._steps_at_once(weights, 16, 100) == 1
    monkeypatch.setattr(decode, "platform_of", lambda *_: "gpu")
    steps = [decode._steps_at_once(weights, *asked) for asked in ((16, 16), (16, 15), (6, 9))]
    assert steps == [4, 1, 2]


def test_tokens_arrive_in_order_and_whole(model):
    arrived = [[], [], []]
    result = run(model, on_tokens=lambda number, tokens: arrived[number].append(tokens))
    assert [list(itertools.chain(*pieces)) for pieces in arrived] == result.tokens
    assert all(len(pieces) > 1 for pieces in arrived), "they came in one piece"


def test_two_compilations_whatever_the_prompts(model, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for lengths in ((1, 2), (130, 3), (128, 129), (64, 150)):
            prompts = [[1] * length for length in lengths]
            run(model, prompts, max_new_tokens=17, max_context_length=CONTEXT + 1)
    compiled = [record.message for record in caplog.records if "Compiling jit(" in record.message]
    for function in ("_prefill", "_decode"):
        assert sum(f"jit({function})" in message for message in compiled) == 1, compiled


@pytest.mark.parametrize(
    ("longest", "batch", "platform", "size"),
    [
        (8000, 1, "cpu", 128),
        (8000, 1, "gpu", 8192),
        (5000, 1, "gpu", 1024),  # 5 of 1,024 and 5 times the weights, not 2 of 4,096 and twice
        (1000, 1, "tpu", 1024),
        (300, 1, "gpu", 512),
        (2000, 8, "gpu", 2048),  # 16,384 tokens of all prompts
        (500, 64, "gpu", 256),
        (500, 1000, "gpu", 128),
        (0, 1, "gpu", 128),
    ],
)
def test_the_chunk_is_what_computes_the_least(longest, batch, platform, size):
    assert decode.prefill_chunk(longest, batch, platform) == size


def test_the_chunk_changes_no_token(model):
    assert run(model, prefill_chunk=33).tokens == run(model).tokens


def test_a_window_has_room_for_the_chunk():
    model = sharp_decoder(architecture="MistralForCausalLM", windows=(None, 8))
    whole = run(model, prefill_chunk=150)
    assert [getattr(group.addressing, "chunk", None) for group in whole.config.groups] == [
        None,
        150,
    ]
    narrow = model.cache_config(max_context_length=CONTEXT, batch_size=3, chunk=6)
    assert run(model, config=narrow).tokens == whole.tokens


def test_on_a_gpu_a_window_is_not_dwarfed_by_the_chunk(model, monkeypatch):
    """Who would prefill 8,192 tokens at once takes no more than the window, or 1,024."""
    monkeypatch.setattr(generation, "platform_at", lambda device: "gpu")
    prompt = [np.zeros(8193, np.int32)]
    assert generation._chunk_size(model, prompt, None, None, None) == 8192
    for window, size in ((128, 1024), (4096, 4096)):
        windowed = sharp_decoder(architecture="MistralForCausalLM", windows=(None, window))
        assert generation._chunk_size(windowed, prompt, None, None, None) == size


def test_decode_is_in_place(model):
    cache = jaxkv.create(model.cache_config(max_context_length=4096, batch_size=2))
    program = decode.Program.of(model, jaxkv.Sampling(), ())
    state = decode.State(*(jnp.zeros(2, jnp.int32) for _ in range(3)))
    lowered = decode._decode.lower(program.weights, state, cache, **program._of_decode())
    memory = compiled_as_users_do(lowered).memory_analysis()
    assert memory.alias_size_in_bytes >= cache.size_bytes
    assert memory.temp_size_in_bytes < 0.2 * cache.size_bytes


def test_any_callable_is_a_model():
    def shift(tokens, cache):
        return jax.nn.one_hot((tokens + 1) % 50, 50), jaxkv.advance(cache, tokens.shape[-1])

    config = jaxkv.KVCacheConfig(1, 300, 1, 4, batch_size=2)
    result = jaxkv.generate(shift, [[48], list(range(150))], max_new_tokens=3, config=config)
    assert result.tokens == [[49, 0, 1], [0, 1, 2]]


def test_the_tracker_saw_the_cache_and_it_is_gone(model):
    tracker = jaxkv.MemoryTracker()
    result = run(model, tracker=tracker)
    planned = result.config.size_bytes + result.config.index_bytes
    assert tracker.peak_usage(jaxkv.Purpose.KV_CACHE) == planned
    assert tracker.total_usage() == 0


def test_timings_add_up(model):
    timings = run(model).timings
    assert timings.prefill_tokens == sum(map(len, PROMPTS))
    assert timings.decode_tokens == 57, "prefill finds the first of each"
    rate = timings.decode_tokens_per_second
    assert rate == pytest.approx(57 / timings.decode_seconds)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts were given"),
        ([[1], []], {}, "prompt 1 must be a list of at least one token id, got an empty one"),
        ([[1.5]], {}, "prompt 0 must be .* got float64"),
        ([[1], [2, 64]], {}, "prompt 1 has token 64, outside the vocabulary of 64 tokens"),
        ([[-1]], {}, "prompt 0 has token -1"),
        ([[1]], {"prefill_chunk": 0}, "prefill_chunk must be an int of at least 1, got 0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be an int of at least 1, got 0"),
        ([[1] * 190], {}, "are 210 tokens, and the context holds 192"),
        ([[1]], {"seed": [1, 2]}, "1 prompts need as many seeds, got 2"),
        ([[1]], {"seed": 2**32}, "a seed must be an int32, got 4294967296"),
        ([[1]], {"seed": 0.5}, "a seed must be an int32, got 0.5"),
        (
            [[1]],
            {"config": jaxkv.KVCacheConfig(2, 192, 2, 16, batch_size=1), "codec": jaxkv.Int8()},
            "give config= alone",
        ),
        (
            [[1]],
            {"config": jaxkv.KVCacheConfig(2, 192, 2, 16, batch_size=3)},
            "need a config with batch_size=1, got 3",
        ),
    ],
)
def test_bad_requests(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        run(model, prompts, **options)


def test_a_function_without_a_config_says_so():
    with pytest.raises(ValueError, match="no cache_config method; pass config="):
        jaxkv.generate(lambda tokens, cache: None, [[1]], max_new_tokens=1)


def test_an_error_of_the_model_leaves_nothing_behind(model):
    def broken(tokens, cache):
        raise RuntimeError("no such weights")

    tracker = jaxkv.MemoryTracker()
    config = jaxkv.KVCacheConfig(1, 64, 1, 4, batch_size=1)
    with pytest.raises(RuntimeError, match="no such weights"):
        jaxkv.generate(broken, [[1]], max_new_tokens=1, config=config, tracker=tracker)
    assert tracker.total_usage() == 0
    gc.collect()  # jax 0.7 has a cycle with what an error held
    assert not [array for array in jax.live_arrays() if array.shape == (1, 2, 64, 1, 4)]


def test_logprobs_are_of_the_model_not_of_the_filters(model, next_logits):
    result = run(model, [[3, 4]], sampling=jaxkv.Sampling(temperature=2.0, top_k=3), seed=8)
    logprobs = jax.nn.log_softmax(next_logits([3, 4]))
    assert np.isclose(result.logprobs[0][0], logprobs[result.tokens[0][0]], atol=1e-4)
