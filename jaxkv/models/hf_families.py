"""Which cache each family of transformers needs, a row a family, by its ``model_type``.

A row says what transformers takes where a ``config.json`` is silent, and which layers have a
window. `tests/models/test_hf_families.py` holds every row to the caches that transformers makes.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxkv.counts import check_count
from jaxkv.errors import ConfigError
from jaxkv.models.mixers import DeltaNetConfig, MambaConfig, MixerConfig, ShortConvConfig
from jaxkv.models.shape import Cross, Heads


class Windows(NamedTuple):
    """Which layers have the window that ``sliding_window`` is.

    Attributes:
      reads: the fields of a ``config.json`` that say so. Where ``use_sliding_window`` is one, no
        layer has a window unless it is true; where ``layer_types`` is one, it decides.
      slides: whether each layer has one, where no ``layer_types`` decide.
      field: the one that says how large the window is, the query itself counted.
      kind: what ``layer_types`` call a layer that has one.
      size: of the window, where other fields say it too.
    """

    reads: tuple[str, ...]
    slides: Callable[[Mapping[str, Any], int], Sequence[bool]]
    field: str = "sliding_window"
    kind: str = "sliding_attention"
    size: Callable[[Mapping[str, Any]], int | None] | None = None

    def of(self, config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
        """The window of each layer, None for one that sees all."""
        window = config.get(self.field) if self.size is None else self.size(config)
        used = "use_sliding_window" not in self.reads or config.get("use_sliding_window")
        if not self.reads or window is None or not used:
            return (None,) * num_layers
        if (types := config.get("layer_types")) and "layer_types" in self.reads:
            slides: Sequence[bool] = [layer_type == self.kind for layer_type in types]
        else:
            slides = self.slides(config, num_layers)
        return tuple(window if slide else None for slide in slides)

    def written(self, windows: Sequence[int | None]) -> dict[str, Any]:
        """The fields that say so."""
        window = next(filter(None, windows), None)
        types = ["full_attention" if each is None else self.kind for each in windows]
        said = {self.field: window, "use_sliding_window": window is not None, "layer_types": types}
        return {name: value for name, value in said.items() if name in self.reads}


def _all_layers(config: Mapping[str, Any], num_layers: int) -> Sequence[bool]:
    return [True] * num_layers


def _no_layers(config: Mapping[str, Any], num_layers: int) -> Sequence[bool]:
    return [False] * num_layers


def _late_layers(config: Mapping[str, Any], num_layers: int) -> Sequence[bool]:
    return [layer >= config["max_window_layers"] for layer in range(num_layers)]


def _unsaid(config: Mapping[str, Any], num_layers: int) -> Sequence[bool]:
    raise ConfigError(
        f"A {config['model_type']} has layers with a window and layers without: its config.json "
        "must say which in layer_types."
    )


def _all_but_every(count: int | str) -> Callable[[Mapping[str, Any], int], Sequence[bool]]:
    """All layers but every ``count``-th; ``count`` may be the name of the field that has it."""

    def slides(config: Mapping[str, Any], num_layers: int) -> Sequence[bool]:
        every = config[count] if isinstance(count, str) else count
        every = check_count(str(count), every, error=ConfigError)
        return [(layer + 1) % every > 0 for layer in range(num_layers)]

    return slides


_NONE = Windows((), _no_layers)
_ALL = Windows(("sliding_window",), _all_layers)
_NAMED = Windows(("sliding_window", "layer_types"), _unsaid)
_NAMED_IF_USED = Windows(("sliding_window", "use_sliding_window", "layer_types"), _unsaid)
_QWEN = Windows(
    ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"), _late_layers
)


def _every(count: int | str) -> Windows:
    named = (count,) if isinstance(count, str) else ()
    return Windows(("sliding_window", "layer_types", *named), _all_but_every(count))


# What a family's layers keep, as further fields of a `Shape`: from a config, and the plain fields.
Keeps = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]


def _as_said(config: Mapping[str, Any], shape: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _chunks(config: Mapping[str, Any], shape: Mapping[str, Any]) -> dict[str, Any]:
    """Windows are chunks of the text."""
    return {"aligned": True}


def _latents(config: Mapping[str, Any], shape: Mapping[str, Any]) -> dict[str, Any]:
    """Multi-head latent attention (DeepSeek-V2, 2024, section 2.1)."""
    fields = "kv_lora_rank", "qk_rope_head_dim"
    rank, rope_dim = (check_count(name, config.get(name), error=ConfigError) for name in fields)
    one = Heads(1, rank + rope_dim, value_dim=rank, values_in_keys=True)
    return one._asdict()


def _mimo(config: Mapping[str, Any], shape: Mapping[str, Any]) -> dict[str, Any]:
    """Layers with a window have twice the KV heads, and values are narrower than keys."""
    head_dim, value_dim, kv_heads = shape["head_dim"], config["v_head_dim"], shape["num_kv_heads"]
    said = {
        "swa_num_key_value_heads": 2 * kv_heads,
        "swa_head_dim": head_dim,
        "swa_v_head_dim": value_dim,
    }
    for field, expected in said.items():
        if config.get(field) not in (None, expected):
            raise ConfigError(
                f"{field} of a {config['model_type']} must be {expected}, got {config[field]}."
            )
    windows = _MIMO_WINDOWS.of(config, shape["num_layers"])
    full, local = (Heads(count, head_dim, value_dim) for count in (kv_heads, 2 * kv_heads))
    return {"heads": tuple(full if window is None else local for window in windows)}


def _shared(config: Mapping[str, Any], shape: Mapping[str, Any]) -> dict[str, Any]:
    """The last ``num_kv_shared_layers`` read the last layer of their kind before them."""
    num_layers, shared = shape["num_layers"], config.get("num_kv_shared_layers") or 0
    windows = BY_MODEL_TYPE[config["model_type"]].windows.of(config, num_layers)
    first = num_layers - shared
    if shared and not set(windows[first:]) <= set(windows[: max(first, 0)]):
        raise ConfigError(
            f"num_kv_shared_layers = {shared} of a {config['model_type']} leaves layers whose keys "
            "and values no layer before them keeps."
        )
    last = {window: layer for layer, window in enumerate(windows[:first])}
    sources = (*range(first), *(last[window] for window in windows[first:]))
    return {"sources": sources if shared else ()}


def _gemma4(config: Mapping[str, Any], shape: Mapping[str, Any]) -> dict[str, Any]:
    """Layers that see all have heads of another size, and perhaps another number."""
    windows = BY_MODEL_TYPE[config["model_type"]].windows.of(config, shape["num_layers"])
    if windows[-1] is not None:
        raise ConfigError(f"The last layer of a {config['model_type']} must see all tokens.")
    plain = Heads(shape["num_kv_heads"], shape["head_dim"])
    whole = plain._replace(head_dim=config["global_head_dim"])
    if config.get("attention_k_eq_v") and config.get("num_global_key_value_heads"):
        whole = whole._replace(num_kv_heads=config["num_global_key_value_heads"])
    heads = [whole if window is None else plain for window in windows]
    if (layers := config.get("per_layer_config")) is not None:  # all that differs, by its number
        own = {int(layer): fields for layer, fields in layers.items()}
        heads = [_overridden(plain, own.get(layer, {})) for layer in range(len(heads))]
    return {"heads": tuple(heads)} | _shared(config, shape)


def _overridden(heads: Heads, fields: Mapping[str, Any]) -> Heads:
    names = {"head_dim": "head_dim", "num_key_value_heads": "num_kv_heads"}
    if unknown := fields.keys() - names.keys():
        raise ConfigError(f"per_layer_config has {', '.join(sorted(unknown))}, which is not known.")
    return heads._replace(**{names[name]: value for name, value in fields.items()})


def _mllama(config: Mapping[str, Any], shape: Mapping[str, Any]) -> dict[str, Any]:
    """Some layers attend to the tokens of images, and not to the text."""
    layers, count = tuple(config["cross_attention_layers"]), shape["num_layers"]
    if layers != tuple(sorted({*layers} & {*range(count)})):
        raise ConfigError(
            f"cross_attention_layers of a {config['model_type']} must be numbers of its {count} "
            f"layers, each once and in order, got {list(layers)}."
        )
    heads = Heads(shape["num_kv_heads"], shape["head_dim"])
    return {"cross": Cross(layers, heads, alone=True)} if layers else {}


def _encoder_decoder(length: str | None) -> Keeps:
    """Every layer attends to the text and to the encoder's tokens, of which a field says the most.

    One half of such a model says that it is no ``is_encoder_decoder``: a decoder, but of families
    without such a field, whose encoders alone are in use.
    """

    def keeps(config: Mapping[str, Any], shape: Mapping[str, Any]) -> dict[str, Any]:
        if not config.get("is_encoder_decoder", True):
            if length is None:
                raise ConfigError(
                    f"This {config['model_type']} is an encoder alone (is_encoder_decoder = "
                    "False), which keeps nothing from step to step."
                )
            return {}
        heads = Heads(shape["num_kv_heads"], shape["head_dim"])
        most = None if length is None else config.get(length)
        return {"cross": Cross(tuple(range(shape["num_layers"])), heads, most)}

    return keeps


class States(NamedTuple):
    """Which layers keep a state in place of keys and values, and what they are.

    Attributes:
      mixer: what such layers are.
      kind: what ``layer_types`` call one, or else ``field`` would.
      field: the field that says which layers attend: ``layer_types``, or numbers of layers.
      stateful: whether each layer is one, where the field is silent.
      attends: what ``layer_types`` call the others.
      also: further fields that ``stateful`` reads.
    """

    mixer: type[MixerConfig]
    kind: str
    stateful: Callable[[Mapping[str, Any], int], Sequence[bool]]
    field: str = "layer_types"
    attends: str = "full_attention"
    also: tuple[str, ...] = ()

    def of(self, config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
        """Whether each layer keeps a state."""
        said = config.get(self.field)
        if said is None:
            return tuple(self.stateful(config, num_layers))
        if self.field == "layer_types":
            return tuple(kind == self.kind for kind in said)
        return tuple(layer not in said for layer in range(num_layers))

    def written(self, stateful: Sequence[bool]) -> dict[str, Any]:
        """The field that says so."""
        if self.field == "layer_types":
            return {self.field: [self.kind if each else self.attends for each in stateful]}
        return {self.field: [layer for layer, each in enumerate(stateful) if not each]}

    @property
    def fields(self) -> tuple[str, ...]:
        """All that is read or known of a ``config.json``."""
        return (self.field, *self.also, *self.mixer.hf_fields, *self.mixer.hf_unused)


def _unless_named(field: str) -> Callable[[Mapping[str, Any], int], Sequence[bool]]:
    """All layers attend, or those that an older field numbers."""

    def stateful(config: Mapping[str, Any], num_layers: int) -> Sequence[bool]:
        named = config.get(field)
        return [named is not None and layer not in named for layer in range(num_layers)]

    return stateful


class Family(NamedTuple):
    """A row.

    Attributes:
      defaults: what is taken for fields that are not there.
      windows: which layers have a window.
      multi_query: what is taken for the field of that name, one head of keys and values unless
        ``new_decoder_architecture``; None where it is not read.
      keeps: what layers keep, where that is not keys and values of one size in each.
      reads: the fields of `OTHER_KINDS` that it reads.
      states: which layers keep a state; None where none does.
      names: usual fields -> what they are called here, where others have the usual names.
    """

    defaults: Mapping[str, Any]
    windows: Windows = _NONE
    multi_query: bool | None = None
    keeps: Keeps = _as_said
    reads: tuple[str, ...] = ()
    states: States | None = None
    names: Mapping[str, str] = MappingProxyType({})


def _plain(
    num_layers: int,
    num_heads: int,
    width: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    *,
    windows: Windows = _NONE,
    **more: Any,
) -> Family:
    """Keys and values of one size a layer and token. None: it follows from the others."""
    defaults = {
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "hidden_size": width,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }
    given = {name: value for name, value in defaults.items() if value is not None}
    return Family(given | more, windows)


def _latent(
    num_layers: int,
    num_heads: int,
    width: int,
    rank: int,
    rope_dim: int,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Family:
    """One latent for keys and values together, and the rope's numbers."""
    more = {**more, "kv_lora_rank": rank, "qk_rope_head_dim": rope_dim}
    row = _plain(num_layers, num_heads, width, **more)
    return row._replace(keeps=_latents, reads=("kv_lora_rank", "v_head_dim"))


def _gpt2(num_layers: int, num_heads: int, width: int) -> Family:
    """The same under GPT-2's names."""
    return Family({"n_layer": num_layers, "n_head": num_heads, "n_embd": width})


def _like_bart(num_layers: int, num_heads: int, width: int, length: str, most: int) -> Family:
    """A decoder beside an encoder that may be of another size."""
    fields = {"decoder_layers": num_layers, "decoder_attention_heads": num_heads}
    return Family(
        {**fields, "d_model": width, length: most},
        keeps=_encoder_decoder(length),
        reads=("is_encoder_decoder",),
        names={
            "num_hidden_layers": "decoder_layers",
            "num_attention_heads": "decoder_attention_heads",
        },
    )


def _like_t5(num_layers: int, num_heads: int, width: int) -> Family:
    """Positions are relative, so that nothing says how long a text for the encoder may be."""
    return Family(
        {"num_layers": num_layers, "num_heads": num_heads, "d_model": width, "d_kv": 64},
        keeps=_encoder_decoder(None),
        reads=("is_encoder_decoder",),
        names={"num_hidden_layers": "num_decoder_layers", "head_dim": "d_kv"},
    )


_GEMMA: dict[str, Any] = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
_COHERE: dict[str, Any] = {
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
}
_BIASED: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
_DEEPSEEK: dict[str, Any] = {"q_lora_rank": 1536, "qk_nope_head_dim": 128, "v_head_dim": 128}
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}

_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 128,
    "mamba_d_head": "auto",
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}

_SHARED = ("num_kv_shared_layers", "kv_sharing_modes")
_GLOBAL = ("global_head_dim", "num_global_key_value_heads", "attention_k_eq_v", "per_layer_config")


def _mimo_window(config: Mapping[str, Any]) -> int | None:
    before = config.get("sliding_window_size")  # without the query itself
    return config.get("sliding_window") if before is None else before + 1


def _mimo_slides(config: Mapping[str, Any], num_layers: int) -> Sequence[bool]:
    return [layer > 0 and (layer + 1) % 6 > 0 for layer in range(num_layers)]


_MIMO_WINDOWS = Windows(
    ("sliding_window", "sliding_window_size", "layer_types"), _mimo_slides, size=_mimo_window
)


def _with_rope(config: Mapping[str, Any], num_layers: int) -> Sequence[bool]:
    if layers := config.get("no_rope_layers"):
        return [bool(has_rope) for has_rope in layers]
    return _all_but_every("no_rope_layer_interval")(config, num_layers)


_CHUNKS = Windows(
    ("attention_chunk_size", "layer_types", "no_rope_layers", "no_rope_layer_interval"),
    *(_with_rope, "attention_chunk_size", "chunked_attention"),
)

_QWEN2 = _plain(32, 32, 4096, 32, windows=_QWEN, max_window_layers=28, sliding_window=4096)
_QWEN_VL = _plain(80, 64, 8192, 8, windows=_QWEN, max_window_layers=80, sliding_window=4096)

_POSITIONS = ("max_position_embeddings", 1024)

# A config.json without a model_type says all itself.
_UNNAMED = Family({}, Windows(_NAMED.reads, _no_layers), multi_query=False)

# By model_type.
BY_MODEL_TYPE: dict[str | None, Family] = {
    None: _UNNAMED,
    "afmoe": _plain(
        *(32, 16, 2048, None, 128),
        windows=_every("global_attn_every_n_layers"),
        global_attn_every_n_layers=4,
        sliding_window=1024,
    ),
    "apertus": _plain(32, 32, 4096),
    "apertus1p5_text": _plain(32, 32, 4096),
    "arcee": _plain(32, 32, 2560, hidden_act="relu2", rms_norm_eps=1e-5),
    "aria_text": _plain(32, 32, 4096),
    "axk1": _latent(61, 64, 7168, 512, 64),
    "bart": _like_bart(12, 16, 1024, *_POSITIONS),
    "beam": _plain(52, 48, 5120, 8, 128, windows=_NAMED, sliding_window=512),
    "biogpt": _plain(24, 16, 1024),
    "bamba": _plain(
        *(32, 32, 4096, 8),
        **_MAMBA,
        partial_rotary_factor=0.5,
    )._replace(states=States(MambaConfig, "mamba", _all_layers, "attn_layer_indices")),
    "bigbird_pegasus": _like_bart(16, 16, 1024, "max_position_embeddings", 4096),
    "bitnet": _plain(30, 20, 2560, 5),
    "blenderbot": _like_bart(24, 32, 2560, "max_position_embeddings", 128),
    "blenderbot-small": _like_bart(8, 16, 512, "max_position_embeddings", 512),
    "bloom": Family({"n_layer": 2, "n_head": 8, "hidden_size": 64}),
    "codegen": _gpt2(28, 16, 4096),
    "cohere": _plain(40, 64, 8192, **_COHERE, rope_theta=500_000.0),
    "cohere2": _plain(
        *(40, 64, 8192),
        windows=_every("sliding_window_pattern"),
        sliding_window_pattern=4,
        sliding_window=4096,
        **_COHERE,
    ),
    "cohere2_moe": _plain(40, 64, 8192, None, 128, windows=_NAMED, sliding_window=4096),
    "ctrl": _gpt2(48, 16, 1280),
    "cwm": _plain(64, 48, 6144, 8, 128, windows=_NAMED, sliding_window=8192),
    "dbrx": Family({"n_layers": 24, "n_heads": 16, "d_model": 2048, "num_key_value_heads": 1}),
    "deepseek_v2": _latent(
        *(32, 32, 4096, 512, 64),
        more=_DEEPSEEK
        | {"n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407},
    ),
    "deepseek_v3": _latent(
        *(61, 128, 7168, 512, 64),
        more=_DEEPSEEK
        | {"n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048}
        | {"n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3}
        | {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "topk_method": "noaux_tc"},
    ),
    "diffllama": _plain(16, 32, 2048),
    "doge": _plain(32, 8, 1024, windows=_ALL),
    "dots1": _plain(
        *(62, 32, 4608, 32),
        windows=Windows(("sliding_window", "max_window_layers", "layer_types"), _late_layers),
        max_window_layers=62,
        sliding_window=4096,
    ),
    "emu3_text_model": _plain(32, 32, 4096, 8),
    "ernie4_5": _plain(18, 16, 1024, 2, 128),
    "ernie4_5_moe": _plain(28, 20, 2560, 4),
    "ernie4_5_vl_moe_text": _plain(28, 20, 2560, 4),
    "exaone": _plain(32, 32, 4096, 8),
    "exaone4": _plain(
        *(32, 32, 4096, 32),
        windows=_every("sliding_window_pattern"),
        sliding_window_pattern=4,
        sliding_window=4096,
    ),
    "exaone_moe": _plain(
        *(32, 32, 4096, 32),
        windows=_every("sliding_window_pattern"),
        sliding_window_pattern=4,
        sliding_window=4096,
    ),
    "falcon": _plain(32, 71, 4544)._replace(multi_query=True),
    "flex_olmo": _plain(32, 32, 4096),
    "flint": _plain(49, 32, 2048, 4, 128, windows=_NAMED, sliding_window=513),
    "fsmt": _like_bart(12, 16, 1024, *_POSITIONS),
    "gemma": _plain(28, 16, 3072, 16, 256, **_GEMMA),
    "gemma2": _plain(
        *(26, 8, 2304, 4, 256),
        windows=_every(2),
        vocab_size=256_000,
        intermediate_size=9216,
        query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        sliding_window=4096,
        **_GEMMA,
    ),
    # gemma-3-4b-it says neither heads nor head size.
    "gemma3_text": _plain(
        *(26, 8, 2304, 4, 256),
        windows=_every("sliding_window_pattern"),
        vocab_size=262_208,
        intermediate_size=9216,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        sliding_window_pattern=6,
        rope_theta=1_000_000.0,
        rope_local_base_freq=10_000.0,
        **_GEMMA,
    ),
    "gemma3n_text": _plain(
        *(35, 8, 2048, 2, 256),
        windows=_every(5),
        sliding_window=512,
        num_kv_shared_layers=15,
        vocab_size=262_400,
        intermediate_size=16_384,
        final_logit_softcapping=30.0,
        rope_theta=1_000_000.0,
        rope_local_base_freq=10_000.0,
        altup_num_inputs=4,
        altup_active_idx=0,
        altup_correct_scale=True,
        laurel_rank=64,
        hidden_size_per_layer_input=256,
        vocab_size_per_layer_input=262_144,
        **_GEMMA,
    )._replace(keeps=_shared, reads=_SHARED),
    "gemma4_text": _plain(
        *(30, 8, 2304, 4, 256), windows=_every(6), sliding_window=512, global_head_dim=512
    )._replace(keeps=_gemma4, reads=(*_SHARED, *_GLOBAL)),
    "glm": _plain(40, 32, 4096, 2, 128),
    "glm4": _plain(
        *(40, 32, 4096, 2, 128),
        attention_bias=True,
        partial_rotary_factor=0.5,
        rms_norm_eps=1.5625e-7,
    ),
    "glm4_moe": _plain(
        *(46, 96, 4096, 8),
        partial_rotary_factor=0.5,
        rms_norm_eps=1e-5,
        first_k_dense_replace=1,
        n_shared_experts=1,
        norm_topk_prob=True,
        use_qk_norm=False,
    ),
    "glm4_moe_lite": _latent(47, 20, 2048, 512, 64),
    "glm4v_moe_text": _plain(46, 96, 4096, 8),
    "glm4v_text": _plain(40, 32, 4096, 2),
    "glm_ocr_text": _plain(16, 16, 1024, 8),
    "gpt-sw3": _gpt2(12, 12, 768),
    "gpt2": _gpt2(12, 12, 768),
    "gpt_bigcode": _gpt2(12, 12, 768)._replace(multi_query=True),
    "gpt_neo": Family({"num_layers": 24, "num_heads": 16, "hidden_size": 2048}),
    "gpt_neox": _plain(
        *(44, 64, 6144),
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        partial_rotary_factor=0.25,
        use_parallel_residual=True,
        **_BIASED,
    ),
    "gpt_neox_japanese": _plain(32, 32, 2560),
    "gpt_oss": _plain(
        *(36, 64, 2880, 8, 64),
        windows=_every(2),
        attention_bias=True,
        rms_norm_eps=1e-5,
        num_experts_per_tok=4,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        sliding_window=128,
        rope_theta=150_000.0,
        rope_scaling=_YARN,
    ),
    "gptj": _gpt2(28, 16, 4096),
    "granite": _plain(32, 32, 4096, attention_multiplier=1.0),
    "granite_docling_text": _plain(28, 16, 1024, 4),
    "granite_swa": _plain(24, 20, 2560, 4, windows=_NAMED, sliding_window=128),
    "granitemoe": _plain(32, 32, 4096),
    "granitemoe_swa": _plain(32, 32, 4096, windows=_NAMED, sliding_window=128),
    "granitemoeshared": _plain(32, 32, 4096),
    "helium": _plain(24, 20, 2560, 20, 128),
    "hunyuan_v1_dense": _plain(32, 32, 4096),
    "hunyuan_v1_moe": _plain(32, 32, 4096),
    "hy_v3": _plain(80, 64, 4096, 8, 128),
    "hyperclovax": _plain(32, 32, 4096),
    "internlm3": _plain(48, 32, 4096, 2, 128),
    "iquestcoder": _plain(80, 40, 5120, 8, 128),
    "jais2": _plain(32, 26, 3328),
    "jetmoe": _plain(12, 32, 2048, 16, kv_channels=128),
    "kolibri1": _plain(50, 48, 2560, 4, 128, windows=_every(5), sliding_window=513),
    "kimi_k2": _latent(61, 64, 7168, 512, 64),
    "laguna": _plain(40, 48, 2048, 8, 128, windows=_UNNAMED.windows, sliding_window=512),
    "led": _like_bart(12, 16, 1024, "max_encoder_position_embeddings", 16_384),
    "lfm2": _plain(
        *(32, 32, 2560, 8),
        conv_L_cache=3,
        conv_bias=False,
        intermediate_size=12_288,
        norm_eps=1e-5,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )._replace(
        states=States(
            ShortConvConfig, "conv", _unless_named("full_attn_idxs"), also=("full_attn_idxs",)
        )
    ),
    "llama": _plain(32, 32, 4096),
    "llama4_text": _plain(
        *(48, 40, 5120, 8, 128),
        windows=_CHUNKS,
        attention_chunk_size=8192,
        attn_scale=0.1,
        attn_temperature_tuning=True,
        floor_scale=8192,
        interleave_moe_layer_step=1,
        intermediate_size=8192,
        intermediate_size_mlp=16_384,
        no_rope_layer_interval=4,
        num_experts_per_tok=1,
        num_local_experts=16,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
    )._replace(keeps=_chunks, reads=("attention_chunk_size",)),
    "longt5": _like_t5(6, 8, 512),
    "m2m_100": _like_bart(12, 16, 1024, *_POSITIONS),
    "marian": _like_bart(12, 16, 1024, *_POSITIONS),
    "mbart": _like_bart(12, 16, 1024, *_POSITIONS),
    "mellum": _plain(28, 32, 2304, 4, 128, windows=_UNNAMED.windows, sliding_window=1024),
    "mimo": _QWEN2,
    "mimo_v2_flash": _plain(
        *(48, 64, 4096, 4, 192), windows=_MIMO_WINDOWS, sliding_window=129, v_head_dim=128
    )._replace(
        keeps=_mimo,
        reads=("v_head_dim", "swa_v_head_dim", "swa_head_dim", "swa_num_key_value_heads"),
    ),
    "minicpm3": _latent(62, 40, 2560, 256, 32),
    "minimax_m2": _plain(62, 48, 3072, 8, 128),
    "ministral": _plain(
        32, 32, 4096, 8, windows=Windows(_NAMED.reads, _all_layers), sliding_window=4096
    ),
    "ministral3": _plain(34, 32, 4096, 8, 128, windows=_ALL),
    "mistral": _plain(32, 32, 4096, 8, windows=_ALL, sliding_window=4096),
    "mixtral": _plain(
        *(32, 32, 4096, 8),
        windows=_ALL,
        num_experts_per_tok=2,
        num_local_experts=8,
        rms_norm_eps=1e-5,
        rope_theta=1_000_000.0,
    ),
    "mllama_text_model": _plain(
        *(40, 32, 4096, 8), cross_attention_layers=(3, 8, 13, 18, 23, 28, 33, 38)
    )._replace(keeps=_mllama, reads=("cross_attention_layers",)),
    "mpt": Family({"n_layers": 24, "n_heads": 16, "d_model": 2048}),
    "mt5": _like_t5(8, 6, 512),
    "mvp": _like_bart(12, 16, 1024, *_POSITIONS),
    "nanochat": _plain(12, 6, 768),
    "nemotron": _plain(32, 48, 6144),
    "nllb-moe": _like_bart(12, 16, 1024, *_POSITIONS),
    "olmo": _plain(32, 32, 4096),
    "olmo2": _plain(32, 32, 4096, rms_norm_eps=1e-5),
    "olmo3": _plain(32, 32, 4096, windows=_every(4), sliding_window=4096, rms_norm_eps=1e-5),
    "olmoe": _plain(16, 16, 2048, rms_norm_eps=1e-5),
    "opt": _plain(12, 12, 768),
    "pegasus": _like_bart(12, 16, 1024, *_POSITIONS),
    "pegasus_x": _like_bart(16, 16, 1024, "max_position_embeddings", 16_384),
    "persimmon": _plain(36, 64, 4096),
    "phi": _plain(24, 32, 2048),
    "phi3": _plain(32, 32, 3072, windows=_ALL, rms_norm_eps=1e-5),
    "phi4_multimodal": _plain(32, 32, 3072, 8, windows=_ALL),
    "phimoe": _plain(32, 32, 4096, 8, windows=_ALL),
    "plbart": _like_bart(6, 12, 768, *_POSITIONS),
    "qwen2": _QWEN2,
    "qwen2_5_vl": _QWEN_VL,
    "qwen2_5_vl_text": _QWEN_VL,
    "qwen2_moe": _plain(24, 16, 2048, 16, windows=_NAMED_IF_USED, sliding_window=4096),
    "qwen2_vl": _QWEN_VL,
    "qwen2_vl_text": _QWEN_VL,
    "qwen3": _plain(
        32, 32, 4096, 32, 128, windows=_QWEN, max_window_layers=28, sliding_window=4096
    ),
    "qwen3_moe": _plain(
        *(24, 32, 2048, 4),
        windows=Windows(("sliding_window", "use_sliding_window"), _all_layers),
        sliding_window=4096,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
    "qwen3_next": _plain(
        *(48, 16, 2048, 2, 256),
        full_attention_interval=4,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        partial_rotary_factor=0.25,
        num_experts=512,
        num_experts_per_tok=10,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        norm_topk_prob=True,
    )._replace(
        states=States(
            DeltaNetConfig,
            "linear_attention",
            _all_but_every("full_attention_interval"),
            also=("full_attention_interval",),
        )
    ),
    "qwen3_vl_moe_text": _plain(24, 16, 2048, 16, windows=_ALL),
    "qwen3_vl_text": _plain(32, 32, 4096, 32, 128),
    "sarvam_mla": _latent(32, 64, 4096, 512, 64),
    "sarvam_moe": _plain(19, 64, 4096, 4, 64),
    "seed_oss": _plain(64, 80, 4096, 8, 128, attention_bias=True),
    "smollm3": _plain(
        *(36, 16, 2048, 4),
        windows=_NAMED_IF_USED,
        no_rope_layer_interval=4,
        rope_theta=2_000_000.0,
        tie_word_embeddings=True,
    ),
    "solar_open": _plain(48, 64, 4096, 8, 128),
    "stablelm": _plain(32, 32, 2560, 32, partial_rotary_factor=0.25, layer_norm_eps=1e-5),
    "starcoder2": _plain(
        *(30, 24, 3072, 2),
        windows=_ALL,
        hidden_act="gelu_pytorch_tanh",
        norm_epsilon=1e-5,
        tie_word_embeddings=True,
        **_BIASED,
    ),
    "switch_transformers": _like_t5(12, 12, 768),
    "t5": _like_t5(6, 8, 512),
    "umt5": _like_t5(8, 6, 512),
    "vaultgemma": _plain(26, 8, 2304, 4, 256, windows=_every(2), sliding_window=4096),
    "whisper": _like_bart(4, 6, 384, "max_source_positions", 1500),
    "xglm": Family({"num_layers": 24, "attention_heads": 16, "d_model": 1024}),
    "youtu": _latent(32, 16, 2048, 512, 64, more=_DEEPSEEK | {"tie_word_embeddings": True}),
}


# Fields that mean more, or less, than keys and values of one size in each layer -> what they mean.
OTHER_KINDS = {
    r"kv_lora_rank": "one latent vector a token instead of keys and values",
    r"(swa_)?v_head_dim|(swa|global)_head_dim|num_global_key_value_heads|attention_k_eq_v"
    r"|swa_num_key_value_heads|per_layer_config": "keys, values or layers of unlike sizes",
    r"num_kv_shared_layers|kv_sharing_modes": "layers that read what other layers keep",
    r"attention_chunk_size": "attention within chunks",
    r"(mamba|ssm|linear|time_step)_\w+|conv_L_cache|conv_kernel|short_conv_kernel_size|state_size"
    r"|full_attention_interval|attn_layer_(period|offset)|attn_type_list|layers_block_type"
    r"|block_types|hybrid_(override_pattern|layer_ids)|lru_width": "layers that keep a state",
    r"index_\w+": "keys of an index beside those of attention",
    r"cross_attention_layers|add_cross_attention|is_encoder_decoder": "cross-attention",
    r"use_bidirectional_attention": "attention to later tokens",
}
