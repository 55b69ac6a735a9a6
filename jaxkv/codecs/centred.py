"""Vectors less one of two centres, which a cache holds once a layer and head."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxkv.codecs.centres import centres_of, in_a_row, is_nearer_to_second, where_all
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
from jaxkv.codecs.offsets import Offsets, chosen
from jaxkv.codecs.rope import Rope
from jaxkv.codecs.signs import signs_of, with_signs, without_signs


@dataclasses.dataclass(frozen=True)
class Centred(Codec):
    """Stores ``k_t - R_t m`` and ``v - n`` by another codec, where R_t is the rope of position t.

    Much of a trained model's keys is one constant vector a head, rotated by the rope; but those of
    attention sinks, to which most attention goes, are another. So there are two centres m of keys
    and n of values: means, and what the token at position 0 has. Each vector is stored less the
    nearer one, and the sign of its scale says which. (Where the codec inside stores no scale, as
    `Dense`, the mean is the only one.)

    Centres are set by the first `append` to a cache that never held any, and frozen from then on,
    through `truncate` and `reset`: so a cache is calibrated by a prompt, the longer the better, and
    a model's later ones can be of any length. Means are those of keys before they were rotated, of
    all tokens nearer to them than to the first token, and one vector of zeros. Both take
    ``16 * layers * kv_heads * head_dim`` bytes. Attention adds ``q . R_t m`` to its logits.

    Padding never counts, but all sequences of a cache share the centres. So in a batch what is
    stored depends on all prompts of the first `append`. Where that must not be, give the cache
    centres first: `jaxkv.calibrate`, as `generate` and `Engine` do.

    Args:
      codec: of the differences, such as `Rotated`.
      rope: the rope that keys were rotated by; None for a model without one. A model of
        `jaxkv.models` says its own in `cache_config`.

    Raises:
      ValueError: a codec with state.

    >>> import jaxkv
    >>> codec = jaxkv.Centred(jaxkv.Rotated(bits=4), rope=jaxkv.Rope.of(500_000, rotary_dim=128))
    >>> config = jaxkv.KVCacheConfig(32, 8192, num_kv_heads=8, head_dim=128, codec=codec)
    >>> config.size_bytes == 2 * 32 * 8192 * 8 * (64 + 2) + 16 * 32 * 8 * 128
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
        return self.codec.decode(self._without_signs(leaves), head_dim, dtype)

    @property
    def levels(self) -> tuple[int, ...] | None:
        return self.codec.levels

    @property
    def scale_leaves(self) -> Mapping[str, slice]:
        return self.codec.scale_leaves

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
        return self.codec.decode_rotated(self._without_signs(leaves), head_dim, dtype)

    # Of centres, its state.

    def state(self, head_dim: int) -> LeafSpecs:
        names = ("means", "sinks") if self.scale_leaves else ("means",)
        return {name: LeafSpec((head_dim,), "float32") for name in names}

    def offsets(self, state: State) -> Offsets:
        return Offsets(state["means"], self.rope, state.get("sinks"))

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
        """The centres of these tokens if the cache is empty and they were never set."""
        was_set = jnp.any(jnp.stack([jnp.any(array != 0) for array in state.values()]))
        empty = jnp.all(lengths == 0)
        # Centres are the same on all devices, which must agree on what they send each other.
        unset = ~was_set & (empty if axis is None else True)
        return _set_once(self, unset, state, vectors, positions, empty, axis)

    def encode_tokens(self, vectors: Tokens, state: State, positions: Positions) -> Leaves:
        wide = vectors.astype(jnp.float32)
        each = [wide - offsets for offsets in self.offsets(state).each_at(positions[..., None])]
        if len(each) == 1:
            return self.encode(each[0])
        is_second = is_nearer_to_second(*each) & self._has_scales(wide.ndim - 2)
        return self._with_signs(self.encode(chosen(each, is_second)), is_second)

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
        wide = jnp.dtype("float32")
        offsets = self.offsets(state).at(positions, self.is_second(leaves))
        if not rotated:
            return (self.decode(leaves, head_dim, wide) + offsets).astype(dtype)
        both = self.decode_rotated(leaves, head_dim, wide)
        added = [self.rotate(offsets[0]), self.rotate_values(offsets[1])]
        return (both + jnp.stack(added)).astype(dtype)

    def is_second(self, leaves: Leaves) -> Bool[Array, "2 *shape"] | None:
        if not self.scale_leaves:
            return None
        shape = leaves[next(iter(self.scale_leaves))].shape[1:]
        sides = jnp.zeros((2, *shape), bool)
        for name, own in self.scale_leaves.items():
            sides = sides.at[own].set(signs_of(leaves[name]))
        return sides

    def _has_scales(self, num_axes: int) -> Bool[Array, "2 *ones"]:
        """The sides that have, to be broadcast over so many axes."""
        sides = np.zeros(2, bool)
        for own in self.scale_leaves.values():
            sides[own] = True
        return jnp.asarray(sides.reshape(2, *(1,) * num_axes))

    def _with_signs(self, leaves: Leaves, is_second: Bool[Array, "2 *shape"]) -> Leaves:
        signed = {
            name: with_signs(leaves[name], is_second[own])
            for name, own in self.scale_leaves.items()
        }
        return leaves | signed

    def _without_signs(self, leaves: Leaves) -> Leaves:
        return leaves | {name: without_signs(leaves[name]) for name in self.scale_leaves}


# A jit of its own: outside one, a cond is compiled anew on each call.
@functools.partial(jax.jit, static_argnames=("codec", "axis"))
def _set_once(
    codec: Centred,
    unset: Array,
    state: State,
    vectors: Tokens,
    positions: Positions,
    empty: Array,
    axis: str | None,
) -> State:
    def fresh() -> State:
        both = in_a_row(vectors, positions, codec.rope)
        means, sinks = centres_of(both, positions.reshape(-1), axis)
        found = {"means": means, "sinks": sinks} if "sinks" in state else {"means": means}
        return found if axis is None else where_all(empty, axis, found, state)

    return lax.cond(unset, fresh, lambda: state)
