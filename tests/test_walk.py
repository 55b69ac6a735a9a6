"""Any sequence of verbs, and every verb on every kind of cache, beside a float64 oracle.

Some tens of verbs of each kind, and 100,000 with ``--hypothesis-profile=nightly``, in the devices
that the tests have; ``python -m tests.walk`` runs in a process of its own, with one.
"""

import hypothesis
import pytest

from tests.walk import pairs
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", pairs.kinds() if NIGHTLY else pairs.kinds()[::16], ids=" ".join)
def test_every_verb_is_right_or_refused_with_a_way_out(kind):
    assert pairs.line_of(kind) in pairs.FILE.read_text().splitlines()


def test_the_table_has_every_kind():
    lines = pairs.FILE.read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert [pairs.Kind(*map(str.strip, row[:4])) for row in cells[2:]] == pairs.kinds()
