"""Every verb on every kind of cache: equal to the oracle, or refused with a way out that works.

``python -m tests.walk.pairs`` writes the table of every addressing, placement and residual, while
codecs take turns. ``python -m tests.walk.pairs all`` tries every codec.
"""

import collections
import itertools
import pathlib
import string
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

import jaxkv
from jaxkv.addressing import PagedIndex
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


def copy_pages(walk):
    """From one sequence to another that holds the same."""
    if isinstance(walk.cache.groups[0].index, PagedIndex):
        walk.select([0, 0])
    walk.copy_pages(0)


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
    "copy_pages": copy_pages,
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


def done(kind, *verbs):
    walk = walked(kind)
    for verb in verbs:
        verb(walk)
    return walk


def copy_in_each_group(walk):
    page = jnp.zeros(1, jnp.int32)
    walk.cache = walk.cache.with_groups(
        [
            jaxkv.copy_pages(group, page, page) if isinstance(group.index, PagedIndex) else group
            for group in walk.cache.groups
        ]
    )


# By what a refusal says: that, done, of the kind and the verb that it refused.
WAYS_OUT: dict[str, Callable[[Kind, Verb], Walk]] = {
    "Leave implementation= out": lambda kind, verb: done(kind, lambda walk: walk.step(Call())),
    "Create it with addressing=jaxkv.Paged": lambda kind, verb: done(
        kind._replace(addressing="pages"), verb
    ),
    "Copy in each of cache.groups": lambda kind, verb: done(kind, copy_in_each_group),
    "Create the cache with addressing=jaxkv.Contiguous()": lambda kind, verb: done(
        kind._replace(addressing="contiguous"), verb
    ),
    "of a contiguous cache or of pages that sequences own": lambda kind, verb: done(
        kind._replace(addressing="contiguous"), verb
    ),
    "compress on the device and jaxkv.offload the result": lambda kind, verb: done(
        kind._replace(placement=OFFLOADED), verb
    ),
    "Fork before jaxkv.compress": lambda kind, verb: done(
        kind._replace(addressing="contiguous"), verb, VERBS["compress by head"]
    ),
    "Leave pages= out": lambda kind, verb: done(kind, VERBS["compress"]),
    "with addressing=jaxkv.Kept(...)": lambda kind, verb: done(
        kind._replace(addressing="kept", placement="device"), verb
    ),
    "into= a cache with more pages": lambda kind, verb: done(kind, VERBS["load into"]),
    "with jaxkv.prefetch first": lambda kind, verb: done(kind, Walk.prefetch, verb),
}


def outcomes(kind):
    """By verb: "=" for what is equal to the oracle, or the way out of what is refused."""
    found = {"create": outcome(kind, lambda walk: None, lambda: walked(kind))}
    if found["create"] == EQUAL:
        start = walked(kind).copy
        found |= {name: outcome(kind, verb, start) for name, verb in VERBS.items()}
    return found


def outcome(kind, verb, start):
    found = EQUAL
    try:
        walk = start()
        verb(walk)
    except (ValueError, TypeError) as error:
        if not refused_by_jaxkv(error):
            raise
        (found,) = (words for words in WAYS_OUT if words in str(error))
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
