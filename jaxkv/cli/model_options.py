"""What subcommands that run a model share: which model, how tokens are drawn, its texts."""

import argparse
import dataclasses
import os
import sys
from typing import Any

from jaxkv.cli.command import argument_type
from jaxkv.codecs import CODECS
from jaxkv.memory import parse_tokens
from jaxkv.serve.sampling import Sampling

# Policies of which the name says enough.
POLICY_NAMES = ("streaming_llm", "snapkv", "tova", "keydiff", "h2o", "random")


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and its cache."""
    add = parser.add_argument
    add(
        "--model",
        metavar="FOLDER",
        help="a Hugging Face folder or name, or a GGUF file (default: jaxkv's own)",
    )
    add(
        "--context",
        type=argument_type(parse_tokens),
        metavar="TOKENS",
        help="most tokens per sequence, such as 4096 or 4k",
    )
    add(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights",
    )
    add("--codec", choices=CODECS, help="codec of the cache (default: the model's dtype)")
    add(
        "--no-compilation-cache",
        action="store_true",
        help="compile anew, and keep nothing (default: in ~/.cache/jaxkv/xla, or where "
        "JAX_COMPILATION_CACHE_DIR says)",
    )


def add_model_arguments(
    parser: argparse.ArgumentParser, *, temperature: float, max_new_tokens: int = 200
) -> None:
    """The model, its cache and its draws, with these numbers unless others are given."""
    add_checkpoint_arguments(parser)
    add = parser.add_argument
    add(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help=f"most new tokens per prompt (default: {max_new_tokens})",
    )
    own = f"generation_config.json's, else {temperature:g}"
    shown = f"temperature of the draws; 0 takes the most likely (default: {own})"
    add("--temperature", type=float, help=shown)
    parser.set_defaults(own_temperature=temperature)
    add("--top-k", type=int, metavar="K", help="keep the K most likely tokens")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="keep the most likely tokens that sum to P",
    )
    add(
        "--min-p",
        type=float,
        metavar="P",
        help="keep tokens at least P times as likely as the first",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="random seed of the first prompt; prompt i uses seed + i",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end an answer before this text; give it again for several",
    )


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """Which tokens of prompts stay."""
    add = parser.add_argument
    add("--policy", choices=POLICY_NAMES, help="which tokens of the prompts stay; needs --keep")
    add(
        "--keep", type=argument_type(_tokens_or_share), metavar="N",
        help="how many: a number of tokens, or a share of them such as 0.5",
    )  # fmt: skip


def _tokens_or_share(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ValueError(f"Not a number of tokens or a share of them: {text!r}") from None


def load_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model that was named, for texts of the context that was, and its tokenizer."""
    from jaxkv import models

    mtp = getattr(options, "draft", None) == "mtp"
    model, tokenizer = models.load(options.model, dtype=options.dtype, mtp=mtp)
    say_if_the_kernel_is_missing(options.command)
    return model.for_context(options.context) if options.context else model, tokenizer


def say_if_the_kernel_is_missing(command: str) -> None:
    """On stderr, why decode is slower than it could be on this CPU; it is built on first use."""
    import jax

    from jaxkv.native import unavailable

    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return
    if (reason := unavailable()) and os.environ.get("JAXKV_NATIVE") != "0":
        print(
            f"jaxkv {command}: decode is slower than it could be, without the CPU kernel: {reason}",
            file=sys.stderr,
        )


def stop_strings_of(options: argparse.Namespace, tokenizer: Any) -> list[str]:
    """The texts that end an answer.

    Raises:
      ValueError: there is no tokenizer, or one is no text.
    """
    if options.stop and tokenizer is None:
        raise ValueError("this model has no tokenizer, so its answers have no text for --stop")
    return [unicode_text(text) for text in options.stop]


def load_chat(options: argparse.Namespace, tokenizer: Any) -> Any:
    """The chat template of the model that was named."""
    from jaxkv import models

    return models.load_chat(options.model, tokenizer)


def sampling_of(options: argparse.Namespace) -> Sampling:
    """How tokens are drawn: as was said, as the model's files say, or as the command does.

    Raises:
      ValueError: naming each value out of range.
    """
    names = ("temperature", "top_k", "top_p", "min_p")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    Sampling(**given)  # what is out of range is named before a model is looked for
    from jaxkv import models

    own = models.load_sampling(options.model) or Sampling(options.own_temperature)
    return dataclasses.replace(own, **given)


def unicode_text(text: str) -> str:
    """A prompt as it was typed: Python takes what is not ASCII for raw bytes in a C locale.

    Raises:
      ValueError: the bytes are not UTF-8.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ValueError(f"a prompt must be Unicode text, got {text!r}: {error.reason}.") from None


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text; without a tokenizer, of a text of token ids.

    Raises:
      ValueError: there is no tokenizer, and these are no ids.
    """
    if tokenizer is not None:
        return tokenizer.encode(text).ids
    try:
        return [int(token) for token in text.split()]
    except ValueError:
        raise ValueError(
            "this model has no tokenizer, so --prompt takes token ids such as '1 15043 29892'"
        ) from None


def nan_message(num_tokens: int) -> str:
    """What to say of an answer whose finish reason is ``nan``."""
    return (
        f"after {num_tokens} tokens of the answer the model's logits are no numbers, and it ends "
        "there. A weight is NaN, or a number was too large for --dtype: bfloat16 and float32 hold "
        "larger ones than float16."
    )
