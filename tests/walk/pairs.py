"""Every verb on every kind of cache: equal to the oracle, or refused with a way out that works.

``python -m tests.walk.pairs > tests/walk/pairs.md`` writes the table of all addressings, placements
and residuals, in which codecs take turns. ``python -m tests.walk.pairs all`` prints it of each.
"""

import functools
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
    return _walked(kind).copy()


@functools.lru_cache(maxsize=4)
def _walked(kind):
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


def fork(walk):
    """One sequence, for pools have no room for more than two of two."""
    walk.select([0])
    walk.fork(2)


def compress_in_pool(walk):
    """A copy, for the pool is donated."""
    walk.cache = jax.tree.map(jnp.copy, walk.cache)
    walk.compress(KEEPS[0], in_pool=True)


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
    "fork": fork,
    "copy_pages": copy_pages,
    "compress": lambda walk: walk.compress(KEEPS[0]),
    "compress by layer": lambda walk: walk.compress(KEEPS[1]),
    "compress by head": lambda walk: walk.compress(KEEPS[2]),
    "compress in a pool": compress_in_pool,
    "evict": Walk.evict,
    "load": Walk.save_and_load,
    "load into": lambda walk: walk.save_and_load(into=True, order=[1, 0]),
    "offload": Walk.offload,
    "prefetch": Walk.prefetch,
}


def copy_in_each_group(walk):
    page = jnp.zeros(1, jnp.int32)
    walk.cache = walk.cache.with_groups(
        [
            jaxkv.copy_pages(group, page, page) if isinstance(group.index, PagedIndex) else group
            for group in walk.cache.groups
        ]
    )


# By what a refusal says: the kind and the verbs that do what it says, of what it refused.
WayOut = Callable[[Kind, Verb], tuple[Kind, list[Verb]]]
WAYS_OUT: dict[str, WayOut] = {
    "Leave implementation= out": lambda kind, verb: (kind, [lambda walk: walk.step(Call())]),
    "Create it with addressing=jaxkv.Paged": lambda kind, verb: (
        kind._replace(addressing="pages"),
        [verb],
    ),
    "Copy in each of cache.groups": lambda kind, verb: (kind, [copy_in_each_group]),
    "Create the cache with addressing=jaxkv.Contiguous()": lambda kind, verb: (
        kind._replace(addressing="contiguous"),
        [verb],
    ),
    "of a contiguous cache or of pages that sequences own": lambda kind, verb: (
        kind._replace(addressing="contiguous"),
        [verb],
    ),
    "create it without one and jaxkv.offload the result": lambda kind, verb: (
        kind._replace(placement=OFFLOADED),
        [verb],
    ),
    "Fork before jaxkv.compress": lambda kind, verb: (
        kind._replace(addressing="contiguous"),
        [verb, VERBS["compress by head"]],
    ),
    "Leave pages= out": lambda kind, verb: (kind, [VERBS["compress"]]),
    "with addressing=jaxkv.Kept(...)": lambda kind, verb: (
        kind._replace(addressing="kept", placement="device"),
        [verb],
    ),
    "it is loaded whole": lambda kind, verb: (kind, [VERBS["load"]]),
    "into= a cache with more pages": lambda kind, verb: (kind, [VERBS["load into"]]),
    "with jaxkv.prefetch first": lambda kind, verb: (kind, [Walk.prefetch, verb]),
}


LETTERS = dict(zip(WAYS_OUT, string.ascii_lowercase, strict=False))


def outcomes(kind):
    """By verb: "=" for what is equal to the oracle, or letters of the ways out that were taken."""
    found = {"create": outcome(kind, lambda walk: None)}
    if found["create"].startswith(EQUAL):
        found |= {name: outcome(kind, verb) for name, verb in VERBS.items()}
    return found


def outcome(kind, verb):
    """Of a verb and of a step after it; what is refused with no way out that works is raised."""
    found, verbs = "", [verb, Walk.check, lambda walk: walk.step(Call())]
    while (refusal := refused(kind, verbs)) is not None:
        number, error = refusal
        words = next((words for words in WAYS_OUT if words in str(error)), None)
        if words is None or LETTERS[words] in found or not refused_by_jaxkv(error):
            raise error
        found += (EQUAL if number and not found else "") + LETTERS[words]
        kind, instead = WAYS_OUT[words](kind, verbs[number])
        verbs[number : number + 1] = instead
    return found or EQUAL


def refused(kind, verbs):
    """The number of the first verb that is refused, and how; None if all are done."""
    number = 0
    try:
        walk = walked(kind)
        for number, verb in enumerate(verbs):  # noqa: B007
            verb(walk)
    except (ValueError, TypeError) as error:
        return number, error
    return None


def kinds():
    """Every addressing, placement and residual, and so that any two names meet in one."""
    every = list(itertools.product(*AXES[1:]))
    turns = [(number + number // len(CODECS)) % len(CODECS) for number in range(len(every))]
    found = [Kind(AXES.codec[turn], *names) for turn, names in zip(turns, every, strict=True)]
    met = {kind[:2] for kind in found}
    missing = (pair for pair in itertools.product(*AXES[:2]) if pair not in met)
    return found + [Kind(*pair) for pair in missing]


FILE = pathlib.Path(__file__).with_name("pairs.md")
COLUMNS = (*Kind._fields, "create", *VERBS)


def line_of(kind):
    """Of the table: a kind, and a letter for the outcome of each verb."""
    found = outcomes(kind)
    return line(*kind, *(found[verb] for verb in COLUMNS[len(kind) :] if verb in found))


def line(*cells):
    """Of a table in Markdown."""
    cells += ("",) * (len(COLUMNS) - len(cells))
    return f"| {' | '.join(cells)} |"


def main():
    jax.config.update("jax_disable_most_optimizations", True)  # many programs, each run a few times
    print("Written by `python -m tests.walk.pairs`: what a verb gives equals the oracle (=), or it")
    print("refuses and says what to do, which was tried and works:\n")
    for words, letter in LETTERS.items():
        print(f"- {letter}: {words}")
    print("\nA kind that cannot be created has no outcomes but of that; its way out was taken too.")
    print("", line(*COLUMNS), line(*["---"] * len(COLUMNS)), sep="\n")
    every = itertools.starmap(Kind, itertools.product(*AXES))
    for kind in every if "all" in sys.argv else kinds():
        print(line_of(kind), flush=True)


if __name__ == "__main__":
    main()
