"""`NGram` against a search that anybody could write."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.drafts import NGram


def looked_up(text, n, k):
    for end in range(len(text) - 2, n - 2, -1):
        if text[end - n + 1 : end + 1] == text[len(text) - n :]:
            longer = list(text)
            while len(longer) < len(text) + k:
                longer.append(longer[end + 1 + len(longer) - len(text)])
            return longer[len(text) :]
    return [-1] * k


@pytest.mark.parametrize("n", [1, 2, 4])
def test_it_finds_what_followed_the_last_time(n):
    random = np.random.default_rng(n)
    texts = [random.integers(0, 3, random.integers(1, 20)).tolist() for _ in range(64)]
    tokens = random.integers(0, 3, (64, 20), np.int32)  # anything after each text
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    lengths = jnp.array([len(text) for text in texts])
    expected = [looked_up(text, n, 5) for text in texts]
    assert NGram(n).propose(jnp.asarray(tokens), lengths, 5).tolist() == expected
    assert -1 in np.ravel(expected)
