"""Keys and values as plain numbers."""

import dataclasses

import jax.numpy as jnp

from jaxkv.codecs.codec import Codec, LeafSpecs, Leaves, Vectors

DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Dense(Codec):
    """Each number of a vector in one float, rounded to nearest.

    Args:
      dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"`` (or the jnp type of one).

    Raises:
      ValueError: for any other dtype.

    >>> import jaxkv
    >>> jaxkv.Dense("float16").leaves(head_dim=128)
    {'data': ((128,), 'float16')}
    """

    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        try:
            name = jnp.dtype(self.dtype).name
        except TypeError:
            name = str(self.dtype)
        if name not in DTYPES:
            raise ValueError(
                f"Dense codec: dtype must be one of {', '.join(DTYPES)}, got {name!r}."
            )
        object.__setattr__(self, "dtype", name)

    @property
    def name(self) -> str:
        return self.dtype

    def leaves(self, head_dim: int) -> LeafSpecs:
        return {"data": ((head_dim,), self.dtype)}

    def encode(self, vectors: Vectors) -> Leaves:
        return {"data": vectors.astype(self.dtype)}

    def decode(self, leaves: Leaves, head_dim: int, dtype: jnp.dtype) -> Vectors:
        return leaves["data"].astype(dtype)
