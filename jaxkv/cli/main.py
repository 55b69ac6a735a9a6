"""The command line: ``jaxkv COMMAND``, one row of `COMMANDS` each."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from jaxkv import __version__
from jaxkv.cli.batch import BATCH
from jaxkv.cli.chat import CHAT
from jaxkv.cli.command import Command
from jaxkv.cli.compiled import keep_compiled
from jaxkv.cli.evaluate import EVAL
from jaxkv.cli.generate import GENERATE
from jaxkv.cli.plan import PLAN
from jaxkv.errors import JaxkvError

COMMANDS: dict[str, Command] = {
    "plan": PLAN,
    "generate": GENERATE,
    "chat": CHAT,
    "batch": BATCH,
    "eval": EVAL,
}

_EXAMPLES = """\
examples:
  jaxkv plan Llama-3-8B --context 32k --batch 8 --device H100
      will its cache fit, and what would?
  jaxkv generate --prompt 'class Stack:'
      the model that comes along writes some Python
  jaxkv COMMAND --help
      more of each, by example; all but chat take --json

exit status: 0 done or yes, 1 no, 2 the question was not understood, 130 interrupted, 141 nobody
reads the output any more
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status: 0 yes, 1 no, 2 not understood.

    130 after Ctrl-C and 141 when nobody reads the output, as shells have it. Given no arguments it
    takes the shell's: text goes in and out as UTF-8 whatever the locale, and what is compiled is
    kept for the next time.

    >>> main(["plan", "gpt2", "--context", "1", "--device", "T4"])  # doctest: +ELLIPSIS
    KV cache  1 tokens x 12 layers x 12 KV heads x 64, bfloat16
    ...
    0
    """
    options = _parser().parse_args(arguments)
    if arguments is None:
        _speak_utf8()
        if not getattr(options, "no_compilation_cache", True):
            keep_compiled()
    try:
        status = COMMANDS[options.command].run(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Or Python fails once more as it ends, when it writes what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (JaxkvError, ValueError, ImportError) as error:
        message = str(error)
    print(f"jaxkv {options.command}: {message}", file=sys.stderr)
    return 2


def _speak_utf8() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say it in one line, where argparse would print the usage too."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="jaxkv",
        description="Key/value caches for JAX.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jaxkv {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.help,
            description=command.help,
            epilog=command.examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
