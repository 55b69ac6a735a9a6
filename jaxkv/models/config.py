"""What a decoder is: the shapes and options of a Hugging Face ``config.json``, validated."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxkv.counts import check_fields
from jaxkv.errors import CheckpointError, ConfigError
from jaxkv.models.families import FAMILIES, Family
from jaxkv.models.hf_config import hf_shape, layer_windows
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
from jaxkv.models.mixers import MixerConfig
from jaxkv.models.rope import HF_FIELDS as ROPE_FIELDS
from jaxkv.models.rope import RopeConfig
from jaxkv.models.routing import ExpertsConfig
from jaxkv.models.shape import Shape
from jaxkv.models.streams import HF_FIELDS as STREAM_FIELDS
from jaxkv.models.streams import StreamsConfig


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
      qkv_bias: biases of queries, keys and values alone.
      use_qk_norm: normalize queries and keys, where the architecture has norms for them.
      tie_word_embeddings: logits come from the embedding table.
      rms_norm_eps: added to the mean square, or to the variance, in norms.
      activation: a name in `ACTIVATIONS`. Experts have their own.
      rope: `RopeConfig`; the default one of ``head_dim`` if None.
      local_rope: that of layers with a window; ``rope`` if None (Gemma 3).
      windows: a layer's window, in tokens, the query itself counted; None for a layer that
        sees all. One entry a layer, or none at all for no windows.
      rope_layers: whether a layer has a rope; all have one if there are none.
      grows_queries, query_growth_step, query_growth: queries of layers without a rope are
        multiplied by more the later they are, see `jaxkv.models.temperature` (Llama 4).
      sources: for each layer, the one whose keys and values it reads; all their own if none.
      streams: several in place of one, see `jaxkv.models.streams`.
      activation_sparsity: the share of an MLP's gate that is zero, per layer; nothing if none.
      query_pre_attn_scalar: attention logits are divided by its root; ``head_dim`` if None.
      attention_multiplier: they are multiplied by it instead, if not None (Granite).
      embedding_multiplier, residual_multiplier: what embeddings, and what a layer adds to the
        stream, are multiplied by (Granite).
      logit_multiplier, logits_scaling: the model's own logits are multiplied by the first
        (Cohere) and divided by the second (Granite).
      parallel_residual: attention and MLP are added to the stream together (GPT-NeoX).
      attention_softcap, logit_softcap: caps on attention logits and on the model's own
        (Gemma 2, section 2); no cap if None.
      num_experts, experts_per_token: of gpt-oss's mixture of experts, and how many a token takes.
      swiglu_alpha, swiglu_limit: of the experts' activation.
      experts: of the usual kind of mixture, see `jaxkv.models.routing`.
      mixer: what layers are that keep a state in place of keys and values.
      mixer_layers: whether each layer is such a one; none is if there are none.
      latent: multi-head latent attention in place of keys and values per head; ``head_dim`` is
        that of its queries then.
      eos_token_ids: the tokens that end a text.
      mtp: it has its module of multi-token prediction, see `jaxkv.models.mtp`, and its cache a
        layer for it.

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
    rope_layers: tuple[bool, ...] = ()
    query_pre_attn_scalar: float = None  # type: ignore[assignment]
    attention_multiplier: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logits_scaling: float = 1.0
    parallel_residual: bool = False
    qkv_bias: bool = False
    use_qk_norm: bool = True
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    num_experts: int = 1
    experts_per_token: int = 1
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    eos_token_ids: tuple[int, ...] = ()
    latent: LatentConfig | None = None
    experts: ExpertsConfig | None = None
    mixer: MixerConfig | None = None
    mixer_layers: tuple[bool, ...] = ()
    grows_queries: bool = False
    query_growth_step: float = 8192
    query_growth: float = 0.1
    sources: tuple[int, ...] = ()
    streams: StreamsConfig | None = None
    activation_sparsity: tuple[float, ...] = ()
    mtp: bool = False

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
        has_rope = tuple(map(bool, self.rope_layers)) or (True,) * self.num_layers
        object.__setattr__(self, "rope_layers", has_rope)
        mixes = tuple(map(bool, self.mixer_layers)) or (False,) * self.num_layers
        object.__setattr__(self, "mixer_layers", mixes)
        check_positive(
            self, "query_pre_attn_scalar", "attention_softcap", "logit_softcap", "swiglu_limit"
        )
        check_positive(self, "query_growth_step")
        self._check_layers()
        multipliers = ("attention", "embedding", "residual", "logit")
        check_positive(self, *(f"{name}_multiplier" for name in multipliers), "logits_scaling")
        check_choice(self, "activation", ACTIVATIONS)
        check_choice(self, "architecture", FAMILIES)
        self._check_windows()
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"DecoderConfig: num_heads must be a multiple of num_kv_heads, got "
                f"{self.num_heads} and {self.num_kv_heads}."
            )
        for field in ("rope_layers", "mixer_layers"):
            if len(getattr(self, field)) != self.num_layers:
                raise ConfigError(
                    f"DecoderConfig: {field} must be {self.num_layers} entries, one per layer, got "
                    f"{getattr(self, field)!r}."
                )
        if any(self.mixer_layers) and self.mixer is None:
            raise ConfigError("DecoderConfig: mixer_layers need a mixer, got None.")
        if (self.streams is not None) != self.family.streams:
            has = "several streams" if self.family.streams else "one stream"
            raise ConfigError(f"DecoderConfig: {self.architecture} has {has}, got {self.streams}.")
        if (self.latent is not None) != self.family.latent:
            has = "is made of latents" if self.family.latent else "has no latents"
            raise ConfigError(f"DecoderConfig: {self.architecture} {has}, got {self.latent}.")
        module = self.family.mtp
        if self.mtp and (module is None or not module.is_read):
            has_not = (
                "no MTP module that is known here"
                if module is None
                else "layers that keep a state, which cannot go back behind a wrong guess: its MTP "
                "module is not read"
            )
            raise ConfigError(f"DecoderConfig: {self.architecture} has {has_not}; got mtp=True.")
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"DecoderConfig: a token takes at most num_experts = {self.num_experts} experts, "
                f"got experts_per_token = {self.experts_per_token}."
            )

    def _check_layers(self) -> None:
        """What is said of each layer, or of none."""
        for field in ("sources", "activation_sparsity"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
            if len(getattr(self, field)) not in (0, self.num_layers):
                raise ConfigError(
                    f"DecoderConfig: {field} must be {self.num_layers} entries, one per layer, or "
                    f"none, got {getattr(self, field)!r}."
                )
        if not all(0 <= share < 1 for share in self.activation_sparsity):
            raise ConfigError(
                "DecoderConfig: activation_sparsity must be shares from 0 to below 1, got "
                f"{self.activation_sparsity!r}."
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
    def is_parallel(self) -> bool:
        """Whether attention and MLP are added to the stream together."""
        return self.family.parallel or self.parallel_residual

    @property
    def attention_scale(self) -> float:
        """What attention logits are multiplied by."""
        if self.attention_multiplier is not None:
            return self.attention_multiplier
        return self.query_pre_attn_scalar**-0.5

    @property
    def logit_scale(self) -> float:
        """What the model's own logits are multiplied by."""
        return self.logit_multiplier / self.logits_scaling

    @property
    def rope_dim(self) -> int:
        """Numbers of a key that the rope may rotate."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def with_mtp_layer(self) -> "DecoderConfig":
        """The layer of its MTP module counted as one more of its own; itself if it has none."""
        if not self.mtp:
            return self
        return dataclasses.replace(
            self,
            mtp=False,
            num_layers=self.num_layers + 1,
            windows=(*self.windows, None),
            rope_layers=(*self.rope_layers, True),
            mixer_layers=(*self.mixer_layers, False),
        )

    @property
    def shape(self) -> Shape:
        """Of the cache."""
        if self.mtp:
            return self.with_mtp_layer.shape
        if self.latent is not None:
            return self.latent.shape(self.num_layers)
        shape = Shape(self.num_layers, self.num_kv_heads, self.head_dim, self.windows)
        shape = shape._replace(aligned=self.family.aligned, sources=self.sources)
        if self.mixer is None:
            return shape
        return shape._replace(state=self.mixer.kept, stateful=self.mixer_layers)

    @property
    def ropes(self) -> tuple[RopeConfig | None, ...]:
        """The rope of each layer; None where it has none."""
        return tuple(
            None if not has_rope or mixes else self.rope if window is None else self.local_rope
            for window, has_rope, mixes in zip(
                self.windows, self.rope_layers, self.mixer_layers, strict=True
            )
        )

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
        family = FAMILIES[architecture]
        flat |= {ours: flat[theirs] for theirs, ours in family.aliases if theirs in flat}
        flat |= family.derived(flat)
        given = read_fields(cls, flat, _hf_fields(architecture))
        row = BY_MODEL_TYPE[family.model_type]
        try:
            if row.states is not None:
                given["mixer"] = row.states.mixer.from_hf(flat)
                given["mixer_layers"] = row.states.of(flat, given["num_layers"])
            if family.streams:
                given["streams"] = StreamsConfig.from_hf(flat)
            if family.shares:
                given["sources"] = hf_shape(flat)["sources"]
            given["latent"] = LatentConfig.from_hf(flat) if family.latent else None
            given["experts"] = ExpertsConfig.from_hf(flat, family.routed) if family.routed else None
            ends = eos_token_ids(flat)
            shape, windows = (
                cls(**given, architecture=architecture, eos_token_ids=ends),
                layer_windows(flat),
            )
            rope, local_rope = _ropes(flat, shape)
            full = dataclasses.replace(
                shape,
                rope=rope,
                local_rope=local_rope,
                windows=windows,
                rope_layers=tuple(ROPE_LAYERS[family.rope_layers](flat, windows)),
            )
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"config.json: {error}") from error
        for factor in (rope.partial_rotary_factor, local_rope.partial_rotary_factor):
            if factor != 1 and not family.partial_rope:
                raise CheckpointError(
                    f"config.json: partial_rotary_factor = {factor!r} is not supported for "
                    f"{architecture}: transformers rotates whole heads. Remove it to do so here."
                )
        return full

    def to_hf(self) -> dict[str, Any]:
        """The contents of a ``config.json`` that `from_hf` reads as this config."""
        written = write_fields(self, _hf_fields(self.architecture), self.architecture)
        if self.latent is not None:
            written |= self.latent.to_hf()
        if self.streams is not None:
            written |= self.streams.to_hf()
        if self.mtp:
            written[MTP_FIELD] = 1
        if self.family.shares:
            others = [source for layer, source in enumerate(self.sources) if source != layer]
            written["num_kv_shared_layers"] = len(others)
        if self.experts is not None and self.family.routed is not None:
            written |= self.experts.to_hf(self.family.routed)
        if self.mixer is not None:
            states = BY_MODEL_TYPE[self.family.model_type].states
            assert states is not None
            written |= self.mixer.to_hf() | states.written(self.mixer_layers)
        written |= dict(self.family.written)
        if self.family.rope_layers == "named":
            written["no_rope_layers"] = [int(has_rope) for has_rope in self.rope_layers]
        if self.family.slides:
            written |= BY_MODEL_TYPE[self.family.model_type].windows.written(self.windows)
        if self.family.local_rope != "of their own":
            return written | self.rope.to_hf()
        ropes = {"full_attention": self.rope, "sliding_attention": self.local_rope}
        parameters = {kind: rope.parameters() for kind, rope in ropes.items()}
        beside = {"max_position_embeddings": self.rope.max_position_embeddings}
        return written | beside | {"rope_parameters": parameters}


# Which layers have a rope, by how a family says so: from a config.json and the layers' windows.
ROPE_LAYERS: dict[str, Callable[[Mapping[str, Any], Sequence[int | None]], Sequence[bool]]] = {
    "all": lambda config, windows: [True] * len(windows),
    "windowed": lambda config, windows: [window is not None for window in windows],
    "named": lambda config, windows: (
        config.get("no_rope_layers")
        or [(layer + 1) % config["no_rope_layer_interval"] != 0 for layer in range(len(windows))]
    ),
}


def _ropes(config: Mapping[str, Any], shape: DecoderConfig) -> tuple[RopeConfig, RopeConfig]:
    """The rope of layers that see all, and that of layers with a window."""
    nested = config.get("rope_parameters") or {}
    if "full_attention" in nested or "sliding_attention" in nested:
        full, local = nested.get("full_attention"), nested.get("sliding_attention")
    elif shape.family.local_rope == "of their own":
        full, local = nested or config.get("rope_scaling"), None
    else:
        rope = RopeConfig.from_hf(config, shape.rope_dim)
        return rope, rope.unscaled if shape.family.local_rope else rope
    plain = {**config, "rope_scaling": None}
    theta = {"rope_theta": config.get("rope_local_base_freq")}
    return (
        RopeConfig.from_hf(plain | {"rope_parameters": full}, shape.rope_dim),
        RopeConfig.from_hf(plain | theta | {"rope_parameters": local}, shape.rope_dim),
    )


# How many MTP modules a config.json says that there are.
MTP_FIELD = "num_nextn_predict_layers"
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
    "activation_sparsity_pattern": "activation_sparsity",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logit_softcap",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "swiglu_alpha": "swiglu_alpha",
    "swiglu_limit": "swiglu_limit",
    "layer_norm_eps": "rms_norm_eps",
    "norm_epsilon": "rms_norm_eps",
    "norm_eps": "rms_norm_eps",
    "use_qkv_bias": "qkv_bias",
    "use_qk_norm": "use_qk_norm",
    "use_parallel_residual": "parallel_residual",
    "intermediate_size_mlp": "intermediate_size",  # of layers without experts
    "attn_temperature_tuning": "grows_queries",
    "floor_scale": "query_growth_step",
    "attn_scale": "query_growth",
    "attention_multiplier": "attention_multiplier",
    "embedding_multiplier": "embedding_multiplier",
    "residual_multiplier": "residual_multiplier",
    "logit_scale": "logit_multiplier",
    "logits_scaling": "logits_scaling",
}


def _hf_fields(architecture: str) -> dict[str, str]:
    family = FAMILIES[architecture]
    shared = {name: field for name, field in _SHARED.items() if name not in family.unused}
    return shared | {name: _OWN[name] for name in family.fields}


def _read_of(architecture: str) -> set[str]:
    """The fields of a ``config.json`` that are read, or that this architecture does not use."""
    family = FAMILIES[architecture]
    windows = BY_MODEL_TYPE[family.model_type].windows.reads
    local = ("rope_local_base_freq",) if family.local_rope == "of their own" else ()
    latent = LATENT_FIELDS if family.latent else ()
    streams = STREAM_FIELDS if family.streams else ()
    shared = ("num_kv_shared_layers",) if family.shares else ()
    routed = family.routed.fields if family.routed else ()
    states = BY_MODEL_TYPE[family.model_type].states
    kept = states.fields if states else ()
    fields = (*_hf_fields(architecture), *family.unused, *dict(family.aliases))
    return {
        *(*fields, *windows, *ROPE_FIELDS, *local),
        *(*latent, *streams, *shared, *routed, *kept),
    }
