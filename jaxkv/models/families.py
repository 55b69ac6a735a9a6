"""What tells the decoders that `Decoder` can be from each other, a row a family."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
    """The traits of an architecture that no field of its ``config.json`` says.

    Attributes:
      model_type: its name in a ``config.json``.
      fields: the fields that its ``config.json`` has beside those that all have.
      unused: fields that it may have and that change nothing: transformers does not use them.
      quantization: how its released weights may be packed.
      slides: layers may have a window.
      local_rope: those layers have a rope of their own.
      qkv_bias: queries, keys and values have biases even where attention has not.
      qk_norm: queries and keys are normalized a head (Henry et al., 2020).
      is_gemma: embeddings are multiplied by the root of their size, norms by one plus their
        weight, and what a layer adds to the stream is normalized too (Gemma 2, section 2).
      has_sinks: one learned logit per head is added to the softmax denominator (gpt-oss).
      has_experts: the MLP is a mixture of experts.
      latent: it keeps latents in place of keys and values (DeepSeek-V2, section 2.1).
    """

    model_type: str
    fields: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    quantization: str | None = None
    slides: bool = False
    local_rope: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    is_gemma: bool = False
    has_sinks: bool = False
    has_experts: bool = False
    latent: bool = False


_GEMMA = ("attention_bias", "hidden_activation", "query_pre_attn_scalar", "final_logit_softcapping")
_EXPERTS = ("num_local_experts", "num_experts_per_tok", "swiglu_alpha", "swiglu_limit")

# By architecture, as a config.json names it.
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", ("hidden_act", "attention_bias", "mlp_bias")),
    "MistralForCausalLM": Family("mistral", ("hidden_act",), slides=True),
    "Qwen2ForCausalLM": Family("qwen2", ("hidden_act",), slides=True, qkv_bias=True),
    "Qwen3ForCausalLM": Family(
        "qwen3", ("hidden_act", "attention_bias"), slides=True, qk_norm=True
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        (*_GEMMA, "attn_logit_softcapping"),
        unused=("hidden_act", "sliding_window_size"),
        slides=True,
        is_gemma=True,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        _GEMMA,
        unused=("hidden_act", "_sliding_window_pattern"),
        slides=True,
        local_rope=True,
        qk_norm=True,
        is_gemma=True,
    ),
    "GptOssForCausalLM": Family(
        "gpt_oss",
        ("attention_bias", *_EXPERTS),
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
}
