"""Packed codes to the whole numbers that they stand for, in registers of a Hopper GPU.

A thread holds four bytes of codes in a register. One instruction, ``prmt``, takes four numbers of
four bits and gives a byte of a table of eight for each; sixteen levels take two tables. As many
operations in Pallas's own terms, a number at a time, would take longer than reading the cache.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from jaxkv.attention import pallas_gpu as gpu

_LAYOUT = plgpu.Layout.WGMMA_UPCAST_4X  # of eight bytes that lie side by side


def widen(codes: Any, numbers: Any, levels: tuple[int, ...] | None, *, interpret: bool) -> None:
    """Write the numbers that a tile's codes stand for, but for its scales, to shared memory.

    Args:
      codes: int8 ``[slots, head_dim]``; or uint8 ``[slots, bytes]``, packed 4 or 2 bits each as
        `codecs.packing.pack` does.
      numbers: ``[slots, head_dim]``, of a dtype that holds them all.
      levels: what each packed code stands for; None for codes that are the numbers.
      interpret: whether no GPU is there.
    """
    parts = [gpu.load(codes, gpu.WIDENING)] if levels is None else _load(codes, levels, interpret)
    for number, part in enumerate(parts):
        columns = gpu.span(number * part.shape[1], part.shape[1])
        numbers[:, columns] = part.astype(numbers.dtype)


def _load(codes: Any, levels: tuple[int, ...], interpret: bool) -> list[jax.Array]:
    """The int8 levels of packed codes, an array for each code of a byte."""
    width = {16: 4, 4: 2}[len(levels)]
    packed = gpu.load(codes, _LAYOUT)
    if interpret:
        shifts = range(0, 8, width)
        return [_one_by_one(packed >> shift & len(levels) - 1, levels) for shift in shifts]
    result = plgpu.ShapeDtypeStruct(codes.shape, jnp.int8, layout=_LAYOUT)

    @plgpu.inline_mgpu(arg_types=(_LAYOUT,), return_type=(result,) * (8 // width))
    def looked_up(_, packed):
        many = [np.empty_like(packed.registers) for _ in range(8 // width)]
        for place, register in np.ndenumerate(packed.registers):
            for array, found in zip(many, _look_up(register, levels), strict=True):
                array[place] = found
        return tuple(
            fragmented_array.FragmentedArray(
                _registers=array, _layout=packed.layout, _is_signed=True
            )
            for array in many
        )

    return list(looked_up(packed))


def _one_by_one(codes: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    chosen = (jnp.where(codes == code, level, 0) for code, level in enumerate(levels))
    return functools.reduce(jnp.add, chosen).astype(jnp.int8)


def _look_up(register: Any, levels: tuple[int, ...]) -> list[Any]:
    """The levels of the codes in four bytes: a register for each code of a byte."""
    word = ir.IntegerType.get_signless(32)
    [num_bytes] = ir.VectorType(register.type).shape
    words = ir.VectorType.get((num_bytes // 4,), word)
    assembly, count = (_SIXTEEN, 2) if len(levels) == 16 else (_FOUR, 4)
    found = [llvm.mlir_undef(words) for _ in range(count)]
    packed = vector.bitcast(words, register)
    for at in range(num_bytes // 4):
        outputs = llvm.inline_asm(
            llvm.StructType.get_literal([word] * count),
            [vector.extract(packed, [], [at])],
            assembly.format(*_tables(levels), x=f"${count}"),
            ",".join(["=r"] * count + ["r"]),
        )
        for number in range(count):
            one = llvm.extractvalue(word, outputs, [number])
            found[number] = vector.insert(one, found[number], [], [at])
    return [vector.bitcast(register.type, each) for each in found]


def _tables(levels: tuple[int, ...]) -> list[str]:
    """Four bytes a word; of sixteen levels without their signs, the upper ones first."""
    numbers = np.asarray(levels, np.int8)
    if len(levels) == 16:
        numbers = np.roll(numbers, 8) & 0x7F
    return [f"0x{word:08x}" for word in numbers.view(np.uint32).tolist()]


# A selector of eight or more gives not a byte but its sign, repeated: zero here. So of the two
# halves of sixteen levels each code finds a number in one and zero in the other; its sign, which is
# that of the upper bit, comes last. Codes are looked up as they lie, four a word, and sorted after.
_SIXTEEN = """
{{
.reg .b32 flipped, high, flipped_high, upper<2>, lower<2>, signs;
xor.b32 flipped, {x}, 0x88888888;
shr.u32 high, {x}, 16;
shr.u32 flipped_high, flipped, 16;
prmt.b32 upper0, {0}, {1}, flipped;
prmt.b32 upper1, {0}, {1}, flipped_high;
prmt.b32 lower0, {2}, {3}, {x};
prmt.b32 lower1, {2}, {3}, high;
or.b32 upper0, upper0, lower0;
or.b32 upper1, upper1, lower1;
shl.b32 signs, flipped, 4;
prmt.b32 lower0, upper0, upper1, 0x6420;
prmt.b32 lower1, upper0, upper1, 0x7531;
lop3.b32 $0, lower0, signs, 0x80808080, 0xf8;
lop3.b32 $1, lower1, flipped, 0x80808080, 0xf8;
}}
"""
_FOUR = """
{{
.reg .b32 even, odd, even_high, odd_high, found<4>;
and.b32 even, {x}, 0x33333333;
shr.u32 odd, {x}, 2;
and.b32 odd, odd, 0x33333333;
shr.u32 even_high, even, 16;
shr.u32 odd_high, odd, 16;
prmt.b32 found0, {0}, 0, even;
prmt.b32 found1, {0}, 0, even_high;
prmt.b32 found2, {0}, 0, odd;
prmt.b32 found3, {0}, 0, odd_high;
prmt.b32 $0, found0, found1, 0x6420;
prmt.b32 $2, found0, found1, 0x7531;
prmt.b32 $1, found2, found3, 0x6420;
prmt.b32 $3, found2, found3, 0x7531;
}}
"""
