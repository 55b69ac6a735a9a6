"""What is lost by storing less: on vectors, on a language model, on recall.

`stores.STORES` lists what is compared; a policy or codec is one more row there.
"""

from collections.abc import Iterator

from benchmarks.quality import language, recall, vectors
from benchmarks.report import Table


def run(quick: bool) -> Iterator[Table]:
    """A table a kind of evidence."""
    yield from vectors.run(quick)
    yield from language.run(quick)
    yield from recall.run(quick)
