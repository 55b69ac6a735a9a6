"""Packed codes to the whole numbers that they stand for, in registers of a Hopper GPU.

A thread holds four bytes of codes in a register. As many operations in Pallas's own terms, a
number at a time, take longer than reading the cache, so this is written in the GPU's assembly.

Keys become bytes: one instruction, ``prmt``, takes four numbers of four bits and gives a byte of
a table of eight for each, and sixteen levels take two tables. Values become bfloat16, where the
sixteen levels are a polynomial: that leaves half of the work to units that are idle otherwise.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from jaxkv.attention.mosaic import pallas as gpu

_LAYOUT = plgpu.Layout.WGMMA_UPCAST_4X  # of eight bytes that lie side by side
# With t half a step from the middle code, levels are ``10 t`` and what this polynomial of t rounds
# to: ``t (A + B t^2 + C t^4)``. All steps are bfloat16, and so is the result, exactly.
A, B, C = 0.10498046875, 0.0015869140625, 0.0011444091796875


def widen(codes: Any, numbers: Any, levels: tuple[int, ...] | None, *, interpret: bool) -> None:
    """Write the numbers that a tile's codes stand for, but for its scales, to shared memory.

    Args:
      codes: int8 ``[slots, head_dim]``; or uint8 ``[slots, bytes]``, packed 4 or 2 bits each as
        `codecs.packing.pack` does.
      numbers: ``[slots, head_dim]``, int8 or bfloat16.
      levels: what each packed code stands for; None for codes that are the numbers.
      interpret: whether no GPU is there.
    """
    if levels is None:
        found = gpu.load(codes, gpu.WIDENING)
    elif interpret:
        found = _one_by_one(gpu.load(codes, _LAYOUT), levels)
    else:
        found = _together(gpu.load(codes, _LAYOUT), levels, numbers.dtype)
    numbers[...] = found.astype(numbers.dtype)  # at once, since each write is fenced from others


def _one_by_one(packed: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    width = len(levels).bit_length() - 1
    parts = []
    for shift in range(0, 8, width):
        codes = packed >> shift & len(levels) - 1
        chosen = (jnp.where(codes == code, level, 0) for code, level in enumerate(levels))
        parts.append(functools.reduce(jnp.add, chosen).astype(jnp.int8))
    return lax.concatenate(parts, 1)


def _together(packed: jax.Array, levels: tuple[int, ...], dtype: Any) -> jax.Array:
    """In int8 or, if that is asked for and known, bfloat16."""
    dtype = dtype if len(levels) == 16 else jnp.int8
    slots, num_bytes = packed.shape
    count = 8 // (len(levels).bit_length() - 1)  # codes of a byte
    shape = slots, num_bytes * count
    result = plgpu.ShapeDtypeStruct(shape, dtype, layout=_LAYOUT)

    @plgpu.inline_mgpu(arg_types=(_LAYOUT,), return_type=result)
    def decoded(_, packed):
        parts = [np.empty_like(packed.registers) for _ in range(count)]
        for place, register in np.ndenumerate(packed.registers):
            for part, found in zip(parts, _decode(register, levels, dtype, count), strict=True):
                part[place] = found
        return fragmented_array.FragmentedArray(
            _registers=np.concatenate(parts, axis=1),  # columns of tiles of registers
            _layout=packed.layout,
            _is_signed=True if dtype == jnp.int8 else None,
        )

    return decoded(packed)


def _decode(register: Any, levels: tuple[int, ...], dtype: Any, count: int) -> list[Any]:
    """What the codes in some bytes stand for: a vector for each code of a byte."""
    word = ir.IntegerType.get_signless(32)
    [num_bytes] = ir.VectorType(register.type).shape
    packed = vector.bitcast(ir.VectorType.get((num_bytes // 4,), word), register)
    each = jnp.dtype(dtype).itemsize  # words that the codes of a word make
    assembly = _assembly(levels, dtype, x=f"${count * each}")
    words = ir.VectorType.get((num_bytes // 4 * each,), word)
    found = [llvm.mlir_undef(words) for _ in range(count)]
    for at in range(num_bytes // 4):
        outputs: Any = llvm.inline_asm(
            llvm.StructType.get_literal([word] * (count * each)),
            [vector.extract(packed, [], [at])],
            assembly,
            ",".join(["=r"] * (count * each) + ["r"]),
        )
        for number in range(count):
            for part in range(each):
                one = llvm.extractvalue(word, outputs, [number * each + part])
                found[number] = vector.insert(one, found[number], [], [at * each + part])
    element = ir.IntegerType.get_signless(8) if each == 1 else ir.BF16Type.get()
    return [vector.bitcast(ir.VectorType.get((num_bytes,), element), one) for one in found]


def _assembly(levels: tuple[int, ...], dtype: Any, x: str) -> str:
    if len(levels) == 4:
        return _FOUR.format(*_tables(np.asarray(levels, np.int8)), x=x)
    if dtype == jnp.int8:  # without their signs, the upper half first
        return _SIXTEEN.format(*_tables(np.roll(np.asarray(levels, np.int8), 8) & 0x7F), x=x)
    numbers = {"middle": -23.5, "a": A, "b": B, "c": C, "ten": 10, "whole": 192, "back": -192}
    moves = (f"mov.b32 {name}, {_twice(number)};\n" for name, number in numbers.items())
    return _POLYNOMIAL.format(x=x, names=", ".join(numbers), moves="".join(moves))


def _tables(numbers: np.ndarray) -> list[str]:
    """Four bytes a word."""
    return [f"0x{word:08x}" for word in numbers.view(np.uint32).tolist()]


def _twice(number: float) -> str:
    """Two of it in bfloat16."""
    return "0x" + 2 * f"{int(np.asarray(number, jnp.bfloat16).view(np.uint16)):04x}"


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
# Codes as the fraction of bfloat16 numbers from 16 up, in eighths; two a word, half a word apart.
_EACH = """
shl.b32 t{n}, {{x}}, {left};
shr.u32 t{n}, t{n}, {right};
lop3.b32 t{n}, t{n}, 0x00780078, 0x41804180, 0xea;
add.rn.bf16x2 t{n}, t{n}, middle;
mul.rn.bf16x2 square, t{n}, t{n};
fma.rn.bf16x2 more, square, c, b;
fma.rn.bf16x2 more, more, square, a;
fma.rn.bf16x2 more, more, t{n}, whole;
add.rn.bf16x2 more, more, back;
fma.rn.bf16x2 t{n}, t{n}, ten, more;
"""
_POLYNOMIAL = (
    "\n{{\n.reg .b32 t<4>, square, more, {names};\n{moves}"
    + "".join(
        _EACH.format(n=number, left=max(0, 3 - 4 * number), right=max(0, 4 * number - 3))
        for number in range(4)
    )
    + """
prmt.b32 $0, t0, t2, 0x5410;
prmt.b32 $1, t0, t2, 0x7632;
prmt.b32 $2, t1, t3, 0x5410;
prmt.b32 $3, t1, t3, 0x7632;
}}
"""
)
