"""Every verb on every kind of cache: equal to the oracle, or refused with a way out that works.

``python -m tests.walk.pairs`` tries all of them and prints the table.
"""

import functools
import itertools
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax

import jaxkv
from jaxkv.attention import IMPLEMENTATIONS
from tests.walk.caches import ADDRESSINGS, CODECS, KEEPS, MOST_ROWS, RESIDUALS, config_of
from tests.walk.walk import Call, Walk, refused_by_jaxkv


class Kind(NamedTuple):
    """By names in the tables of `tests.walk.caches`, and what is made by a verb."""

    codec: str = "float32"
    addressing: str = "contiguous"
    placement: str = "device"
    residual: str = ""


AXES = Kind(
    tuple(CODECS),
    (*ADDRESSINGS, "hybrid", "kept by head"),
    ("device", "host", "host, chosen", "offloaded"),
    tuple(RESIDUALS),
)


def walked(kind):
    """A cache of a kind that is in use: it has come round a ring, and was rolled back."""
    by_head, offloaded = kind.addressing == "kept by head", kind.placement == "offloaded"
    addressing = "contiguous" if by_head else kind.addressing
    placement = "device" if offloaded else kind.placement
    walk = Walk(config_of(kind.codec, addressing, placement, kind.residual, MOST_ROWS))
    for tokens in (4, 4, 1):
        if addressing.startswith("kept"):
            walk.evict()
        walk.step(Call(tokens))
    walk.truncate([9, 8])
    if by_head:
        walk.compress(KEEPS[2])
    if offloaded:
        walk.offload()
    return walk


def attend_by(name):
    return lambda walk: walk.step(Call(1, name))


Verb = Callable[[Walk], None]
VERBS: dict[str, Verb] = {
    "append, attend, advance": lambda walk: walk.step(Call(4)),
    "attend by native": attend_by("native"),
    "attend by reference": attend_by("reference"),
    "attend by blockwise": attend_by("blockwise"),
    "attend by streamed": attend_by("streamed"),
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
    "evict": lambda walk: walk.evict(),
    "load": Walk.save_and_load,
    "load into": lambda walk: walk.save_and_load(into=True, order=[1, 0]),
    "offload": Walk.offload,
    "prefetch": Walk.prefetch,
}


def error_of(verb, walk):
    """What refuses a verb; None if it, and a step after it, give what they must."""
    try:
        verb(walk)
    except (ValueError, TypeError) as error:
        if not refused_by_jaxkv(error):
            raise
        return f"{type(error).__name__}: {error}"
    walk.check()
    walk.step(Call())
    return None


def main():
    names = sys.argv[1:]
    for kind in itertools.product(*AXES):
        kind = Kind(*kind)
        if names and kind.codec not in names:
            continue
        try:
            walk = walked(kind)
        except Exception as e:
            print(kind, "CREATE", type(e).__name__, e, flush=True)
            continue
        for name, verb in VERBS.items():
            try:
                e = error_of(verb, walk.copy())
            except Exception as e2:
                e = f"RAW {type(e2).__name__}: {str(e2)[:300]}"
            if e is not None:
                print(kind, name, e[:300], flush=True)
        print(kind, "done", flush=True)


if __name__ == "__main__":
    main()
