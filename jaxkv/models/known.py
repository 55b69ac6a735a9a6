"""The cache of a model: by its config.json, or by name for public ones, whose shapes are here."""

import difflib
import os
import re
from collections.abc import Mapping
from typing import Unpack

from jaxkv.addressing import Addressing, Contiguous
from jaxkv.cache.hybrid import AnyConfig
from jaxkv.errors import ConfigError
from jaxkv.models.hf_config import Source, hf_shape, layer_windows, read_hf, text_config
from jaxkv.models.shape import RING_CHUNK, Codecs, SameInAllLayers, Shape


def _gemma3n(num_layers: int, shared: int) -> Shape:
    """Every fifth layer sees all; the last ones read the last before them of their kind."""
    own = num_layers - shared
    sources = (own - 1 if layer % 5 == 4 else own - 2 for layer in range(own, num_layers))
    shape = Shape(num_layers, 2, 256, sources=(*range(own), *sources))
    return shape.sliding(512, full_every=5)


_LLAMA4 = Shape(48, 8, 128, aligned=True).sliding(8192, full_every=4)

# As in the config.json files on the Hugging Face hub.
KNOWN_MODELS: dict[str, Shape] = {
    "DeepSeek-V2": Shape.latent(60, rank=512, rope_dim=64),
    "DeepSeek-V2-Lite": Shape.latent(27, rank=512, rope_dim=64),
    "DeepSeek-V3": Shape.latent(61, rank=512, rope_dim=64),
    "DeepSeek-R1": Shape.latent(61, rank=512, rope_dim=64),
    "Kimi-K2": Shape.latent(61, rank=512, rope_dim=64),
    "gpt2": Shape(12, 12, 64),
    "gpt2-medium": Shape(24, 16, 64),
    "gpt2-large": Shape(36, 20, 64),
    "gpt2-xl": Shape(48, 25, 64),
    "gpt-oss-20b": Shape(24, 8, 64).sliding(128, full_every=2),
    "gpt-oss-120b": Shape(36, 8, 64).sliding(128, full_every=2),
    "Gemma-2-2B": Shape(26, 4, 256).sliding(4096, full_every=2),
    "Gemma-2-9B": Shape(42, 8, 256).sliding(4096, full_every=2),
    "Gemma-2-27B": Shape(46, 16, 128).sliding(4096, full_every=2),
    "Gemma-3-270M": Shape(18, 1, 256).sliding(512, full_every=6),
    "Gemma-3-1B": Shape(26, 1, 256).sliding(512, full_every=6),
    "Gemma-3-4B": Shape(34, 4, 256).sliding(1024, full_every=6),
    "Gemma-3-12B": Shape(48, 8, 256).sliding(1024, full_every=6),
    "Gemma-3-27B": Shape(62, 16, 128).sliding(1024, full_every=6),
    "Gemma-3n-E2B": _gemma3n(30, shared=10),
    "Gemma-3n-E4B": _gemma3n(35, shared=15),
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
    "Llama-4-Scout-17B-16E": _LLAMA4,
    "Llama-4-Maverick-17B-128E": _LLAMA4,
    "Mistral-7B": Shape(32, 8, 128),  # from v0.2 on without a window
    "Mistral-7B-v0.1": Shape(32, 8, 128).sliding(4096),
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
_TUNED = re.compile(r"-(base|instruct|chat|hf|it|pt)(?=-|$)")
_VERSION = re.compile(r"-v\d[\d.]*$")


def cache_config(
    model: Source,
    *,
    max_context_length: int,
    batch_size: int | None = None,
    codec: Codecs = "bfloat16",
    addressing: Addressing = Contiguous(),
    chunk: int | None = RING_CHUNK,
    state_dtype: str = "bfloat16",
    max_encoder_length: int | None = None,
    **fields: Unpack[SameInAllLayers],
) -> AnyConfig:
    """The cache that a model needs, layers with windows in rings.

    Args:
      model: a Hugging Face ``config.json``, the folder that holds it or its contents as a dict;
        or the name of a public model.
      max_context_length: tokens that one sequence may hold.
      batch_size: sequences, or None for one sequence and arrays without a batch axis.
      codec: how a vector is stored; one codec or one per layer, by value or by name.
      addressing: which slot holds which token, in layers that see all tokens.
      chunk: the most tokens that a step brings. Layers with a window keep ``window - 1 + chunk``
        tokens. None for steps of any size: then all layers keep all tokens.
      state_dtype: of those parts of a state that have the model's own dtype; what adds up over
        all tokens is float32.
      max_encoder_length: tokens of an encoder that one sequence's cross-attention may read; the
        most that the model can be given if None, where its config says that (Whisper's 1,500).
        Of a Llama 3.2 Vision they are 1,601 per tile of an image.
      **fields: other fields of `KVCacheConfig`, the same in all layers: ``placement``, for
        contexts that do not fit on the device, and ``newest``.

    Returns:
      A `KVCacheConfig`, or a `HybridConfig` where layers differ.

    Raises:
      ConfigError: not the config of a decoder, or a model that is not known, or a
        ``max_encoder_length`` that is missing, or of no use.

    >>> import jaxkv
    >>> hybrid = jaxkv.cache_config("google/gemma-3-4b-it", max_context_length=32_768)
    >>> full = jaxkv.cache_config("google/gemma-3-4b-it", max_context_length=32_768, chunk=None)
    >>> hybrid.size_bytes, full.size_bytes
    (807927808, 4563402752)
    """
    if isinstance(model, Mapping) or os.path.exists(model):
        text = text_config(read_hf(model))
        shape = Shape(**hf_shape(text), windows=layer_windows(text))
    else:
        shape = known_shape(os.fspath(model))
    return shape.cache_config(
        max_context_length=max_context_length,
        batch_size=batch_size,
        codec=codec,
        addressing=addressing,
        chunk=chunk,
        state_dtype=state_dtype,
        max_encoder_length=max_encoder_length,
        **fields,
    )


def known_shape(name: str) -> Shape:
    """The shape of a public model by name: any case, with or without ``organisation/``.

    Raises:
      ConfigError: not in the table; the message names those that are close.

    >>> known_shape("meta-llama/Meta-Llama-3-8B-Instruct")  # doctest: +ELLIPSIS
    Shape(num_layers=32, num_kv_heads=8, head_dim=128, windows=(), value_dim=None, ...)
    """
    return KNOWN_MODELS[known_name(name)]


def known_name(name: str) -> str:
    """What the table calls a public model; as `known_shape`.

    >>> known_name("meta-llama/Meta-Llama-3-8B-Instruct")
    'Llama-3-8B'
    """
    spelled = {known.lower(): known for known in KNOWN_MODELS}
    named = _TUNED.sub("", _PREFIX.sub("", name.lower()))
    for plain in (named, _VERSION.sub("", named)):
        if plain in spelled:
            return spelled[plain]
    close = [spelled[match] for match in difflib.get_close_matches(named, spelled, n=3)]
    hint = f"Did you mean {', '.join(close)}?" if close else f"Known: {', '.join(KNOWN_MODELS)}."
    raise ConfigError(f"No file, folder or known model is called {name!r}. {hint}")
