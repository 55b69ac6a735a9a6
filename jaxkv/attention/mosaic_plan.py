"""How a call of `mosaic` is cut up: tiles of slots, parts of a sequence, and what is in flight."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxkv.addressing.paged import PagedIndex
from jaxkv.attention.request import Request
from jaxkv.codecs import Centred, Codec, Dense, Rotated
from jaxkv.kv_cache import KVCache

LEAST_TILE = 64  # rows of a product, which are slots
# Parts of a sequence are at most this long, so that one long one in a batch is read by many.
_LONGEST_PART = 8192
_MULTIPROCESSORS = 132  # of an H100 or H200, where there is no device to ask
_SHARED_BYTES = 220 << 10  # of one multiprocessor
_OTHER_BYTES = 2 << 10  # sums, barriers, and what is lost to alignment
# Slots of a tile, and parts at once on a multiprocessor.
_OF_PACKED, _OF_OTHERS = (128, 3), (64, 2)
_SLOTS_LOST = 128  # that could be read while a part begins and ends
MOST_PARTS = 32  # of a sequence: what combines them is unrolled


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static of a call.

    Attributes:
      page_size: slots from one entry of the page table to the next.
      paged: whether there is a page table; without one, a sequence is one page.
      holes: whether a page may be missing (-1 in the table) before the last token.
      splits: parts of a sequence.
      tile: slots that are taken at once.
      stages: tiles that a block of threads holds at once.
      softcap: of `attend`, or None.
      levels: what packed codes stand for; None for numbers that are stored as they are.
    """

    page_size: int
    paged: bool
    holes: bool
    splits: int
    tile: int
    stages: int
    softcap: float | None
    levels: tuple[int, ...] | None

    @property
    def piece(self) -> int:
        """Slots that are read at once: a tile, or a page if that is smaller."""
        return min(self.page_size, self.tile) if self.paged else self.tile


def plan(request: Request, rows: int) -> Plan:
    """For this call, with so many queries a KV head, high parts and low parts."""
    cache, index = request.cache, request.cache.index
    pages = index if isinstance(index, PagedIndex) else None
    tile, splits, stages = parts(cache, rows)
    return Plan(
        page_size=index.extent if pages is None else pages.page_size,
        paged=pages is not None,
        holes=pages is not None and pages.shared,
        splits=splits,
        tile=tile,
        stages=stages,
        softcap=request.softcap,
        levels=getattr(stored_by(cache), "levels", None),
    )


def parts(cache: KVCache, rows: int) -> tuple[int, int, int]:
    """Slots of a tile, parts of a sequence, and tiles that a part has on their way.

    Several parts on each multiprocessor hide each other's waiting. A single long sequence is read
    as fast by one on each, which leaves fewer to combine, unless there are codes to widen.
    """
    config, extent = cache.config, cache.index.extent
    lists, head_dim = (config.batch_size or 1) * config.num_kv_heads, config.head_dim
    device = jax.local_devices()[0]
    multiprocessors = getattr(device, "core_count", None) or _MULTIPROCESSORS
    codec, centred = stored_by(cache), isinstance(config.codec, Centred)
    quantized, packed = not isinstance(codec, Dense), isinstance(codec, Rotated)
    tile, at_once = _OF_PACKED if packed else _OF_OTHERS
    if not quantized and lists * 4 <= multiprocessors:
        at_once = 1
    if not fits(cache, tile):
        tile = LEAST_TILE

    def share_of_time_spent_reading(splits: int) -> float:
        rounds = -(-lists * splits // (at_once * multiprocessors))
        slots = -(-extent // splits)
        busy = lists * splits / (rounds * at_once * multiprocessors)
        return busy * slots / (slots + _SLOTS_LOST)

    fewest = min(-(-extent // _LONGEST_PART), MOST_PARTS)
    splits = max(range(fewest, MOST_PARTS + 1), key=share_of_time_spent_reading)
    # A row of numbers or codes of one head, and the scales of all of them.
    (shape, dtype, *_), *scales = codec.leaves(head_dim).values()
    stored_bytes = math.prod(shape) * jnp.dtype(dtype).itemsize
    slot_bytes = 2 * (stored_bytes + len(scales) * 2 * config.num_kv_heads)
    tile_bytes = tile * (slot_bytes + centred * 2 * rows)
    wide_bytes = tile * head_dim * (2 * quantized + packed)
    fixed_bytes = wide_bytes + 2 * rows * (head_dim + tile) + _OTHER_BYTES
    return tile, splits, max(2, (_SHARED_BYTES // at_once - fixed_bytes) // tile_bytes)


def stored_by(cache: KVCache) -> Codec:
    """What encodes its vectors, after their mean was taken off if it is."""
    codec = cache.config.codec
    return codec.codec if isinstance(codec, Centred) else codec


def fits(cache: KVCache, tile: int) -> bool:
    """Whether tiles of so many slots are made of whole pages, or pages of whole tiles."""
    index = cache.index
    if isinstance(index, PagedIndex) and index.page_size % tile and tile % index.page_size:
        return False
    return cache.config.num_slots >= tile
