"""Between a ``config.json`` and a model's config: names, checks, and what is not supported."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jaxkv.errors import CheckpointError, ConfigError
from jaxkv.hf_config import text_config
from jaxkv.models.families import FAMILIES

# Architecture -> model_type.
_MODEL_TYPES = {name: family.model_type for name, family in FAMILIES.items()} | {
    "GPT2LMHeadModel": "gpt2"
}
# Multimodal architectures whose text decoder is read, and which one that is.
_NESTED = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}


def hf_decoder(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The architecture that a ``config.json`` names, and its decoder's fields, flat.

    Raises:
      CheckpointError: it is not supported, or it uses a feature that is not.
    """
    by_type: dict[Any, str] = {model_type: name for name, model_type in _MODEL_TYPES.items()}
    flat = text_config(config)
    named = (config.get("architectures") or [by_type.get(flat["model_type"])])[0]
    named = _NESTED.get(named, named)
    if named not in _MODEL_TYPES:
        raise CheckpointError(
            f"config.json: architecture {named or config.get('model_type')!r} is not supported; "
            f"known are {', '.join((*_MODEL_TYPES, *_NESTED))}."
        )
    if flat["model_type"] != _MODEL_TYPES[named]:
        flat = text_config(flat | {"model_type": _MODEL_TYPES[named]})
    _refuse(named, flat)
    return named, flat


def _refuse(architecture: str, config: Mapping[str, Any]) -> None:
    """Refuse what would silently give other logits than the model's."""
    quantization = config.get("quantization_config") or {}
    is_mxfp4 = architecture == "GptOssForCausalLM" and quantization.get("quant_method") == "mxfp4"
    slides = architecture in FAMILIES and FAMILIES[architecture].slides
    layer_types = set(config.get("layer_types") or []) - {"full_attention"}
    windows = config.get("use_sliding_window") and config.get("sliding_window")
    refused = {
        "quantization_config": not is_mxfp4 and quantization,
        "layer_types": not slides and sorted(layer_types),
        "sliding_window": not slides and windows,
        "add_cross_attention": config.get("add_cross_attention"),
        "use_bidirectional_attention": config.get("use_bidirectional_attention"),
        # transformers reads this one, and does not use it.
        "attn_logit_softcapping": architecture == "Gemma3ForCausalLM"
        and config.get("attn_logit_softcapping"),
    }
    for field, value in refused.items():
        if value:
            raise CheckpointError(
                f"config.json: {field} = {value!r} is not supported for {architecture}."
            )


def read_fields(kind: type, config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a dataclass that a ``config.json`` gives, under the names they have here.

    Raises:
      CheckpointError: it lacks one that has no default.
    """
    given = {field: config[name] for name, field in names.items() if config.get(name) is not None}
    needed = {
        field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING
    }
    missing = [name for name, field in names.items() if field in needed - given.keys()]
    if missing:
        raise CheckpointError(f"config.json: {', '.join(missing)} is missing.")
    return given


def write_fields(config: Any, names: Mapping[str, str], architecture: str) -> dict[str, Any]:
    """The other way round, with what says how to read them."""
    fields = {name: getattr(config, field) for name, field in names.items()}
    ends = list(config.eos_token_ids) or None
    about = {"architectures": [architecture], "model_type": _MODEL_TYPES[architecture]}
    return about | fields | {"eos_token_id": ends, "bos_token_id": None}


def eos_token_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text: a ``config.json`` has none, one or a list."""
    ends = config.get("eos_token_id")
    return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)


def check_counts(config: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                f"{type(config).__name__}: {field} must be an int of at least 1, got {value!r}."
            )


def check_positive(config: Any, *fields: str) -> None:
    """Numbers above zero, or None."""
    for field in fields:
        value = getattr(config, field)
        if value is not None and not (isinstance(value, int | float) and value > 0):
            raise ConfigError(
                f"{type(config).__name__}: {field} must be a positive number, got {value!r}."
            )


def check_choice(config: Any, field: str, choices: Iterable[str]) -> None:
    value = getattr(config, field)
    if value not in choices:
        raise ConfigError(
            f"{type(config).__name__}: {field} must be one of {', '.join(choices)}, got {value!r}."
        )
