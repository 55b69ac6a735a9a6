"""The codec contract: how one token's key or value vector is stored.

A codec is a frozen, hashable, static value. It says which arrays ("leaves") hold a
vector, and maps a vector to them and back. It is append-only: a stored token is never
encoded again, and encoding tokens one at a time gives bitwise what bulk gives.

A cache gives a codec keys and values at once, on the first axis, and has a buffer for each
leaf. Most codecs need not know.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


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


# Leaf name -> its spec; a plain (shape, dtype) does for most.
LeafSpecs = Mapping[str, tuple[tuple[int, ...], str] | LeafSpec]
Leaves = dict[str, Array]


@runtime_checkable
class Codec(Protocol):
    """What `KVCacheConfig.codec` must offer; see `Dense` for the smallest one.

    >>> import jaxkv
    >>> isinstance(jaxkv.Int8(), jaxkv.Codec), jaxkv.Int8().leaves(head_dim=128)
    (True, {'codes': ((128,), 'int8'), 'scales': ((), 'bfloat16')})
    """

    @property
    def name(self) -> str:
        """What messages and tables call it, such as ``bfloat16``."""
        ...

    def leaves(self, head_dim: int) -> LeafSpecs:
        """The arrays that hold one vector of ``head_dim`` numbers."""
        ...

    def encode(self, vectors: Float[Array, "*shape head_dim"]) -> Leaves:
        """Vectors to leaves, each leaf ``[*shape, *its own shape]``."""
        ...

    def decode(
        self, leaves: Leaves, head_dim: int, dtype: jnp.dtype
    ) -> Float[Array, "*shape head_dim"]:
        """Leaves back to vectors of ``head_dim`` numbers in ``dtype``."""
        ...


@runtime_checkable
class RotatingCodec(Codec, Protocol):
    """A codec that keeps vectors turned by an orthogonal matrix R of its own.

    Attention reads them as they are, since ``(R q) . (R k) = q . k`` and a mix of turned values
    is the turned mix: it turns its queries and its output, and no stored vector.
    """

    def rotate(self, queries: Float[Array, "*shape head_dim"]) -> Float[Array, "*shape head_dim"]:
        """Queries turned as keys are."""
        ...

    def unrotate(self, outputs: Float[Array, "*shape head_dim"]) -> Float[Array, "*shape head_dim"]:
        """A mix of turned values, turned back."""
        ...

    def rotate_values(
        self, values: Float[Array, "*shape head_dim"]
    ) -> Float[Array, "*shape head_dim"]:
        """The inverse of `unrotate`."""
        ...

    def decode_rotated(
        self, leaves: Leaves, head_dim: int, dtype: jnp.dtype
    ) -> Float[Array, "*shape head_dim"]:
        """Leaves to turned vectors."""
        ...


def rotate(codec: Codec, queries: Array) -> Array:
    """`RotatingCodec.rotate`; the queries themselves for any other codec."""
    return codec.rotate(queries) if isinstance(codec, RotatingCodec) else queries


def unrotate(codec: Codec, outputs: Array) -> Array:
    """`RotatingCodec.unrotate`, likewise."""
    return codec.unrotate(outputs) if isinstance(codec, RotatingCodec) else outputs


def rotate_values(codec: Codec, values: Array) -> Array:
    """`RotatingCodec.rotate_values`, likewise."""
    return codec.rotate_values(values) if isinstance(codec, RotatingCodec) else values


def decode_rotated(codec: Codec, leaves: Leaves, head_dim: int, dtype: jnp.dtype) -> Array:
    """`RotatingCodec.decode_rotated`, likewise."""
    if isinstance(codec, RotatingCodec):
        return codec.decode_rotated(leaves, head_dim, dtype)
    return codec.decode(leaves, head_dim, dtype)


def leaf_specs(codec: Codec, head_dim: int) -> dict[str, LeafSpec]:
    """`Codec.leaves`, with the sides that each holds."""
    return {name: LeafSpec(*spec) for name, spec in codec.leaves(head_dim).items()}


def bytes_per_token(codec: Codec, head_dim: int) -> int:
    """Exact bytes of one token's key and value of one head."""
    return sum(
        spec.sides * jnp.dtype(spec.dtype).itemsize * math.prod(spec.shape)
        for spec in leaf_specs(codec, head_dim).values()
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


def decode_stored(
    codec: Codec, stored: Leaves, head_dim: int, dtype: jnp.dtype, *, rotated: bool = False
) -> Float[Array, "*shape head_dim"]:
    """Decode leaves as read from a cache's buffers, out of their containers.

    Args:
      rotated: leave the vectors as a `RotatingCodec` turned them.
    """
    specs = leaf_specs(codec, head_dim)
    leaves = {name: bitcast(stored[name], spec.dtype) for name, spec in specs.items()}
    decode = functools.partial(decode_rotated, codec) if rotated else codec.decode
    return decode(leaves, head_dim, dtype)
