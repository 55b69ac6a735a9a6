"""What subcommands that run a model share: which model, how tokens are drawn, its texts."""

import argparse
from collections.abc import Sequence
from typing import Any

from jaxkv.cli.command import argument_type
from jaxkv.codecs import CODECS
from jaxkv.memory import parse_tokens
from jaxkv.serve.sampling import Sampling

# What a decoded text ends with while a character's last bytes are still to come.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def add_model_arguments(parser: argparse.ArgumentParser, *, temperature: float) -> None:
    """The model, its cache and its draws, with this temperature unless another is given."""
    add = parser.add_argument
    add("--model", metavar="FOLDER", help="a Hugging Face folder or name (default: jaxkv's own)")
    add(
        "--max-new-tokens",
        type=int,
        default=200,
        metavar="N",
        help="most new tokens per prompt (default: 200)",
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
    shown = f"temperature of the draws; 0 takes the most likely (default: {temperature:g})"
    add("--temperature", type=float, default=temperature, help=shown)
    add("--top-k", type=int, metavar="K", help="keep the K most likely tokens")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="keep the most likely tokens that sum to P",
    )
    add(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="keep tokens at least P times as likely as the first",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="random seed of the first prompt; prompt i uses seed + i",
    )


def load_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model that was named, for texts of the context that was, and its tokenizer."""
    from jaxkv import models

    model, tokenizer = models.load(options.model, dtype=options.dtype)
    return model.for_context(options.context) if options.context else model, tokenizer


def sampling_of(options: argparse.Namespace) -> Sampling:
    """How tokens are drawn.

    Raises:
      ValueError: naming each value out of range.
    """
    return Sampling(options.temperature, options.top_k, options.top_p, options.min_p)


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
            "this model has no tokenizer.json, so --prompt takes token ids such as '1 15043 29892'"
        ) from None


def decode_prompt(tokenizer: Any, prompt: Sequence[int]) -> str:
    """The text of token ids, whole characters only; the ids themselves without a tokenizer."""
    return _decode(tokenizer, prompt).rstrip(INCOMPLETE)


def decode_answer(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """What the tokens of an answer add to the text of its prompt.

    Not the text of these tokens alone, for it may depend on those before: SentencePiece's has no
    space at its start, and a character may take several tokens.
    """
    return _decode(tokenizer, [*prompt, *tokens])[len(decode_prompt(tokenizer, prompt)) :]


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens) if tokenizer else "".join(f" {token}" for token in tokens)


def nan_message(num_tokens: int) -> str:
    """What to say of an answer whose finish reason is ``nan``."""
    return (
        f"after {num_tokens} tokens of the answer the model's logits are no numbers, and it ends "
        "there. A weight is NaN, or a number was too large for --dtype: bfloat16 and float32 hold "
        "larger ones than float16."
    )
