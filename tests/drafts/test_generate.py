"""With a draft `generate` says what it says without: the same tokens, and their probabilities."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxkv
from jaxkv.addressing import ADDRESSINGS
from jaxkv.drafts import DraftModel, NGram
from jaxkv.serve import speculate
from jaxkv.serve.decode import Program, State
from tests.drafts.toy import config_of, toy
from tests.oracle import EACH_ONCE, KINDS

PROMPTS = [[5], [1, 2, 3, 1, 2, 3, 1], [7, 7, 7, 4, 7, 7]]
SAMPLINGS = {"greedy": jaxkv.Sampling(), "sampled": jaxkv.Sampling(temperature=1.5, top_k=6)}
# At which a ring turns and pages end within a step.
SMALL = {
    "contiguous": jaxkv.Contiguous(),
    "ring": jaxkv.Ring(window=9, sinks=1, chunk=5),
    "chunked": jaxkv.Chunked(size=9, chunk=5),
    "paged": jaxkv.Paged(page_size=4),
}
assert SMALL.keys() == ADDRESSINGS.keys(), "give a new addressing its row here"
TABLE = [(*pair, "sampled") for pair in EACH_ONCE] + [("bfloat16", "contiguous", "greedy")]
TABLE += [("rotated2-centred", "ring", "greedy"), ("float8", "paged", "greedy")]


@dataclasses.dataclass(frozen=True)
class FromOutside:
    """Guesses what the last token is followed by in a list; none where it has no say."""

    following: tuple[int, ...]

    def propose(self, tokens, lengths, k):
        following = jnp.asarray(self.following, jnp.int32)
        guesses = [jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]]
        for _ in range(k):
            guesses.append(jnp.where(guesses[-1] < 0, -1, following[guesses[-1]]))
        return jnp.stack(guesses[1:], axis=1)


def run(config, sampling="sampled", prompts=PROMPTS, **options):
    options = {"max_new_tokens": 25, "seed": [3, 4, 5], "prefill_chunk": 5, **options}
    return jaxkv.generate(toy, prompts, config=config, sampling=SAMPLINGS[sampling], **options)


def assert_same(with_draft, plain):
    assert with_draft.tokens == plain.tokens
    assert with_draft.finish_reasons == plain.finish_reasons
    for mine, other in zip(with_draft.logprobs, plain.logprobs, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


# Of few tokens, so that they repeat themselves.
TEXTS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=17), min_size=3, max_size=3)


@pytest.mark.full_cases(r"list|^(float16|float8|int8)-contiguous")
@pytest.mark.slow_cases(r"^(?!(int8-ring-sampled|bfloat16-contiguous-greedy)-ngram$)")
@pytest.mark.parametrize("draft", [NGram(1), FromOutside((1, 2, 3, 0) * 3)], ids=["ngram", "list"])
@pytest.mark.parametrize(("codec", "addressing", "sampling"), TABLE)
def test_the_answer_is_that_of_plain_decode(codec, addressing, sampling, draft):
    config = config_of(3, codec=KINDS[codec], addressing=SMALL[addressing])
    accepted = []

    @settings(max_examples=6, deadline=None, derandomize=True, database=None)
    @given(TEXTS, st.integers(0, 1000), st.integers(1, 30))
    def holds(prompts, seed, number):
        options = {"prompts": prompts, "seed": [seed] * 3, "max_new_tokens": number}
        result = run(config, sampling, draft=draft, num_guesses=3, **options)
        assert_same(result, run(config, sampling, **options))
        accepted.append(result.speculation.accepted)

    holds()
    assert sum(accepted) > 0 or not isinstance(draft, NGram)  # a list may be wrong throughout


@pytest.mark.slow_cases("model")
@pytest.mark.parametrize(
    "draft",
    [
        DraftModel(toy, config_of(3, codec=jaxkv.Rotated(2))),
        DraftModel(toy, config_of(3)),
        FromOutside((3, 1, 3, 7, 8, -1, 0, 0, 0, 9, 5, 5)),
    ],
    ids=["coarse model", "model", "from outside"],
)
def test_each_draft(draft):
    config = config_of(3)
    plain = run(config, "greedy")
    stop = plain.tokens[0][9]
    plain = run(config, "greedy", stop_tokens=[stop])
    result = run(config, "greedy", stop_tokens=[stop], draft=draft, num_guesses=4)
    assert_same(result, plain)
    assert "stop" in plain.finish_reasons
    if isinstance(draft, DraftModel):
        assert result.speculation.accepted > result.speculation.steps


@pytest.mark.parametrize("policy", ["keydiff", pytest.param("tova", marks=pytest.mark.slow)])
def test_beside_a_policy(policy):
    prompts = [[5, 1, 2, 3, 1, 2, 3, 1, 7], [1, 2, 3] * 5, [7, 7, 7, 4, 7, 7]]
    options = {"prompts": prompts, "policy": policy, "keep": 4}
    plain = run(config_of(3), "greedy", **options)
    result = run(config_of(3), "greedy", draft=NGram(1), num_guesses=3, **options)
    assert_same(result, plain)
    assert result.speculation.accepted > 0


def test_a_draft_that_knows_the_answer_takes_the_fewest_steps():
    prompts = [[4, 5], [9]]

    def counts_up(tokens, cache):
        logits = 9 * jnp.eye(64)[jnp.minimum(tokens + 1, 63)]
        return logits, jaxkv.advance(cache, tokens.shape[-1])

    config = config_of(2)
    options = {"max_new_tokens": 9, "config": config, "stop_tokens": [12]}
    draft = FromOutside(tuple(range(1, 65)))
    result = jaxkv.generate(counts_up, prompts, draft=draft, num_guesses=3, **options)
    assert result.tokens == [[6, 7, 8, 9, 10, 11, 12], [10, 11, 12]]
    assert result.finish_reasons == ["stop", "stop"]
    # Of 2, 4 and 1 tokens, and of 2 and 1: half of the guesses at first; a step ends with what the
    # model says itself, or at its stop.
    assert result.speculation.steps == 5
    assert result.speculation.guessed[0] == [True, False] + [True] * 3 + [False, False]
    assert result.speculation.tokens_per_step == pytest.approx(10 / 5)


def test_guesses_that_never_come_true_cost_few_steps():
    config = config_of(1)
    wrong = FromOutside((12,) * 12)  # no token of the vocabulary
    options = {"prompts": [[1, 2]], "seed": 0, "max_new_tokens": 60}
    plain = run(config, "greedy", **options)
    result = run(config, "greedy", draft=wrong, num_guesses=2, **options)
    assert_same(result, plain)
    assert 1 <= result.speculation.guesses <= 9
    assert result.speculation.steps == 60


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"addressing": SMALL["ring"]}, {"num_guesses": 5}, "a ring cache takes back 5"),
        ({"newest": jaxkv.Newest(4)}, {}, "newest= do not go together"),
        ({"placement": jaxkv.HostMemory(8, 8, 1)}, {}, "blocks_per_query= do not go together"),
        ({}, {"num_guesses": 0}, "num_guesses must be"),
        ({}, {"draft": DraftModel(toy, config_of(2))}, "must have 3 rows.*got 2 rows"),
    ],
    ids=["ring", "newest", "blocks", "no guesses", "rows"],
)
def test_what_is_refused(fields, options, message):
    with pytest.raises((jaxkv.ConfigError, ValueError), match=message):
        run(config_of(3, **fields), **{"draft": NGram(2), **options})


def test_two_compilations_whatever_is_guessed(caplog):
    """As many as without a draft."""
    config = config_of(2).replace(max_context_length=63)  # a shape that no other test has
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for prompts in ([[1, 2, 3], [4]], [[7] * 9, [1, 2, 1, 2, 1]]):
            for number in (20, 3):
                options = {"max_new_tokens": number, "config": config, "draft": NGram(1)}
                jaxkv.generate(toy, prompts, **options)
    compiled = [record.message for record in caplog.records if "Compiling jit(" in record.message]
    for function in ("_prefill", "_decode"):
        assert sum(f"jit({function})" in message for message in compiled) == 1, compiled


def test_steps_of_one_token_and_of_several_are_in_place():
    config = config_of(2, codec=jaxkv.Dense("float32")).replace(max_context_length=1 << 16)
    cache = jax.eval_shape(lambda: jaxkv.create(config))
    plain = Program.of(toy, jaxkv.Sampling(), ())
    program = speculate.DraftProgram.of(plain, NGram(2), 3)
    ints = jax.ShapeDtypeStruct((2,), jnp.int32)
    state = program.start(
        State(ints, ints, ints), PROMPTS[:2], config.replace(max_context_length=64)
    )
    options, arrays = program._options()
    lowered = speculate._decode.lower(plain.weights, state, arrays, cache, **options)
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= config.size_bytes
    assert memory.temp_size_in_bytes < 0.5 * config.size_bytes
