"""GPT-2 (Radford et al., 2019): learned positions, layer norms, biases everywhere."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxkv.cache.ancestors import Ancestors
from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.kv_cache import NumTokens
from jaxkv.cache.verbs import advance
from jaxkv.counts import check_fields
from jaxkv.errors import CheckpointError, ConfigError
from jaxkv.models.hf_fields import (
    check_all_read,
    check_choice,
    eos_token_ids,
    hf_decoder,
    read_fields,
    write_fields,
)
from jaxkv.models.layers import (
    ACTIVATIONS,
    INIT_STD,
    Embedding,
    LayerNorm,
    Linear,
    Step,
    attend_causal,
    check_tokens,
    positions_of,
)
from jaxkv.models.model import Model
from jaxkv.models.shape import Shape
from jaxkv.programs import promotes_ranks

Hidden = Float[Array, "*batch tokens hidden"]


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2. Frozen, hashable and validated when made.

    Args:
      vocab_size: token ids that the model knows.
      hidden_size: numbers in a token's vector between layers.
      num_layers, num_heads: of the decoder, of each layer.
      max_positions: tokens that a context can have: positions are learned.
      intermediate_size: numbers in a token's vector inside an MLP; ``4 * hidden_size`` if None.
      activation: a name in `ACTIVATIONS`.
      layer_norm_eps: added to the variance in norms.
      scale_attn_weights: divide attention logits by ``sqrt(head_dim)``.
      scale_attn_by_inverse_layer_idx: divide them by the layer's number too, counted from 1.
      tie_word_embeddings: logits come from the embedding table.
      eos_token_ids: the tokens that end a text.

    Raises:
      ConfigError: a `ValueError` that says which field is wrong.

    >>> GPT2Config(50257, 768, num_layers=12, num_heads=12).head_dim
    64
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    max_positions: int = 1024
    intermediate_size: int = None  # type: ignore[assignment]  # filled below
    activation: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_fields(
            self,
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "max_positions",
            error=ConfigError,
        )
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        check_fields(self, "intermediate_size", error=ConfigError)
        check_choice(self, "activation", ACTIVATIONS)
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"GPT2Config: hidden_size must be a multiple of num_heads, got {self.hidden_size} "
                f"and {self.num_heads}."
            )

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def shape(self) -> Shape:
        """Of the cache."""
        return Shape(self.num_layers, self.num_kv_heads, self.head_dim)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "GPT2Config":
        """Read the contents of a GPT-2 ``config.json``.

        Raises:
          CheckpointError: another architecture, an unsupported feature or a bad field.
        """
        family, flat = hf_decoder(config)
        if family != "GPT2LMHeadModel":
            raise CheckpointError(f"config.json: {family} is read by DecoderConfig, not here.")
        check_all_read(family, config, _HF_FIELDS.keys())
        given = read_fields(cls, flat, _HF_FIELDS)
        try:
            return cls(**given, eos_token_ids=eos_token_ids(flat))
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"config.json: {error}") from error

    def to_hf(self) -> dict[str, Any]:
        """The contents of a ``config.json`` that `from_hf` reads as this config."""
        return write_fields(self, _HF_FIELDS, "GPT2LMHeadModel")


# Name in a config.json -> name here.
_HF_FIELDS = {
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_positions": "max_positions",
    "n_inner": "intermediate_size",
    "activation_function": "activation",
    "layer_norm_epsilon": "layer_norm_eps",
    "scale_attn_weights": "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx": "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings": "tie_word_embeddings",
}


class Attention(nnx.Module):
    """Multi-head attention over the cache, with one projection for queries, keys and values."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs, dtype: Any, out_std: float):
        hidden = config.hidden_size
        shared = {"bias": True, "rngs": rngs, "dtype": dtype}
        self.c_attn = Linear(hidden, 3 * hidden, **shared)
        self.c_proj = Linear(hidden, hidden, std=out_std, **shared)
        self.config = config

    def __call__(self, x: Hidden, cache: Any, layer: int, step: Step) -> tuple[Hidden, Any]:
        config = self.config
        heads = (config.num_heads, config.head_dim)
        queries, keys, values = (
            part.reshape(*x.shape[:-1], *heads) for part in jnp.split(self.c_attn(x), 3, axis=-1)
        )
        scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1
        mixed, cache = attend_causal(
            cache, queries, keys, values, layer=layer, scale=scale, step=step
        )
        return self.c_proj(mixed.reshape(x.shape)), cache


class MLP(nnx.Module):
    """Two projections with an activation between."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs, dtype: Any, out_std: float):
        hidden, inner = config.hidden_size, config.intermediate_size
        shared = {"bias": True, "rngs": rngs, "dtype": dtype}
        self.c_fc = Linear(hidden, inner, **shared)
        self.c_proj = Linear(inner, hidden, std=out_std, **shared)
        self.activation = config.activation

    def __call__(self, x: Hidden) -> Hidden:
        return self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x)))


class Block(nnx.Module):
    """One layer: attention and MLP, each normalized first and added to the stream."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs, dtype: Any):
        eps, hidden = config.layer_norm_eps, config.hidden_size
        out_std = INIT_STD / (2 * config.num_layers) ** 0.5
        self.ln_1 = LayerNorm(hidden, eps=eps, dtype=dtype)
        self.attn = Attention(config, rngs=rngs, dtype=dtype, out_std=out_std)
        self.ln_2 = LayerNorm(hidden, eps=eps, dtype=dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype, out_std=out_std)

    def __call__(self, x: Hidden, cache: Any, layer: int, step: Step) -> tuple[Hidden, Any]:
        mixed, cache = self.attn(self.ln_1(x), cache, layer, step)
        x = x + mixed
        return x + self.mlp(self.ln_2(x)), cache


class GPT2(Model):
    """GPT-2, without dropout.

    Args:
      config: its shape.
      rngs: for random weights.
      dtype: of the weights, and of all that is computed but norms, softmax and logits (float32).

    >>> import jax.numpy as jnp
    >>> model = GPT2(GPT2Config(256, 32, num_layers=2, num_heads=4), rngs=nnx.Rngs(0))
    >>> logits, _ = model(jnp.array([72, 101, 108]))
    >>> logits.shape
    (3, 256)
    """

    checkpoint_prefix = "transformer."
    checkpoint_transposes = ("lm_head",)
    checkpoint_embedding = "wte"

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        vocab, hidden = config.vocab_size, config.hidden_size
        self.config = config
        self.wte = Embedding(vocab, hidden, rngs=rngs, dtype=dtype)
        self.wpe = Embedding(config.max_positions, hidden, rngs=rngs, dtype=dtype)
        self.h = nnx.data([Block(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)])
        self.ln_f = LayerNorm(hidden, eps=config.layer_norm_eps, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(hidden, vocab, rngs=rngs, dtype=dtype)

    @promotes_ranks
    def hidden(
        self,
        tokens: Int[Array, "*batch tokens"],
        cache: AnyCache | None = None,
        *,
        num_tokens: NumTokens | None = None,
        ancestors: Ancestors | None = None,
    ) -> tuple[Hidden, AnyCache | None]:
        """As of any model; a context beyond ``max_positions`` is a `ValueError`."""
        step = Step(num_tokens, ancestors)
        check_tokens(tokens, cache, self.config.max_positions, step=step)
        length, positions = tokens.shape[-1], positions_of(tokens, cache, step)
        # Padding may lie past the last position that there is.
        x = self.wte(tokens) + self.wpe(jnp.minimum(positions, self.config.max_positions - 1))
        for number, block in enumerate(self.h):
            x, cache = block(x, cache, number, step)
        if cache is not None:
            cache = advance(cache, length if num_tokens is None else num_tokens)
        return self.ln_f(x), cache

    def logits(self, hidden: Hidden) -> Float[Array, "*batch tokens vocab"]:
        return self._logits(hidden, self.wte)

    @property
    def dtype(self) -> jnp.dtype:
        return self.wte.weight.dtype
