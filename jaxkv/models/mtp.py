"""Multi-token prediction (DeepSeek-V3, 2024, section 2.2): what guesses one token further.

It goes on from the model's hidden state of a token, after the last norm, and from the embedding
of the token after it, through one more layer of the model's own kind.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxkv.models.config import DecoderConfig
from jaxkv.models.families import MTPTensors
from jaxkv.models.layers import NORMS, Linear, Step

Hidden = Float[Array, "*batch tokens hidden"]


class MTPModule(nnx.Module):
    """The module: embeddings and head are the model's own.

    Args:
      config: of the model.
      block: the layer, whose keys and values come after those of the model's layers.
    """

    def __init__(self, config: DecoderConfig, block: nnx.Module, *, rngs: nnx.Rngs, dtype: Any):
        hidden, norm = config.hidden_size, NORMS[config.family.norms.kind]
        shared = {"eps": config.rms_norm_eps, "dtype": dtype}
        self.enorm: Any = norm(hidden, **shared)
        self.hnorm: Any = norm(hidden, **shared)
        self.eh_proj = Linear(2 * hidden, hidden, rngs=rngs, dtype=dtype)
        self.block: Any = block
        self.norm: Any = norm(hidden, **shared)
        assert config.family.mtp is not None, "config.mtp says so"
        self.hidden_first = config.family.mtp.hidden_first

    def __call__(
        self, hidden: Hidden, embedded: Hidden, rotation: Any, cache: Any
    ) -> tuple[Hidden, Any]:
        """Hidden states that the head makes logits of, and the cache."""
        both = [self.enorm(embedded), self.hnorm(hidden)]
        if self.hidden_first:
            both.reverse()
        x = self.eh_proj(jnp.concatenate(both, axis=-1))
        x, cache = self.block(x, rotation, cache, Step())
        return self.norm(x), cache


def names_of(module: MTPTensors, num_layers: int) -> tuple[tuple[str, str], ...]:
    """Parts of names in a checkpoint of so many layers, and what they are here."""
    own = zip(module.modules, ("enorm", "hnorm", "eh_proj", "norm"), strict=True)
    inside = ((f"mtp.block.{there}.", f"mtp.{here}.") for there, here in own)
    return (module.begins.format(layers=num_layers), "mtp.block."), *inside


def copies_of(module: MTPTensors, num_layers: int) -> dict[str, str]:
    """Tensors that a checkpoint may have there once more, and which those are."""
    begins = module.begins.format(layers=num_layers)
    return {
        f"{begins}embed_tokens.weight": "embed_tokens.weight",
        f"{begins}shared_head.head.weight": "lm_head.weight",
    }
