"""What a model is: the shapes and options of a Hugging Face ``config.json``, validated."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxkv.errors import CheckpointError, ConfigError
from jaxkv.models.layers import ACTIVATIONS
from jaxkv.models.rope import RopeConfig

# Architecture -> model_type, as a config.json names them.
FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GPT2LMHeadModel": "gpt2",
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder of the Llama family. Frozen, hashable and validated when made.

    Args:
      vocab_size: token ids that the model knows.
      hidden_size: numbers in a token's vector between layers.
      intermediate_size: numbers in it inside an MLP.
      num_layers, num_heads: of the decoder, of each layer.
      num_kv_heads: key/value heads a layer; ``num_heads`` if None.
      head_dim: numbers in one head's vector; ``hidden_size // num_heads`` if None.
      architecture: ``LlamaForCausalLM``, ``Qwen2ForCausalLM`` (queries, keys and values have
        biases) or ``Qwen3ForCausalLM`` (queries and keys are normalized a head).
      attention_bias, mlp_bias: biases in all projections of attention, of the MLP.
      tie_word_embeddings: logits come from the embedding table.
      rms_norm_eps: added to the mean square in norms.
      activation: a name in `ACTIVATIONS`.
      rope: `RopeConfig`; the default one of ``head_dim`` if None.
      eos_token_ids: the tokens that end a text.

    Raises:
      ConfigError: a `ValueError` that says which field is wrong.

    >>> config = DecoderConfig(256, 64, 128, num_layers=2, num_heads=4, num_kv_heads=2)
    >>> config.head_dim
    16
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = None  # type: ignore[assignment]  # filled below, like those after
    head_dim: int = None  # type: ignore[assignment]
    architecture: str = "LlamaForCausalLM"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    activation: str = "silu"
    rope: RopeConfig = None  # type: ignore[assignment]
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        def default(field: str, value: Any) -> None:
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)

        check_counts(self, "hidden_size", "num_heads")
        default("num_kv_heads", self.num_heads)
        default("head_dim", self.hidden_size // self.num_heads)
        check_counts(
            self, "vocab_size", "intermediate_size", "num_layers", "num_kv_heads", "head_dim"
        )
        default("rope", RopeConfig(head_dim=self.head_dim))
        check_choice(self, "activation", ACTIVATIONS)
        check_choice(self, "architecture", [name for name in FAMILIES if "GPT2" not in name])
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"DecoderConfig: num_heads must be a multiple of num_kv_heads, got "
                f"{self.num_heads} and {self.num_kv_heads}."
            )

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.architecture == "Qwen2ForCausalLM"

    @property
    def qk_norm(self) -> bool:
        return self.architecture == "Qwen3ForCausalLM"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Read the contents of a Llama, Qwen2 or Qwen3 ``config.json``.

        Raises:
          CheckpointError: an architecture or a feature that is not supported, or a bad field.
        """
        family = hf_architecture(config)
        if family == "GPT2LMHeadModel":
            raise CheckpointError("config.json: GPT2LMHeadModel is read by GPT2Config, not here.")
        given = read_fields(cls, config, _HF_FIELDS)
        if family == "Qwen2ForCausalLM":
            given.pop("attention_bias", None)
        if family != "LlamaForCausalLM":
            given.pop("mlp_bias", None)
        try:
            shape = cls(**given, architecture=family, eos_token_ids=eos_token_ids(config))
            rope = RopeConfig.from_hf(config, shape.head_dim)
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"config.json: {error}") from error
        return dataclasses.replace(shape, rope=rope)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a ``config.json`` that `from_hf` reads as this config."""
        return write_fields(self, _HF_FIELDS, self.architecture) | self.rope.to_hf()


# Name in a config.json -> name here.
_HF_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "tie_word_embeddings": "tie_word_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "hidden_act": "activation",
}


def hf_architecture(config: Mapping[str, Any]) -> str:
    """The architecture that a ``config.json`` names, once it is sure to be supported.

    Raises:
      CheckpointError: it is not, or it uses a feature that is not.
    """
    by_type: dict[Any, str] = {model_type: name for name, model_type in FAMILIES.items()}
    named = (config.get("architectures") or [by_type.get(config.get("model_type"))])[0]
    if named not in FAMILIES:
        raise CheckpointError(
            f"config.json: architecture {named or config.get('model_type')!r} is not supported; "
            f"known are {', '.join(FAMILIES)}."
        )
    layer_types = set(config.get("layer_types") or []) - {"full_attention"}
    windows = config.get("use_sliding_window") and config.get("sliding_window")
    refused = {
        "quantization_config": config.get("quantization_config"),
        "layer_types": sorted(layer_types),
        "sliding_window": windows,
        "add_cross_attention": config.get("add_cross_attention"),
    }
    for field, value in refused.items():
        if value:
            raise CheckpointError(
                f"config.json: {field} = {value!r} is not supported; "
                "the checkpoint must use full attention and unquantized weights."
            )
    return named


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
    about = {"architectures": [architecture], "model_type": FAMILIES[architecture]}
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


def check_choice(config: Any, field: str, choices: Any) -> None:
    value = getattr(config, field)
    if value not in choices:
        raise ConfigError(
            f"{type(config).__name__}: {field} must be one of {', '.join(choices)}, got {value!r}."
        )
