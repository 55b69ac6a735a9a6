"""Keys by one codec, values by another."""

import dataclasses

import jax.numpy as jnp

from jaxkv.codecs.codec import Codec, LeafSpec, Leaves, Vectors, leaf_specs, refuse_state


@dataclasses.dataclass(frozen=True)
class KeysValues(Codec):
    """Keys and values stored unlike: a leaf belongs to one side, and its buffer's axis 1 is 1.

    Args:
      keys: the codec of keys. Any but this one and those with state, such as `Centred`, which goes
        around it.
      values: the codec of values, likewise.

    Raises:
      ValueError: a codec with state.

    >>> import jaxkv
    >>> codec = jaxkv.KeysValues(keys=jaxkv.Rotated(bits=4), values=jaxkv.Rotated(bits=2))
    >>> config = jaxkv.KVCacheConfig(32, 8192, num_kv_heads=8, head_dim=128, codec=codec)
    >>> config.size_bytes == 32 * 8192 * 8 * ((64 + 2) + (32 + 2))
    True
    """

    keys: Codec
    values: Codec

    def __post_init__(self) -> None:
        refuse_state("KeysValues", self.keys, self.values)

    @property
    def name(self) -> str:
        return f"{self.keys.name}/{self.values.name}"

    def leaves(self, head_dim: int) -> dict[str, LeafSpec]:
        return {
            f"{side}_{name}": LeafSpec(spec.shape, spec.dtype, sides=1)
            for side, codec in self._sides()
            for name, spec in leaf_specs(codec, head_dim).items()
        }

    def encode(self, vectors: Vectors) -> Leaves:
        return {
            f"{side}_{name}": leaf
            for (side, codec), own in zip(self._sides(), jnp.split(vectors, 2), strict=True)
            for name, leaf in codec.encode(own).items()
        }

    def decode(self, leaves: Leaves, head_dim: int, dtype: jnp.dtype) -> Vectors:
        sides = (codec.decode(own, head_dim, dtype) for codec, own in self._split(leaves))
        return jnp.concatenate(list(sides))

    def rotate(self, queries: Vectors) -> Vectors:
        return self.keys.rotate(queries)

    def unrotate(self, outputs: Vectors) -> Vectors:
        return self.values.unrotate(outputs)

    def rotate_values(self, values: Vectors) -> Vectors:
        return self.values.rotate_values(values)

    def decode_rotated(self, leaves: Leaves, head_dim: int, dtype: jnp.dtype) -> Vectors:
        sides = (codec.decode_rotated(own, head_dim, dtype) for codec, own in self._split(leaves))
        return jnp.concatenate(list(sides))

    @property
    def scale_leaves(self) -> dict[str, slice]:
        return {
            f"{side}_{name}": slice(number, number + 1)
            for number, (side, codec) in enumerate(self._sides())
            for name in codec.scale_leaves
        }

    @property
    def sides(self) -> tuple[Codec, Codec]:
        return self.keys, self.values

    def _sides(self) -> tuple[tuple[str, Codec], ...]:
        return ("key", self.keys), ("value", self.values)

    def _split(self, leaves: Leaves) -> list[tuple[Codec, Leaves]]:
        return [
            (
                codec,
                {
                    name.removeprefix(f"{side}_"): leaves[name]
                    for name in leaves
                    if name.startswith(side)
                },
            )
            for side, codec in self._sides()
        ]
