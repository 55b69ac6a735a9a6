"""Between a ``config.json`` and a model's config: names, checks, and what is not supported."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from jaxkv.errors import CheckpointError, ConfigError
from jaxkv.models.families import FAMILIES
from jaxkv.models.hf_config import decoder_fields, text_config
from jaxkv.models.quantized import method_of, quantized

# Architecture -> model_type.
_MODEL_TYPES = {name: family.model_type for name, family in FAMILIES.items()} | {
    "GPT2LMHeadModel": "gpt2"
}
# Multimodal architectures whose text decoder is read, and which one that is.
_NESTED = {
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
    "Gemma3nForConditionalGeneration": "Gemma3nForCausalLM",
    "Llama4ForConditionalGeneration": "Llama4ForCausalLM",
}

# Fields that say nothing of logits: of files, of training, of how texts are drawn, of other heads.
_HARMLESS = re.compile(
    r"_name_or_path|architectures|auto_map|(torch_)?dtype|model_type|quantization_config|tokenizer_class"
    r"|transformers_version|transformers\.js_config|torchscript|use_bfloat16|unsloth_\w+|is_llama_config"
    r"|\w+_p?drop(out)?|gradient_checkpointing|initializer_range|pretraining_tp"
    r"|output_router_logits|router_aux_loss_coef"
    r"|\w+_token_id|bad_words_ids|\w*suppress_tokens|(max|min)_length|do_sample|early_stopping"
    r"|num_beams|num_beam_groups|num_return_sequences|\w+_penalty|\w*no_repeat_ngram_size"
    r"|temperature|top_[kp]|typical_p|prefix|remove_invalid_values|task_specific_params"
    r"|(output|return_dict)_\w+|return_dict|use_cache|cache_implementation|n_ctx|is_decoder"
    r"|summary_\w+|id2label|label2id|num_labels|problem_type|finetuning_task|tf_legacy_loss"
    r"|chunk_size_feed_forward|reorder_and_upcast_attn"
)


def _is_off(value: Any) -> bool:
    return not value


# Fields that change logits -> whether a value of theirs does not.
_CHANGES_NOTHING: dict[str, Callable[[Any], bool]] = {
    "add_cross_attention": _is_off,
    "attention_bias": _is_off,
    "attention_out_bias": _is_off,
    "attn_logit_softcapping": _is_off,
    "final_logit_softcapping": _is_off,
    "is_encoder_decoder": _is_off,
    "layer_types": lambda types: set(types) <= {"full_attention"},
    "lm_head_bias": _is_off,
    "mlp_bias": _is_off,
    "moe_layer_freq": lambda every: every == 1,
    "partial_rotary_factor": lambda factor: factor == 1,
    "rope_interleaved": _is_off,
    "use_bidirectional_attention": _is_off,
    "use_mrope": _is_off,
    "clip_qkv": _is_off,
    "qk_layernorm": _is_off,
    "use_bias": lambda biased: biased,
    "use_parallel_residual": _is_off,
    "use_qk_norm": _is_off,
}


def hf_decoder(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The architecture that a ``config.json`` names, and its decoder's fields, flat.

    Raises:
      CheckpointError: it is not supported, or its weights are packed in a way that is not.
    """
    by_type: dict[Any, str] = {model_type: name for name, model_type in _MODEL_TYPES.items()}
    own = decoder_fields(config)
    named = (config.get("architectures") or [by_type.get(text_config(own)["model_type"])])[0]
    named = _NESTED.get(named, named)
    if named not in _MODEL_TYPES:
        raise CheckpointError(
            f"config.json: architecture {named or own.get('model_type')!r} is not supported; "
            f"known are {', '.join((*_MODEL_TYPES, *_NESTED))}."
        )
    method = method_of(own)
    if method not in (None, FAMILIES[named].quantization if named in FAMILIES else None):
        raise CheckpointError(f"config.json: quantization_config: {quantized(method)}")
    return named, text_config(own | {"model_type": _MODEL_TYPES[named]})


def check_all_read(architecture: str, config: Mapping[str, Any], read: Collection[str]) -> None:
    """Name every field of a ``config.json`` that nothing reads although it may matter.

    Args:
      read: the fields that are read for this architecture, or not used by it.

    Raises:
      CheckpointError: a field that changes logits.

    Warns:
      UserWarning: a field that is not known.
    """
    unknown = []
    for name, value in decoder_fields(config).items():
        if name in read or value is None or _HARMLESS.fullmatch(name):
            continue
        if name not in _CHANGES_NOTHING:
            unknown.append(f"{name} = {value!r:.60}")
        elif not _CHANGES_NOTHING[name](value):
            raise _unsupported(architecture, name, value)
    if unknown:
        warnings.warn(
            f"config.json: nothing reads {', '.join(unknown)} for {architecture}. If that changes "
            "what the model computes, its logits are wrong here.",
            stacklevel=3,
        )


def _unsupported(architecture: str, name: str, value: Any) -> CheckpointError:
    return CheckpointError(f"config.json: {name} = {value!r} is not supported for {architecture}.")


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
    """The tokens that end a text: a ``config.json`` has none, one or a list.

    Raises:
      CheckpointError: something else.
    """
    ends = config.get("eos_token_id")
    found = () if ends is None else tuple(ends) if isinstance(ends, list | tuple) else (ends,)
    if not all(isinstance(end, int) and end >= 0 for end in found):
        raise CheckpointError(
            f"eos_token_id must be a token id or a list of them, got {ends!r:.60}."
        )
    return found


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
