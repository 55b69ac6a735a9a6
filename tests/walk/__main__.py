"""Random walks in a process of its own, with one CPU device: ``python -m tests.walk 100000``."""

import os
import sys
import time
import traceback

from tests.haste import FLAGS

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS

import jax

from tests.walk.caches import kinds
from tests.walk.machine import walk

VERBS = 50  # of a walk
WALKS = 20  # of a seed


def main():
    jax.config.update("jax_disable_most_optimizations", True)  # many programs, each run a few times
    wanted, *names = sys.argv[1:]
    chosen = {name: kind for name, kind in kinds().items() if not names or name in names}
    total, violations, start = 0, 0, time.monotonic()
    for number, (name, kind) in enumerate(chosen.items(), 1):
        seed = 0
        while total * len(chosen) < int(wanted) * number:
            try:
                total += walk(kind, WALKS, VERBS, seed, print_blob=True, database=None)
            except Exception:
                violations += 1
                traceback.print_exc()
                break  # the other kinds are walked all the same
            print(
                f"{total:7} steps, {time.monotonic() - start:5.0f} s: {name}, seed {seed}",
                flush=True,
            )
            seed += 1
        jax.clear_caches()
    print(f"{total} steps, {violations} violations")
    sys.exit(violations > 0)


if __name__ == "__main__":
    main()
