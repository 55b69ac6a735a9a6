"""One decoder for all with rope and norms: Llama, Mistral, Qwen, Gemma 2 and 3, gpt-oss."""

import dataclasses
from typing import Any, Self

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.kv_cache import NumTokens
from jaxkv.cache.verbs import advance, next_positions
from jaxkv.models.config import DecoderConfig
from jaxkv.models.experts import MixtureOfExperts
from jaxkv.models.layers import (
    ACTIVATIONS,
    INIT_STD,
    Embedding,
    Linear,
    RMSNorm,
    attend_causal,
    check_tokens,
    linears,
)
from jaxkv.models.model import Model
from jaxkv.models.rope import check_room, rotate, rotation
from jaxkv.programs import promotes_ranks

Hidden = Float[Array, "*batch tokens hidden"]


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., 2023) with rope, over the cache."""

    def __init__(
        self, config: DecoderConfig, layer: int, *, rngs: nnx.Rngs, dtype: Any, out_std: float
    ):
        hidden, head_dim, family = config.hidden_size, config.head_dim, config.family
        queries, keys = config.num_heads * head_dim, config.num_kv_heads * head_dim
        qkv_bias = config.attention_bias or family.qkv_bias
        shared = {"rngs": rngs, "dtype": dtype}
        self.q_proj = Linear(hidden, queries, bias=qkv_bias, **shared)
        self.k_proj = Linear(hidden, keys, bias=qkv_bias, **shared)
        self.v_proj = Linear(hidden, keys, bias=qkv_bias, **shared)
        self.o_proj = Linear(queries, hidden, bias=config.attention_bias, std=out_std, **shared)
        if family.qk_norm:
            self.q_norm = _norm(head_dim, config, dtype)
            self.k_norm = _norm(head_dim, config, dtype)
        if family.has_sinks:
            self.sinks = nnx.Param(jnp.zeros(config.num_heads, dtype))
        self.config, self.layer = config, layer

    def __call__(
        self, x: Hidden, rotation: Any, cache: Any, num_tokens: NumTokens | None
    ) -> tuple[Hidden, Any]:
        config = self.config
        queries, keys, values = (
            projected.reshape(*x.shape[:-1], -1, config.head_dim)
            for projected in linears(x, self.q_proj, self.k_proj, self.v_proj)
        )
        if config.family.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        mixed, cache = attend_causal(
            cache,
            rotate(queries, rotation),
            rotate(keys, rotation),
            values,
            layer=self.layer,
            num_tokens=num_tokens,
            scale=config.query_pre_attn_scalar**-0.5,
            window=config.windows[self.layer],
            softcap=config.attention_softcap,
            sinks=self.sinks[...] if config.family.has_sinks else None,
        )
        return self.o_proj(mixed.reshape(*x.shape[:-1], -1)), cache


class MLP(nnx.Module):
    """A gated linear unit (Shazeer, 2020)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any, out_std: float):
        hidden, inner = config.hidden_size, config.intermediate_size
        shared = {"bias": config.mlp_bias, "rngs": rngs, "dtype": dtype}
        self.gate_proj = Linear(hidden, inner, **shared)
        self.up_proj = Linear(hidden, inner, **shared)
        self.down_proj = Linear(inner, hidden, std=out_std, **shared)
        self.activation = config.activation

    def __call__(self, x: Hidden) -> Hidden:
        gate, up = linears(x, self.gate_proj, self.up_proj)
        return self.down_proj(ACTIVATIONS[self.activation](gate) * up)


class Block(nnx.Module):
    """One layer: attention and MLP, each normalized first and added to the stream.

    Gemma normalizes what they give too, and so its names shift: what stands before the MLP
    elsewhere, ``post_attention_layernorm``, stands after attention there.
    """

    def __init__(self, config: DecoderConfig, layer: int, *, rngs: nnx.Rngs, dtype: Any):
        out_std = INIT_STD / (2 * config.num_layers) ** 0.5
        shared = {"rngs": rngs, "dtype": dtype, "out_std": out_std}
        mlp = MixtureOfExperts if config.family.has_experts else MLP
        self.input_layernorm = _norm(config.hidden_size, config, dtype)
        self.self_attn = Attention(config, layer, **shared)
        self.post_attention_layernorm = _norm(config.hidden_size, config, dtype)
        self.mlp = mlp(config, **shared)
        if config.family.is_gemma:
            self.pre_feedforward_layernorm = _norm(config.hidden_size, config, dtype)
            self.post_feedforward_layernorm = _norm(config.hidden_size, config, dtype)
        self.is_gemma = config.family.is_gemma

    def __call__(
        self, x: Hidden, rotation: Any, cache: Any, num_tokens: NumTokens | None
    ) -> tuple[Hidden, Any]:
        mixed, cache = self.self_attn(self.input_layernorm(x), rotation, cache, num_tokens)
        if not self.is_gemma:
            x = x + mixed
            return x + self.mlp(self.post_attention_layernorm(x)), cache
        x = x + self.post_attention_layernorm(mixed)
        fed = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(fed), cache


class Decoder(Model):
    """A decoder of one of the families in `jaxkv.models.families.FAMILIES`.

    Args:
      config: its shape.
      rngs: for random weights.
      dtype: of the weights, and of all that is computed but norms, softmax and logits (float32).

    >>> import jax.numpy as jnp, jaxkv
    >>> config = DecoderConfig(256, 32, 64, num_layers=2, num_heads=4, num_kv_heads=2)
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> cache = jaxkv.create(model.cache_config(max_context_length=16))
    >>> logits, cache = model(jnp.array([72, 101, 108]), cache)
    >>> logits.shape, int(cache.lengths)
    ((3, 256), 3)
    """

    checkpoint_prefix = "model."
    checkpoint_transposes = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj", "router", "lm_head"),
    )
    checkpoint_embedding = "embed_tokens"

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        vocab, hidden = config.vocab_size, config.hidden_size
        self.config = config
        self.embed_tokens = Embedding(vocab, hidden, rngs=rngs, dtype=dtype)
        self.layers = nnx.data(
            [Block(config, layer, rngs=rngs, dtype=dtype) for layer in range(config.num_layers)]
        )
        self.norm = _norm(hidden, config, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(hidden, vocab, rngs=rngs, dtype=dtype)

    @promotes_ranks
    def __call__(
        self,
        tokens: Int[Array, "*batch tokens"],
        cache: AnyCache | None = None,
        *,
        num_tokens: NumTokens | None = None,
    ) -> tuple[Float[Array, "*batch tokens vocab"], AnyCache | None]:
        """Logits of the token after each of these, and the cache with them counted.

        Args:
          tokens: ids, ``[tokens]``, with a leading ``[batch]`` exactly when the cache has one.
          cache: what came before. None for the plain causal forward over these tokens alone,
            with any leading axes; it is differentiable and returns None as cache.
          num_tokens: how many of ``tokens`` are real, a sequence, for prompts padded on the
            right. All if None. Logits of padding mean nothing.

        Raises:
          CacheFullError: outside jit, see `jaxkv.append`.
          TypeError, ValueError: a bad dtype or shape, or a cache for which `for_context` must say
            what the rope is.
        """
        check_tokens(tokens, cache)
        length = tokens.shape[-1]
        positions = (
            jnp.arange(length, dtype=jnp.int32) if cache is None else next_positions(cache, length)
        )
        ropes = self.config.ropes
        context = length if cache is None else cache.config.max_context_length
        if cache is not None or num_tokens is not None:  # texts may be shorter than that
            check_room(ropes, context)
        rotations = {rope: rotation(rope, positions, context) for rope in dict.fromkeys(ropes)}
        x = self._embed(tokens)
        for rope, block in zip(ropes, self.layers, strict=True):
            x, cache = block(x, rotations[rope], cache, num_tokens)
        if cache is not None:
            cache = advance(cache, length if num_tokens is None else num_tokens)
        logits, cap = self._logits(self.norm(x), self.embed_tokens), self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap), cache

    def for_context(self, max_context_length: int) -> Self:
        ropes = {
            field: getattr(self.config, field).for_context(max_context_length)
            for field in ("rope", "local_rope")
        }
        model, config = nnx.clone(self), dataclasses.replace(self.config, **ropes)
        for _, module in nnx.iter_modules(model):
            if getattr(module, "config", None) == self.config:
                module.config = config  # type: ignore[attr-defined]
        return model

    def _embed(self, tokens: Int[Array, "*batch tokens"]) -> Hidden:
        embedded = self.embed_tokens(tokens)
        if not self.config.family.is_gemma:
            return embedded
        return embedded * jnp.asarray(self.config.hidden_size**0.5, self.dtype)

    @property
    def dtype(self) -> jnp.dtype:
        return self.embed_tokens.weight.dtype


def _norm(features: int, config: DecoderConfig, dtype: Any) -> RMSNorm:
    return RMSNorm(features, eps=config.rms_norm_eps, dtype=dtype, plus_one=config.family.is_gemma)
