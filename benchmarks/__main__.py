"""`python -m benchmarks [PART ...] [--quick] [--json FILE]`: jaxkv beside its peers."""

import argparse
import importlib
import json
import shlex
import sys
import time
from pathlib import Path

from benchmarks.measure import OtherLoad
from benchmarks.report import environment, header

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
        "checkpoint",
        "ways",
        "latents",
        "mesh",
        "draft",
    ),
    *("accelerator", "accelerator-checks"),
)


def main(arguments: list[str]) -> None:
    """Run the parts asked for, one after the other, and print each as it is done."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all if none")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and sizes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")

    facts = environment(shlex.join(["python", "-m", "benchmarks", *arguments]))
    print(header(facts), flush=True)
    figures = []
    for part in options.parts or PARTS:
        started, others = time.monotonic(), OtherLoad()
        for table in importlib.import_module(f"benchmarks.{part.replace('-', '_')}").run(
            options.quick
        ):
            print(f"\n{table}", flush=True)
            figures.append({"title": table.title, "rows": table.rows, "notes": table.notes})
        seconds, busy = time.monotonic() - started, others.share()
        disturbed = busy > _MOST_BUSY and seconds > 1
        warning = ": do not trust these figures" if disturbed else ""
        print(f"  ({part}: {seconds:.0f} s; other processes took {busy:.0%} of the cores{warning})")
    if options.json:
        options.json.write_text(json.dumps({"environment": facts, "tables": figures}, indent=2))


main(sys.argv[1:])
