"""A model's own module of multi-token prediction: what it says; no answer depends on it."""

import dataclasses
import json
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import jaxkv
from jaxkv.drafts import MTP
from jaxkv.errors import CheckpointError
from jaxkv.models import load, save
from jaxkv.serve import speculate
from jaxkv.serve.decode import Program, State
from tests.drafts import ahead
from tests.drafts.ahead import TOY, config_of, counting_checkpoint, write_mtp_checkpoint
from tests.drafts.test_generate import (
    PROMPTS,
    SAMPLINGS,
    SMALL,
    TABLE,
    TEXTS,
    assert_same,
)
from tests.drafts.toy import toy
from tests.models.variants import (
    goldens,
    hf_config,
    mtp_weights,
    token_ids,
    weights,
    write_checkpoint,
)
from tests.oracle import KINDS


@pytest.fixture
def loaded(request, tmp_path):
    return load(write_mtp_checkpoint(request.param, tmp_path), mtp=True)[0]


def each_family(test):
    pairs = [(variant, variant) for variant in ("glm4_moe", "deepseek_v3", "qwen2")]
    cases = {"ids": ["glm4_moe", "deepseek_v3", "mimo"], "indirect": ["loaded"]}
    slow = pytest.mark.slow_cases("deepseek|glm")
    return slow(pytest.mark.parametrize(("variant", "loaded"), pairs, **cases)(test))


@each_family
def test_the_module_says_what_its_definition_says(variant, loaded):
    """From the hidden states of transformers, in chunks, for one more than the cache has."""
    tokens, hidden = token_ids(variant), ahead.hidden_of_goldens(variant, goldens()[variant])
    np.testing.assert_allclose(loaded.hidden(jnp.asarray(tokens))[0], hidden, atol=1e-4)
    cache = jaxkv.create(loaded.cache_config(max_context_length=32))
    found = []
    for start in range(0, len(tokens) - 1, 8):
        chunk = slice(start, min(start + 8, len(tokens) - 1))
        following = jnp.asarray(tokens[1:][chunk])
        given = jnp.asarray(hidden[chunk], jnp.float32)
        said, cache = loaded.ahead(given, following, cache)
        found.append(said)
    logits, expected = ahead.oracle(variant, hidden[:-1], tokens[1:])
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-4)
    np.testing.assert_allclose(loaded.logits(jnp.concatenate(found)), logits, atol=2e-4)
    assert int(cache.lengths) == len(tokens) - 1


HEARD = []


@dataclasses.dataclass(frozen=True)
class Heard(MTP):
    """Its guesses are noted."""

    def propose_in(self, model, newest, cache, k, wanted):
        guesses, cache = super().propose_in(model, newest, cache, k, wanted)
        jax.debug.callback(lambda *said: HEARD.append(said), cache.lengths, guesses)
        return guesses, cache


@each_family
def test_its_guesses_are_those_of_the_definition(variant, loaded, monkeypatch):
    """After a prompt in chunks, after wrong guesses, and from what it said itself."""
    HEARD.clear()
    monkeypatch.setattr(speculate, "_COST_OF_A_GUESS", 0)  # or it would soon guess no more
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6] * 4]
    options = {"max_new_tokens": 12, "prefill_chunk": 4, "num_guesses": 6}
    result = jaxkv.generate(loaded, prompts, draft=Heard(), **options)
    jax.effects_barrier()
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, result.tokens, strict=True)]
    every = [np.asarray(loaded.hidden(jnp.asarray(text))[0], np.float64) for text in texts]
    num_compared = 0
    for lengths, guesses in HEARD:
        for text, hidden, length, own in zip(texts, every, lengths, guesses, strict=True):
            if own[0] < 0 or length + 1 >= len(text):
                continue
            hidden, tokens = hidden[:length], text[1 : length + 1]
            for guess in own[own >= 0].tolist():
                logits, said = ahead.oracle(variant, hidden, tokens)
                assert logits[-1, guess] > logits[-1].max() - 1e-3
                hidden, tokens = np.concatenate([hidden, said[-1:]]), [*tokens, guess]
                num_compared += 1
    assert num_compared >= 50
    assert result.speculation.guesses > result.speculation.accepted  # some were taken back


@pytest.mark.parametrize("by", ["hidden", pytest.param("token", marks=pytest.mark.slow)])
def test_a_module_that_is_right_is_believed(by, tmp_path):
    model, _ = load(counting_checkpoint(tmp_path, by), mtp=True)
    result = jaxkv.generate(model, [[3, 5]], max_new_tokens=20, draft=MTP(), num_guesses=3)
    assert result.tokens == [[*range(6, 26)]]
    worth = result.speculation
    assert worth.accepted == worth.guesses
    # A token without a guess, one and its own after it, and then three and theirs.
    assert worth.steps == 1 + 1 + 5


def run(config, sampling="sampled", prompts=PROMPTS, **options):
    options = {"max_new_tokens": 25, "seed": [3, 4, 5], "prefill_chunk": 5, **options}
    return jaxkv.generate(TOY, prompts, config=config, sampling=SAMPLINGS[sampling], **options)


@pytest.mark.slow_cases(r"^(?!(int8-ring-sampled|bfloat16-contiguous-greedy)$)")
@pytest.mark.parametrize(("codec", "addressing", "sampling"), TABLE)
def test_the_answer_is_that_of_plain_decode(codec, addressing, sampling):
    config = config_of(3, codec=KINDS[codec], addressing=SMALL[addressing])
    accepted = []

    @settings(max_examples=6, deadline=None, derandomize=True, database=None)
    @given(TEXTS, st.integers(0, 1000), st.integers(1, 30))
    def holds(prompts, seed, number):
        options = {"prompts": prompts, "seed": [seed] * 3, "max_new_tokens": number}
        result = run(config, sampling, draft=MTP(), num_guesses=3, **options)
        assert_same(result, run(config, sampling, **options))
        accepted.append(result.speculation.accepted)

    holds()
    assert sum(accepted) > 0


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["keydiff", "tova"])
def test_beside_a_policy(policy):
    prompts = [[5, 1, 2, 3, 1, 2, 3, 1, 7], [1, 2, 3] * 5, [7, 7, 7, 4, 7, 7]]
    options = {"prompts": prompts, "policy": policy, "keep": 4, "draft": MTP()}
    result = run(config_of(3), "greedy", num_guesses=3, **options)
    # Beside the draft's layer, which queries of all layers need: NGram has none.
    plain = jaxkv.generate(
        toy,
        prompts,
        config=config_of(3).replace(num_layers=1),
        max_new_tokens=25,
        seed=[3, 4, 5],
        prefill_chunk=5,
        policy=policy,
        keep=4,
    )
    assert_same(result, plain)


PREFIX = [1, 2, 3, 1, 2, 3, 1, 2]
ASKED = [[*PREFIX, 4], [7, 7, 7, 4, 7, 7], [5], [*PREFIX, 9, 2], [*PREFIX, 4]]
STOPS = [(), (6, 3), (), (8,), ()]
POOL = jaxkv.Paged(page_size=4, num_pages=14)


def answers(sampling, prefill_rows=1, **options):
    config = config_of(3, codec=jaxkv.Int8(), addressing=POOL)
    chunks = {"prefill_chunk": 8, "decode_steps": 6, "prefill_rows": prefill_rows}
    with jaxkv.Engine(TOY, config, sampling=sampling, **chunks, **options) as engine:
        requests = [
            engine.submit(prompt, max_new_tokens=22, seed=seed, stop_tokens=stops)
            for seed, (prompt, stops) in enumerate(zip(ASKED, STOPS, strict=True))
        ]
        engine.run()
        engine.pages.check()
        again = engine.submit(ASKED[0], max_new_tokens=22, seed=0)
        engine.run()
        assert again.num_cached == len(PREFIX)
        assert again.tokens == requests[0].tokens
        return requests, engine.figures


@pytest.mark.slow_cases("swapped|rows")
@pytest.mark.parametrize(
    ("temperature", "options"),
    [(1.5, {}), (0.0, {"swap_space": 1 << 20}), (1.5, {"prefill_rows": 2})],
    ids=["sampled", "greedy, swapped", "sampled, two rows"],
)
def test_an_engine_answers_as_without(temperature, options):
    sampling = jaxkv.Sampling(temperature=temperature)
    plain, _ = answers(sampling)
    drafted, figures = answers(sampling, draft=MTP(), num_guesses=3, **options)
    assert figures.preemptions > 0
    assert 0 < figures.right_guesses <= figures.checked_guesses
    for mine, other in zip(drafted, plain, strict=True):
        assert mine.tokens == other.tokens
        assert mine.finish_reason == other.finish_reason
        np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.parametrize("prefill_rows", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_pages_of_an_engine_have_what_the_module_keeps(prefill_rows):
    """Of prompts in chunks, of prefixes that were found, and of tokens after wrong guesses."""
    long = [int(token) for token in np.random.default_rng(0).integers(0, 12, 30)]
    pool = jaxkv.Paged(page_size=4, num_pages=60)
    config = config_of(2, codec=jaxkv.Dense("float32"), addressing=pool)
    chunks = {"prefill_chunk": 4, "prefill_rows": prefill_rows, "decode_steps": 4}
    with jaxkv.Engine(TOY, config, draft=MTP(), num_guesses=3, **chunks) as engine:
        engine.submit(long[:20], max_new_tokens=2)
        engine.run()
        parted = [*long[:8], (long[8] + 1) % 12, 7, 7, 7]
        requests = [engine.submit(prompt, max_new_tokens=30) for prompt in (long, parted)]
        while min(len(request.tokens) for request in requests) < 12:
            engine.step()
        assert [request.num_cached for request in requests] == [16, 8]
        kept, lengths = jaxkv.layer(engine.cache, 1)[0], np.asarray(engine.cache.lengths)
        rows = [(request, lengths[request.row], kept[request.row]) for request in requests]
    for request, length, own in rows:
        text = jnp.asarray([[*request.prompt.tokens, *request.tokens][: length + 1]], jnp.int32)
        cache = jaxkv.create(config_of(1, codec=jaxkv.Dense("float32")))
        _, cache = MTP().filling(TOY)(text, cache)
        expected = jaxkv.layer(cache, 1)[0][0]
        # What was found ends with a token whose next one may have been another there.
        compared = np.delete(np.arange(length), request.num_cached - 1)
        np.testing.assert_allclose(own[compared], expected[compared], atol=1e-5)
    assert not np.allclose(own[7], expected[7])


def test_two_compilations_whatever_is_guessed(caplog):
    """As many as without a draft."""
    config = config_of(2).replace(max_context_length=61)  # a shape that no other test has
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for prompts in ([[1, 2, 3], [4]], [[7] * 9, [1, 2, 1, 2, 1]]):
            for number in (20, 3):
                options = {"max_new_tokens": number, "config": config, "draft": MTP()}
                jaxkv.generate(TOY, prompts, **options)
    compiled = [record.message for record in caplog.records if "Compiling jit(" in record.message]
    for function in ("_prefill", "_decode"):
        assert sum(f"jit({function})" in message for message in compiled) == 1, compiled


def test_guessing_and_checking_are_in_place():
    config = config_of(2, codec=jaxkv.Dense("float32")).replace(max_context_length=1 << 16)
    cache = jax.eval_shape(lambda: jaxkv.create(config))
    plain = Program.of(TOY, jaxkv.Sampling(), (), draft=MTP())
    program = speculate.DraftProgram.of(plain, MTP(), 3)
    ints = jax.ShapeDtypeStruct((2,), jnp.int32)
    small = config.replace(max_context_length=64)
    state = program.start(State(ints, ints, ints), PROMPTS[:2], small)
    options, arrays = program._options()
    memory = (
        speculate._decode.lower(plain.weights, state, arrays, cache, **options)
        .compile()
        .memory_analysis()
    )
    assert memory.alias_size_in_bytes >= config.size_bytes
    assert memory.temp_size_in_bytes < 0.5 * config.size_bytes


@pytest.mark.parametrize("model", [toy, dataclasses.replace(TOY, predicts_ahead=False)])
def test_a_model_without_such_a_module_is_refused(model):
    with pytest.raises(jaxkv.ConfigError, match=r"generate: draft=MTP.*mtp=True"):
        jaxkv.generate(model, PROMPTS, max_new_tokens=2, config=config_of(3), draft=MTP())
    pool = config_of(3, addressing=POOL)
    with pytest.raises(jaxkv.ConfigError, match="Engine: draft=MTP"):
        jaxkv.Engine(model, pool, draft=MTP())
    engine = jaxkv.Engine(TOY, pool, draft=MTP())
    with pytest.raises(jaxkv.ConfigError, match=r"Engine.update: draft=MTP"):
        engine.update(model)
    engine.close()


@pytest.mark.slow_cases("glm")
@pytest.mark.parametrize("variant", ["glm4_moe", "qwen2"])
def test_what_a_checkpoint_has_goes_in_and_out(variant, tmp_path):
    folder = write_mtp_checkpoint(variant, tmp_path)
    num_layers = hf_config(variant)["num_hidden_layers"]
    model, _ = load(folder, mtp=True)
    assert model.config.num_layers == num_layers
    assert model.cache_config(max_context_length=8).num_layers == num_layers + 1
    save(model, tmp_path / "saved")
    again, _ = load(tmp_path / "saved", mtp=True)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, model, again)
    stored = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert {*stored} == {*(weights(variant) | mtp_weights(variant))} - {
        f"model.layers.3.{copy}.weight" for copy in ("embed_tokens", "shared_head.head")
    }
    without, _ = load(folder)
    assert without.cache_config(max_context_length=8).num_layers == num_layers
    codecs = ["int8", "bfloat16", "float32"][-num_layers:]
    groups = model.cache_config(max_context_length=8, codec=codecs).groups
    counts = [1] * (num_layers - 1) + [2]
    assert [(group.codec.name, group.num_layers) for group in groups] == [
        *zip(codecs, counts, strict=True)
    ]


def test_an_embedding_of_its_own_is_told_of(tmp_path):
    name = "model.layers.3.embed_tokens.weight"
    other = {name: np.zeros_like(mtp_weights("glm4_moe")[name])}
    folder = write_mtp_checkpoint("glm4_moe", tmp_path, **other)
    with pytest.warns(UserWarning, match=f"{name} differs from model.embed_tokens.weight"):
        load(folder, mtp=True)


@pytest.mark.parametrize(
    ("variant", "changed", "says"),
    [
        ("glm4_moe", {"model.layers.3.enorm.weight": None}, "mtp.enorm.weight is missing"),
        ("glm4_moe", {"count": 2}, "num_nextn_predict_layers = 2, and mtp=True reads one"),
        ("glm4_moe", {"count": None}, "num_nextn_predict_layers = None"),
        ("llama", None, "LlamaForCausalLM has no MTP module that is known here"),
        ("gpt2", None, "GPT2LMHeadModel has no MTP module"),
        ("qwen3_next", None, "keep a state, which cannot go back behind a wrong guess"),
    ],
)
def test_what_is_no_module_is_refused(variant, changed, says, tmp_path):
    if changed is None:
        write_checkpoint(variant, tmp_path)
    else:
        fields = {"num_nextn_predict_layers": changed.pop("count", 1)}
        write_mtp_checkpoint(variant, tmp_path, **changed)
        config = hf_config(variant) | fields
        (tmp_path / "config.json").write_text(json.dumps(config))
    if variant == "qwen3_next":  # as released; without mtp=True it is left out
        more = {"mtp.fc.weight": np.ones((2, 2), np.float32)}
        save_file(weights(variant) | more, tmp_path / "model.safetensors")
        assert load(tmp_path)[0].config.num_layers == 2
    with pytest.raises(CheckpointError, match=re.escape(says)):
        load(tmp_path, mtp=True)
