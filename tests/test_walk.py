"""Any sequence of verbs on every kind of cache, beside a float64 oracle.

Some tens of verbs of each kind, and 100,000 with ``--hypothesis-profile=nightly``, in the devices
that the tests have; ``python -m tests.walk`` runs in a process of its own, with one.
"""

import hypothesis
import pytest

from tests.walk.caches import kinds
from tests.walk.machine import walk

NIGHTLY = hypothesis.settings().max_examples > 100
KINDS = kinds()


@pytest.mark.slow_cases(r"^(?!float32 pages, window device newest)")
@pytest.mark.parametrize("name", KINDS)
def test_walks(name):
    steps = walk(
        KINDS[name],
        examples=100 if NIGHTLY else 1,
        verbs=50 if NIGHTLY else 20,
        derandomize=not NIGHTLY,
    )
    print(f"{steps} verbs: {name}")
