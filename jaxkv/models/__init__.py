"""Flax NNX decoders that generate with a jaxkv cache, and Hugging Face checkpoints for them.

>>> import jaxkv
>>> model, tokenizer = jaxkv.models.load()  # the one that comes along
>>> model.cache_config(max_context_length=2048).size_bytes
10485760
"""

from jaxkv.models.byte_tokenizer import byte_tokenizer
from jaxkv.models.config import DecoderConfig
from jaxkv.models.decoder import Decoder
from jaxkv.models.gpt2 import GPT2, GPT2Config
from jaxkv.models.load import load, save
from jaxkv.models.rope import RopeConfig

__all__ = [
    "GPT2",
    "Decoder",
    "DecoderConfig",
    "GPT2Config",
    "RopeConfig",
    "byte_tokenizer",
    "load",
    "save",
]
