"""A token's key and value, and which of a codec's leaves hold them.

The one question that a config's `head_dim`, `value_dim` and `values_in_keys` answer: the verbs,
files and kernels ask a `Pair`, and none of them has a case for latents.
"""

import abc
import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkv.codecs import Codec, LeafSpec, Leaves, leaf_specs, refuse_gradient

Vectors = Float[Array, "*batch tokens kv_heads _"]


@dataclasses.dataclass(frozen=True)
class Pair(abc.ABC):
    """How a codec stores the key and the value of one token and head.

    Attributes:
      codec: of both.
      head_dim, value_dim: numbers in a key, in a value.
    """

    codec: Codec
    head_dim: int
    value_dim: int

    @property
    @abc.abstractmethod
    def leaves(self) -> dict[str, LeafSpec]:
        """The arrays that hold them, by name."""

    @abc.abstractmethod
    def names(self, side: int) -> tuple[str, ...]:
        """The leaves that hold keys (0) or values (1), in the codec's order."""

    @abc.abstractmethod
    def encode(self, keys: Vectors, values: Vectors | None) -> Leaves:
        """Leaves ``[sides, *batch, tokens, kv_heads, ...]``, by a codec without state."""

    @abc.abstractmethod
    def decode(
        self, leaves: Leaves, dtype: jnp.dtype, *, rotated: bool = False
    ) -> tuple[Vectors, Vectors]:
        """Keys and values, as the codec rotated them if ``rotated``; values are to be `cut`."""

    @property
    def width(self) -> int:
        """Numbers in a value that `decode` gives, and in a mix of them."""
        return self.value_dim

    def cut(self, values: Array) -> Array:
        """What belongs to the value, of the vectors that `decode` gives or of a mix of them."""
        return values

    @property
    def unlike(self) -> str | None:
        """What a kernel for keys and values of one size must know of these; None: they are that."""
        return None

    @property
    def reason_against(self) -> str | None:
        """Why the codec cannot store them, or None."""
        if self.codec.state(self.head_dim):
            return (
                f"{self.codec.name} has state, which is of keys and values of one size; choose "
                "a codec without, such as its inner one"
            )
        return None

    @property
    def described(self) -> str:
        """Its sizes, for messages."""
        return f"{self.head_dim}/{self.value_dim}"


@dataclasses.dataclass(frozen=True)
class Alike(Pair):
    """Of one size, side by side: axis 1 of a buffer is keys and values."""

    @property
    def leaves(self) -> dict[str, LeafSpec]:
        return leaf_specs(self.codec, self.head_dim)

    def names(self, side: int) -> tuple[str, ...]:
        whole = tuple(self.codec.leaves(self.head_dim))
        keys = len(whole) - len(self.codec.sides[1].leaves(self.head_dim))
        if not keys:  # both are in each
            return whole
        return whole[keys:] if side else whole[:keys]

    def encode(self, keys: Vectors, values: Vectors | None) -> Leaves:
        assert values is not None
        return _encoded(self.codec, jnp.stack([keys, values]))

    def decode(
        self, leaves: Leaves, dtype: jnp.dtype, *, rotated: bool = False
    ) -> tuple[Vectors, Vectors]:
        both = _decoded(self.codec, leaves, self.head_dim, dtype, rotated)
        return both[0], both[1]

    @property
    def reason_against(self) -> None:
        return None

    @property
    def described(self) -> str:
        return str(self.head_dim)


@dataclasses.dataclass(frozen=True)
class Apart(Pair):
    """Of two sizes, each in leaves of its own, whose axis 1 has size 1 (MiMo-V2: 192 and 128)."""

    @property
    def leaves(self) -> dict[str, LeafSpec]:
        return {
            f"{side}_{name}": LeafSpec(spec.shape, spec.dtype, sides=1)
            for side, codec, size in self._sides
            for name, spec in leaf_specs(codec, size).items()
        }

    def names(self, side: int) -> tuple[str, ...]:
        prefix, codec, size = self._sides[side]
        return tuple(f"{prefix}_{name}" for name in codec.leaves(size))

    @property
    def _sides(self) -> tuple[tuple[str, Codec, int], tuple[str, Codec, int]]:
        keys, values = self.codec.sides
        return ("key", keys, self.head_dim), ("value", values, self.value_dim)

    def encode(self, keys: Vectors, values: Vectors | None) -> Leaves:
        assert values is not None
        encoded: Leaves = {}
        for (side, codec, _), vectors in zip(self._sides, (keys, values), strict=True):
            own = _encoded(codec, vectors[None])
            encoded |= {f"{side}_{name}": leaf for name, leaf in own.items()}
        return encoded

    def decode(
        self, leaves: Leaves, dtype: jnp.dtype, *, rotated: bool = False
    ) -> tuple[Vectors, Vectors]:
        def one(side: str, codec: Codec, size: int) -> Vectors:
            own = {name: leaves[f"{side}_{name}"] for name in codec.leaves(size)}
            return _decoded(codec, own, size, dtype, rotated)[0]

        keys, values = self._sides
        return one(*keys), one(*values)

    @property
    def unlike(self) -> str:
        return f"keys have {self.head_dim} numbers and values {self.value_dim}"


@dataclasses.dataclass(frozen=True)
class InKeys(Pair):
    """A value is the first ``value_dim`` numbers of its key, and is stored once, with it.

    The latent of multi-head latent attention (DeepSeek-V2, 2024, section 2.1), which is the value
    of all heads and, with the rope's numbers after it, their key. Values are mixed as whole keys
    and cut after that, so that a codec may rotate the whole.
    """

    @property
    def leaves(self) -> dict[str, LeafSpec]:
        specs = leaf_specs(self.codec, self.head_dim)
        return {name: spec._replace(sides=1) for name, spec in specs.items()}

    def names(self, side: int) -> tuple[str, ...]:
        return tuple(self.codec.leaves(self.head_dim))

    def encode(self, keys: Vectors, values: Vectors | None) -> Leaves:
        return _encoded(self.codec, keys[None])

    def decode(
        self, leaves: Leaves, dtype: jnp.dtype, *, rotated: bool = False
    ) -> tuple[Vectors, Vectors]:
        keys = _decoded(self.codec, leaves, self.head_dim, dtype, rotated)[0]
        return keys, keys

    @property
    def width(self) -> int:
        return self.head_dim

    def cut(self, values: Array) -> Array:
        return values[..., : self.value_dim]

    @property
    def unlike(self) -> str:
        return "values are in the keys"

    @property
    def reason_against(self) -> str | None:
        keys, values = self.codec.sides
        if keys != values:
            return f"{self.codec.name} stores values unlike keys, and these are in the keys"
        return super().reason_against

    @property
    def described(self) -> str:
        return f"{self.head_dim} (the first {self.value_dim} are the value)"


def pair_of(codec: Codec, head_dim: int, value_dim: int | None, values_in_keys: bool) -> Pair:
    """What these fields of a config mean."""
    size = head_dim if value_dim is None else value_dim
    if values_in_keys:
        return InKeys(codec, head_dim, size)
    return (Alike if size == head_dim else Apart)(codec, head_dim, size)


def _encoded(codec: Codec, vectors: Array) -> Leaves:
    return codec.encode(refuse_gradient(codec, vectors))


def _decoded(codec: Codec, leaves: Leaves, size: int, dtype: jnp.dtype, rotated: bool) -> Array:
    return (codec.decode_rotated if rotated else codec.decode)(leaves, size, dtype)
