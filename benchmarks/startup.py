"""What a person waits for before anything happens: imports, and a question that needs no device."""

import resource
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.report import Row, Table

_MOST_ADDED_SECONDS, _MOST_PLAN_SECONDS = 0.1, 1.0
_PROGRAMS = {
    "import jax": ["-c", "import jax"],
    "import jaxkv": ["-c", "import jaxkv"],
    "jaxkv plan Llama-3-8B --device 24GB": [
        "-m", "jaxkv.cli.main", "plan", "Llama-3-8B", "--device", "24GB"
    ],
}  # fmt: skip


def run(quick: bool) -> Iterator[Table]:
    """A row a program, each in a process of its own, in turns; the best of all turns."""
    turns = 3 if quick else 9
    wall = dict.fromkeys(_PROGRAMS, float("inf"))
    processor = dict(wall)
    for _ in range(turns):
        for name, arguments in _PROGRAMS.items():
            started, before = time.perf_counter(), _child_seconds()
            subprocess.run([sys.executable, *arguments], check=False, stdout=subprocess.DEVNULL)
            wall[name] = min(wall[name], time.perf_counter() - started)
            processor[name] = min(processor[name], _child_seconds() - before)
    first = next(iter(_PROGRAMS))
    rows: list[Row] = [
        {
            "program": name,
            "s": wall[name],
            "processor s": processor[name],
            "over import jax, s": processor[name] - processor[first],
        }
        for name in _PROGRAMS
    ]
    _, imported, planned = rows
    notes = [
        f"Best of {turns} processes each, in turns. The last column is processor time, which "
        "others on the machine disturb least.",
        _target(
            "import jaxkv over import jax", imported["over import jax, s"], _MOST_ADDED_SECONDS
        ),
        _target("jaxkv plan", planned["s"], _MOST_PLAN_SECONDS),
    ]
    yield Table("Startup", rows, notes)


def _target(what: str, seconds: float, most: float) -> str:
    verdict = "met" if seconds <= most else "NOT MET"
    return f"target: {what} at most {most:g} s: {seconds:.3f} s, {verdict}"


def _child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
