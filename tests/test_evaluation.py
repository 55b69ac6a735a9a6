"""What eviction costs a model: samples that say what they ask for, and figures by another way."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import evaluation
from jaxkv.cli.main import main

CONTEXT = 400


@pytest.fixture(scope="module")
def embedded():
    return jaxkv.models.load()


def samples(tokenizer, count=3, text=None, context=CONTEXT, *, question_known=True):
    rng = np.random.default_rng(0)
    return evaluation._tasks(tokenizer, text, context, count, rng, question_known=question_known)


@pytest.mark.parametrize("question_known", [True, False])
@pytest.mark.parametrize(("task", "pairs"), [(0, 1), (1, 8)])
def test_a_context_tells_once_what_is_asked_for(embedded, task, pairs, question_known):
    for context, question, following in samples(embedded[1], question_known=question_known)[task]:
        assert len(context) == CONTEXT
        assert bool(question) != question_known
        text = bytes([*context, *question]).decode(errors="ignore")
        answer, name = bytes(following).decode(), text.rsplit("The number of ", 1)[1]
        name = name.removesuffix(" is")
        assert text.count(f"\nThe number of {name} is{answer}.\n") == 1
        assert text.count("\nThe number of ") == pairs + 1
        assert answer.strip().isdigit()


def test_figures(embedded):
    """With nothing dropped they are the uncached model's, and all that is kept drops nothing."""
    model, tokenizer = embedded
    mine = {"mine": lambda keys, values, queries, positions: positions.astype(jnp.float32)}
    options = {"context": CONTEXT, "samples": 1, "keep": (1.0, 0.1)}
    nothing, all_kept, few = evaluation.evaluate(model, tokenizer, mine, **options)
    assert nothing[2:5] == pytest.approx(all_kept[2:5], rel=1e-3)
    assert few.cache_bytes < 0.4 * nothing.cache_bytes
    assert few.perplexity > 1.05 * nothing.perplexity
    (plain,) = samples(tokenizer, 1)[2]
    tokens = jnp.asarray([*plain.context, *plain.following])
    logprobs = jax.nn.log_softmax(
        jax.jit(lambda model, tokens: model(tokens, None)[0])(model, tokens)
    )
    own = [float(logprobs[at - 1, tokens[at]]) for at in range(CONTEXT, len(tokens))]
    assert nothing.perplexity == pytest.approx(np.exp(-np.mean(own)), rel=1e-3)


def test_a_question_that_is_unknown_is_asked_of_what_was_kept(embedded):
    """With nothing dropped that is what the uncached model says of the whole."""
    model, tokenizer = embedded
    options = {"context": CONTEXT, "samples": 2, "keep": (0.5,), "question_known": False}
    policies = {"newest": "streaming_llm", "kvzip": evaluation.KVZIP}
    nothing, newest, kvzip = evaluation.evaluate(model, tokenizer, policies, **options)
    assert nothing.nats_more == 0
    assert newest.nats_more != kvzip.nats_more
    assert newest.cache_bytes == kvzip.cache_bytes
    (first, *_), _, _ = samples(tokenizer, 2, question_known=False)
    tokens = jnp.asarray([*first.context, *first.question, *first.following])
    told = model(tokens, None)[0][-1 - len(first.following) : -1].argmax(axis=-1)
    right = bool((told == jnp.asarray(first.following)).all())
    assert nothing.needle in ({0.5, 1.0} if right else {0.0, 0.5})


@pytest.mark.parametrize(("right", "half"), [(0, 0.21), (4, 0.285), (8, 0.21)])
def test_an_interval_of_few_answers_is_wide(right, half):
    """None or all of eight is no certainty: two more of each are counted (Agresti and Coull)."""
    found = evaluation._share_interval([True] * right + [False] * (8 - right))
    assert found == pytest.approx(half, abs=0.002)


@pytest.mark.parametrize(
    ("text", "context", "message"),
    [
        ("short", 40, "the text has 5 tokens, and contexts of 40 need 104"),
        (None, 99, "too short for"),
    ],
)
def test_what_cannot_be_asked(embedded, text, context, message):
    with pytest.raises(ValueError, match=message):
        samples(embedded[1], 1, text, context)


@pytest.mark.slow
def test_the_command_takes_a_policy_of_ones_own(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "def newest(k, v, q, positions):\n    return positions.astype('float32')\n"
    )
    own = f"{tmp_path / 'mine.py'}:newest"
    line = ["eval", "--context", str(CONTEXT), "--samples", "1", "--policy", own]
    assert main([*line, "--policy", "streaming_llm", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert [score["policy"] for score in scores] == ["nothing dropped", own, "streaming_llm"]
    assert scores[1]["perplexity"] == pytest.approx(scores[2]["perplexity"])  # sinks stay anyhow
    assert main([*line, "--policy", "snapkv"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == [
        *("policy", "kept", "needle", "+-", "multi-key", "+-"),
        *("perplexity", "nats", "more", "+-", "cache"),
    ]
    assert main(["eval", "--policy", f"{tmp_path / 'mine.py'}:oldest"]) == 2
    assert "has no function 'oldest'" in capsys.readouterr().err
