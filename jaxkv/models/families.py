"""What tells the decoders that `Decoder` can be from each other, a row a family."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxkv.errors import CheckpointError


class Norms(NamedTuple):
    """A layer's norms, as a checkpoint names them; None where there is none.

    Attributes:
      attention_input, mlp_input: of the stream, before attention and before the MLP.
      attention_output, mlp_output: of what they give, before it is added to the stream.
      kind: of all norms of the model, a name in `jaxkv.models.layers.NORMS`.
      last: of the stream after all layers.
    """

    attention_input: str | None = "input_layernorm"
    attention_output: str | None = None
    mlp_input: str | None = "post_attention_layernorm"
    mlp_output: str | None = None
    kind: str = "rms"
    last: str = "norm"


class Joined(NamedTuple):
    """Projections that a checkpoint has in one tensor.

    Attributes:
      whole: the module there.
      parts: the modules here, one below the other there.
      by_head: each head has its rows of all of them together.
    """

    whole: str
    parts: tuple[str, ...]
    by_head: bool = False


class Routed(NamedTuple):
    """A mixture of experts whose router is of the usual kind.

    Attributes:
      fields: name in a ``config.json`` -> field of `jaxkv.models.routing.ExpertsConfig`.
      always: fields of it that no ``config.json`` says.
      whole: a checkpoint has one tensor of a projection for all experts.
    """

    fields: Mapping[str, str]
    always: Mapping[str, Any] = MappingProxyType({})
    whole: bool = False


class MTPTensors(NamedTuple):
    """A checkpoint's module of multi-token prediction (DeepSeek-V3, 2024, section 2.2).

    Attributes:
      begins: what its tensors' names begin with; ``{layers}`` is the number of the model's.
      modules: those beside its layer, as they are called there.
      hidden_first: its projection is given the hidden state before the embedding.
      is_read: whether it is read here.
    """

    begins: str = "layers.{layers}."
    modules: tuple[str, str, str, str] = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
    hidden_first: bool = False
    is_read: bool = True


def _nothing(config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class Family:
    """The traits of an architecture that no field of its ``config.json`` says.

    Attributes:
      model_type: its name in a ``config.json``.
      fields: the fields that its ``config.json`` has beside those that all have.
      unused: fields that it may have and that change nothing: transformers does not use them.
      quantization: how its released weights may be packed.
      slides: layers may have a window.
      aligned: it is a chunk of the text, as `jaxkv.Chunked` has it (Llama 4).
      local_rope: those layers have a rope "of their own", or the same one "unscaled".
      rope_layers: which layers have a rope, a name in `jaxkv.models.config.ROPE_LAYERS`.
      partial_rope: the rope may rotate a part of each head.
      interleaved: the rope rotates neighbours together, not halves.
      qkv_bias: queries, keys and values have biases even where attention has not.
      output_bias: attention's output has a bias where queries have one.
      qk_norm: queries and keys are normalized: "head", each head (Henry et al., 2020), or "all",
        all heads together (OLMo 2), or "rotated", each head after the rope, where a layer has one,
        and by no weights (Llama 4).
      norms: the norms of a layer.
      parallel: attention and the MLP read the same, and both are added to the stream.
      gated: the MLP is a gated linear unit; if not, it is two projections.
      scales_embeddings: embeddings are multiplied by the root of their size (Gemma).
      has_sinks: one learned logit per head is added to the softmax denominator (gpt-oss).
      has_experts: the MLP is gpt-oss's mixture of experts.
      routed: it is one of the usual kind.
      latent: it keeps latents in place of keys and values (DeepSeek-V2, section 2.1).
      mtp: how checkpoints have a module that guesses the token after the next one; None: none has.
      renamed: parts of names in a checkpoint, and what they are here.
      joined: projections that a checkpoint has in one tensor.
      aliases: fields of its ``config.json`` that others call otherwise, and how.
      derived: fields that follow from others in a way of its own.
      written: what a ``config.json`` says so that they do not.
      value_norm: values are normalized, each head, by no weights (Gemma 3n).
      shares: the last layers may read what earlier ones keep (Gemma 3n).
      streams: layers read one of several streams (Gemma 3n).
      output_gate: attention's output is multiplied by the sigmoid of a gate, which is projected
        beside the queries (Qwen3-Next).
    """

    model_type: str
    fields: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    quantization: str | None = None
    slides: bool = False
    aligned: bool = False
    local_rope: str | None = None
    rope_layers: str = "all"
    partial_rope: bool = False
    interleaved: bool = False
    qkv_bias: bool = False
    output_bias: bool = True
    qk_norm: str | None = None
    norms: Norms = Norms()
    parallel: bool = False
    gated: bool = True
    scales_embeddings: bool = False
    has_sinks: bool = False
    has_experts: bool = False
    routed: Routed | None = None
    latent: bool = False
    mtp: MTPTensors | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    joined: tuple[Joined, ...] = ()
    derived: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    written: tuple[tuple[str, Any], ...] = ()
    output_gate: bool = False
    value_norm: bool = False
    shares: bool = False
    streams: bool = False


def _lfm2_inner(config: Mapping[str, Any]) -> dict[str, Any]:
    """Its MLP is two thirds as wide as said, by a factor and rounded up to whole blocks."""
    inner, block = config["intermediate_size"], config.get("block_multiple_of", 256)
    if not config.get("block_auto_adjust_ff_dim", True):
        return {}
    inner = 2 * inner // 3
    if (factor := config.get("block_ffn_dim_multiplier", 1.0)) is not None:
        inner = -(-int(factor * inner) // block) * block
    return {"intermediate_size": inner}


def _gemma3n(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes may be lists, and logits of attention are as they come."""
    num_layers, sizes = config["num_hidden_layers"], config["intermediate_size"]
    if not isinstance(sizes, int):
        if len(set(sizes)) != 1 or len(sizes) != num_layers:
            raise CheckpointError(
                f"config.json: intermediate_size of a {config['model_type']} must be one number in "
                f"all of {num_layers} layers, got {sizes!r:.60}."
            )
        sizes = sizes[0]
    sparse = config.get("activation_sparsity_pattern")
    if sparse is None:
        sparse = [0.95 if layer < 10 < num_layers else 0.0 for layer in range(num_layers)]
    return {
        "intermediate_size": sizes,
        "activation_sparsity_pattern": sparse,
        "attention_multiplier": 1.0,
    }


_LFM2 = (  # of training, of code that is elsewhere, or said by other fields too
    *("block_dim", "block_mlp_init_scale", "block_norm_eps", "block_out_init_scale"),
    *("block_use_swiglu", "block_use_xavier_init", "conv_dim", "conv_dim_out"),
    *("conv_use_xavier_init", "use_pos_enc", "num_heads"),
)
_LFM2_ADJUSTED = ("block_auto_adjust_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of")
_GEMMA = ("attention_bias", "hidden_activation", "query_pre_attn_scalar", "final_logit_softcapping")
_GPT_OSS = ("num_local_experts", "num_experts_per_tok", "swiglu_alpha", "swiglu_limit")
_GEMMA_NORMS = Norms(
    attention_output="post_attention_layernorm",
    mlp_input="pre_feedforward_layernorm",
    mlp_output="post_feedforward_layernorm",
    kind="rms plus one",
)
_GEMMA3N = (  # without `query_pre_attn_scalar`, which it may have and does not use
    *("attention_bias", "hidden_activation", "final_logit_softcapping"),
    *("attention_multiplier", "activation_sparsity_pattern"),
)
_OLMO2_NORMS = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_GLM4_NORMS = Norms(attention_output="post_self_attn_layernorm", mlp_output="post_mlp_layernorm")
_GATE_UP = Joined("gate_up_proj", ("gate_proj", "up_proj"))
_QKV = ("q_proj", "k_proj", "v_proj")

_MULTIPLIERS = (
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
)
_COHERE = ("hidden_act", "attention_bias", "layer_norm_eps", "logit_scale")
_GPT_NEOX = (
    *("hidden_act", "layer_norm_eps", "attention_bias", "mlp_bias", "use_parallel_residual"),
)
_COHERE2 = (  # what is so in all of them, or said by layer_types too
    *("order_of_interleaved_layers", "layer_switch", "position_embedding_type", "rotary_pct"),
    *("use_embedding_sharing", "use_gated_activation", "use_parallel_block"),
    *("use_parallel_embedding", "sliding_window_pattern"),
)
_STARCODER2 = (  # of the code that it was trained with
    *("activation_function", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"),
    *("layer_norm_epsilon", "mlp_type", "norm_type", "scale_attn_weights"),
)
_COHERE_NORMS = Norms(mlp_input=None, kind="layer without bias")

# Of training, and what follows from other fields.
_DEEPSEEK = ("head_dim", "qk_head_dim", "ep_size", "seq_aux", "aux_loss_alpha")
_DEEPSEEK_EXPERTS = {
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "intermediate_size",
    "n_shared_experts": "shared_experts",
    "n_group": "num_groups",
    "topk_group": "groups_per_token",
    "routed_scaling_factor": "scaling",
    "norm_topk_prob": "normalized",
    "first_k_dense_replace": "first_layer",
    "topk_method": "method",
    "scoring_func": "scores",
}
_QWEN_EXPERTS = {
    "num_local_experts": "num_experts",
    "num_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "intermediate_size",
    "norm_topk_prob": "normalized",
    "decoder_sparse_step": "every",
    "mlp_only_layers": "dense_layers",
}
_LLAMA4 = ("use_qk_norm", "attn_temperature_tuning", "floor_scale", "attn_scale")
_LLAMA4_EXPERTS = {
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "intermediate_size": "intermediate_size",
    "interleave_moe_layer_step": "every",
    "moe_layers": "layers",
}
_MIMO_MTP = ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")
_NORMALIZED = {"norm_topk_prob": "normalized"}
_MIXTRAL_EXPERTS = {
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "intermediate_size": "intermediate_size",
}

# By architecture, as a config.json names it.
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", ("hidden_act", "attention_bias", "mlp_bias")),
    "Llama4ForCausalLM": Family(
        "llama4_text",
        ("hidden_act", "attention_bias", "intermediate_size_mlp", *_LLAMA4),
        unused=("router_jitter_noise", "for_llm_compressor"),
        slides=True,
        aligned=True,
        rope_layers="named",
        interleaved=True,
        qk_norm="rotated",
        routed=Routed(
            _LLAMA4_EXPERTS,
            {"method": "greedy_sigmoid", "shared_experts": 1, "weighs_inputs": True},
            whole=True,
        ),
        renamed=(
            (".feed_forward.", ".mlp."),
            (".shared_expert.", ".shared_experts."),
            (".router.", ".gate."),
        ),
    ),
    "MistralForCausalLM": Family("mistral", ("hidden_act",), slides=True),
    "MixtralForCausalLM": Family(
        "mixtral",
        ("hidden_act",),
        unused=("router_jitter_noise",),
        slides=True,
        routed=Routed(_MIXTRAL_EXPERTS, {"normalized": True}),
        renamed=(
            ("block_sparse_moe.", "mlp."),
            (".w1.", ".gate_proj."),
            (".w3.", ".up_proj."),
            (".w2.", ".down_proj."),
        ),
    ),
    "Qwen2ForCausalLM": Family("qwen2", ("hidden_act",), slides=True, qkv_bias=True),
    "MiMoForCausalLM": Family(
        "mimo",
        ("hidden_act",),
        unused=("attention_bias", "num_nextn_predict_layers"),
        slides=True,
        qkv_bias=True,
        mtp=MTPTensors("mtp_layers.0.", _MIMO_MTP, hidden_first=True),
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3", ("hidden_act", "attention_bias"), slides=True, qk_norm="head"
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        ("hidden_act", "attention_bias"),
        unused=("max_window_layers",),
        slides=True,
        qk_norm="head",
        routed=Routed(_QWEN_EXPERTS),
    ),
    "Qwen3NextForCausalLM": Family(
        "qwen3_next",
        ("hidden_act", "attention_bias"),
        partial_rope=True,
        qk_norm="head",
        norms=Norms(kind="rms plus one"),
        output_gate=True,
        routed=Routed(
            _QWEN_EXPERTS | {"shared_expert_intermediate_size": "shared_size"},
            {"shared_gate": True},
        ),
        renamed=((".shared_expert.", ".shared_experts."),),
        mtp=MTPTensors("mtp.", is_read=False),
    ),
    "BambaForCausalLM": Family(
        "bamba",
        ("hidden_act",),
        unused=("num_logits_to_keep", "z_loss_coefficient"),
        partial_rope=True,
        norms=Norms(mlp_input="pre_ff_layernorm", last="final_layernorm"),
        renamed=((".feed_forward.", ".mlp."),),
    ),
    "Lfm2ForCausalLM": Family(
        "lfm2",
        ("norm_eps",),
        unused=("rms_norm_eps", *_LFM2, *_LFM2_ADJUSTED),
        qk_norm="head",
        derived=_lfm2_inner,
        written=(("block_auto_adjust_ff_dim", False),),
        norms=Norms("operator_norm", mlp_input="ffn_norm", last="embedding_norm"),
        renamed=(
            (".feed_forward.w1.", ".mlp.gate_proj."),
            (".feed_forward.w3.", ".mlp.up_proj."),
            (".feed_forward.w2.", ".mlp.down_proj."),
            (".self_attn.out_proj.", ".self_attn.o_proj."),
            (".q_layernorm.", ".q_norm."),
            (".k_layernorm.", ".k_norm."),
        ),
        aliases=(
            ("block_ff_dim", "intermediate_size"),
            ("tie_embedding", "tie_word_embeddings"),
        ),
    ),
    "OlmoeForCausalLM": Family(
        "olmoe",
        ("hidden_act", "attention_bias"),
        qk_norm="all",
        routed=Routed(_MIXTRAL_EXPERTS | {"num_experts": "num_experts", **_NORMALIZED}),
    ),
    "Glm4MoeForCausalLM": Family(
        "glm4_moe",
        ("hidden_act", "attention_bias", "use_qk_norm"),
        unused=("num_nextn_predict_layers",),
        partial_rope=True,
        output_bias=False,
        qk_norm="head",
        routed=Routed(_DEEPSEEK_EXPERTS, {"method": "noaux_tc"}),
        mtp=MTPTensors(),
    ),
    "SeedOssForCausalLM": Family(
        "seed_oss", ("hidden_act", "attention_bias", "mlp_bias"), output_bias=False
    ),
    "ArceeForCausalLM": Family("arcee", ("hidden_act", "attention_bias", "mlp_bias"), gated=False),
    "GemmaForCausalLM": Family(
        "gemma",
        ("attention_bias", "hidden_activation"),
        unused=("hidden_act",),
        norms=Norms(kind="rms plus one"),
        scales_embeddings=True,
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        (*_GEMMA, "attn_logit_softcapping"),
        unused=("hidden_act", "sliding_window_size"),
        slides=True,
        norms=_GEMMA_NORMS,
        scales_embeddings=True,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        _GEMMA,
        unused=("hidden_act", "_sliding_window_pattern"),
        slides=True,
        local_rope="of their own",
        qk_norm="head",
        norms=_GEMMA_NORMS,
        scales_embeddings=True,
    ),
    "Gemma3nForCausalLM": Family(
        "gemma3n_text",
        _GEMMA3N,
        unused=("query_pre_attn_scalar", "altup_coef_clip", "altup_lr_multiplier"),
        slides=True,
        local_rope="of their own",
        qk_norm="head",
        value_norm=True,
        norms=_GEMMA_NORMS._replace(kind="rms"),
        scales_embeddings=True,
        shares=True,
        streams=True,
        derived=_gemma3n,
        renamed=(
            ("embed_tokens_per_layer.", "streams.embed_tokens_per_layer."),
            ("per_layer_model_projection.", "streams.per_layer_model_projection."),
            ("per_layer_projection_norm.", "streams.per_layer_projection_norm."),
            ("altup_projections.", "streams.altup_projections."),
            ("altup_unembed_projections.", "streams.altup_unembed_projections."),
            (".per_layer_input_gate.", ".altup.per_layer_input_gate."),
            (".per_layer_projection.", ".altup.per_layer_projection."),
            (".post_per_layer_input_norm.", ".altup.post_per_layer_input_norm."),
        ),
    ),
    "GptOssForCausalLM": Family(
        "gpt_oss",
        ("attention_bias", *_GPT_OSS),
        unused=("hidden_act", "experts_per_token", "initial_context_length"),
        quantization="mxfp4",
        slides=True,
        has_sinks=True,
        has_experts=True,
    ),
    "YoutuForCausalLM": Family(
        "youtu",
        ("hidden_act", "attention_bias"),
        unused=("head_dim", "qk_head_dim", "embedding_initializer_range"),
        latent=True,
    ),
    "DeepseekV2ForCausalLM": Family(
        "deepseek_v2",
        ("hidden_act", "attention_bias", "mlp_bias"),
        unused=_DEEPSEEK,
        latent=True,
        routed=Routed(_DEEPSEEK_EXPERTS),
    ),
    "DeepseekV3ForCausalLM": Family(
        "deepseek_v3",
        ("hidden_act", "attention_bias"),
        unused=(*_DEEPSEEK, "num_nextn_predict_layers"),
        latent=True,
        mtp=MTPTensors(),
        routed=Routed(_DEEPSEEK_EXPERTS),
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2", ("hidden_act", "attention_bias"), qk_norm="all", norms=_OLMO2_NORMS
    ),
    "Olmo3ForCausalLM": Family(
        "olmo3",
        ("hidden_act", "attention_bias"),
        slides=True,
        local_rope="unscaled",
        qk_norm="all",
        norms=_OLMO2_NORMS,
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        ("hidden_act",),
        unused=("full_attn_mod", "interpolate_factor"),
        slides=True,
        partial_rope=True,
        joined=(Joined("qkv_proj", _QKV), _GATE_UP),
    ),
    "Glm4ForCausalLM": Family(
        "glm4",
        ("hidden_act", "attention_bias"),
        partial_rope=True,
        interleaved=True,
        output_bias=False,
        norms=_GLM4_NORMS,
        joined=(_GATE_UP,),
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        ("hidden_act", "attention_bias", "mlp_bias"),
        unused=("no_rope_layers", "no_rope_layer_interval", "max_window_layers"),
        slides=True,
        rope_layers="named",
    ),
    "GraniteForCausalLM": Family(
        "granite", ("hidden_act", "attention_bias", "mlp_bias", *_MULTIPLIERS)
    ),
    "CohereForCausalLM": Family(
        "cohere",
        _COHERE,
        unused=("rms_norm_eps",),
        interleaved=True,
        parallel=True,
        norms=_COHERE_NORMS,
    ),
    "Cohere2ForCausalLM": Family(
        "cohere2",
        _COHERE,
        unused=("rms_norm_eps", "_sliding_window_pattern", *_COHERE2),
        slides=True,
        rope_layers="windowed",
        interleaved=True,
        parallel=True,
        norms=_COHERE_NORMS,
    ),
    "Starcoder2ForCausalLM": Family(
        "starcoder2",
        ("hidden_act", "norm_epsilon", "attention_bias", "mlp_bias"),
        unused=("rms_norm_eps", *_STARCODER2),
        slides=True,
        norms=Norms(kind="layer"),
        gated=False,
        renamed=((".c_fc.", ".up_proj."), (".c_proj.", ".down_proj.")),
    ),
    "GPTNeoXForCausalLM": Family(
        "gpt_neox",
        _GPT_NEOX,
        unused=("rms_norm_eps",),
        partial_rope=True,
        norms=Norms(kind="layer"),
        gated=False,
        renamed=(
            ("gpt_neox.", "model."),
            ("model.final_layer_norm.", "model.norm."),
            ("model.embed_in.", "model.embed_tokens."),
            ("embed_out.", "lm_head."),
            (".attention.", ".self_attn."),
            (".self_attn.dense.", ".self_attn.o_proj."),
            (".dense_h_to_4h.", ".up_proj."),
            (".dense_4h_to_h.", ".down_proj."),
        ),
        joined=(Joined("query_key_value", _QKV, by_head=True),),
        aliases=(("rotary_pct", "partial_rotary_factor"), ("rotary_emb_base", "rope_theta")),
    ),
    "StableLmForCausalLM": Family(
        "stablelm",
        ("hidden_act", "layer_norm_eps", "use_qkv_bias"),
        unused=("rms_norm_eps",),
        partial_rope=True,
        norms=Norms(kind="layer"),
    ),
}
