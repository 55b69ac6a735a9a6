"""Vectors less their mean, which a cache holds once a layer and head."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxkv.codecs.codec import (
    Codec,
    LeafSpecs,
    Leaves,
    decode_rotated,
    rotate,
    rotate_values,
    unrotate,
)
from jaxkv.codecs.rope import Rope, to_12_bits

# Vectors this many times as long as the median are left out of a mean: no token may move it far.
_LONGEST = 8.0

Means = Float[Array, "2 kv_heads head_dim"]


@dataclasses.dataclass(frozen=True)
class Centred:
    """Stores ``k_t - R_t m`` and ``v - n`` by another codec, where R_t is the rope of position t.

    Much of a trained model's keys is one constant vector a head, turned by the rope. Here m is the
    mean of the keys before they were turned and n that of the values, over all tokens of the first
    `append` to a cache that never held any, and one vector of zeros. They are frozen from then
    on, through `truncate` and `reset`: so a cache is calibrated by a prompt, the longer the
    better, and a model's later ones can be of any length. They take ``8 * layers * kv_heads *
    head_dim`` bytes. Attention adds ``q . R_t m`` to its logits.

    A mean is set while all of it is zero and every sequence is empty. Padding never counts, but all
    sequences of a cache share the means. So in a batch an answer depends on the other prompts, and
    in an `Engine` on the prompt that came first, whatever their salts. Where that must not be, let
    a prompt of your own come first.

    Args:
      codec: of the differences, such as `Rotated`.
      rope: the rope that keys were turned by; None for a model without one. A model of
        `jaxkv.models` says its own in `cache_config`.

    >>> import jaxkv
    >>> codec = jaxkv.Centred(jaxkv.Rotated(bits=4), rope=jaxkv.Rope.of(500_000, rotary_dim=128))
    >>> config = jaxkv.KVCacheConfig(32, 8192, num_kv_heads=8, head_dim=128, codec=codec)
    >>> config.size_bytes == 2 * 32 * 8192 * 8 * (64 + 2) + 8 * 32 * 8 * 128
    True
    """

    codec: Codec
    rope: Rope | None = None

    @property
    def name(self) -> str:
        return f"{self.codec.name}-centred"

    def under(self, rope: Rope | None) -> "Centred":
        """The same for a model with this rope, if none was named."""
        return self if self.rope else dataclasses.replace(self, rope=rope)

    # Of differences, all as the codec inside does it.

    def leaves(self, head_dim: int) -> LeafSpecs:
        return self.codec.leaves(head_dim)

    def encode(self, vectors: Float[Array, "2 *shape head_dim"]) -> Leaves:
        return self.codec.encode(vectors)

    def decode(
        self, leaves: Leaves, head_dim: int, dtype: jnp.dtype
    ) -> Float[Array, "2 *shape head_dim"]:
        return self.codec.decode(leaves, head_dim, dtype)

    def rotate(self, queries: Float[Array, "*shape head_dim"]) -> Float[Array, "*shape head_dim"]:
        return rotate(self.codec, queries)

    def unrotate(self, outputs: Float[Array, "*shape head_dim"]) -> Float[Array, "*shape head_dim"]:
        return unrotate(self.codec, outputs)

    def rotate_values(
        self, values: Float[Array, "*shape head_dim"]
    ) -> Float[Array, "*shape head_dim"]:
        return rotate_values(self.codec, values)

    def decode_rotated(
        self, leaves: Leaves, head_dim: int, dtype: jnp.dtype
    ) -> Float[Array, "2 *shape head_dim"]:
        return decode_rotated(self.codec, leaves, head_dim, dtype)

    # Of means.

    def means(
        self,
        vectors: Float[Array, "2 *batch tokens kv_heads head_dim"],
        positions: Int[Array, "*batch tokens"],
    ) -> Means:
        """The means of these keys and values, where positions are not -1, to 12 bits.

        Vectors that are not finite, or of a length that stands out, do not count.
        """
        keys, values = vectors.astype(jnp.float32)
        both = jnp.stack([self._unturned(keys, positions[..., None]), values])
        both = both.reshape(2, -1, *both.shape[-2:])
        length = jnp.sum(both * both, axis=-1, keepdims=True)
        counts = jnp.isfinite(length) & (positions.reshape(-1) >= 0)[:, None, None]
        counts &= length <= _LONGEST**2 * _median(length, counts)
        total = jnp.sum(jnp.where(counts, both, 0), axis=1)
        mean = total / (1 + jnp.sum(counts, axis=1, dtype=jnp.float32))
        return to_12_bits(mean)

    def centres(
        self, means: Means, positions: Int[Array, "*batch tokens #kv_heads"]
    ) -> Float[Array, "2 *batch tokens kv_heads head_dim"]:
        """What the tokens of these positions are stored less; the same to the bit everywhere."""
        keys, values = means
        shape = (*positions.shape[:-1], *values.shape)
        if self.rope:
            cos, sin = self.rope.cos_sin(positions)
            first, second, rest = self.rope.pairs(keys)
            first, second = first * cos - second * sin, second * cos + first * sin
            rest = jnp.broadcast_to(rest, (*first.shape[:-1], rest.shape[-1]))
            keys = self.rope.joined(first, second, rest)
        return jnp.stack([jnp.broadcast_to(side, shape) for side in (keys, values)])

    def centre_queries(
        self,
        queries: Float[Array, "batch kv_heads tokens group head_dim"],
        key_means: Float[Array, "kv_heads head_dim"],
    ) -> Float[Array, "batch kv_heads tokens group features"]:
        """What `centre_features` are multiplied with to give ``q . R_t m`` for all t.

        It is a sum over pairs of cosines and sines of t times what only q and m enter.
        """
        means = key_means[:, None, None, :]
        if not self.rope:
            return jnp.sum(queries * means, axis=-1, keepdims=True)
        first, second, rest = self.rope.pairs(queries)
        mean_first, mean_second, mean_rest = self.rope.pairs(means)
        with_cos = first * mean_first + second * mean_second
        with_sin = second * mean_first - first * mean_second
        unturned = jnp.sum(rest * mean_rest, axis=-1, keepdims=True)
        return jnp.concatenate([with_cos, with_sin, unturned], axis=-1)

    def centre_features(
        self, positions: Int[Array, "batch #kv_heads slots"]
    ) -> Float[Array, "batch #kv_heads slots features"]:
        """A table for a block of slots that all heads and layers share."""
        ones = jnp.ones((*positions.shape, 1), jnp.float32)
        return (
            jnp.concatenate([*self.rope.cos_sin(positions), ones], axis=-1) if self.rope else ones
        )

    def _unturned(self, keys: Array, positions: Array) -> Array:
        if not self.rope:
            return keys
        cos, sin = self.rope.cos_sin(positions)
        first, second, rest = self.rope.pairs(keys)
        return self.rope.joined(first * cos + second * sin, second * cos - first * sin, rest)


def updated_means(
    codec: Centred,
    means: Means,
    vectors: Float[Array, "2 *batch tokens kv_heads head_dim"],
    positions: Int[Array, "*batch tokens"],
    empty: Bool[Array, ""],
) -> Means:
    """A layer's means: those of these tokens if the cache is empty and they were never set."""
    unset = empty & ~jnp.any(means != 0)
    return _set_once(codec, unset, means, vectors, positions)


# A jit of its own: outside one, a cond is compiled anew on each call.
@functools.partial(jax.jit, static_argnames="codec")
def _set_once(
    codec: Centred, unset: Array, means: Means, vectors: Array, positions: Array
) -> Means:
    return lax.cond(unset, codec.means, lambda *_: means, vectors, positions)


def _median(
    lengths: Float[Array, "2 tokens kv_heads 1"], counts: Bool[Array, "2 tokens kv_heads 1"]
) -> Float[Array, "2 1 kv_heads 1"]:
    """The lower median of those that count, a side and head; infinite where none does."""
    ordered = jnp.sort(jnp.where(counts, lengths, jnp.inf), axis=1)
    middle = (jnp.maximum(jnp.sum(counts, axis=1, keepdims=True), 1) - 1) // 2
    return jnp.take_along_axis(ordered, middle, axis=1)
