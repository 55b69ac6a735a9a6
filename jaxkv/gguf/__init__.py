"""A model in one GGUF file: its header, and what it says in the words of a Hugging Face folder."""

from jaxkv.gguf.config import hf_config, sampling_fields
from jaxkv.gguf.header import Header, is_gguf, read_header
from jaxkv.gguf.tensors import GgufTensor, gguf_tensors
from jaxkv.gguf.tokenizer import gguf_tokenizer, special_tokens

__all__ = [
    "GgufTensor",
    "Header",
    "gguf_tensors",
    "gguf_tokenizer",
    "hf_config",
    "is_gguf",
    "read_header",
    "sampling_fields",
    "special_tokens",
]
