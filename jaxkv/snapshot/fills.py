"""What a cache gets from a file: its own tokens, and the newest by a finer codec."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxkv.addressing import KeptIndex
from jaxkv.kv_cache import KVCache
from jaxkv.snapshot.fill import Fill
from jaxkv.snapshot.kept_fill import KeptFill
from jaxkv.snapshot.manifest import Manifest
from jaxkv.snapshot.places import named


def fills_of(
    file: Path,
    saved: Manifest,
    number: int,
    cache: KVCache,
    rows: Sequence[int],
    tensors: dict[str, np.ndarray],
) -> tuple[Fill | KeptFill, Fill | None]:
    """Of a cache and, where it has one, that of its newest tokens."""
    group, own = saved.groups[number], named(tensors, f"{number}.")
    kind = KeptFill if isinstance(cache.index, KeptIndex) else Fill
    fill = kind(file, group, saved.lengths, cache, rows, own)
    if group.of_newest is None or cache.newest is None:
        return fill, None
    of_newest = named(own, "newest.")
    return fill, Fill(file, group.of_newest, saved.lengths, cache.newest, rows, of_newest)


def filled_by(own: Fill | KeptFill, newest: Fill | None) -> KVCache:
    """The cache, with those if it has any."""
    return dataclasses.replace(own(), newest=None if newest is None else newest())
