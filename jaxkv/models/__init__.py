"""Flax NNX decoders that generate with a jaxkv cache, and checkpoints for them.

>>> import jaxkv
>>> model, tokenizer = jaxkv.models.load()  # the one that comes along
>>> model.cache_config(max_context_length=2048).size_bytes
10485760
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxkv.show.tokens import TextStream

if TYPE_CHECKING:
    from jaxkv.models.chat import Chat, load_chat, load_sampling
    from jaxkv.models.config import DecoderConfig
    from jaxkv.models.decoder import Decoder
    from jaxkv.models.gpt2 import GPT2, GPT2Config
    from jaxkv.models.loading import load, save
    from jaxkv.models.rope import RopeConfig
    from jaxkv.models.tokenizer import byte_tokenizer

__all__ = [
    "GPT2",
    "Chat",
    "Decoder",
    "DecoderConfig",
    "GPT2Config",
    "RopeConfig",
    "TextStream",
    "byte_tokenizer",
    "load",
    "load_chat",
    "load_sampling",
    "save",
]

# The models need flax; the shapes of caches, which `import jaxkv` brings, do not.
_HOMES = {
    "GPT2": "gpt2",
    "Chat": "chat",
    "Decoder": "decoder",
    "DecoderConfig": "config",
    "GPT2Config": "gpt2",
    "RopeConfig": "rope",
    "byte_tokenizer": "tokenizer",
    "load": "loading",
    "load_chat": "chat",
    "load_sampling": "chat",
    "save": "loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxkv.models' has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f"jaxkv.models.{_HOMES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(__all__)
