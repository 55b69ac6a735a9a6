"""What a subcommand is."""

import argparse
from collections.abc import Callable
from typing import NamedTuple, TypeVar

Number = TypeVar("Number", int, float)


class Command(NamedTuple):
    """A subcommand: what help says, how its arguments are added, what runs it."""

    help: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def argument_type(parse: Callable[[str], Number]) -> Callable[[str], Number]:
    """A parser whose own words argparse shows: only those of an ArgumentTypeError."""

    def parse_argument(text: str) -> Number:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_argument
