"""Any sequence of verbs on every kind of cache, beside a float64 oracle.

Some 300 verbs by default and 100,000 with ``--hypothesis-profile=nightly``, in the devices that
the tests have; ``python -m tests.walk`` and ``python -m tests.walk.pairs`` run in a process of
their own, with one.
"""

import hypothesis
import jax
import pytest

from tests.walk.caches import kinds
from tests.walk.machine import walk

NIGHTLY = hypothesis.settings().max_examples > 100
KINDS = kinds()
SOON = ["bfloat16 contiguous host, chosen", "float32 pages, window device newest"]


@pytest.fixture(autouse=True, scope="module")
def compiled_in_haste():
    """The many small programs here are run a few times each."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow_cases("^(?!" + "|".join(SOON) + ")")
@pytest.mark.parametrize("name", KINDS)
def test_walks(name):
    steps = walk(
        KINDS[name],
        examples=100 if NIGHTLY else 3,
        verbs=50 if NIGHTLY else 25,
        derandomize=not NIGHTLY,
    )
    print(f"{steps} verbs: {name}")
