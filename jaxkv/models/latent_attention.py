"""Multi-head latent attention (DeepSeek-V2, 2024, section 2.1), absorbed.

What makes a head's keys of latents is multiplied into its queries instead, and what makes its
values into its output: all heads then read the latents as they are kept, as one KV head whose
values are the first part of its keys. No key or value of a head is ever made.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxkv.models.config import DecoderConfig
from jaxkv.models.layers import Linear, RMSNorm, Step, attend_causal
from jaxkv.models.rope import rotate, temperature, unpaired

Hidden = Float[Array, "*batch tokens hidden"]

_EPS = 1e-6  # of the norms of latents, whatever the config says


class LatentAttention(nnx.Module):
    """Attention of all heads over latents, in the cache or among the tokens given."""

    def __init__(
        self, config: DecoderConfig, layer: int, *, rngs: nnx.Rngs, dtype: Any, out_std: float
    ):
        hidden, heads, latent = config.hidden_size, config.num_heads, config.latent
        assert latent is not None
        shared = {"rngs": rngs, "dtype": dtype}
        biased = {"bias": config.attention_bias, **shared}
        if latent.query_rank is None:
            self.q_proj = Linear(hidden, heads * latent.head_dim, **shared)
        else:
            self.q_a_proj = Linear(hidden, latent.query_rank, **biased)
            self.q_a_layernorm = RMSNorm(latent.query_rank, eps=_EPS, dtype=dtype)
            self.q_b_proj = Linear(latent.query_rank, heads * latent.head_dim, **shared)
        self.kv_a_proj_with_mqa = Linear(hidden, latent.rank + latent.rope_dim, **biased)
        self.kv_a_layernorm = RMSNorm(latent.rank, eps=_EPS, dtype=dtype)
        made = heads * (latent.plain_dim + latent.value_dim)
        self.kv_b_proj = Linear(latent.rank, made, **shared)
        self.o_proj = Linear(heads * latent.value_dim, hidden, std=out_std, **biased)
        self.config, self.layer, self.latent = config, layer, latent

    def __call__(self, x: Hidden, rotation: Any, cache: Any, step: Step) -> tuple[Hidden, Any]:
        latent, heads = self.latent, self.config.num_heads
        plain, rotated = jnp.split(self._queries(x), [latent.plain_dim], axis=-1)
        latents, rope_keys = jnp.split(self.kv_a_proj_with_mqa(x), [latent.rank], axis=-1)
        rope_keys = self._rotated(rope_keys[..., None, :], rotation)
        keys = jnp.concatenate([self.kv_a_layernorm(latents)[..., None, :], rope_keys], axis=-1)
        made = self.kv_b_proj.weight[...].reshape(latent.rank, heads, -1)
        to_keys, to_values = jnp.split(made, [latent.plain_dim], axis=-1)
        absorbed = jnp.einsum("...hn,rhn->...hr", plain, to_keys)
        mixed, cache = attend_causal(
            cache,
            jnp.concatenate([absorbed, self._rotated(rotated, rotation)], axis=-1),
            keys,
            keys[..., : latent.rank] if cache is None else None,
            layer=self.layer,
            step=step,
            scale=self._scale(),
        )
        output = jnp.einsum("...hr,rhv->...hv", mixed, to_values)
        return self.o_proj(output.reshape(*x.shape[:-1], -1)), cache

    def _queries(self, x: Hidden) -> Float[Array, "*batch tokens heads head_dim"]:
        if self.latent.query_rank is None:
            queries = self.q_proj(x)
        else:
            queries = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        return queries.reshape(*x.shape[:-1], -1, self.latent.head_dim)

    def _rotated(self, vectors: Array, rotation: Any) -> Array:
        if self.latent.interleaved:
            vectors = unpaired(vectors, rotation)
        return rotate(vectors, rotation)

    def _scale(self) -> float:
        """With the temperature of YaRN over all numbers, where a config has one (DeepSeek-V3)."""
        rope, scale = self.config.rope, self.config.attention_scale
        if rope.rope_type == "default" or not rope.mscale_all_dim or rope.factor <= 1:
            return scale
        return scale * temperature(rope.factor, rope.mscale_all_dim) ** 2
