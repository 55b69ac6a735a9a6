"""The peers of the decode benchmark: transformers on torch, and the cache of flax.nnx itself."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import jaxkv
from benchmarks.caches import layer_vectors
from jaxkv.models import Decoder, DecoderConfig

_DYNAMIC, _STATIC = "transformers, dynamic cache", "transformers, static cache"
_NNX_LOOP, _NNX_STEPS = "flax.nnx cache, on-device loop", "flax.nnx cache, one step a call"
TRANSFORMERS = (_DYNAMIC, _STATIC)
NNX = (_NNX_LOOP, _NNX_STEPS)


class Transformers:
    """A `LlamaForCausalLM` with the weights of a jaxkv model. Imports torch when made."""

    def __init__(self, model: Decoder):
        import torch
        import transformers

        torch.set_num_threads(os.cpu_count() or 1)
        config = model.config
        self.config = transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=1 << 15,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            attn_implementation="sdpa",
        )
        self.model = transformers.LlamaForCausalLM(self.config).eval()
        self.model.load_state_dict(
            {name: torch.from_numpy(weight) for name, weight in _hf_weights(model).items()}
        )

    def competitors(self, cache: jaxkv.KVCache, context: int, tokens: int) -> dict[str, Callable]:
        """A greedy loop of so many tokens over each cache, always from the same context."""
        dynamic, static = self._dynamic(cache, context), self._static(cache, context)

        def run_dynamic() -> list[int]:
            answer = self._decode(dynamic, tokens)
            dynamic.crop(-tokens)
            return answer

        def run_static() -> list[int]:
            answer = self._decode(static, tokens)
            for layer in static.layers:
                layer.cumulative_length.fill_(context)
            return answer

        return {_DYNAMIC: run_dynamic, _STATIC: run_static}

    def logits(self, cache: jaxkv.KVCache, context: int) -> np.ndarray:
        """Of the token after token 1."""
        import torch

        with torch.no_grad():
            token = torch.ones((1, 1), dtype=torch.long)
            return (
                self.model(token, past_key_values=self._dynamic(cache, context))
                .logits[0, -1]
                .numpy()
            )

    def _decode(self, cache: Any, tokens: int) -> list[int]:
        import torch

        token, answer = torch.ones((1, 1), dtype=torch.long), []
        with torch.no_grad():
            for _ in range(tokens):
                logits = self.model(token, past_key_values=cache, use_cache=True).logits
                token = logits[:, -1].argmax(dim=-1, keepdim=True)
                answer.append(int(token))
        return answer

    def _dynamic(self, cache: jaxkv.KVCache, context: int) -> Any:
        import transformers

        return self._filled(transformers.DynamicCache(config=self.config), cache, context)

    def _static(self, cache: jaxkv.KVCache, context: int) -> Any:
        import transformers

        slots = cache.config.max_context_length
        static = transformers.StaticCache(config=self.config, max_cache_len=slots)
        return self._filled(static, cache, context)

    def _filled(self, peer: Any, cache: jaxkv.KVCache, context: int) -> Any:
        import torch

        for layer in range(cache.config.num_layers):
            both = torch.from_numpy(layer_vectors(cache, layer)[:, :, :context])
            keys, values = both.transpose(2, 3).contiguous()
            peer.update(keys, values, layer)
        return peer


def _hf_weights(model: Decoder) -> dict[str, np.ndarray]:
    """Weights under the names and in the layout of a Hugging Face checkpoint."""
    weights = {}
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(map(str, path))
        value = np.array(parameter[...])
        if value.ndim == 2 and "embed" not in name:
            value = np.ascontiguousarray(value.T)
        weights[name if name.startswith("lm_head") else f"model.{name}"] = value
    return weights


class _NnxBlock(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        hidden, inner = config.hidden_size, config.intermediate_size
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.first_norm = nnx.RMSNorm(hidden, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            config.num_heads,
            hidden,
            num_kv_heads=config.num_kv_heads,
            use_bias=False,
            decode=True,
            rngs=rngs,
        )
        self.second_norm = nnx.RMSNorm(hidden, rngs=rngs)
        self.gate, self.up = linear(hidden, inner), linear(hidden, inner)
        self.down = linear(inner, hidden)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.first_norm(x))
        y = self.second_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class _NnxDecoder(nnx.Module):
    def __init__(self, config: DecoderConfig, slots: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.blocks = nnx.List([_NnxBlock(config, rngs) for _ in range(config.num_layers)])
        self.norm = nnx.RMSNorm(config.hidden_size, rngs=rngs)
        self.head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)
        for block in self.blocks:
            block.attention.init_cache((1, slots, config.hidden_size))

    def __call__(self, token: jax.Array) -> jax.Array:
        x = self.embed(token[:, None])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))[:, -1]


def nnx_missing() -> str | None:
    """Why flax.nnx cannot be a peer here, or None."""
    if "num_kv_heads" in inspect.signature(nnx.MultiHeadAttention.__init__).parameters:
        return None
    return "MultiHeadAttention of this flax has no num_kv_heads"


def nnx_competitors(
    config: DecoderConfig, context: int, room: int, tokens: int
) -> dict[str, Callable]:
    """The decode cache of `nnx.MultiHeadAttention`, as arrays in and out of jit, donated."""
    model = _NnxDecoder(config, context + room, nnx.Rngs(0))
    graph, weights, caches = nnx.split(model, nnx.Param, ...)
    holder = [caches]

    def one_token(weights, caches, token, position):
        caches = jax.tree.map(
            lambda leaf: position if leaf.dtype == jnp.int32 else leaf, caches
        )  # the index of each layer, which has no reset
        model = nnx.merge(graph, weights, caches)
        token = jnp.argmax(model(token), axis=-1).astype(jnp.int32)
        return token, nnx.state(model, nnx.Cache)

    @functools.partial(jax.jit, donate_argnums=1)
    def loop(weights, caches, token):
        def body(step, state):
            token, caches = state
            return one_token(weights, caches, token, context + step)

        return lax.fori_loop(0, tokens, body, (token, caches))

    step = jax.jit(one_token, donate_argnums=1)
    first = jnp.ones(1, jnp.int32)

    def run_loop() -> jax.Array:
        token, holder[0] = loop(weights, holder[0], first)
        return token

    def run_steps() -> list[int]:
        answer, token = [], first
        for position in range(context, context + tokens):
            token, holder[0] = step(weights, holder[0], token, jnp.int32(position))
            answer.append(int(token[0]))
        return answer

    return {_NNX_LOOP: run_loop, _NNX_STEPS: run_steps}
