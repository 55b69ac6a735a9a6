"""A model's name into a folder: one that is here, or one fetched from the Hugging Face Hub."""

import os
import re
from pathlib import Path

from jaxkv.errors import CheckpointError

_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
_WANTED = [
    *("config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json"),
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json"),
]


def local_folder(name: str) -> Path:
    """The folder of that name, or a copy of the Hub's repository of that name.

    Raises:
      CheckpointError: the Hub has no such repository, or cannot be reached.
      FileNotFoundError: neither a folder nor a name that the Hub could know.
      ImportError: a name of the Hub without the package ``huggingface_hub``.
    """
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name) or not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(
            f"load: {name!r} is no folder, nor a name of the Hugging Face Hub such as "
            "'Qwen/Qwen2.5-0.5B'."
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"load: there is no folder {name!r}; fetching it from the Hugging Face Hub needs "
            "huggingface_hub. Run `pip install jaxkv[hf]`."
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_WANTED))
    except Exception as error:  # which types, depends on the version of the client
        raise CheckpointError(
            f"load: there is no folder {name!r}, and it could not be fetched from the Hugging Face "
            f"Hub: {error}"
        ) from error
