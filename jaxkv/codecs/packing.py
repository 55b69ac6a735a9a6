"""Codes of 1 to 6 bits in bytes."""

import jax.numpy as jnp
from jaxtyping import Array, UInt8

from jaxkv.counts import ceil_div

# Bits of a code -> the widths that it is cut into, low bits first. Each divides a byte.
_WIDTHS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}


def packed_bytes(head_dim: int, bits: int) -> int:
    """Bytes that ``head_dim`` codes take: ``head_dim * bits / 8``, for head_dim in whole eights."""
    return ceil_div(head_dim, 8) * bits


def pack(codes: UInt8[Array, "*shape head_dim"], bits: int) -> UInt8[Array, "*shape bytes"]:
    """Put codes below ``2 ** bits`` together.

    With 4 bits the low half of byte j holds code j, its high half code ``j + head_dim / 2``. With
    2 bits byte j holds codes j, ``j + head_dim / 4`` and so on, from its low bits up. With 3 bits
    the low two bits of all codes are laid so, and then the third ones, eight a byte; with 5 and 6
    bits the low four, and then the others. Runs of bytes
    so become runs of codes with a shift and a mask.

    >>> import jax.numpy as jnp
    >>> [hex(byte) for byte in pack(jnp.arange(8, dtype=jnp.uint8), bits=4).tolist()]
    ['0x40', '0x51', '0x62', '0x73']
    """
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % 8)]
    codes = jnp.pad(codes, padding)
    planes, low = [], 0
    for width in _WIDTHS[bits]:
        parts = jnp.split(codes >> low & (1 << width) - 1, 8 // width, axis=-1)
        packed = parts[0]
        for number, part in enumerate(parts[1:], start=1):
            packed |= part << number * width
        planes.append(packed)
        low += width
    return jnp.concatenate(planes, axis=-1)


def unpack(
    packed: UInt8[Array, "*shape bytes"], bits: int, head_dim: int
) -> UInt8[Array, "*shape head_dim"]:
    """The codes that `pack` put together."""
    codes, low, first = jnp.uint8(0), 0, 0
    for width in _WIDTHS[bits]:
        num_bytes = packed_bytes(head_dim, width)
        plane = packed[..., first : first + num_bytes]
        parts = [plane >> shift & (1 << width) - 1 for shift in range(0, 8, width)]
        codes |= jnp.concatenate(parts, axis=-1) << low
        low, first = low + width, first + num_bytes
    return codes[..., :head_dim]
