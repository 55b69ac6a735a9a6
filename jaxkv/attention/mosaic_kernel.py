"""The Mosaic GPU kernel of `mosaic`: a part of one sequence's context, for one KV head.

Flash-Decoding (Dao et al., 2023): the context is split over blocks of threads, each of which
goes through its part by online softmax and leaves an unnormalized mix, a maximum and a total.
Tiles of `TILE` slots come straight from the whole cache by the tensor memory accelerator, a
few ahead of their use. The query heads of a group are rows of one matrix product, which has 64
whether they are used or not: what the others hold is never looked at.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.attention import pallas_gpu as gpu

TILE = 64  # slots
LOG2_E = math.log2(math.e)
# A hidden slot's score lies so far below the least maximum that its weight is zero even in a
# tile that is all hidden.
LOWEST, HIDDEN = -1e30, -2e30
_LOW_STEPS = 254  # int8 queries: steps of the low part in one step of the high part


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is static of a call.

    Attributes:
      page_size: slots from one entry of the page table to the next.
      paged: whether there is a page table; without one, a sequence is one page.
      holes: whether a page may be missing (-1 in the table) before the last token.
      splits: parts of a sequence.
      stages: tiles that a block of threads holds at once.
      softcap: of `attend`, or None.
    """

    page_size: int
    paged: bool
    holes: bool
    splits: int
    stages: int
    softcap: float | None

    @property
    def piece(self) -> int:
        """Slots that are read at once: a tile, or a page if that is smaller."""
        return min(self.page_size, TILE) if self.paged else TILE


def decode_parts(
    queries: tuple[jax.Array, ...],
    leaves: tuple[jax.Array, ...],
    layer: jax.Array,
    bounds: jax.Array,
    table: jax.Array,
    *,
    group: int,
    shape: Shape,
    interpret: object = None,
) -> tuple[jax.Array, jax.Array]:
    """The parts of each sequence's attention, for `mosaic` to combine.

    Args:
      queries: of a bfloat16 cache ``([batch, kv_heads, rows, head_dim] bfloat16,)``; of an int8
        cache the high and the low parts in int8, and a step ``[batch, kv_heads] float32``. In
        units of log2(e) unless there is a softcap. Rows of a group, padded to a multiple of 8.
      leaves: of the cache: ``[layers, 2, ctx, kv_heads, ...]``.
      layer: int32 ``[1]``.
      bounds: int32 ``[batch, 2]``: the first visible slot, and the one after the last.
      table: int32 ``[batch, pages]``.

    Returns:
      Mixes ``[splits, batch, kv_heads, group, head_dim]``, and the maxima and totals of weights
      ``[splits, batch, kv_heads, 2, rows]``, base 2.
    """
    quantized = len(leaves) == 2
    batch, kv_heads, rows, head_dim = queries[0].shape
    stages, piece = shape.stages, shape.piece
    pieces = TILE // piece
    tile, mix_shape = (gpu.ROWS, TILE), (gpu.ROWS, head_dim)
    operand = jnp.bfloat16  # of the product with the values

    def body(*refs):
        query_refs, refs = refs[: len(queries)], refs[len(queries) :]
        leaf_refs, (layer_ref, bounds_ref, table_ref, mix_out, sums_out), scratch = (
            refs[: len(leaves)], refs[len(leaves) : len(leaves) + 5], refs[len(leaves) + 5 :],
        )
        query_tiles, (buffers, mix_tile), sums_tile, ready, full_, staging, wide = scratch
        head, part, row = (gpu.axis_index(name) for name in ("head", "part", "row"))
        layer, low, high = layer_ref[0], bounds_ref[row, 0], bounds_ref[row, 1]
        first, last = lax.div(low, TILE), lax.div(high + (TILE - 1), TILE)
        share = lax.div(last - first + (shape.splits - 1), shape.splits)
        first = first + part * share
        count = jnp.clip(last - first, 0, share)

        def pages_of(number):
            """The page that each piece of a tile lies in."""
            if not shape.paged:
                return (row,)
            slots = [(first + number) * TILE + at * piece for at in range(pieces)]
            entries = [jnp.clip(lax.div(slot, shape.page_size), 0, table.shape[1] - 1) for slot in slots]
            return tuple(table_ref[row, entry] for entry in entries)

        def fetch(number, stage, its_pages):
            for at, page in enumerate(its_pages):
                inside = lax.rem((first + number) * TILE + at * piece, shape.page_size)
                slots = gpu.span(jnp.maximum(page, 0) * shape.page_size + inside, piece)
                into = stage if pieces == 1 else (stage, gpu.span(at * piece, piece))
                for side in range(2):
                    for leaf, name in zip(leaf_refs, buffers[side], strict=True):
                        source = leaf.at[(layer, side, slots, head)[: 4 if len(leaf.shape) == 5 else 3]]
                        gpu.copy_in(source, name.at[into], full_[side].at[stage])

        for ref, into in zip(query_refs, query_tiles):
            gpu.copy_in(ref.at[row, head], into.at[gpu.span(0, rows)], ready)
        upcoming = tuple(pages_of(number) for number in range(stages + 1))
        for number in range(stages):
            @gpu.when(number < count)
            def _(number=number):
                fetch(jnp.int32(number), number, upcoming[number])
        gpu.wait(ready)
        step = query_refs[2][row, head] if quantized else None

        def scores_of(stage):
            keys = gpu.transposed(buffers[0][0].at[stage])
            if not quantized:
                return gpu.multiply(query_tiles[0], keys, jnp.float32)
            coarse, fine = (gpu.multiply(query, keys, jnp.int32) for query in query_tiles)
            scales = gpu.load_column(buffers[0][1].at[stage, :, head], interpret is not None) * step
            return (coarse * _LOW_STEPS + fine).astype(jnp.float32) * gpu.across(scales, tile, 1)

        def one_tile(number, state):
            mix, highest, total, upcoming = state
            stage, start = lax.rem(number, stages), (first + number) * TILE
            gpu.wait(full_[0].at[stage])
            scores = scores_of(stage)
            if shape.softcap is not None:
                scores = capped(scores, shape.softcap)
            column = gpu.iota(tile, 1)
            seen = (column >= low - start) & (column < high - start)
            whole = (start >= low) & (start + TILE <= high)
            held = None
            if shape.holes:
                held = sum((page >= 0).astype(jnp.int32) << at for at, page in enumerate(upcoming[0]))
                seen &= ((held >> lax.div(column, piece)) & 1) == 1
                whole &= held == (1 << pieces) - 1
            scores = jnp.where(seen, scores, HIDDEN)
            new_highest = jnp.maximum(highest, scores.max(axis=1))
            keep = jnp.exp2(highest - new_highest)
            weights = jnp.exp2(scores - gpu.across(new_highest, tile, 0))
            total = total * keep + weights.sum(axis=1)
            mix = mix * gpu.across(keep, mix_shape, 0)
            gpu.wait(full_[1].at[stage])
            if quantized:
                wide[...] = gpu.load(buffers[1][0].at[stage], gpu.WIDENING).astype(operand)
                gpu.commit()
                values = wide
                scales = gpu.load_column(buffers[1][1].at[stage, :, head], interpret is not None)
                scaled = weights * gpu.across(scales, tile, 1)
                weights = jnp.where(seen, scaled, 0)
            else:
                values = buffers[1][0].at[stage]

                @gpu.when(jnp.logical_not(whole))
                def _():  # zero times NaN is NaN, so what a hidden slot holds must not be read
                    slot = gpu.iota((TILE, head_dim), 0)
                    visible = (slot >= low - start) & (slot < high - start)
                    if held is not None:
                        visible &= ((held >> lax.div(slot, piece)) & 1) == 1
                    values[...] = jnp.where(visible, gpu.load(values), jnp.bfloat16(0))
                    gpu.commit()

            mix = gpu.multiply_add(mix, weights.astype(operand), values, staging)

            @gpu.when(number + stages < count)
            def _():
                fetch(number + stages, stage, upcoming[-1])

            upcoming = (*upcoming[1:], pages_of(number + stages + 1))
            return mix, new_highest, total, upcoming

        rows_shape = mix_shape[:1]
        state = gpu.full(mix_shape, 0), gpu.full(rows_shape, LOWEST), gpu.full(rows_shape, 0), upcoming
        mix, highest, total, _ = gpu.fori_loop(0, count, one_tile, state)
        mix_tile[...] = mix
        sums_tile[0] = highest
        sums_tile[1] = total
        gpu.commit()
        gpu.copy_out(mix_tile.at[gpu.span(0, group)], mix_out.at[part, row, head])
        for number in range(2):
            sums = sums_tile.at[number, gpu.span(0, rows)]
            gpu.copy_out(sums, sums_out.at[part, row, head, number])
        gpu.wait_out()

    codes = gpu.shared_tiles((stages, TILE, head_dim), leaves[0].dtype)
    side = (codes, gpu.shared((stages, TILE, kv_heads), leaves[1].dtype)) if quantized else (codes,)
    mixes, sums = gpu.run(
        body,
        [*queries, *leaves, layer, bounds, table],
        outputs=[
            jax.ShapeDtypeStruct((shape.splits, batch, kv_heads, group, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((shape.splits, batch, kv_heads, 2, rows), jnp.float32),
        ],
        scratch=[
            [gpu.shared_tiles((gpu.ROWS, head_dim), query.dtype) for query in queries[:2]],
            gpu.Either((side, side), gpu.shared(mix_shape, jnp.float32)),
            gpu.shared((2, gpu.ROWS), jnp.float32),
            gpu.Barrier(num_arrivals=min(len(queries), 2)),
            [gpu.Barrier(num_arrivals=pieces * len(leaves), num_barriers=stages)] * 2,
            None if interpret is None else gpu.shared_tiles(tile, operand),
            gpu.shared_tiles((TILE, head_dim), operand) if quantized else None,
        ],
        grid={"head": kv_heads, "part": shape.splits, "row": batch},
        interpret=interpret,
    )
    return mixes, sums


def capped(scores: jax.Array, softcap: float) -> jax.Array:
    """``softcap * tanh(scores / softcap)`` in base 2."""
    double = jnp.exp2(scores * (2 * LOG2_E / softcap))
    return (softcap * LOG2_E) * (1 - 2 / (1 + double))
