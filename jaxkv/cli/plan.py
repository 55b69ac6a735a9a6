"""``jaxkv plan``: will it fit?"""

import argparse
import math
import sys

from jax.sharding import AbstractMesh

from jaxkv.cache.axes import Axes
from jaxkv.cli.command import Command, argument_type
from jaxkv.codecs import CODECS
from jaxkv.counts import ceil_div
from jaxkv.memory import Plan, parse_tokens, plan
from jaxkv.memory.cards import CARDS, parse_device
from jaxkv.models.known import cache_config
from jaxkv.models.parameters import weight_bytes
from jaxkv.quality import BY_PREFERENCE, MEASURED, sample_error
from jaxkv.show.text import format_bytes, parse_size, table

_EXAMPLES = """\
examples:
  jaxkv plan Qwen2.5-0.5B --context 32k
      with the memory of this machine's device
  jaxkv plan Llama-3-8B --context 32k --batch 8 --device 24GB
      for a device that is not here
  jaxkv plan ./my-model --context 128k --device 80GiB --codec float16 --json
      for a folder (or file) with a Hugging Face config.json, or a GGUF file
  jaxkv plan Llama-3-70B --context 32k --batch 32 --device H100 --devices 8
      for each of eight cards that share its KV heads and weights
  jaxkv plan Llama-3-8B --context 128k --device 24GB --quality
      with the error of each codec beside its bytes, and the first to try

exit status: 0 it fits, 1 it does not, 2 the question was not understood
"""

# Mesh axes, each over so many devices.
_SPLITS = {
    "tensor": "devices over which KV heads and weights are spread (default: those of --devices)",
    "data": "devices over which sequences are spread (default: those that are left)",
    "sequence": "devices over which the tokens of a sequence are spread (default: 1)",
}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="a config.json, a folder that holds one, a GGUF file, or a model's name"
    )
    parser.add_argument(
        "--context", type=argument_type(parse_tokens), default=4096, metavar="TOKENS",
        help="tokens of one sequence, prompt and answer: 4096 or 32k (default: 4096)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, metavar="N", help="sequences at once (default: 1)")
    parser.add_argument(
        "--encoder", type=argument_type(parse_tokens), metavar="TOKENS",
        help="of an encoder that one sequence's cross-attention reads (default: all that the model "
        "can be given)",
    )  # fmt: skip
    parser.add_argument(
        "--device", type=argument_type(parse_device), metavar="CARD",
        help=f"a device that is not here, by its memory, such as 24GB or 80GiB, or by name: "
        f"{', '.join(CARDS)} (default: what this machine's device has free)",
    )  # fmt: skip
    parser.add_argument(
        "--devices", type=int, metavar="N", help="devices in all (default: as the next three say)"
    )
    for what, help_text in _SPLITS.items():
        parser.add_argument(f"--{what}", type=int, metavar="N", help=help_text)
    parser.add_argument(
        "--weights", type=argument_type(parse_size), metavar="SIZE",
        help="of all weights together; 0B for none (default: in bfloat16, where they are known)",
    )  # fmt: skip
    parser.add_argument(
        "--codec", choices=CODECS, default="bfloat16",
        help="how keys and values are stored (default: bfloat16)",
    )  # fmt: skip
    parser.add_argument(
        "--quality", action="store_true",
        help="also what each codec does to made-up keys and values of this head_dim and to a "
        "released model, and which is the first to try",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def _run(options: argparse.Namespace) -> int:
    config = cache_config(
        options.model,
        max_context_length=options.context,
        batch_size=options.batch,
        codec=options.codec,
        max_encoder_length=options.encoder,
    )
    sizes = _sizes(options)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    axes = Axes(batch="data", heads="tensor", context="sequence") if mesh.size > 1 else None
    if options.weights is None:
        weights = weight_bytes(options.model, devices=sizes["tensor"])
    else:
        weights = ceil_div(options.weights, sizes["tensor"])
    answer = plan(config, options.device, mesh=mesh, axes=axes, weights=weights or 0)
    print(answer.to_json() if options.json else answer)
    if weights is None:
        message = "The weights are not counted: jaxkv does not know them. Say --weights 16GB."
        print(f"\n{message}", file=sys.stderr if options.json else sys.stdout)
    if options.quality:
        print(f"\n{_quality(answer)}", file=sys.stderr if options.json else sys.stdout)
    return 0 if answer.fits else 1


def _sizes(options: argparse.Namespace) -> dict[str, int]:
    """Of each mesh axis.

    Raises:
      ValueError: a number that is none of devices, or numbers that do not fit together.
    """
    given = {what: getattr(options, what) for what in ("devices", *_SPLITS)}
    for what, number in given.items():
        if number is not None and number < 1:
            raise ValueError(f"--{what} must be at least 1, got {number}.")
    devices = given.pop("devices")
    named = math.prod(number or 1 for number in given.values())
    left, rest = divmod(devices or named, named)
    free = next((what for what in ("tensor", "data") if given[what] is None), None)
    if rest or (left > 1 and free is None):
        words = " x ".join(f"--{what} {number}" for what, number in given.items() if number)
        must = "the product of" if free is None else "a multiple of"
        raise ValueError(f"--devices {devices} must be {must} {words}.")
    if free is not None:
        given[free] = left
    return {what: number or 1 for what, number in given.items()}


def _quality(answer: Plan) -> str:
    """Bytes of each codec beside its error, measured now, and what it did to a released model."""
    head_dim = answer.config.groups[0].head_dim
    fits = {row.codec: row.fits for row in answer.codecs}
    errors = ("error on Gaussian keys", "on keys with outliers", "on values")
    headers = ("codec", "bytes", *errors, "1,000 x KL on a model", "same likeliest token")
    rows = []
    for name, codec in CODECS.items():
        gaussian = sample_error(codec, head_dim, outliers=False)
        trained = sample_error(codec, head_dim, outliers=True)
        size = format_bytes(answer.config.replace(codec=codec).size_bytes)
        found = (gaussian.keys, trained.keys, trained.values)
        known = MEASURED.get(name)
        shown = (
            ("-", "-") if known is None else (f"{1000 * known.divergence:g}", f"{known.same:.1%}")
        )
        rows.append((name, size, *(f"{error:.2%}" for error in found), *shown))
    first = next((name for name in BY_PREFERENCE if fits.get(name)), None)
    fit = "none fits" if first is None else f"{first} is the first that fits"
    return (
        f"{table(headers, rows)}\n\nThe model is SmolLM2-135M-Instruct, whose answers rank codecs "
        f"better than errors of vectors do.\nOf {', '.join(BY_PREFERENCE)}, in this order, {fit}."
    )


PLAN = Command(
    "Will a model's KV cache fit beside its weights? Needs neither them nor a network.",
    _EXAMPLES,
    _add_arguments,
    _run,
)
