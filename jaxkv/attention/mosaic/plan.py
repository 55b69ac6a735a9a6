"""How a call of `mosaic` is cut up: parts of a sequence, and what each has in flight."""

import dataclasses
import math

import jax.numpy as jnp

from jaxkv.attention.call import AttentionCall
from jaxkv.cache.kv_cache import KVCache
from jaxkv.devices import local_gpu

TILE = 64  # slots that are taken at once, the rows of a product
# Parts of a sequence are at most this long, so that one long one in a batch is read by many.
_LONGEST_PART = 8192
_MULTIPROCESSORS = 132  # of an H100 or H200, where there is no device to ask
_SHARED_BYTES = 220 << 10  # of one multiprocessor
_OTHER_BYTES = 2 << 10  # sums, barriers, and what is lost to alignment
# Parts at once on a multiprocessor, which hide each other's waiting: more where more is computed.
_OF_NUMBERS, _OF_CODES, _OF_PACKED = 2, 3, 4
_FEW_ROWS = 16  # whose registers leave room for so many
_TILES_LOST = 2  # that could be read while a part begins and ends
MOST_PARTS = 32  # of a sequence: what combines them is unrolled
# More parts than these take longer to combine than they save in reading, unless they are long.
_FEW_PARTS, _LONG_PART = 8, 16  # tiles
LOW_STEPS = 254  # of the low byte in one step of the high one


@dataclasses.dataclass(frozen=True)
class Turning:
    """How scores of centres are made, see `centres`.

    Attributes:
      centres: of keys; the queries' columns are there once for each.
      count: of queries, that is of columns a centre.
      pairs: of numbers that the rope turns together, as many as a table has.
      digits: of a tile's number.
    """

    centres: int
    count: int
    pairs: int
    digits: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static of a call.

    Attributes:
      page_size: slots from one entry of the page table to the next.
      paged: whether there is a page table; without one, a sequence is one page.
      holes: whether a page may be missing (-1 in the table) before the last token.
      gap: whether slots between visible ones are hidden, as a ring's are.
      group: queries of one token; those of the next see one slot more.
      splits: parts of a sequence.
      stages: tiles that a block of threads holds at once.
      softcap: of `attend`, or None.
      levels: what packed codes stand for; None for numbers that are stored as they are.
      signed: whether the sign of a scale says which of two centres a vector has.
    """

    page_size: int
    paged: bool
    holes: bool
    gap: bool
    group: int
    splits: int
    stages: int
    softcap: float | None
    levels: tuple[int, ...] | None
    signed: bool
    turning: Turning | None

    @property
    def piece(self) -> int:
        """Slots that are read at once: a tile, or a page if that is smaller."""
        return min(self.page_size, TILE) if self.paged else TILE


def plan(request: AttentionCall, rows: int, turning: Turning | None) -> Plan:
    """For this call, with so many queries a KV head, high parts and low parts."""
    cache, index = request.cache, request.cache.index
    splits, stages = parts(cache, rows, turning)
    return Plan(
        page_size=index.run or index.extent,
        paged=index.pages is not None,
        holes=index.pages is not None and index.pages.shared,
        gap=index.ring is not None,
        group=request.queries.shape[3],
        splits=splits,
        stages=stages,
        softcap=request.softcap,
        levels=packed_levels(cache),
        signed=request.offsets is not None and request.offsets.second is not None,
        turning=turning,
    )


def parts(cache: KVCache, rows: int, turning: Turning | None = None) -> tuple[int, int]:
    """Parts of a sequence, and tiles that a part holds at once."""
    config, extent = cache.config, cache.index.extent
    lists, head_dim = (config.batch_size or 1) * config.num_kv_heads, config.head_dim
    multiprocessors = getattr(local_gpu(), "core_count", None) or _MULTIPROCESSORS
    codec, added = config.codec, bool(cache.codec_state) and turning is None
    quantized, packed = codec.levels is not None, packed_levels(cache) is not None

    # A row of numbers or codes of one head, the scales of all of them, and addends.
    (shape, dtype, *_), *scales = codec.leaves(head_dim).values()
    stored_bytes = math.prod(shape) * jnp.dtype(dtype).itemsize
    slot_bytes = 2 * (stored_bytes + len(scales) * 2 * config.num_kv_heads) + added * 2 * rows
    wide_bytes = TILE * head_dim * (2 * quantized + packed) + 2 * rows * TILE
    # Before that is used, queries as they come, and rotated ones with the matrix that rotates them.
    before_bytes = 2 * rows * head_dim + packed * (2 * rows * head_dim + 2 * TILE * TILE)
    table_bytes = 0
    if turning is not None:  # of cosines and sines, in two bytes, and what is multiplied with them
        before_bytes += 8 * (rows // 2 + turning.digits) * turning.pairs
        table_bytes = (4 * TILE + 2 * rows + 8) * turning.pairs
    fixed_bytes = max(wide_bytes, before_bytes) + 2 * rows * head_dim + table_bytes + _OTHER_BYTES

    def stages(at_once: int) -> int:
        return (_SHARED_BYTES // at_once - fixed_bytes) // (TILE * slot_bytes)

    most = _OF_PACKED if packed else _OF_CODES if quantized else _OF_NUMBERS
    if rows > _FEW_ROWS:
        most = min(most, 2)
    at_once = max((number for number in range(1, most + 1) if stages(number) >= 2), default=1)

    # One part a multiprocessor reads numbers at the memory's rate: a second place is there for the
    # next to begin while that one ends.
    places = multiprocessors * (at_once if quantized else 1)

    def share_of_time_spent_reading(splits: int) -> float:
        rounds = -(-lists * splits // places)
        tiles = -(-extent // (splits * TILE))
        busy = lists * splits / (rounds * places)
        return busy * tiles / (tiles + _TILES_LOST)

    fewest = min(-(-extent // _LONGEST_PART), MOST_PARTS)
    most_parts = min(max(_FEW_PARTS, extent // (_LONG_PART * TILE)), MOST_PARTS)
    splits = max(range(fewest, most_parts + 1), key=share_of_time_spent_reading)
    return splits, max(2, stages(at_once))


def packed_levels(cache: KVCache) -> tuple[int, ...] | None:
    """What the codes stand for, several of which are in a byte; None for other numbers."""
    levels = cache.config.codec.levels
    return levels if levels and len(levels) < 256 else None
