"""Preempted requests whose pages go to host memory: the same answers, and nothing done twice."""

import pytest

import jaxkv
from tests.engine.pools import POOLS, engine
from tests.engine.requests import PAGE, PROMPTS, run

KIND = "windows"


def answers(running, at_once=True):
    """Tokens and log-probabilities of all, after one that means are taken of."""
    running.submit(PROMPTS[4], max_new_tokens=1)
    running.run()
    requests = []
    for seed, prompt in enumerate(PROMPTS):
        requests.append(running.submit(prompt, max_new_tokens=24, seed=seed))
        if not at_once:
            running.run()
    run(running)
    return [(request.tokens, request.logprobs) for request in requests]


@pytest.mark.slow
@pytest.mark.parametrize("kind", POOLS)
def test_answers_are_those_without_preemption(kind):
    config = POOLS[kind]
    with engine(config) as unhurried:
        expected = answers(unhurried, at_once=False)
        assert unhurried.figures.preemptions == 0
    with engine(config, swap_space=1 << 20) as running:
        assert answers(running) == expected
        figures = running.figures
        assert figures.swaps == figures.preemptions > 0
        assert figures.repeated_tokens == figures.swapped_bytes == 0
        assert figures.generated_tokens - 1 == sum(len(tokens) for tokens, _ in expected)
        most = figures.most_swapped_bytes
        assert 0 < most <= config.size_bytes
    with engine(config, swap_space=most - 1) as running:  # the largest is computed again
        assert answers(running) == expected
        assert running.figures.most_swapped_bytes < most
        assert running.figures.swaps < running.figures.preemptions


def test_host_memory_is_given_back_by_those_who_leave():
    with engine(POOLS[KIND], swap_space=1 << 20) as running:
        one, two = (running.submit(PROMPTS[n], max_new_tokens=40) for n in (1, 5))
        while not two.num_preemptions:
            running.step()
        end, seen = -(-two.length // PAGE), (two.length + 1 - 20) // PAGE
        windowed, full = (PAGE * group.bytes_per_token for group in running.config.groups)
        assert running.figures.swapped_bytes == (end - seen) * windowed + end * full
        child = running.fork(two, seed=0)  # computed again: it has nothing of its own there
        running.cancel(two)
        assert running.figures.swapped_bytes == 0
        run(running)
        assert child.tokens[: len(two.tokens)] == two.tokens
        assert one.finish_reason == child.finish_reason == "length"


def test_what_is_no_number_of_bytes_is_refused():
    with pytest.raises(jaxkv.ConfigError, match="swap_space must be an int of at least 0, got -1"):
        engine(POOLS[KIND], swap_space=-1)
