"""Drafts over a mesh: what one device answers."""

import jax
import pytest

import jaxkv
from jaxkv.drafts import MTP, DraftModel, NGram
from tests.drafts import ahead
from tests.drafts.toy import config_of, toy

pytestmark = pytest.mark.devices(8)

PROMPTS = [[5], [1, 2, 3, 1, 2, 3, 1], [7, 7, 7, 4, 7, 7], [3, 4, 3, 4, 3]]
HOT = jaxkv.Sampling(temperature=1.5)


# The model of an answer, its cache and its draft.
DRAFTS = {
    "ngram": (toy, config_of, NGram(1)),
    "model": (toy, config_of, DraftModel(toy, config_of(4))),
    "mtp": (ahead.TOY, ahead.config_of, MTP()),
}


def generated(model=toy, config_of=config_of, **options):
    options |= {"max_new_tokens": 20, "seed": [1, 2, 3, 4], "sampling": HOT}
    return jaxkv.generate(model, PROMPTS, config=config_of(4), **options).tokens


def served(model=toy, config_of=config_of, **options):
    config = config_of(4, addressing=jaxkv.Paged(4, 56))
    with jaxkv.Engine(model, config, prefill_chunk=8, sampling=HOT, **options) as engine:
        requests = [
            engine.submit(prompt, max_new_tokens=20, seed=seed)
            for seed, prompt in enumerate(PROMPTS * 2)
        ]
        engine.run()
        return [request.tokens for request in requests]


@pytest.mark.slow_cases("generate|heads|model|mtp")
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize(
    ("answers", "split"),
    [
        (generated, {"batch": 2, "heads": 2}),
        (generated, {"context": 2}),
        (served, {"batch": 2}),
        (served, {"batch": 2, "heads": 2}),
    ],
    ids=["generate, batch and heads", "generate, context", "engine, batch", "engine, both: heads"],
)
def test_tokens_are_those_of_one_device(answers, split, draft):
    place = {
        "mesh": jax.make_mesh(tuple(split.values()), tuple(split)),
        "axes": jaxkv.Axes(**{what: what for what in split}),
    }
    model, config_of, draft = DRAFTS[draft]
    assert answers(model, config_of, draft=draft, num_guesses=3, **place) == answers()
