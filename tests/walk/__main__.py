"""Random walks in a process of its own, with one CPU device: ``python -m tests.walk 100000``."""

import sys
import time

import jax

from tests.walk.caches import kinds
from tests.walk.machine import walk

WALK = 50  # verbs


def main():
    wanted, *names = sys.argv[1:]
    chosen = {name: kind for name, kind in kinds().items() if not names or name in names}
    examples = -(-int(wanted) // (WALK * len(chosen)))
    total, start = 0, time.monotonic()
    for name, kind in chosen.items():
        total += walk(kind, examples, WALK, print_blob=True)
        print(f"{total:7} steps, {time.monotonic() - start:5.0f} s: {name}", flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main()
