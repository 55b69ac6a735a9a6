"""All that jaxkv uses of Pallas for Mosaic GPU, whose interface moves, but for `levels`.

The kernel itself is in `kernel`. Imported only when that kernel runs: Pallas is slow to
import, and is not there on every platform.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of one warpgroup's matrix product
ROW_VECTOR, COLUMN_VECTOR = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
# Neighbours of a row's are in one register of the transposed layout.
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
WIDENING = plgpu.Layout.WGMMA_UPCAST_2X  # from one byte to two
Barrier = plgpu.Barrier
Either = plgpu.RefUnion  # one piece of shared memory, used first as one thing, then as another

_IS_0_10 = jax.__version_info__ < (0, 11)
# jax 0.10 wants an index beside the reference, 0.11 warns of one.
_NO_INDEX = ((),) if _IS_0_10 else ()

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
    """A float32 matrix, or a vector of a number a column, in registers."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else COLUMN_VECTOR
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def iota(shape: tuple[int, int], axis: int) -> jax.Array:
    """The index along an axis of each element of a matrix in registers."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def load(ref: Any, layout: Any = plgpu.Layout.WGMMA) -> jax.Array:
    """From shared memory to registers."""
    return plgpu.load(ref, *_NO_INDEX, layout=layout, optimized=False)


def load_every(ref: Any, step: int, first: jax.Array, layout: Any, *, interpret: bool) -> jax.Array:
    """Each so many numbers of a vector in shared memory, from the first of them on."""
    size = ref.shape[0] // step
    if interpret:  # without a GPU a reference cannot be reshaped
        return lax.dynamic_index_in_dim(ref[...].reshape(size, step), first, 1, keepdims=False)
    return load(ref.reshape(size, step).at[:, first], layout)


def upright(matrix: jax.Array) -> jax.Array:
    """From the transposed layout to that of products."""
    return plgpu.layout_cast(matrix, plgpu.Layout.WGMMA)


def repeated(ref: Any, shape: tuple[int, ...], axis: int) -> jax.Array:
    """`across` of a vector in shared memory, in the transposed layout."""
    vector = load(ref, TRANSPOSED.reduce(1 - axis))
    return plgpu.layout_cast(across(vector, shape, axis), TRANSPOSED)


def across(vector: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A number a row (``axis`` 0) or a column (1), repeated over a matrix."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def transposed(ref: Any) -> Any:
    """A matrix in shared memory, read the other way round."""
    if hasattr(ref, "transpose"):
        return ref.transpose((1, 0))
    return plgpu.transpose_ref(ref, (1, 0))  # jax 0.10


def store_transposed(ref: Any, parts: Sequence[jax.Array]) -> None:
    """From registers to shared memory, the other way round, one part's columns after another's.

    In the dtype of the reference, which may be narrower, since bytes cannot be transposed. At once,
    since each write is fenced from others; jax 0.10 cannot join what is in registers.
    """
    if _IS_0_10:
        for number, part in enumerate(parts):
            rows = span(number * part.shape[1], part.shape[1])
            part = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
            transposed(ref.at[rows])[...] = part.astype(ref.dtype)
        return
    joined = lax.concatenate(list(parts), 1)
    joined = plgpu.layout_cast(joined, plgpu.Layout.WGMMA_TRANSPOSED)
    transposed(ref)[...] = joined.astype(ref.dtype)


def stacked(parts: Sequence[jax.Array], *, interpret: bool) -> jax.Array:
    """Matrices of 64 rows in registers, one below the other."""
    if interpret:
        return lax.concatenate(list(parts), 0)
    layout = plgpu.Layout.WGMMA
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    result = plgpu.ShapeDtypeStruct(shape, parts[0].dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,) * len(parts), return_type=result)
    def joined(_, *parts):
        registers = np.concatenate([part.registers for part in parts], axis=0)
        return fragmented_array.FragmentedArray(
            _registers=registers, _layout=parts[0].layout, _is_signed=parts[0].is_signed
        )

    return joined(*parts)


def products(left: Any, right: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """``left @ right``, both in shared memory, as the two halves of its columns.

    One product: the tensor cores read all of ``left`` for each, and take as long for few columns.
    """
    [whole] = sums_of_products(([(left, right)], dtype))
    return halves(whole)


def sums_of_products(*sums: tuple[Sequence[tuple[Any, Any]], Any]) -> list[jax.Array]:
    """Sums of such products, each in its dtype, which are waited for together."""

    def multiply(*totals):
        for total, (pairs, _) in zip(totals, sums, strict=True):
            for left, right in pairs:
                plgpu.wgmma(total, left, right)
        return [total[...] for total in totals]

    totals = [
        plgpu.ACC((pairs[0][0].shape[0], pairs[0][1].shape[1]), dtype) for pairs, dtype in sums
    ]
    return pl.run_scoped(multiply, *totals)


def halves(whole: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the columns."""
    rows, columns = whole.shape
    half = columns // 2
    return lax.slice(whole, (0, 0), (rows, half)), lax.slice(whole, (0, half), (rows, columns))


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
