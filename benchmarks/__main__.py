"""`python -m benchmarks [PART ...] [--quick] [--json FILE]`: jaxkv beside its peers.

Some parts take long, and can be finished in pieces: `--table` and `--row` choose what is measured,
`--json` writes it, and `--known` takes what was written before.
"""

import argparse
import importlib
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import OtherLoad
from benchmarks.report import Pieces, Table, environment, header

# Above this share of the cores, others disturb the figures more than a spread shows.
_MOST_BUSY = 0.1
PARTS = (
    *("startup", "allocation", "append", "attention", "codecs", "decode", "paging", "engine"),
    *(
        "snapshot",
        "streaming",
        "compression",
        "quality",
        "codecs-real",
        "eviction-real",
        "checkpoint",
        "ways",
        "latents",
        "mesh",
        "draft",
    ),
    *("accelerator", "accelerator-checks"),
)
IN_PIECES = ("codecs-real", "eviction-real")


def main(arguments: list[str]) -> None:
    """Run the parts asked for, one after the other, and print each as it is done."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all if none")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and sizes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    for what, name in (("table", "title"), ("row", "name")):
        text = f"only {what}s whose {name} holds this; again for several ({', '.join(IN_PIECES)})"
        parser.add_argument(f"--{what}", action="append", default=[], metavar="WORD", help=text)
    parser.add_argument(
        "--known", action="append", default=[], type=Path, metavar="FILE",
        help="rows that --json wrote, which are shown and not measured again",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    pieces = Pieces(tuple(options.table), tuple(options.row), tuple(_known(options.known)))
    whole = sorted(set(options.parts or PARTS) - set(IN_PIECES))
    if whole and pieces != Pieces():
        parser.error(f"{', '.join(whole)} cannot be run in pieces; {', '.join(IN_PIECES)} can")

    facts = environment(shlex.join(["python", "-m", "benchmarks", *arguments]))
    print(header(facts), flush=True)
    figures = []
    for part in options.parts or PARTS:
        started, others = time.monotonic(), OtherLoad()
        run = importlib.import_module(f"benchmarks.{part.replace('-', '_')}").run
        tables = run(options.quick, pieces) if part in IN_PIECES else run(options.quick)
        for table in tables:
            print(f"\n{table}", flush=True)
            figures.append({"title": table.title, "rows": table.rows, "notes": table.notes})
            if options.json:  # after each, since a long run may be cut short
                found = {"environment": facts, "tables": figures}
                options.json.write_text(json.dumps(found, indent=2))
        seconds, busy = time.monotonic() - started, others.share()
        disturbed = busy > _MOST_BUSY and seconds > 1
        warning = ": do not trust these figures" if disturbed else ""
        print(f"  ({part}: {seconds:.0f} s; other processes took {busy:.0%} of the cores{warning})")


def _known(files: list[Path]) -> Iterator[Table]:
    for file in files:
        for table in json.loads(file.read_text())["tables"]:
            yield Table(**table)


main(sys.argv[1:])
