"""What a Hugging Face ``config.json`` says, with what transformers takes where it is silent."""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from jaxkv.errors import ConfigError
from jaxkv.gguf import hf_config, is_gguf, read_header
from jaxkv.models.hf_families import BY_MODEL_TYPE, OTHER_KINDS

# A ``config.json``, the folder that holds it, a GGUF file, or the contents.
Source = str | os.PathLike[str] | Mapping[str, Any]

# What a multimodal config.json says of its text decoder beside ``text_config``.
_BESIDE = ("architectures", "eos_token_id", "quantization_config", "tie_word_embeddings")


def decoder_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``config.json`` itself says of its decoder, flat: without `text_config`'s defaults."""
    nested = config.get("text_config")
    if not nested:
        return dict(config)
    outer = {name: config[name] for name in ("model_type", *_BESIDE) if name in config}
    return outer | nested


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's fields, flat: those of ``text_config`` where a multimodal model nests them.

    >>> nested = {"model_type": "gemma3", "text_config": {"num_hidden_layers": 34}}
    >>> text = text_config(nested)
    >>> text["model_type"], text["num_hidden_layers"], text["head_dim"]
    ('gemma3_text', 34, 256)
    """
    own = decoder_fields(config)
    kind = own.get("model_type")
    kind = "gemma3_text" if kind == "gemma3" else kind
    defaults = BY_MODEL_TYPE[kind].defaults if kind in BY_MODEL_TYPE else {}
    return {**defaults, **own, "model_type": kind}


def layer_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The window of each layer of a `text_config`, in tokens; None for one that sees all.

    The window counts the query itself. Where neither ``model_type`` nor ``layer_types`` says which
    layers have it, none has: what is planned is then the most that it can need.

    Raises:
      ConfigError: as `hf_shape`, or nothing says which layers have a window.

    >>> gemma2 = {"model_type": "gemma2", "num_hidden_layers": 4, "sliding_window": 8}
    >>> layer_windows(text_config(gemma2))
    (8, None, 8, None)
    """
    num_layers = hf_shape(config)["num_layers"]
    return BY_MODEL_TYPE[config.get("model_type")].windows.of(config, num_layers)


def read_hf(source: Source) -> Mapping[str, Any]:
    """The contents of a ``config.json``: given as such, by its path, its folder, or a GGUF file.

    Raises:
      CheckpointError: a GGUF file that is damaged or not supported.
      ConfigError: no JSON object.
      FileNotFoundError: no such file.
    """
    if isinstance(source, Mapping):
        return source
    path = os.fspath(source)
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
    if is_gguf(path):
        return hf_config(read_header(path))
    with open(path, encoding="utf-8") as file:
        try:
            contents = json.load(file)
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(contents, dict):
        raise ConfigError(f"{path} must hold a JSON object, got a {type(contents).__name__}.")
    return contents


def hf_shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """num_layers, num_kv_heads and head_dim of a `text_config`, whatever a family calls them.

    And the other fields of `Shape`, but for windows, where its layers are not all of that.

    Raises:
      ConfigError: not a decoder whose cache is known and built here.
    """
    config = _under_usual_names(config)

    def first(*names: str) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), None)

    num_layers = first("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    num_heads = first("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
    width = first("hidden_size", "n_embd", "d_model")
    head_dim = first("head_dim", "kv_channels")
    _refuse_other_kinds(config, head_dim)
    if not all(isinstance(number, int) and number > 0 for number in (num_layers, num_heads, width)):
        raise ConfigError(
            "Not the config of a decoder: expected num_hidden_layers, num_attention_heads and "
            "hidden_size (or GPT-2's n_layer, n_head and n_embd), got the keys "
            f"{', '.join(sorted(config.keys() - {'model_type'})) or 'of an empty object'}."
        )
    _check_layer_types(config, num_layers)
    shape = {
        "num_layers": num_layers,
        "num_kv_heads": _num_kv_heads(config) or num_heads,
        "head_dim": head_dim or width // num_heads,
    }
    row = BY_MODEL_TYPE[config.get("model_type")]
    if row.states is not None:
        mixer, stateful = row.states.mixer.from_hf(config), row.states.of(config, num_layers)
        if all(stateful):
            raise ConfigError(
                f"Of a {config['model_type']} no layer attends by this config, and so there are no "
                f"keys and values: {row.states.field} must name layers that do."
            )
        shape |= {"state": mixer.kept, "stateful": stateful}
    return shape | row.keeps(config, shape)


def _under_usual_names(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """With what the family has under names of its own, whatever else has the usual ones."""
    row = BY_MODEL_TYPE.get(config.get("model_type"))
    names = {} if row is None else row.names
    said = {usual: config.get(own) for usual, own in names.items()}
    return {**config, **{name: value for name, value in said.items() if value is not None}}


def _num_kv_heads(config: Mapping[str, Any]) -> int | None:
    """None where there are as many as query heads."""
    default = BY_MODEL_TYPE[config.get("model_type")].multi_query
    multi_query = default is not None and config.get("multi_query", default)
    if multi_query and not config.get("new_decoder_architecture"):
        return 1
    nested = config.get("attn_config") or {}
    return (
        nested.get("kv_n_heads") or config.get("num_key_value_heads") or config.get("num_kv_heads")
    )


def _refuse_other_kinds(config: Mapping[str, Any], head_dim: int | None) -> None:
    """Refuse what is not, or may not be, what the family's row reads."""
    model_type = config.get("model_type")
    row = BY_MODEL_TYPE.get(model_type)
    read = () if row is None else (*row.reads, *(row.states.fields if row.states else ()))
    for field, value in config.items():
        if field in read:
            continue
        for names, meaning in OTHER_KINDS.items():
            plain = not value or (field.endswith("head_dim") and value == head_dim)
            if re.fullmatch(names, field) and not plain:
                raise ConfigError(
                    f"{model_type or 'This model'} has {meaning} ({field} = {value!r:.60}). Such a "
                    "cache is not built here for it."
                )
    if model_type not in BY_MODEL_TYPE:
        raise ConfigError(
            f"What a {model_type!r} keeps is not known here. If it is keys and values of one size "
            "in all layers, and nothing else, give num_hidden_layers, num_attention_heads, "
            "num_key_value_heads, head_dim and hidden_size alone, without model_type."
        )


def _check_layer_types(config: Mapping[str, Any], num_layers: int) -> None:
    windows = BY_MODEL_TYPE[config.get("model_type")].windows
    types, known = config.get("layer_types"), (windows.kind, "full_attention")
    if (states := BY_MODEL_TYPE[config.get("model_type")].states) is not None:
        known = (states.kind, states.attends)
    unknown = sorted(set(types or ()) - set(known))
    if types and (unknown or len(types) != num_layers):
        raise ConfigError(
            f"layer_types of {config.get('model_type') or 'a model'} must be {num_layers} of "
            f"{', '.join(known)}, one per layer, got "
            f"{len(types)}{f' with {unknown[0]}, which no cache here holds' if unknown else ''}."
        )
    if types and not windows.reads and windows.kind in types:
        raise ConfigError(
            f"layer_types has sliding_attention; a {config['model_type']} has no windows."
        )
