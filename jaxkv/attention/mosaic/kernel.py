"""The Mosaic GPU kernel of `mosaic`: a part of one sequence's context, for one KV head.

Flash-Decoding (Dao et al., 2023): the context is split over blocks of threads, each of which
goes through its part by online softmax and leaves an unnormalized mix, a maximum and a total.
Tiles of slots come straight from the whole cache by the tensor memory accelerator, a
few ahead of their use. Slots are the rows of the products and query heads their columns: a
tensor core has 64 rows, which the few query heads of a group would leave empty. Queries and
weights are multiplied in two parts, high and low, which costs nothing beside reading the
cache, so that the result is a float32 one.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.attention.mosaic import pallas as gpu
from jaxkv.attention.mosaic.centres import Centres
from jaxkv.attention.mosaic.levels import widen
from jaxkv.attention.mosaic.plan import LOW_STEPS, TILE, Plan
from jaxkv.attention.mosaic.turned import Turned, lasting, num_copies, passing
from jaxkv.codecs.hadamard import matrix_of

BLOCK = 64  # of the Hadamard matrix that is multiplied with: the rows of a product


def in_two_parts(matrix: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """``high + low``, in this dtype of 16 bits: exact to 16 bits in bfloat16, to 22 in float16."""
    high = matrix.astype(dtype)
    return high, (matrix - high.astype(jnp.float32)).astype(dtype)


def in_two_bytes(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(LOW_STEPS * high + low) * step``: whole numbers up to 127, and a step for each column.

    They are multiplied with the stored codes as they are, so keys need not be widened.
    """
    largest = jnp.maximum(jnp.abs(matrix).max(axis=0), 1e-30)
    step = largest / (127 * LOW_STEPS)
    rows, columns = matrix.shape
    steps = matrix / gpu.across(step, (rows, columns), 1)
    high = jnp.round(steps / LOW_STEPS)
    return high, jnp.round(steps - LOW_STEPS * high), step


def store_in_two(tiles: Any, matrix: jax.Array) -> None:
    """``[rows, columns]`` in 16 bits to ``[2 * columns, rows]``: high parts, then low ones."""
    gpu.store_transposed(tiles, in_two_parts(matrix, tiles.dtype))


def store_in_two_bytes(tiles: Any, matrix: jax.Array) -> jax.Array:
    """The same in int8; the step of each column."""
    high, low, step = in_two_bytes(matrix)
    gpu.store_transposed(tiles, [high, low])
    return step


def rotated(matrix: jax.Array, tiles: Any, signs: Any, *, interpret: bool) -> jax.Array:
    """Sylvester's Hadamard matrix times this one, whose rows are 64 times a power of two.

    That of twice the size is ``[[h, h], [h, -h]]``.

    Args:
      tiles: bfloat16 ``[2 * columns, rows]``, for the matrix.
      signs: bfloat16 ``[64, 64]``, that of 64.
      interpret: whether no GPU is there.
    """
    store_in_two(tiles, matrix)
    gpu.commit()
    parts = []
    for start in range(0, matrix.shape[0], BLOCK):
        whole = matrix.shape[0] == BLOCK
        some = tiles if whole else tiles.at[:, gpu.span(start, BLOCK)]
        coarse, fine = gpu.products(signs, gpu.transposed(some), jnp.float32)
        parts.append(coarse + fine)
    half = 1
    while half < len(parts):
        blocks = [parts[at : at + half] for at in range(0, len(parts), half)]
        parts = []
        for first, second in zip(blocks[::2], blocks[1::2], strict=True):
            parts += [a + b for a, b in zip(first, second, strict=True)]
            parts += [a - b for a, b in zip(first, second, strict=True)]
        half *= 2
    return parts[0] if len(parts) == 1 else gpu.stacked(parts, interpret=interpret)


class Slots:
    """A part of a sequence's visible slots, in tiles; tiles that are all gap are left out.

    Attributes:
      count: of tiles.
    """

    def __init__(self, bounds: Any, table: Any, row: jax.Array, part: jax.Array, plan: Plan):
        self._table, self._row, self._plan = table, row, plan
        bound = tuple(bounds[row, at] for at in range(bounds.shape[1]))
        self._low, self._high, self._gap, self._gap_end, *self._of_first = bound
        first, last = lax.div(self._low, TILE), lax.div(self._high + (TILE - 1), TILE)
        self._gap_tile, self._skipped = lax.div(self._gap + (TILE - 1), TILE), jnp.int32(0)
        if plan.gap:
            self._skipped = jnp.maximum(lax.div(self._gap_end, TILE) - self._gap_tile, 0)
        tiles = last - first - self._skipped
        share = lax.div(tiles + (plan.splits - 1), plan.splits)
        self._first = first + part * share
        self.count = jnp.clip(tiles - part * share, 0, share)

    def start_of(self, number: Any) -> jax.Array:
        """The first slot of a tile."""
        tile = self._first + number
        if self._plan.gap:
            tile += jnp.where(tile >= self._gap_tile, self._skipped, 0)
        return tile * TILE

    def pages_of(self, number: Any) -> tuple[jax.Array, ...]:
        """The page that each piece of a tile lies in."""
        plan, table = self._plan, self._table
        if not plan.paged:
            return (self._row,)
        slots = (self.start_of(number) + at for at in range(0, TILE, plan.piece))
        entries = (lax.div(slot, plan.page_size) for slot in slots)
        most = table.shape[1] - 1
        return tuple(table[self._row, jnp.clip(entry, 0, most)] for entry in entries)

    def seen(
        self, start: jax.Array, pages: tuple[jax.Array, ...], matrix: tuple[int, int]
    ) -> tuple[Callable[[], jax.Array], jax.Array]:
        """Which slots of the tile any query sees, for a matrix of a row a slot; and if all are."""
        plan = self._plan
        whole = (start >= self._low) & (start + TILE <= self._high)
        if plan.gap:
            whole &= (start + TILE <= self._gap) | (start >= self._gap_end)
        if plan.holes:
            bits = [(page >= 0).astype(jnp.int32) << at for at, page in enumerate(pages)]
            held = functools.reduce(jnp.bitwise_or, bits)
            whole &= held == (1 << len(pages)) - 1

        def visible() -> jax.Array:
            slot = gpu.iota(matrix, 0)
            inside = (slot >= self._low - start) & (slot < self._high - start)
            if plan.gap:
                inside &= (slot < self._gap - start) | (slot >= self._gap_end - start)
            if plan.holes:
                inside &= ((held >> lax.div(slot, plan.piece)) & 1) == 1
            return inside

        return visible, whole

    def seen_by_each(
        self, start: jax.Array, pages: tuple[jax.Array, ...], matrix: tuple[int, int]
    ) -> jax.Array:
        """Which slots of the tile a query sees, for a matrix of a row a slot and a column a query.

        A token sees one slot more than the one before it, and of a window's first one less.
        """
        visible = self.seen(start, pages, matrix)[0]()
        if not self._of_first:
            return visible
        low, high = self._of_first
        slot, query = gpu.iota(matrix, 0), gpu.iota(matrix, 1)
        if (turning := self._plan.turning) is not None:
            query = lax.rem(query, turning.count)
        token = lax.div(query, self._plan.group)
        return visible & (slot >= low - start + token) & (slot < high - start + token)


LOG2_E = math.log2(math.e)
# A hidden slot's score lies so far below the least maximum that its weight is zero even in a
# tile that is all hidden.
LOWEST, HIDDEN = -1e30, -2e30


def decode_parts(
    queries: jax.Array,
    leaves: tuple[jax.Array, ...],
    layer: jax.Array,
    bounds: jax.Array,
    table: jax.Array,
    added: tuple[jax.Array, ...],
    centres: Centres | None,
    *,
    plan: Plan,
    interpret: Any = None,
) -> list[jax.Array]:
    """The parts of each sequence's attention, for `mosaic` to combine.

    Args:
      queries: float32 ``[batch, kv_heads, head_dim, rows]``: a group's queries, a column each, one
        token's after another's, padded to a multiple of 8. In units of log2(e) unless there is a
        softcap. For packed codes they and the mixes are as before the product with a Hadamard
        matrix.
      leaves: of the cache: ``[layers, 2, ctx, kv_heads, ...]``; scales of few heads
        ``[layers, 2, ctx * kv_heads]``, since what is copied must be whole 16 bytes.
      layer: int32 ``[1]``.
      bounds: int32 ``[batch, 4]``: the first visible slot, and the one after the last; and of a
        gap between them, whose slots are hidden, likewise. For several tokens ``[batch, 6]``: for
        all of them, and at last for the first, whose first slot may be below 0.
      table: int32 ``[batch, pages]``; not read unless there are pages.
      added: nothing, or what is added to scores, float32 ``[batch, kv_heads, slots, rows]``.
      centres: what makes them in the kernel, instead. Queries are there once for each centre then,
        and each column sees the slots whose keys were stored less that centre.

    Returns:
      Mixes ``[splits, batch, kv_heads, 2 * rows, head_dim]``, again high parts and then low ones,
      and the maxima and totals of weights ``[splits, batch, kv_heads, 2, rows]``, base 2; with two
      centres the total of values that were stored less the second, too.
    """
    quantized = len(leaves) == 2
    batch, kv_heads, head_dim, rows = queries.shape
    both, interpreted = 2 * rows, interpret is not None
    stages, piece, turning = plan.stages, plan.piece, plan.turning
    pieces = TILE // piece
    in_a_row = quantized and leaves[1].ndim == 3
    scales_per_slot = kv_heads if in_a_row else 1  # along the axis that is cut
    scores_shape, mix_shape = (TILE, rows), (head_dim, rows)

    def body(query_ref, *refs):
        leaf_refs, added_refs = refs[: len(leaves)], refs[len(leaves) :][: len(added)]
        refs = refs[len(leaves) + len(added) :]
        centre_refs, refs = refs[: len(centres or ())], refs[len(centres or ()) :]
        layer_ref, bounds_ref, table_ref, signs_ref, mix_out, sums_out, *scratch = refs
        query_tiles, (buffers, mix_tile), sums_tile, either, addends, kept, *barriers = scratch
        ready, signs_arrived, arrived = barriers
        (weight_tiles, wide), (raw_queries, rotating, raw_centres) = either
        head, part, row = (gpu.axis_index(name) for name in ("head", "part", "row"))
        layer = layer_ref[0]
        slots = Slots(bounds_ref, table_ref, row, part, plan)
        count = slots.count

        def fetch(number, stage, its_pages):
            start = slots.start_of(number)
            for source, buffer in zip(added_refs, addends, strict=True):
                tile = gpu.span(start, TILE)
                gpu.copy_in(source.at[row, head, tile], buffer.at[stage], arrived[0].at[stage])
            for at, page in enumerate(its_pages):
                inside = lax.rem(start + at * piece, plan.page_size)
                first = jnp.maximum(page, 0) * plan.page_size + inside

                def place(per_slot, at=at):
                    whole = gpu.span(at * piece * per_slot, piece * per_slot)
                    return stage if pieces == 1 else (stage, whole)

                held = gpu.span(first, piece)
                of_scales = gpu.span(first * scales_per_slot, piece * scales_per_slot)
                for side in range(2):
                    numbers, *its_scales = buffers[side]
                    source = leaf_refs[0].at[layer, side, held, head]
                    gpu.copy_in(source, numbers.at[place(1)], arrived[side].at[stage])
                    for leaf, buffer in zip(leaf_refs[1:], its_scales, strict=True):
                        source = leaf.at[layer, side, of_scales]
                        target = buffer.at[place(scales_per_slot)]
                        gpu.copy_in(source, target, arrived[side].at[stage])

        gpu.copy_in(query_ref.at[row, head], raw_queries, ready)
        if turning:
            turned = Turned(turning, rows, raw_centres, kept)
            first_tile = lax.div(slots.start_of(0), TILE)
            turned.fetch(centre_refs, row, head, first_tile, ready)
        if plan.levels:
            gpu.copy_in(signs_ref, rotating[1], signs_arrived)
        upcoming = tuple(slots.pages_of(number) for number in range(stages + 1))
        for number in range(stages):

            @gpu.when(number < count)
            def _(number=number):
                fetch(jnp.int32(number), number, upcoming[number])

        gpu.wait(ready)
        if plan.levels:
            gpu.wait(signs_arrived)

        of_centres: Any = ()
        if turning:
            pairs = turned.begin()
            gpu.commit()
            found = gpu.sums_of_products(*turned.products(count))
            of_centres = pairs, turned.scores(*found)

        # Under a condition, or addresses would be kept in registers up to the mix's rotation.
        @gpu.when(count > 0)
        def _():
            its_queries = gpu.load(raw_queries)
            if plan.levels:
                its_queries = rotated(its_queries, *rotating, interpret=interpreted)
            if quantized:  # the steps wait where no register is lost to them
                sums_tile[0] = store_in_two_bytes(query_tiles, its_queries)
            else:
                store_in_two(query_tiles, its_queries)
            gpu.commit()

        def scales_of(side, stage):
            tile, layout = buffers[side][1].at[stage], gpu.ROW_VECTOR
            if in_a_row:
                scales = gpu.load_every(tile, kv_heads, head, layout, interpret=interpreted)
            else:
                scales = gpu.load(tile.at[:, head], layout)
            return scales.astype(jnp.float32)

        def of_second(scales):  # of zeros too
            return lax.bitcast_convert_type(scales, jnp.int32) < 0

        def scores_of(stage):
            keys = buffers[0][0].at[stage]
            if plan.levels:
                widen(keys, wide[1], plan.levels, interpret=interpreted)
                gpu.commit()
                keys = wide[1]
            in_parts = gpu.transposed(query_tiles)
            coarse, fine = gpu.products(keys, in_parts, jnp.int32 if quantized else jnp.float32)
            if not quantized:
                return coarse + fine
            whole = (coarse * LOW_STEPS + fine).astype(jnp.float32)
            whole *= gpu.across(gpu.load(sums_tile.at[0], gpu.COLUMN_VECTOR), scores_shape, 1)
            scales = scales_of(0, stage)
            if plan.signed:
                scales = jnp.abs(scales)
            return whole * gpu.across(scales, scores_shape, 0)

        def values_of(stage, start, its_pages):
            """In bfloat16, without what hidden slots hold: zero times NaN is NaN."""
            values = buffers[1][0].at[stage]
            if quantized:
                widen(values, wide[0], plan.levels, interpret=interpreted)
                return wide[0]
            visible, whole = slots.seen(start, its_pages, (TILE, head_dim))

            @gpu.when(jnp.logical_not(whole))
            def _():
                values[...] = jnp.where(visible(), gpu.load(values), jnp.zeros((), values.dtype))

            return values

        def less_its_centre(stage, of_first):
            """The slots whose keys were stored less a column's centre, by signs of both."""
            scales = gpu.across(scales_of(0, stage), scores_shape, 0)
            column = of_first - 1 - gpu.iota(scores_shape, 1)  # negative of the second
            return (lax.bitcast_convert_type(scales, jnp.int32) ^ column) >= 0

        def one_tile(number, state):
            mix, highest, total, second, of_centres, upcoming = state
            stage, start, here = lax.rem(number, stages), slots.start_of(number), upcoming[0]

            gpu.wait(arrived[0].at[stage])
            scores = scores_of(stage)
            for buffer in addends:
                scores += gpu.load(buffer.at[stage])
            if turning:
                pairs, scores_of_centres = of_centres
                scores += scores_of_centres
            if plan.softcap is not None:
                scores = capped(scores, plan.softcap)
            visible = slots.seen_by_each(start, here, scores_shape)
            if turning and turning.centres == 2:
                visible &= less_its_centre(stage, turning.count)
            scores = jnp.where(visible, scores, HIDDEN)
            new_highest = jnp.maximum(highest, scores.max(axis=0))
            keep = jnp.exp2(highest - new_highest)
            weights = jnp.exp2(scores - gpu.across(new_highest, scores_shape, 1))
            total = total * gpu.across(keep, scores_shape, 1) + weights
            gpu.wait(arrived[1].at[stage])
            values = values_of(stage, start, here)
            if quantized:
                scales = scales_of(1, stage)
                if plan.signed:
                    theirs = gpu.across(of_second(scales), scores_shape, 0)
                    keeping = gpu.across(keep, scores_shape, 1)
                    second = (second[0] * keeping + jnp.where(theirs, weights, 0),)
                    scales = jnp.abs(scales)
                weights *= gpu.across(scales, scores_shape, 0)
                weights = jnp.where(visible, weights, 0)
            store_in_two(weight_tiles, weights)
            if turning:
                pairs = turned.next(pairs)
            gpu.commit()
            in_parts = gpu.transposed(weight_tiles)
            sums = [([(gpu.transposed(values), in_parts)], jnp.float32)]
            if turning:  # of the next tile
                sums += turned.products(number)
            of_values, *found = gpu.sums_of_products(*sums)
            coarse, fine = gpu.halves(of_values)
            if turning:
                of_centres = pairs, turned.scores(*found)
            mix = mix * gpu.across(keep, mix_shape, 1) + (coarse + fine)

            @gpu.when(number + stages < count)
            def _():
                fetch(number + stages, stage, upcoming[-1])

            upcoming = (*upcoming[1:], slots.pages_of(number + stages + 1))
            return mix, new_highest, total, second, of_centres, upcoming

        state = gpu.full(mix_shape, 0), gpu.full((rows,), LOWEST), gpu.full(scores_shape, 0)
        second = (gpu.full(scores_shape, 0),) * plan.signed
        mix, highest, total, second, *_ = gpu.fori_loop(
            0, count, one_tile, (*state, second, of_centres, upcoming)
        )
        sums_tile[0] = highest
        sums_tile[1] = total.sum(axis=0)
        if plan.signed:
            sums_tile[2] = second[0].sum(axis=0)
        if plan.levels:
            gpu.commit()  # what was there
            gpu.copy_in(signs_ref, rotating[1], signs_arrived)
            gpu.wait(signs_arrived)
            mix = rotated(mix, mix_tile, rotating[1], interpret=interpreted)
        store_in_two(mix_tile, mix)
        gpu.commit()
        gpu.copy_out(mix_tile, mix_out.at[part, row, head])
        gpu.copy_out(sums_tile, sums_out.at[part, row, head])
        gpu.wait_out()

    stored = leaves[0].dtype
    codes = gpu.shared_tiles((stages, TILE, leaves[0].shape[-1]), stored)
    number = jnp.bfloat16 if quantized else stored  # what values are multiplied in
    of_tile = (TILE * kv_heads,) if in_a_row else (TILE, kv_heads)
    scales = [gpu.shared((stages, *of_tile), leaf.dtype) for leaf in leaves[1:]]
    side = (codes, *scales)
    wide = [gpu.shared_tiles((TILE, head_dim), jnp.bfloat16)] if quantized else []
    if plan.levels:
        wide += [gpu.shared_tiles((TILE, head_dim), jnp.int8)]
    # What is rotated, high and low parts, and the matrix that rotates it. Made in registers, that
    # would take so many that fewer blocks of threads fit.
    signs = jnp.asarray(matrix_of(BLOCK), jnp.bfloat16)
    rotating = [gpu.shared_tiles((both, head_dim), jnp.bfloat16)] if plan.levels else []
    rotating += [gpu.shared_tiles((BLOCK, BLOCK), jnp.bfloat16)] if plan.levels else []
    copies = pieces * len(leaves) + len(added), pieces * len(leaves)
    return gpu.run(
        body,
        [queries, *leaves, *added, *(centres or ()), layer, bounds, table, signs],
        outputs=[
            jax.ShapeDtypeStruct((plan.splits, batch, kv_heads, both, head_dim), jnp.bfloat16),
            jax.ShapeDtypeStruct(
                (plan.splits, batch, kv_heads, 2 + plan.signed, rows), jnp.float32
            ),
        ],
        scratch=[
            gpu.shared_tiles((both, head_dim), jnp.int8 if quantized else stored),
            gpu.Either((side, side), gpu.shared_tiles((both, head_dim), jnp.bfloat16)),
            gpu.shared((2 + plan.signed, rows), jnp.float32),
            gpu.Either(
                (gpu.shared_tiles((both, TILE), number), wide),
                (gpu.shared((head_dim, rows), jnp.float32), rotating, passing(turning, rows)),
            ),
            [gpu.shared((stages, TILE, rows), jnp.float32) for _ in added],
            lasting(turning, rows),
            gpu.Barrier(num_arrivals=1 + num_copies(turning)),
            gpu.Barrier(),
            [gpu.Barrier(num_arrivals=arrivals, num_barriers=stages) for arrivals in copies],
        ],
        grid={"head": kv_heads, "part": plan.splits, "row": batch},
        interpret=interpret,
    )


def capped(scores: jax.Array, softcap: float) -> jax.Array:
    """``softcap * tanh(scores / softcap)`` in base 2."""
    double = jnp.exp2(scores * (2 * LOG2_E / softcap))
    return (softcap * LOG2_E) * (1 - 2 / (1 + double))
