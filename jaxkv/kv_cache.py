"""The cache: an immutable pytree. Its verbs are in `jaxkv.cache`."""

import dataclasses
import functools

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxkv.addressing import Index, Layer
from jaxkv.codecs import Leaves
from jaxkv.config import KVCacheConfig
from jaxkv.text import format_bytes, sequences

__all__ = ["KVCache", "Layer", "NumTokens"]

# Tokens processed: one number for all sequences, or one for each of a ragged batch.
NumTokens = int | Int[Array, "*batch"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["storage", "index"], meta_fields=["config"]
)
@dataclasses.dataclass(frozen=True, repr=False)
class KVCache:
    """Keys and values of every token so far, and where they are. Made by `create`.

    Attributes:
      storage: one buffer a codec leaf, ``[layers, 2, ctx, kv_heads, ...]``; axis 1 is keys,
        values. On a CPU a bfloat16 buffer has dtype uint16 (see `container_dtype`); use
        `layer` to get numbers.
      index: which slot holds which token; `lengths` is part of it.
      config: the static description.
    """

    storage: Leaves
    index: Index
    config: KVCacheConfig

    @property
    def lengths(self) -> Int[Array, "*batch"]:
        """Tokens in each sequence. More than the capacity once a write was dropped."""
        return self.index.lengths

    @property
    def overflowed(self) -> Bool[Array, "*batch"]:
        """True for a sequence that was given more tokens than it can hold."""
        return self.lengths > self.index.room

    @property
    def size_bytes(self) -> int:
        """Bytes of the keys and values; equal to ``config.size_bytes``."""
        return sum(leaf.nbytes for leaf in self.storage.values())

    def __repr__(self) -> str:
        config = self.config
        batch = "" if config.batch_size is None else f"{sequences(config.batch_size)}, "
        return (
            f"KVCache({config.num_layers} layers, {config.num_kv_heads} KV heads x "
            f"{config.head_dim}, {config.codec.name}, {config.addressing.name}, {batch}"
            f"{_tokens_held(self)} of {config.max_context_length} tokens, "
            f"{format_bytes(config.size_bytes)})"
        )


def _tokens_held(cache: KVCache) -> str:
    lengths = cache.lengths
    if isinstance(lengths, jax.core.Tracer) or not isinstance(lengths, jax.Array):
        return "?"
    if lengths.is_deleted():
        return "donated, ?"
    held = np.asarray(lengths).tolist()
    return str(held if isinstance(held, int) or len(held) <= 8 else f"{min(held)} to {max(held)}")
