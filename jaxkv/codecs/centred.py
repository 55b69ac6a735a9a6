"""Vectors less their mean, which a cache holds once a layer and head."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxkv.codecs.codec import (
    Codec,
    LeafSpec,
    LeafSpecs,
    Leaves,
    Positions,
    State,
    Tokens,
    Vectors,
    refuse_state,
)
from jaxkv.codecs.offsets import Offsets
from jaxkv.codecs.rope import Rope, to_12_bits

# Vectors this many times as long as the median are left out of a mean: no token may move it far.
_LONGEST = 8.0

Means = Float[Array, "2 kv_heads head_dim"]


@dataclasses.dataclass(frozen=True)
class Centred(Codec):
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

    Raises:
      ValueError: a codec with state.

    >>> import jaxkv
    >>> codec = jaxkv.Centred(jaxkv.Rotated(bits=4), rope=jaxkv.Rope.of(500_000, rotary_dim=128))
    >>> config = jaxkv.KVCacheConfig(32, 8192, num_kv_heads=8, head_dim=128, codec=codec)
    >>> config.size_bytes == 2 * 32 * 8192 * 8 * (64 + 2) + 8 * 32 * 8 * 128
    True
    """

    codec: Codec
    rope: Rope | None = None

    def __post_init__(self) -> None:
        refuse_state("Centred", self.codec)

    @property
    def name(self) -> str:
        return f"{self.codec.name}-centred"

    def under(self, rope: Rope | None) -> "Centred":
        """The same for a model with this rope, if none was named."""
        return self if self.rope else dataclasses.replace(self, rope=rope)

    # Of differences, all as the codec inside does it.

    def leaves(self, head_dim: int) -> LeafSpecs:
        return self.codec.leaves(head_dim)

    def encode(self, vectors: Vectors) -> Leaves:
        return self.codec.encode(vectors)

    def decode(self, leaves: Leaves, head_dim: int, dtype: jnp.dtype) -> Vectors:
        return self.codec.decode(leaves, head_dim, dtype)

    @property
    def levels(self) -> tuple[int, ...] | None:
        return self.codec.levels

    @property
    def rotation(self) -> str | None:
        return self.codec.rotation

    @property
    def sides(self) -> tuple[Codec, Codec]:
        return self.codec.sides

    def rotate(self, queries: Vectors) -> Vectors:
        return self.codec.rotate(queries)

    def unrotate(self, outputs: Vectors) -> Vectors:
        return self.codec.unrotate(outputs)

    def rotate_values(self, values: Vectors) -> Vectors:
        return self.codec.rotate_values(values)

    def decode_rotated(self, leaves: Leaves, head_dim: int, dtype: jnp.dtype) -> Vectors:
        return self.codec.decode_rotated(leaves, head_dim, dtype)

    # Of means, its state.

    def state(self, head_dim: int) -> LeafSpecs:
        return {"means": LeafSpec((head_dim,), "float32")}

    def offsets(self, state: State) -> Offsets:
        return Offsets(state["means"], self.rope)

    @property
    def learns_over_devices(self) -> bool:
        return True

    def update_state(
        self,
        state: State,
        vectors: Tokens,
        positions: Positions,
        lengths: Int[Array, "*batch"],
        *,
        axis: str | None = None,
    ) -> State:
        """The means of these tokens if the cache is empty and they were never set."""
        means, empty = state["means"], jnp.all(lengths == 0)
        # Means are the same on all devices, which must agree on what they send each other.
        unset = ~jnp.any(means != 0) & (empty if axis is None else True)
        vectors = vectors.astype(jnp.float32)
        return {"means": _set_once(self, unset, means, vectors, positions, empty, axis)}

    def encode_tokens(self, vectors: Tokens, state: State, positions: Positions) -> Leaves:
        offsets = self.offsets(state).at(positions[..., None])
        return self.encode(vectors.astype(jnp.float32) - offsets)

    def decode_tokens(
        self,
        leaves: Leaves,
        head_dim: int,
        dtype: jnp.dtype,
        state: State,
        positions: Int[Array, "*batch tokens #kv_heads"],
        *,
        rotated: bool = False,
    ) -> Tokens:
        offsets, wide = self.offsets(state), jnp.dtype("float32")
        if not rotated:
            return (self.decode(leaves, head_dim, wide) + offsets.at(positions)).astype(dtype)
        both = self.decode_rotated(leaves, head_dim, wide)
        keys = both[0] + self.rotate(offsets.at(positions)[0])
        values = both[1] + self.rotate_values(offsets.values)
        return jnp.stack([keys, values]).astype(dtype)

    def means(self, vectors: Tokens, positions: Positions, axis: str | None = None) -> Means:
        """The means of these keys and values, where positions are not -1, to 12 bits.

        Vectors that are not finite, or of a length that stands out, do not count. With those of
        all devices along a mesh axis: lengths and sums of vectors move, and no vector.
        """
        keys, values = vectors.astype(jnp.float32)
        both = jnp.stack([self._unturned(keys, positions[..., None]), values])
        both = both.reshape(2, -1, *both.shape[-2:])
        length = jnp.sum(both * both, axis=-1, keepdims=True)
        counts = jnp.isfinite(length) & (positions.reshape(-1) >= 0)[:, None, None]
        lengths = jnp.where(counts, length, jnp.inf)
        if axis is not None:
            lengths = lax.all_gather(lengths, axis, axis=1, tiled=True)
        counts &= length <= _LONGEST**2 * _median(lengths)
        total = jnp.sum(jnp.where(counts, both, 0), axis=1)
        number = jnp.sum(counts, axis=1, dtype=jnp.float32)
        if axis is not None:
            total, number = lax.psum((total, number), axis)
        return to_12_bits(total / (1 + number))

    def _unturned(self, keys: Array, positions: Array) -> Array:
        if not self.rope:
            return keys
        cos, sin = self.rope.cos_sin(positions)
        first, second, rest = self.rope.pairs(keys)
        return self.rope.joined(first * cos + second * sin, second * cos - first * sin, rest)


# A jit of its own: outside one, a cond is compiled anew on each call.
@functools.partial(jax.jit, static_argnames=("codec", "axis"))
def _set_once(
    codec: Centred,
    unset: Array,
    means: Means,
    vectors: Array,
    positions: Array,
    empty: Array,
    axis: str | None,
) -> Means:
    def of_these(vectors: Array, positions: Array) -> Means:
        new = codec.means(vectors, positions, axis)
        return new if axis is None else jnp.where(lax.pmin(jnp.int32(empty), axis) > 0, new, means)

    return lax.cond(unset, of_these, lambda *_: means, vectors, positions)


def _median(lengths: Float[Array, "2 tokens kv_heads 1"]) -> Float[Array, "2 1 kv_heads 1"]:
    """The lower median of those that are finite, a side and head; infinite where none is."""
    ordered, counts = jnp.sort(lengths, axis=1), jnp.isfinite(lengths)
    middle = (jnp.maximum(jnp.sum(counts, axis=1, keepdims=True), 1) - 1) // 2
    return jnp.take_along_axis(ordered, middle, axis=1)
