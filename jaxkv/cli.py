"""The command line: ``jaxkv COMMAND``, one row of `COMMANDS` each."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from jaxkv import __version__
from jaxkv.codecs import CODECS
from jaxkv.config import KVCacheConfig
from jaxkv.errors import JaxkvError
from jaxkv.known_models import known_shape
from jaxkv.memory import parse_bytes, parse_tokens, plan

_PLAN_EXAMPLES = """\
examples:
  jaxkv plan Qwen2.5-0.5B --context 32k
      with the memory of this machine's device
  jaxkv plan Llama-3-8B --context 32k --batch 8 --device 24GB
      for a device that is not here
  jaxkv plan ./my-model --context 128k --device 80GiB --codec float16 --json
      for a folder (or file) with a Hugging Face config.json

exit status: 0 it fits, 1 it does not, 2 the question was not understood
"""


class Command(NamedTuple):
    """A subcommand: what help says, how its arguments are added, what runs it."""

    help: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status: 0 yes, 1 no, 2 not understood."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return COMMANDS[options.command].run(options)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}"
    except (JaxkvError, ValueError) as error:
        message = str(error)
    print(f"jaxkv {options.command}: {message}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say it in one line, where argparse would print the usage too."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jaxkv", description="Key/value caches for JAX.")
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


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a config.json, a folder that holds one, or a model's name")
    parser.add_argument(
        "--context", type=_argument(parse_tokens), default=4096, metavar="TOKENS",
        help="tokens of one sequence, prompt and answer: 4096 or 32k (default: 4096)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, metavar="N", help="sequences at once (default: 1)")
    parser.add_argument(
        "--device", type=_argument(parse_bytes), metavar="SIZE",
        help="memory of the device: 24GB, 80GiB (default: what this machine's device has free)",
    )  # fmt: skip
    parser.add_argument(
        "--codec", choices=CODECS, default="bfloat16",
        help="how keys and values are stored (default: bfloat16)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def _run_plan(options: argparse.Namespace) -> int:
    fields = {
        "max_context_length": options.context,
        "batch_size": options.batch,
        "codec": CODECS[options.codec],
    }
    if Path(options.model).exists():
        config = KVCacheConfig.from_hf(options.model, **fields)
    else:
        config = KVCacheConfig(**known_shape(options.model)._asdict(), **fields)
    answer = plan(config, options.device)
    print(answer.to_json() if options.json else answer)
    return 0 if answer.fits else 1


def _argument(parse: Callable[[str], int]) -> Callable[[str], int]:
    """A parser whose own words argparse shows: only those of an ArgumentTypeError."""

    def parse_argument(text: str) -> int:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_argument


COMMANDS: dict[str, Command] = {
    "plan": Command(
        "Will a model's KV cache fit? Needs no weights and no network.",
        _PLAN_EXAMPLES,
        _add_plan_arguments,
        _run_plan,
    ),
}

if __name__ == "__main__":
    sys.exit(main())
