"""What a decoder is: the shapes and options of a Hugging Face ``config.json``, validated."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxkv.counts import check_fields
from jaxkv.errors import CheckpointError, ConfigError
from jaxkv.models.families import FAMILIES, Family
from jaxkv.models.hf_config import layer_windows
from jaxkv.models.hf_families import BY_MODEL_TYPE
from jaxkv.models.hf_fields import (
    check_all_read,
    check_choice,
    check_positive,
    eos_token_ids,
    hf_decoder,
    read_fields,
    write_fields,
)
from jaxkv.models.latents import HF_FIELDS as LATENT_FIELDS
from jaxkv.models.latents import LatentConfig
from jaxkv.models.layers import ACTIVATIONS
from jaxkv.models.rope import HF_FIELDS as ROPE_FIELDS
from jaxkv.models.rope import RopeConfig
from jaxkv.models.shape import Shape


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder with rope and norms. Frozen, hashable and validated when made.

    Args:
      vocab_size: token ids that the model knows.
      hidden_size: numbers in a token's vector between layers.
      intermediate_size: numbers in it inside an MLP, or inside an expert.
      num_layers, num_heads: of the decoder, of each layer.
      num_kv_heads: key/value heads per layer; ``num_heads`` if None.
      head_dim: numbers in one head's vector; ``hidden_size // num_heads`` if None.
      architecture: a name in `jaxkv.models.families.FAMILIES`, which says what it brings.
      attention_bias, mlp_bias: biases in all projections of attention, of the MLP.
      tie_word_embeddings: logits come from the embedding table.
      rms_norm_eps: added to the mean square in norms.
      activation: a name in `ACTIVATIONS`. Experts have their own.
      rope: `RopeConfig`; the default one of ``head_dim`` if None.
      local_rope: that of layers with a window; ``rope`` if None (Gemma 3).
      windows: a layer's window, in tokens, the query itself counted; None for a layer that
        sees all. One entry a layer, or none at all for no windows.
      query_pre_attn_scalar: attention logits are divided by its root; ``head_dim`` if None.
      attention_softcap, logit_softcap: caps on attention logits and on the model's own
        (Gemma 2, section 2); no cap if None.
      num_experts, experts_per_token: of a mixture of experts, and how many a token takes.
      swiglu_alpha, swiglu_limit: of the experts' activation.
      latent: multi-head latent attention in place of keys and values per head; ``head_dim`` is
        that of its queries then.
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
    local_rope: RopeConfig = None  # type: ignore[assignment]
    windows: tuple[int | None, ...] = ()
    query_pre_attn_scalar: float = None  # type: ignore[assignment]
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    num_experts: int = 1
    experts_per_token: int = 1
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    eos_token_ids: tuple[int, ...] = ()
    latent: LatentConfig | None = None

    def __post_init__(self) -> None:
        def default(field: str, value: Any) -> None:
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)

        check_fields(self, "hidden_size", "num_heads", error=ConfigError)
        default("num_kv_heads", self.num_heads)
        if self.latent is not None:
            object.__setattr__(self, "head_dim", self.latent.head_dim)
        default("head_dim", self.hidden_size // self.num_heads)
        check_fields(
            self,
            "vocab_size",
            "intermediate_size",
            "num_layers",
            "num_kv_heads",
            "head_dim",
            error=ConfigError,
        )
        check_fields(self, "num_experts", "experts_per_token", error=ConfigError)
        default("rope", RopeConfig(head_dim=self.rope_dim))
        default("local_rope", self.rope)
        default("query_pre_attn_scalar", self.head_dim)
        object.__setattr__(self, "windows", tuple(self.windows) or (None,) * self.num_layers)
        check_positive(
            self, "query_pre_attn_scalar", "attention_softcap", "logit_softcap", "swiglu_limit"
        )
        check_choice(self, "activation", ACTIVATIONS)
        check_choice(self, "architecture", FAMILIES)
        self._check_windows()
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"DecoderConfig: num_heads must be a multiple of num_kv_heads, got "
                f"{self.num_heads} and {self.num_kv_heads}."
            )
        if (self.latent is not None) != self.family.latent:
            has = "is made of latents" if self.family.latent else "has no latents"
            raise ConfigError(f"DecoderConfig: {self.architecture} {has}, got {self.latent}.")
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"DecoderConfig: a token takes at most num_experts = {self.num_experts} experts, "
                f"got experts_per_token = {self.experts_per_token}."
            )

    def _check_windows(self) -> None:
        sizes = set(self.windows) - {None}
        positive = all(isinstance(size, int) and size > 0 for size in sizes)
        if len(self.windows) != self.num_layers or len(sizes) > 1 or not positive:
            raise ConfigError(
                f"DecoderConfig: windows must be {self.num_layers} entries, one per layer, each "
                f"None or the one window of at least 1 token, got {self.windows!r}."
            )
        if sizes and not self.family.slides:
            raise ConfigError(f"DecoderConfig: {self.architecture} has no windows, got {sizes}.")

    @property
    def family(self) -> Family:
        """What the architecture brings."""
        return FAMILIES[self.architecture]

    @property
    def rope_dim(self) -> int:
        """Numbers of a key that the rope may turn."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def shape(self) -> Shape:
        """Of the cache."""
        if self.latent is not None:
            return self.latent.shape(self.num_layers)
        return Shape(self.num_layers, self.num_kv_heads, self.head_dim, self.windows)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rope of each layer."""
        return tuple(self.rope if window is None else self.local_rope for window in self.windows)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Read the contents of the ``config.json`` of one of `FAMILIES`.

        Raises:
          CheckpointError: an architecture or a feature that is not supported, or a bad field.
        """
        architecture, flat = hf_decoder(config)
        if architecture == "GPT2LMHeadModel":
            raise CheckpointError("config.json: GPT2LMHeadModel is read by GPT2Config, not here.")
        check_all_read(architecture, config, _read_of(architecture))
        given = read_fields(cls, flat, _hf_fields(architecture))
        try:
            latent = LatentConfig.from_hf(flat) if FAMILIES[architecture].latent else None
            ends = eos_token_ids(flat)
            shape = cls(**given, architecture=architecture, eos_token_ids=ends, latent=latent)
            rope, local_rope = _ropes(flat, shape)
            full = dataclasses.replace(
                shape, rope=rope, local_rope=local_rope, windows=layer_windows(flat)
            )
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"config.json: {error}") from error
        for factor in (rope.partial_rotary_factor, local_rope.partial_rotary_factor):
            if factor != 1:
                raise CheckpointError(
                    f"config.json: partial_rotary_factor = {factor!r} is not supported for "
                    f"{architecture}: transformers turns whole heads. Remove it to do so here."
                )
        return full

    def to_hf(self) -> dict[str, Any]:
        """The contents of a ``config.json`` that `from_hf` reads as this config."""
        written = write_fields(self, _hf_fields(self.architecture), self.architecture)
        if self.latent is not None:
            written |= self.latent.to_hf()
        if self.family.slides:
            window = next(filter(None, self.windows), None)
            types = ["full_attention" if w is None else "sliding_attention" for w in self.windows]
            written |= {"sliding_window": window, "layer_types": types}
        if self.architecture.startswith("Qwen"):
            written["use_sliding_window"] = written["sliding_window"] is not None
        if self.architecture == "MistralForCausalLM":
            del written["layer_types"]  # all of its layers slide, or none
        if self.architecture != "Gemma3ForCausalLM":
            return written | self.rope.to_hf()
        ropes = {"full_attention": self.rope, "sliding_attention": self.local_rope}
        parameters = {kind: rope.parameters() for kind, rope in ropes.items()}
        beside = {"max_position_embeddings": self.rope.max_position_embeddings}
        return written | beside | {"rope_parameters": parameters}


def _ropes(config: Mapping[str, Any], shape: DecoderConfig) -> tuple[RopeConfig, RopeConfig]:
    """The rope of layers that see all, and that of layers with a window."""
    nested = config.get("rope_parameters") or {}
    if "full_attention" in nested or "sliding_attention" in nested:
        full, local = nested.get("full_attention"), nested.get("sliding_attention")
    elif shape.family.local_rope:
        full, local = nested or config.get("rope_scaling"), None
    else:
        rope = RopeConfig.from_hf(config, shape.rope_dim)
        return rope, rope
    plain = {**config, "rope_scaling": None}
    theta = {"rope_theta": config.get("rope_local_base_freq")}
    return (
        RopeConfig.from_hf(plain | {"rope_parameters": full}, shape.rope_dim),
        RopeConfig.from_hf(plain | theta | {"rope_parameters": local}, shape.rope_dim),
    )


# Name in a config.json -> name here. All families have the first ones.
_SHARED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "tie_word_embeddings": "tie_word_embeddings",
    "rms_norm_eps": "rms_norm_eps",
}
_OWN = {
    "hidden_act": "activation",
    "hidden_activation": "activation",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logit_softcap",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "swiglu_alpha": "swiglu_alpha",
    "swiglu_limit": "swiglu_limit",
}


def _hf_fields(architecture: str) -> dict[str, str]:
    family = FAMILIES[architecture]
    shared = {name: field for name, field in _SHARED.items() if name not in family.unused}
    return shared | {name: _OWN[name] for name in family.fields}


def _read_of(architecture: str) -> set[str]:
    """The fields of a ``config.json`` that are read, or that this architecture does not use."""
    family = FAMILIES[architecture]
    windows = BY_MODEL_TYPE[family.model_type].windows.reads
    local = ("rope_local_base_freq",) if family.local_rope else ()
    latent = LATENT_FIELDS if family.latent else ()
    return {*_hf_fields(architecture), *windows, *ROPE_FIELDS, *local, *latent, *family.unused}
