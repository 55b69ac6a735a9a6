"""All that jaxkv uses of Pallas for Mosaic GPU, whose interface moves between JAX releases.

The kernel itself is in `mosaic_kernel`. Imported only when that kernel runs: Pallas is slow to
import, and is not there on every platform.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector

ROWS = 64  # of one warpgroup's matrix product
ROW_VECTOR, COLUMN_VECTOR = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
WIDENING = plgpu.Layout.WGMMA_UPCAST_2X  # from one byte to two
Barrier = plgpu.Barrier
Either = plgpu.RefUnion  # one piece of shared memory, used first as one thing, then as another

axis_index = lax.axis_index
fori_loop = lax.fori_loop
when = pl.when
span = pl.ds
copy_in = plgpu.copy_gmem_to_smem
copy_out = plgpu.copy_smem_to_gmem
wait = plgpu.barrier_wait
commit = plgpu.commit_smem


def shared(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in row-major order."""
    return plgpu.SMEM(shape, dtype)


def shared_tiles(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the order in which tensor cores read it without bank conflicts."""
    row_bytes = min(128, shape[-1] * jnp.dtype(dtype).itemsize)
    tiling = plgpu.TilingTransform((8, row_bytes // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(row_bytes)))


def full(shape: tuple[int, ...], value: float) -> jax.Array:
    """A float32 matrix, or a vector of a number a row, in registers."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else ROW_VECTOR
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def iota(shape: tuple[int, int], axis: int) -> jax.Array:
    """The index along an axis of each element of a matrix in registers."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def column_iota(size: int) -> jax.Array:
    """The number of each column, as a vector of a number a column."""
    return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=COLUMN_VECTOR)


def load(ref: Any, layout: Any = plgpu.Layout.WGMMA) -> jax.Array:
    """From shared memory to registers."""
    return plgpu.load(ref, layout=layout, optimized=False)


def load_column(ref: Any, interpret: bool) -> jax.Array:
    """A column of a bfloat16 matrix in shared memory, as a float32 number a column.

    Pallas has loads of neighbouring numbers only, so this is one floor below it. That floor is
    not interpreted.
    """
    if interpret:
        return ref[...].astype(jnp.float32)
    (size,) = ref.shape
    column = plgpu.ShapeDtypeStruct((size,), jnp.float32, layout=COLUMN_VECTOR)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=column)
    def gather(context, memory):
        layout = COLUMN_VECTOR.to_mgpu()
        registers = np.empty(layout.registers_shape((size,)), object)
        places = layout.thread_idxs((size,))
        for register, (place,) in zip(np.ndindex(registers.shape), places, strict=True):
            numbers = [
                arith.extf(ir.F32Type.get(), memref.load(memory, [_plus(place, at)]))
                for at in range(layout.vector_length)
            ]
            kind = ir.VectorType.get((layout.vector_length,), ir.F32Type.get())
            registers[register] = vector.from_elements(kind, numbers)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return gather(ref)


def _plus(index: ir.Value, number: int) -> ir.Value:
    return arith.addi(index, arith.constant(ir.IndexType.get(), number))


def across(vector: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    """A number a row (``axis`` 0) or a column (1), repeated over a matrix."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def transposed(ref: Any) -> Any:
    """A matrix in shared memory, read the other way round."""
    if hasattr(ref, "transpose"):
        return ref.transpose((1, 0))
    return plgpu.transpose_ref(ref, (1, 0))  # jax 0.10


def multiply(left: Any, right: Any, dtype: Any) -> jax.Array:
    """``left @ right`` of two matrices in shared memory."""

    def product(total):
        plgpu.wgmma(total, left, right)
        return total[...]

    return pl.run_scoped(product, plgpu.ACC((left.shape[0], right.shape[1]), dtype))


def multiply_add(total: jax.Array, left: jax.Array, right: Any, staging: Any) -> jax.Array:
    """``total + left @ right``, of a matrix in registers and one in shared memory.

    Pallas' interpreter multiplies in shared memory only; it is given some for ``left``.
    """
    if staging is None:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, left, right))(plgpu.ACC.init(total))
    staging[...] = left
    commit()
    return total + multiply(staging, right, total.dtype)


def wait_out() -> None:
    """Until what was copied out is out."""
    plgpu.wait_smem_to_gmem(0)


def run(
    body: Callable[..., None],
    arrays: Sequence[jax.Array],
    *,
    outputs: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    grid: dict[str, int],
    interpret: Any,
) -> list[jax.Array]:
    """Call the kernel: ``body(*arrays, *outputs, *scratch)``, once a point of the grid."""
    return plgpu.kernel(
        body,
        out_type=list(outputs),
        scratch_types=list(scratch),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )(*arrays)
