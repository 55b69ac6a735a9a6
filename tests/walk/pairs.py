"""Every verb on every kind of cache: equal to the oracle, or refused with a way out that works.

``python -m tests.walk.pairs`` tries kinds that cover every pair of names of two axes, and prints
the table; ``python -m tests.walk.pairs all`` tries every kind that there is.
"""

import collections
import itertools
import pathlib
import re
import string
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax

from tests.walk.caches import ADDRESSINGS, CODECS, KEEPS, MOST_ROWS, RESIDUALS, config_of
from tests.walk.walk import Call, Walk, refused_by_jaxkv


class Kind(NamedTuple):
    """By names in the tables of `tests.walk.caches`, and two kinds that verbs make."""

    codec: str = "float32"
    addressing: str = "contiguous"
    placement: str = "device"
    residual: str = ""


BY_HEAD, OFFLOADED, EQUAL = "kept by head", "offloaded", "="
AXES = Kind(
    codec=tuple(CODECS),
    addressing=(*ADDRESSINGS, "hybrid", BY_HEAD),
    placement=("device", "host", "host, chosen", OFFLOADED),
    residual=tuple(RESIDUALS),
)


def walked(kind):
    """A cache of a kind that is in use: it went round a ring, and was rolled back."""
    addressing = "contiguous" if kind.addressing == BY_HEAD else kind.addressing
    placement = "device" if kind.placement == OFFLOADED else kind.placement
    walk = Walk(config_of(kind.codec, addressing, placement, kind.residual, MOST_ROWS))
    for tokens in (4, 4, 1):
        if addressing.startswith("kept"):
            walk.evict()
        walk.step(Call(tokens))
    walk.truncate([9, 8])
    if kind.addressing == BY_HEAD:
        walk.compress(KEEPS[2])
    if kind.placement == OFFLOADED:
        walk.offload()
    return walk


Verb = Callable[[Walk], None]
VERBS: dict[str, Verb] = {
    "append, attend, advance": lambda walk: walk.step(Call(4)),
    "attend by native": lambda walk: walk.step(Call(1, "native")),
    "attend by reference": lambda walk: walk.step(Call(1, "reference")),
    "attend by blockwise": lambda walk: walk.step(Call(1, "blockwise")),
    "attend by streamed": lambda walk: walk.step(Call(1, "streamed")),
    "layer": Walk.read,
    "truncate": lambda walk: walk.truncate([7, 8]),
    "reset": Walk.reset,
    "select": lambda walk: walk.select([1, 0]),
    "fork": lambda walk: walk.fork(2),
    "copy_pages": lambda walk: walk.copy_pages(0),
    "compress": lambda walk: walk.compress(KEEPS[0]),
    "compress by layer": lambda walk: walk.compress(KEEPS[1]),
    "compress by head": lambda walk: walk.compress(KEEPS[2]),
    "compress in a pool": lambda walk: walk.compress(KEEPS[0], in_pool=True),
    "evict": Walk.evict,
    "load": Walk.save_and_load,
    "load into": lambda walk: walk.save_and_load(into=True, order=[1, 0]),
    "offload": Walk.offload,
    "prefetch": Walk.prefetch,
}


# A way out: what a refusal says to do, of a kind and a verb; a walk in which that, and the verb,
# were done.
WayOut = Callable[[Kind, Verb], Walk]


def created(**fields) -> WayOut:
    """The verb on a cache that was created otherwise."""
    return lambda kind, verb: after(verb)(walked(kind._replace(**fields)))


def first(*verbs: Verb) -> WayOut:
    """The verb after others."""
    return lambda kind, verb: after(*verbs, verb)(walked(kind))


def instead(other: Verb) -> WayOut:
    return lambda kind, verb: after(other)(walked(kind))


def after(*verbs):
    def done(walk):
        for verb in verbs:
            verb(walk)
        return walk

    return done


def before_compress(kind, verb):
    return after(verb, VERBS["compress by head"])(walked(kind._replace(addressing="contiguous")))


WAYS_OUT: dict[str, WayOut] = {  # by what the refusal says
    "Leave implementation= out": instead(lambda walk: walk.step(Call())),
    "Create it with addressing=jaxkv.Paged": created(addressing="pages"),
    "Create the cache with addressing=jaxkv.Contiguous": created(addressing="contiguous"),
    "compress on the device and jaxkv.offload the result": created(placement=OFFLOADED),
    "blocks_per_query needs blocks .*, of a contiguous cache": created(addressing="contiguous"),
    "Fork before jaxkv.compress": before_compress,
    "Leave pages= out": instead(VERBS["compress"]),
    "evict needs a cache of jaxkv.compress": first(VERBS["compress"]),
    "with jaxkv.prefetch": first(Walk.prefetch),
}


def outcomes(kind):
    """By verb: "=" for what is equal to the oracle, or the way out of what is refused."""
    found = {"create": outcome(kind, lambda walk: None, lambda: walked(kind))}
    if found["create"] != EQUAL:
        return found
    walk = walked(kind)
    return found | {name: outcome(kind, verb, walk.copy) for name, verb in VERBS.items()}


def outcome(kind, verb, start):
    try:
        walk = after(verb)(start())
        found = EQUAL
    except (ValueError, TypeError) as error:
        if not refused_by_jaxkv(error):
            raise
        (found,) = (words for words in WAYS_OUT if re.search(words, str(error)))
        walk = WAYS_OUT[found](kind, verb)
    walk.check()
    walk.step(Call())
    return found


def kinds():
    """Of every addressing, placement and residual; codecs take turns."""
    every = itertools.product(*AXES[1:])
    return [Kind(AXES.codec[number % len(CODECS)], *names) for number, names in enumerate(every)]


# A letter for each outcome that some kinds have, by placement, verb and addressing.
Table = dict[tuple[str, str, str], str]
LETTERS = {EQUAL: EQUAL, **dict(zip(WAYS_OUT, string.ascii_lowercase, strict=False))}
FILE = pathlib.Path(__file__).with_name("pairs.md")


def table_of(found) -> Table:
    """Of the outcomes of some kinds."""
    table = collections.defaultdict(set)
    for kind, of_verbs in found.items():
        for verb, outcome in of_verbs.items():
            table[kind.placement, verb, kind.addressing].add(LETTERS[outcome])
    return {key: "".join(sorted(cell)) for key, cell in table.items()}


def written(table: Table):
    """As Markdown."""
    lines = [
        "Written by `python -m tests.walk.pairs`: what a verb gives equals the oracle (=), or it",
        "refuses and says what to do, which was tried and works:",
        "",
        *(f"- {letter}: {words}" for words, letter in LETTERS.items() if words != EQUAL),
    ]
    for placement in AXES.placement:
        lines += [
            "",
            _row(placement, *AXES.addressing),
            _row(*["---"] * (1 + len(AXES.addressing))),
        ]
        for verb in ("create", *VERBS):
            cells = (table.get((placement, verb, name), "") for name in AXES.addressing)
            lines.append(_row(verb, *cells))
    return "\n".join(lines)


def _row(*cells):
    return f"| {' | '.join(cells)} |"


def read() -> Table:
    """What the file says."""
    table, placement, header = {}, "", []
    for line in FILE.read_text().splitlines():
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if first in AXES.placement:
            placement, header = first, cells
        table |= {(placement, first, name): cell for name, cell in zip(header, cells, strict=False)}
    return table


def main():
    found = {}
    every = itertools.starmap(Kind, itertools.product(*AXES))
    for kind in every if "all" in sys.argv else kinds():
        found[kind] = outcomes(kind)
        refused = [f"{verb}: {way}" for verb, way in found[kind].items() if way != EQUAL]
        print(*kind, *refused, sep=", ", flush=True)
        jax.clear_caches()
    FILE.write_text(written(table_of(found)))


if __name__ == "__main__":
    main()
