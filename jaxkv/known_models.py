"""Shapes of public models, so that memory can be planned without their config.json."""

import difflib
import re
from typing import NamedTuple

from jaxkv.errors import ConfigError


class Shape(NamedTuple):
    """The fields of a `KVCacheConfig` that a model decides."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


# As in the config.json files on the Hugging Face hub.
KNOWN_MODELS: dict[str, Shape] = {
    "gpt2": Shape(12, 12, 64),
    "gpt2-medium": Shape(24, 16, 64),
    "gpt2-large": Shape(36, 20, 64),
    "gpt2-xl": Shape(48, 25, 64),
    "Llama-2-7B": Shape(32, 32, 128),
    "Llama-2-13B": Shape(40, 40, 128),
    "Llama-2-70B": Shape(80, 8, 128),
    "Llama-3-8B": Shape(32, 8, 128),
    "Llama-3-70B": Shape(80, 8, 128),
    "Llama-3.1-8B": Shape(32, 8, 128),
    "Llama-3.1-70B": Shape(80, 8, 128),
    "Llama-3.1-405B": Shape(126, 8, 128),
    "Llama-3.2-1B": Shape(16, 8, 64),
    "Llama-3.2-3B": Shape(28, 8, 128),
    "Llama-3.3-70B": Shape(80, 8, 128),
    "Mistral-7B": Shape(32, 8, 128),
    "Mixtral-8x7B": Shape(32, 8, 128),
    "Qwen2.5-0.5B": Shape(24, 2, 64),
    "Qwen2.5-1.5B": Shape(28, 2, 128),
    "Qwen2.5-3B": Shape(36, 2, 128),
    "Qwen2.5-7B": Shape(28, 4, 128),
    "Qwen2.5-14B": Shape(48, 8, 128),
    "Qwen2.5-32B": Shape(64, 8, 128),
    "Qwen2.5-72B": Shape(80, 8, 128),
    "Qwen3-0.6B": Shape(28, 8, 128),
    "Qwen3-1.7B": Shape(28, 8, 128),
    "Qwen3-4B": Shape(36, 8, 128),
    "Qwen3-8B": Shape(36, 8, 128),
    "Qwen3-14B": Shape(40, 8, 128),
    "Qwen3-32B": Shape(64, 8, 128),
    "SmolLM2-135M": Shape(30, 3, 64),
    "SmolLM2-360M": Shape(32, 5, 64),
    "SmolLM2-1.7B": Shape(24, 32, 64),
    "TinyLlama-1.1B": Shape(22, 4, 64),
}

# A tuned or re-released model has the shape of its base.
_PREFIX = re.compile(r"^(.*/)?(meta-)?")
_SUFFIX = re.compile(r"(-(base|instruct|chat|hf|it|v\d[\d.]*))+$")


def known_shape(name: str) -> Shape:
    """The shape of a public model by name: any case, with or without ``organisation/``.

    Raises:
      ConfigError: not in the table; the message names those that are close.

    >>> known_shape("meta-llama/Meta-Llama-3-8B-Instruct")
    Shape(num_layers=32, num_kv_heads=8, head_dim=128)
    """
    shapes = {known.lower(): shape for known, shape in KNOWN_MODELS.items()}
    plain = _SUFFIX.sub("", _PREFIX.sub("", name.lower()))
    if plain in shapes:
        return shapes[plain]
    spelled = {known.lower(): known for known in KNOWN_MODELS}
    close = [spelled[match] for match in difflib.get_close_matches(plain, spelled, n=3)]
    hint = f"Did you mean {', '.join(close)}?" if close else f"Known: {', '.join(KNOWN_MODELS)}."
    raise ConfigError(f"No file, folder or known model is called {name!r}. {hint}")
