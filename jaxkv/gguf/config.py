"""The metadata of a GGUF file as the fields of a Hugging Face ``config.json``."""

from typing import Any

from jaxkv.errors import CheckpointError
from jaxkv.gguf.header import Header

# By general.architecture. The Mistral models that llama.cpp converts are "llama" too.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
_MODEL_TYPES = {"gemma3": "gemma3_text"}
# Key, without the architecture before it -> field.
_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
}
# Read here; the rest of the metadata becomes fields that nothing reads, which are warned of.
_READ = {
    *_FIELDS,
    *("vocab_size", "attention.value_length", "rope.dimension_count", "rope.scale_linear"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
    *("rope.scaling.finetuned", "attention.causal", "expert_count", "expert_used_count"),
}
# Gemma's 27B models divide attention logits by the root of hidden_size / num_heads, the others by
# that of head_dim; no metadata says so. Architecture -> layers of the 27B model.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
# Control tokens that end a turn of a chat, in files that do not say which one does.
_TURN_ENDS = {"<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>"}
_CONTROL = 3
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def hf_config(header: Header) -> dict[str, Any]:
    """The ``config.json`` that says what this header says.

    Raises:
      CheckpointError: an architecture or a feature that is not supported, or metadata that is
        missing or of the wrong kind.
    """
    name = header.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{header.file}: general.architecture {name!r:.60} is not supported in a GGUF file; "
            f"known are {', '.join(ARCHITECTURES)}."
        )
    own = {
        key.removeprefix(f"{name}."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{name}.")
    }
    if own.get("expert_count"):
        raise _refused(header, f"{name}.expert_count = {own['expert_count']}")
    for key in (_READ & own.keys()) - {"rope.scaling.type"}:
        if not isinstance(own[key], int | float):
            raise _refused(header, f"{name}.{key} = {own[key]!r:.60}, which is no number,")
    fields = {field: own[key] for key, field in _FIELDS.items() if key in own}
    said = _of_tensors(header) | _of_heads(header, own, fields)
    unread = {f"{name}.{key}": value for key, value in own.items() if key not in _READ}
    about = {
        "architectures": [ARCHITECTURES[name]],
        "model_type": _MODEL_TYPES.get(name, name),
        "rope_scaling": _rope_scaling(header, own),
        "eos_token_id": end_tokens(header),
    }
    return unread | fields | said | about


def end_tokens(header: Header) -> list[int]:
    """The tokens that end a text or a turn."""
    metadata = header.metadata
    named = [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
    types = metadata.get("tokenizer.ggml.token_type", ())
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    turns = [
        number
        for number, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == _CONTROL and token in _TURN_ENDS
    ]
    return list(dict.fromkeys([end for end in named if end is not None] + turns))


def sampling_fields(header: Header) -> dict[str, Any]:
    """How tokens are to be drawn, as a ``generation_config.json`` says it."""
    found = {
        field: header.metadata[f"general.sampling.{key}"]
        for key, field in _SAMPLING.items()
        if f"general.sampling.{key}" in header.metadata
    }
    return found | {"do_sample": True} if found else {}


def _of_tensors(header: Header) -> dict[str, Any]:
    """What only the tensors say."""
    places = header.places
    if "token_embd.weight" not in places:
        raise CheckpointError(f"{header.file}: tensor token_embd.weight is missing.")
    return {
        "vocab_size": places["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in places,
        "attention_bias": "blk.0.attn_output.bias" in places,
        "mlp_bias": "blk.0.ffn_down.bias" in places,
    }


def _of_heads(header: Header, own: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The size of a head, and what follows from it."""
    heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
    if not (isinstance(heads, int) and isinstance(hidden, int) and heads > 0):
        return {}  # which is named with all other fields that are missing or bad
    name, head_dim = header.metadata["general.architecture"], fields.get("head_dim")
    head_dim = hidden // heads if head_dim is None else head_dim
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise _refused(header, f"{name}.{key} = {own[key]} with heads of {head_dim}")
    if name not in _LAYERS_OF_27B:
        return {"head_dim": head_dim}
    is_27b = fields.get("num_hidden_layers") == _LAYERS_OF_27B[name]
    return {
        "head_dim": head_dim,
        "query_pre_attn_scalar": hidden // heads if is_27b else head_dim,
    }


def _rope_scaling(header: Header, own: dict[str, Any]) -> dict[str, Any] | None:
    kind, factor = own.get("rope.scaling.type", "none"), own.get("rope.scaling.factor")
    if "rope_freqs.weight" in header.places:  # a divisor a pair, as LongRoPE has; Llama 3.1
        divisors = _divisors(header)
        both = dict.fromkeys(("short_factor", "long_factor"), divisors)
        return {"rope_type": "longrope", "attention_factor": 1.0, **both}
    if kind == "none" and own.get("rope.scale_linear", 1.0) == 1.0:
        return None
    if kind in ("none", "linear"):
        return {"rope_type": "linear", "factor": own.get("rope.scale_linear", factor)}
    if kind == "yarn":
        trained = own.get("rope.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}
    raise _refused(header, f"rope.scaling.type {kind!r:.60}")


def _divisors(header: Header) -> list[float]:
    place = header.places["rope_freqs.weight"]
    if place.type != 0 or len(place.shape) != 1:
        raise _refused(header, "rope_freqs.weight that is not one row of float32")
    return place.read(4 * place.shape[0]).view("<f4").tolist()


def _refused(header: Header, what: str) -> CheckpointError:
    return CheckpointError(f"{header.file}: {what} is not supported.")
