"""The task that eviction is measured on: what it asks can be answered from its context alone."""

import numpy as np
import pytest

from benchmarks.recall import (
    ASK,
    CONTEXT,
    LENGTH,
    PAIR,
    PAIRS,
    QUESTION,
    questions,
    repetitions,
)


@pytest.mark.parametrize(("context", "pairs"), [(CONTEXT, PAIRS), (CONTEXT // 4, PAIRS // 2)])
def test_each_answer_stands_once_in_the_context(context, pairs):
    batch = questions(np.random.default_rng(0), 50, context, pairs)
    assert batch.tokens.shape == (50, context + QUESTION * pairs)
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        of_key = {tokens[at + 1]: tokens[at + 2] for at in range(context) if tokens[at] == PAIR}
        asked = [at for at, target in enumerate(targets) if target >= 0]
        assert len(of_key) == len(asked) == pairs
        assert all(tokens[at - 1] == ASK for at in asked)
        assert {tokens[at]: targets[at] for at in asked} == of_key
        # Every key is in one pair and one question, nowhere in the filler.
        assert all(tokens.count(key) == 2 for key in of_key)


def test_repetitions_ask_for_all_but_the_first_showing():
    batch = repetitions(np.random.default_rng(0), 50)
    assert batch.tokens.shape == (50, LENGTH)
    known = batch.targets >= 0
    assert (batch.targets[:, :-1] == batch.tokens[:, 1:])[known[:, :-1]].all()
    for tokens, row in zip(batch.tokens, known, strict=True):
        period = int(row.argmax())  # the token at this place was shown a period ago
        np.testing.assert_array_equal(tokens[period:], tokens[:-period])
