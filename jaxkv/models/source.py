"""Where the parts of a checkpoint are: in a Hugging Face folder, or in one GGUF file."""

import functools
import os
import re
from pathlib import Path
from typing import Any, Protocol

from jaxkv.errors import CheckpointError
from jaxkv.gguf import (
    GgufTensor,
    Header,
    gguf_tensors,
    gguf_tokenizer,
    hf_config,
    is_gguf,
    read_header,
    sampling_fields,
    special_tokens,
)
from jaxkv.models.checkpoint import StoredTensor, read_json, stored_tensors
from jaxkv.models.hub import local_folder
from jaxkv.models.mxfp4 import PackedTensor, with_packed
from jaxkv.models.quantized import refuse_quantized

Tensors = dict[str, StoredTensor | PackedTensor | GgufTensor]

EMBEDDED = Path(__file__).parent / "embedded"
# What multimodal models have beside their text decoder, and what stands before its names.
_NO_TEXT = re.compile(
    r"^(model\.)?(vision_tower|vision_model|multi_modal_projector|audio_tower|embed_(audio|vision))\."
)
_TEXT = re.compile(r"^language_model\.(?:model\.)?|^model\.language_model\.")


class Source(Protocol):
    """The parts of a checkpoint; each is read when it is asked for."""

    path: Path

    @property
    def config(self) -> dict[str, Any]:
        """The contents of its ``config.json``."""

    @property
    def generation(self) -> dict[str, Any]:
        """The contents of its ``generation_config.json``; nothing where there is none."""

    @property
    def chat_template(self) -> str | None: ...

    @property
    def special_tokens(self) -> dict[str, str]:
        """``bos_token`` and its like, as chat templates name them."""

    def tensors(self, prefix: str) -> Tensors:
        """By the names that a checkpoint has for them, without the prefix."""

    def tokenizer(self) -> Any:
        """A `tokenizers.Tokenizer`, or None."""


def source_of(name: str | os.PathLike[str] | None) -> Source:
    """The checkpoint of that name, see `jaxkv.models.load`."""
    if name is None:
        return Folder(EMBEDDED)
    name = os.fspath(name)
    if os.path.isfile(name):
        if not is_gguf(name):
            raise CheckpointError(
                f"load: {name} is a file, but not GGUF. Give a GGUF file, or the folder that holds "
                "config.json and *.safetensors."
            )
        return GgufFile(Path(name))
    return Folder(local_folder(name))


class Folder:
    """A folder as Hugging Face writes it."""

    def __init__(self, path: Path):
        self.path = path

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json")

    @functools.cached_property
    def generation(self) -> dict[str, Any]:
        return self._json_if_any("generation_config.json")

    @property
    def chat_template(self) -> str | None:
        """That of ``chat_template.jinja``, else of the files that older checkpoints have."""
        file = self.path / "chat_template.jinja"
        if file.exists():
            return _text_of(file)
        for name in ("chat_template.json", "tokenizer_config.json"):
            template = self._json_if_any(name).get("chat_template")
            if isinstance(template, list):  # several, by name
                template = {one.get("name"): one.get("template") for one in template}.get("default")
            if template is not None:
                return template
        return None

    @property
    def special_tokens(self) -> dict[str, str]:
        fields = self._json_if_any("special_tokens_map.json")
        fields |= self._json_if_any("tokenizer_config.json")
        named = {name: token for name, token in fields.items() if name.endswith("_token") and token}
        texts = {
            name: token.get("content") if isinstance(token, dict) else token
            for name, token in named.items()
        }
        return {name: text for name, text in texts.items() if isinstance(text, str)}

    def tensors(self, prefix: str) -> Tensors:
        """Those of the text decoder, whatever stands before their names.

        Files of a model without its head leave the prefix out.

        Raises:
          CheckpointError: two tensors of one name, or weights that are quantized in a way that is
            not read.
        """
        stored = stored_tensors(self.path)
        refuse_quantized(stored, self.path)
        named: Tensors = {}
        for name, tensor in with_packed(stored).items():
            if _NO_TEXT.match(name):
                continue
            short = _TEXT.sub("", name).removeprefix(prefix)
            if short in named:
                raise CheckpointError(
                    f"{self.path}: {named[short].name} and {name} are the same tensor."
                )
            named[short] = tensor
        return named

    def tokenizer(self) -> Any:
        file = self.path / "tokenizer.json"
        if not file.exists():
            return None
        import tokenizers

        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{file} is not a tokenizer: {error}") from error

    def _json_if_any(self, name: str) -> dict[str, Any]:
        file = self.path / name
        return read_json(file) if file.exists() else {}


class GgufFile:
    """A GGUF file."""

    def __init__(self, path: Path):
        self.path = path

    @functools.cached_property
    def _header(self) -> Header:
        return read_header(self.path)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        return hf_config(self._header)

    @property
    def generation(self) -> dict[str, Any]:
        return sampling_fields(self._header)

    @property
    def chat_template(self) -> str | None:
        return self._header.metadata.get("tokenizer.chat_template")

    @property
    def special_tokens(self) -> dict[str, str]:
        return special_tokens(self._header)

    def tensors(self, prefix: str) -> Tensors:
        return dict(gguf_tensors(self._header, self.config))

    def tokenizer(self) -> Any:
        return gguf_tokenizer(self._header)


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8: {error}") from error
