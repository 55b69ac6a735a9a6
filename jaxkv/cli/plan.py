"""``jaxkv plan``: will it fit?"""

import argparse
import sys

from jax.sharding import AbstractMesh

from jaxkv.cache.axes import Axes
from jaxkv.cache.hybrid import AnyConfig
from jaxkv.cli.command import Command, argument_type
from jaxkv.codecs import CODECS
from jaxkv.memory import parse_bytes, parse_tokens, plan
from jaxkv.models.known import cache_config
from jaxkv.quality import sample_error
from jaxkv.show.text import format_bytes, table

_EXAMPLES = """\
examples:
  jaxkv plan Qwen2.5-0.5B --context 32k
      with the memory of this machine's device
  jaxkv plan Llama-3-8B --context 32k --batch 8 --device 24GB
      for a device that is not here
  jaxkv plan ./my-model --context 128k --device 80GiB --codec float16 --json
      for a folder (or file) with a Hugging Face config.json, or a GGUF file
  jaxkv plan Llama-3-70B --context 32k --batch 64 --device 80GB --tensor 8
      for each of eight devices that share its KV heads
  jaxkv plan Llama-3-8B --context 128k --device 24GB --quality
      with the error of each codec beside its bytes

exit status: 0 it fits, 1 it does not, 2 the question was not understood
"""

# Mesh axes, each over so many devices.
_SPLITS = {
    "tensor": "devices over which KV heads are spread (default: 1)",
    "data": "devices over which sequences are spread (default: 1)",
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
        "--device", type=argument_type(parse_bytes), metavar="SIZE",
        help="memory of the device: 24GB, 80GiB (default: what this machine's device has free)",
    )  # fmt: skip
    for what, help_text in _SPLITS.items():
        parser.add_argument(f"--{what}", type=int, default=1, metavar="N", help=help_text)
    parser.add_argument(
        "--codec", choices=CODECS, default="bfloat16",
        help="how keys and values are stored (default: bfloat16)",
    )  # fmt: skip
    parser.add_argument(
        "--quality", action="store_true",
        help="also what each codec does to made-up keys and values of this head_dim",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def _run(options: argparse.Namespace) -> int:
    config = cache_config(
        options.model,
        max_context_length=options.context,
        batch_size=options.batch,
        codec=options.codec,
    )
    sizes = {what: getattr(options, what) for what in _SPLITS}
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    axes = Axes(batch="data", heads="tensor", context="sequence")
    answer = plan(config, options.device, mesh=mesh, axes=axes if mesh.size > 1 else None)
    print(answer.to_json() if options.json else answer)
    if options.quality:
        print(f"\n{_quality(config)}", file=sys.stderr if options.json else sys.stdout)
    return 0 if answer.fits else 1


def _quality(config: AnyConfig) -> str:
    """Bytes of each codec beside its error, measured now."""
    head_dim = config.groups[0].head_dim
    headers = ("codec", "bytes", "error on Gaussian keys", "on keys with outliers", "on values")
    rows = []
    for name, codec in CODECS.items():
        gaussian = sample_error(codec, head_dim, outliers=False)
        trained = sample_error(codec, head_dim, outliers=True)
        size = format_bytes(config.replace(codec=codec).size_bytes)
        errors = (gaussian.keys, trained.keys, trained.values)
        rows.append((name, size, *(f"{error:.2%}" for error in errors)))
    return table(headers, rows)


PLAN = Command(
    "Will a model's KV cache fit? Needs no weights and no network.",
    _EXAMPLES,
    _add_arguments,
    _run,
)
