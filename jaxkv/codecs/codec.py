"""The codec contract: how one token's key or value vector is stored.

A codec is a frozen, hashable, static value. It says which arrays ("leaves") hold a
vector, and maps a vector to them and back. It is append-only: a stored token is never
encoded again, and encoding tokens one at a time gives bitwise what bulk gives.

A cache gives a codec keys and values at once, on the first axis, and has a buffer for each
leaf. Most codecs need not know.
"""

import abc
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxkv.codecs.offsets import Offsets
from jaxkv.codecs.rope import Rope


class LeafSpec(NamedTuple):
    """An array that holds part of each vector.

    Attributes:
      shape: of its part of one vector.
      dtype: by name.
      sides: 2, it holds keys and values; 1, those of one side alone (see `KeysValues`).
    """

    shape: tuple[int, ...]
    dtype: str
    sides: int = 2


class Steps(NamedTuple):
    """Keys in codes of several widths, as kernels read them.

    Attributes:
      runs: bits of a code, and how many numbers have so many, in order.
      levels: the whole numbers of 8 bits that the codes of each run stand for, lowest first.
      scales: what each byte of the second leaf stands for, ``[256]``; with a sign, that of -0 too,
        where a key was stored less the second of `Codec.centres`.
    """

    runs: tuple[tuple[int, int], ...]
    levels: tuple[tuple[int, ...], ...]
    scales: Any


# Leaf name -> its spec; a plain (shape, dtype) does for most.
LeafSpecs = Mapping[str, tuple[tuple[int, ...], str] | LeafSpec]
Leaves = dict[str, Array]


Vectors = Float[Array, "*shape head_dim"]
Tokens = Float[Array, "2 *batch tokens kv_heads head_dim"]  # keys and values
Positions = Int[Array, "*batch tokens"]
# The arrays of a codec's state, by name: of all layers, or of one.
State = dict[str, Array]


@runtime_checkable
class Codec(Protocol):
    """What `KVCacheConfig.codec` must offer: a codec of your own is a subclass. See `Dense`.

    A codec defines `name`, `leaves`, `encode` and `decode`. The other members have defaults, for a
    codec without state whose leaves only it can read.

    **State** is what a codec learns once for a cache, such as the means of `Centred`: arrays that
    the cache carries, saves, forks and rolls back for it. It begins as zeros, and all zeros mean
    that it was never set. `encode` and `decode` are under that; a codec with state defines
    `update_state`, `encode_tokens` and `decode_tokens` beside them.

    >>> import jaxkv
    >>> isinstance(jaxkv.Int8(), jaxkv.Codec), jaxkv.Int8().leaves(head_dim=128)
    (True, {'codes': ((128,), 'int8'), 'scales': ((), 'bfloat16')})
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What messages and tables call it, such as ``bfloat16``."""

    @abc.abstractmethod
    def leaves(self, head_dim: int) -> LeafSpecs:
        """The arrays that hold one vector of ``head_dim`` numbers."""

    @abc.abstractmethod
    def encode(self, vectors: Vectors) -> Leaves:
        """Vectors to leaves, each leaf ``[*shape, *its own shape]``."""

    @abc.abstractmethod
    def decode(self, leaves: Leaves, head_dim: int, dtype: jnp.dtype) -> Vectors:
        """Leaves back to vectors of ``head_dim`` numbers in ``dtype``."""

    # What a kernel must know to read leaves without `decode`: at most one of the first three. Only
    # a codec whose vectors are these numbers, rotated by `rotation` and less `offsets`, names one.

    @property
    def dtype(self) -> str | None:
        """The float type of a vector's numbers, where its one leaf holds them as they are."""
        return None

    @property
    def scaled_dtype(self) -> str | None:
        """The float type of the first leaf, where the second is one bfloat16 scale per vector."""
        return None

    @property
    def levels(self) -> tuple[int, ...] | None:
        """The whole numbers that the codes of the first leaf stand for, lowest first.

        The second leaf is one bfloat16 scale per vector. Codes of 256 levels are int8, those of
        2, 4, 8 or 16 are laid out by `jaxkv.codecs.packing.pack`. None for any other layout.
        """
        return None

    @property
    def scale_leaves(self) -> Mapping[str, slice]:
        """The leaves of one scale per vector, bfloat16 and never negative, and whose they are.

        ``slice(0, 2)`` for keys' and values', ``slice(0, 1)`` and ``slice(1, 2)`` for one side's.
        """
        if self.levels is None and self.scaled_dtype is None:
            return {}
        return {list(self.leaves(head_dim=8))[1]: slice(0, 2)}

    @property
    def rotation(self) -> str | None:
        """``"hadamard"`` if `rotate` is `jaxkv.codecs.hadamard.rotate`; None if it does nothing."""
        return None

    @property
    def sides(self) -> tuple["Codec", "Codec"]:
        """What stores keys and what stores values, once state was applied."""
        return self, self

    def steps(self, head_dim: int) -> Steps | None:
        """How keys are stored, where no one width of codes is; values as by the last of `sides`.

        The first two leaves are codes, each run as `jaxkv.codecs.packing.pack` lays it out, and
        scales.
        """
        return None

    def stepped(
        self, queries: Float[Array, "batch kv_heads tokens group head_dim"], state: State
    ) -> Float[Array, "batch kv_heads tokens group head_dim"]:
        """Queries whose products with the numbers of `steps`, and `centres`, are the scores."""
        return queries

    # A codec may keep vectors rotated by an orthogonal matrix R. Attention reads them as they are,
    # since (R q) . (R k) = q . k and a mix of rotated values is the rotated mix: it rotates its
    # queries and its output, and no stored vector.

    def rotate(self, queries: Vectors) -> Vectors:
        """Queries rotated as keys are."""
        return queries

    def unrotate(self, outputs: Vectors) -> Vectors:
        """A mix of rotated values, rotated back."""
        return outputs

    def rotate_values(self, values: Vectors) -> Vectors:
        """The inverse of `unrotate`."""
        return values

    def decode_rotated(self, leaves: Leaves, head_dim: int, dtype: jnp.dtype) -> Vectors:
        """Leaves to rotated vectors."""
        return self.decode(leaves, head_dim, dtype)

    @property
    def rope(self) -> Rope | None:
        """The rope that it takes out of keys, if it does."""
        return None

    def under(self, rope: Rope | None) -> "Codec":
        """The same codec for keys under this rope, where it asks for one and has none yet."""
        return self

    def state(self, head_dim: int) -> LeafSpecs:
        """The arrays of its state: ``[layers, sides, kv_heads, *shape]`` each."""
        return {}

    @property
    def asks_queries(self) -> bool:
        """Whether `update_state` takes ``queries=``, those of the same tokens, or None."""
        return False

    @property
    def learns_over_devices(self) -> bool:
        """Whether `update_state` takes ``axis=``, the mesh axis over which other devices have other
        sequences of the same cache, or None, and gives all of them one state.
        """
        return False

    def update_state(
        self, state: State, vectors: Tokens, positions: Positions, lengths: Int[Array, "*batch"]
    ) -> State:
        """The state of a layer before these tokens are encoded: new, or as it was.

        Args:
          state: of the layer, ``[sides, kv_heads, *shape]`` each.
          vectors: keys and values that are to be appended.
          positions: of the tokens; -1 for padding, which must not count.
          lengths: of the sequences without them.
        """
        return state

    def encode_tokens(self, vectors: Tokens, state: State, positions: Positions) -> Leaves:
        """`encode` of tokens at these positions, under a layer's state."""
        return self.encode(vectors)

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
        """`decode`, or `decode_rotated`, of tokens at these positions, under a layer's state."""
        return (self.decode_rotated if rotated else self.decode)(leaves, head_dim, dtype)

    def offsets(self, state: State) -> Offsets | None:
        """What a layer's vectors were stored less, where that is all that its state does.

        Attention then reads `decode_rotated`, and adds the share of these.
        """
        return None

    def centres(self, state: State) -> Offsets | None:
        """What a layer's vectors were stored less, whatever else its state does."""
        return self.offsets(state)

    def is_second(self, leaves: Leaves) -> Bool[Array, "2 *shape"] | None:
        """Which vectors were stored less the second ones of `offsets`; None if there are none."""
        return None


def refuse_state(who: str, *codecs: Codec) -> None:
    """Refuse codecs with state, where nothing would keep it.

    Raises:
      ValueError: naming one.
    """
    for codec in codecs:
        if codec.state(head_dim=8):
            raise ValueError(f"{who} goes around codecs without state, and {codec.name} has some.")


def leaf_specs(codec: Codec, head_dim: int) -> dict[str, LeafSpec]:
    """`Codec.leaves`, with the sides that each holds."""
    return {name: LeafSpec(*spec) for name, spec in codec.leaves(head_dim).items()}


def state_specs(codec: Codec, head_dim: int) -> dict[str, LeafSpec]:
    """`Codec.state`, likewise."""
    return {name: LeafSpec(*spec) for name, spec in codec.state(head_dim).items()}


def bytes_per_token(codec: Codec, head_dim: int) -> int:
    """Exact bytes of one token's key and value of one head."""
    return bytes_of(leaf_specs(codec, head_dim))


def state_bytes(codec: Codec, head_dim: int) -> int:
    """Exact bytes of the state of one layer and head."""
    return bytes_of(state_specs(codec, head_dim))


def bytes_of(specs: Mapping[str, LeafSpec]) -> int:
    """Exact bytes of what arrays hold of one token and head, all sides together."""
    return sum(
        spec.sides * jnp.dtype(spec.dtype).itemsize * math.prod(spec.shape)
        for spec in specs.values()
    )


def container_dtype(dtype: str, platform: str) -> jnp.dtype:
    """The dtype of the buffer that holds ``dtype`` on a platform.

    XLA's CPU backend has no native update of bfloat16 and float8 arrays: jax 0.10 converts
    the whole cache to float32 and back for each token written. There the bits live in an
    unsigned integer of the same width, and only new tokens and blocks read are bitcast.
    """
    narrow_float = jnp.dtype(dtype).name.startswith(("bfloat16", "float8"))
    if platform == "cpu" and narrow_float:
        return jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
    return jnp.dtype(dtype)


def bitcast(leaf: Array, dtype: jnp.dtype | str) -> Array:
    """The same bits as ``dtype``; nothing where the dtype is that already.

    Raises:
      TypeError: when differentiated, which would give zeros for no visible reason.
    """
    return leaf if leaf.dtype == jnp.dtype(dtype) else _bitcast(jnp.dtype(dtype), leaf)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _bitcast(dtype: jnp.dtype, leaf: Array) -> Array:
    return lax.bitcast_convert_type(leaf, dtype)


@_bitcast.defjvp
def _refuse_derivative(dtype: jnp.dtype, primals: Any, tangents: Any) -> Any:
    if tangents[0].dtype == jax.dtypes.float0:  # out of a container: there is nothing to pass on
        out = _bitcast(dtype, *primals)
        return out, jnp.zeros_like(out)
    raise TypeError(
        f"No gradient flows through keys and values kept as {primals[0].dtype}: on this backend "
        'their bits are stored as integers. Use codec=jaxkv.Dense("float32") to differentiate.'
    )


def refuse_gradient(codec: Codec, vectors: Array) -> Array:
    """The same vectors; where the codec rounds them to codes, with no derivative.

    Raises:
      TypeError: when differentiated, which would give that of the scales alone.
    """
    dtypes = (jnp.dtype(spec.dtype) for spec in leaf_specs(codec, vectors.shape[-1]).values())
    is_plain = all(jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1 for dtype in dtypes)
    return vectors if is_plain else _to_be_rounded(codec, vectors)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _to_be_rounded(codec: Codec, vectors: Array) -> Array:
    return vectors


@_to_be_rounded.defjvp
def _refuse_rounding(codec: Codec, primals: Any, tangents: Any) -> Any:
    raise TypeError(
        f"No gradient flows through keys and values stored as {codec.name}: they are rounded to "
        'codes. Use codec=jaxkv.Dense("float32") to differentiate.'
    )


def out_of_containers(codec: Codec, stored: Leaves, head_dim: int) -> Leaves:
    """Leaves as read from a cache's buffers, in the dtypes that the codec gave them."""
    specs = leaf_specs(codec, head_dim)
    return {name: bitcast(stored[name], spec.dtype) for name, spec in specs.items()}
