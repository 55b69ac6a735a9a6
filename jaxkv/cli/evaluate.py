"""``jaxkv eval``: what eviction costs a model, by policy."""

import argparse
import importlib
import json
import pathlib
import runpy
from typing import Any

from jaxkv.cli.command import Command
from jaxkv.cli.model_options import POLICY_NAMES, add_checkpoint_arguments, load_model
from jaxkv.show.text import format_bytes, table

_EXAMPLES = """\
examples:
  jaxkv eval
      shipped policies that keep half of a context, on the model that comes along
  jaxkv eval --model SmolLM2-135M-Instruct.Q4_1.gguf --context 1k --keep 0.5 --keep 0.25
      two shares, on a checkpoint
  jaxkv eval --policy kvzip --policy keydiff --question unknown
      policies that need not know what will be asked
  jaxkv eval --policy snapkv --policy mine.py:loudest --json
      beside a policy of your own: a function in a file or a module

It prints the share of right answers where a context tells one number (needle) and where it tells
eight (multi-key), the perplexity per token of a text's next 64 tokens, and how many nats per token
that is more than with nothing dropped; +- is half the interval of 95 % over contexts.

exit status: 0 done, 2 the question was not understood or the model could not be loaded
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    add = parser.add_argument
    add(
        "--policy", action="append", metavar="NAME",
        help=f"one of {', '.join((*POLICY_NAMES, 'kvzip'))}, or FILE.py:NAME or MODULE:NAME of "
        "your own; give it again for several (default: all that are shipped but kvzip)",
    )  # fmt: skip
    add(
        "--keep", action="append", type=float, metavar="SHARE",
        help="share of a context's tokens that stays; give it again for several (default: 0.5)",
    )  # fmt: skip
    add(
        "--question", choices=("known", "unknown"), default="known",
        help="whether policies see it at a context's end (default: known)",
    )  # fmt: skip
    add("--samples", type=int, default=8, metavar="N", help="contexts of a task (default: 8)")
    add("--text", metavar="FILE", help="what contexts are made of (default: Python's help texts)")
    add("--seed", type=int, default=0, help="of numbers and places")
    add("--json", action="store_true", help="print the scores as JSON")


def _run(options: argparse.Namespace) -> int:
    from jaxkv.evaluation import evaluate

    policies = {name: _policy(name) for name in options.policy or POLICY_NAMES}
    text = options.text and pathlib.Path(options.text).read_text(encoding="utf-8")
    context = options.context or 512
    options.context = None  # which is a context's tokens here; what follows needs some more
    model, tokenizer = load_model(options)
    if tokenizer is None:
        raise ValueError("this model has no tokenizer, and contexts are made of text")
    scores = evaluate(
        model,
        tokenizer,
        policies,
        keep=options.keep or (0.5,),
        context=context,
        samples=options.samples,
        text=text,
        codec=options.codec,
        seed=options.seed,
        question_known=options.question == "known",
    )
    if options.json:
        print(json.dumps([score._asdict() for score in scores], indent=2))
        return 0
    recall = ("needle", "+-", "multi-key", "+-")
    headers = ("policy", "kept", *recall, "perplexity", "nats more", "+-", "cache")
    rows = [
        (
            score.policy,
            f"{score.keep:.0%}",
            *(f"{share:.0%}" for share in (score.needle, score.needle_interval)),
            *(f"{share:.0%}" for share in (score.multi_key, score.multi_key_interval)),
            f"{score.perplexity:.3f}",
            f"{score.nats_more:.3f}",
            "-" if score.nats_interval is None else f"{score.nats_interval:.3f}",
            format_bytes(score.cache_bytes),
        )
        for score in scores
    ]
    print(table(headers, rows))
    return 0


def _policy(name: str) -> Any:
    """A policy by its name, or one of the user's own.

    Raises:
      ValueError: there is none.
    """
    if ":" not in name:
        return name
    where, attribute = name.rsplit(":", 1)
    if where.endswith(".py"):
        policy = runpy.run_path(where).get(attribute)
    else:
        policy = getattr(importlib.import_module(where), attribute, None)
    if not callable(policy):
        raise ValueError(f"--policy {name}: {where} has no function {attribute!r}")
    return policy


EVAL = Command(
    "What does eviction cost a model? Recall and perplexity, by policy; your own too.",
    _EXAMPLES,
    _add_arguments,
    _run,
)
