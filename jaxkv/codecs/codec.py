"""The codec contract: how one token's key or value vector is stored.

A codec is a frozen, hashable, static value. It says which arrays ("leaves") hold a
vector, and maps a vector to them and back. It is append-only: a stored token is never
encoded again, and encoding tokens one at a time gives bitwise what bulk gives.
"""

import functools
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Leaf name -> (shape of one stored vector, dtype name).
LeafSpecs = dict[str, tuple[tuple[int, ...], str]]
Leaves = dict[str, Array]


@runtime_checkable
class Codec(Protocol):
    """What `KVCacheConfig.codec` must offer; see `Dense` for the smallest one."""

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

    def decode(self, leaves: Leaves, dtype: jnp.dtype) -> Float[Array, "*shape head_dim"]:
        """Leaves back to vectors in ``dtype``."""
        ...


def bytes_per_vector(codec: Codec, head_dim: int) -> int:
    """Exact bytes of one stored key or value vector of one head."""
    return sum(
        jnp.dtype(dtype).itemsize * math.prod(shape)
        for shape, dtype in codec.leaves(head_dim).values()
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
def _refuse_derivative(dtype, primals, tangents):
    if tangents[0].dtype == jax.dtypes.float0:  # out of a container: there is nothing to pass on
        out = _bitcast(dtype, *primals)
        return out, jnp.zeros_like(out)
    raise TypeError(
        f"No gradient flows through keys and values kept as {primals[0].dtype}: on this backend "
        'their bits are stored as integers. Use codec=jaxkv.Dense("float32") to differentiate.'
    )


def decode_stored(codec: Codec, stored: Leaves, head_dim: int, dtype: jnp.dtype) -> Array:
    """Decode leaves as read from a cache's buffers, out of their containers."""
    specs = codec.leaves(head_dim)
    return codec.decode({name: bitcast(stored[name], specs[name][1]) for name in specs}, dtype)
