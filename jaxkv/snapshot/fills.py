"""What a cache gets from a file: its own tokens, and those of them that it keeps a second time."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxkv.addressing import KeptIndex
from jaxkv.addressing.ring import RingIndex
from jaxkv.kv_cache import KVCache
from jaxkv.snapshot.fill import Fill
from jaxkv.snapshot.kept_fill import KeptFill
from jaxkv.snapshot.manifest import Manifest
from jaxkv.snapshot.places import named
from jaxkv.streaming import bounds_of, on_the_device


class Fills(NamedTuple):
    """Of a cache; of its newest tokens by a finer codec; of those that are on the device too."""

    own: Fill | KeptFill
    newest: Fill | None
    resident: Fill | None
    cache: KVCache
    rows: Sequence[int]

    def __call__(self) -> KVCache:
        """The cache with all of them."""
        filled = self.own()
        if self.newest is not None:
            filled = dataclasses.replace(filled, newest=self.newest())
        if self.resident is None or self.cache.resident is None:
            return filled
        tokens = self.resident()
        assert isinstance(tokens.index, RingIndex)
        resident = dataclasses.replace(
            self.cache.resident, storage=tokens.storage, first=tokens.index.first
        )
        if resident.bounds is not None:
            bounds = bounds_of(filled, resident.bounds, jnp.array(self.rows, jnp.int32))
            resident = dataclasses.replace(resident, bounds=bounds)
        return dataclasses.replace(filled, resident=resident)


def fills_of(
    file: Path,
    saved: Manifest,
    number: int,
    cache: KVCache,
    rows: Sequence[int],
    tensors: dict[str, np.ndarray],
) -> Fills:
    """Of one group of layers. Made, they have checked all."""
    group, own = saved.groups[number], named(tensors, f"{number}.")
    kind = KeptFill if isinstance(cache.index, KeptIndex) else Fill
    fill = kind(file, group, saved.lengths, cache, rows, own)
    newest = resident = None
    if group.of_newest is not None and cache.newest is not None:
        of_newest = named(own, "newest.")
        newest = Fill(file, group.of_newest, saved.lengths, cache.newest, rows, of_newest)
    if cache.resident is not None:
        resident = Fill(file, group, saved.lengths, on_the_device(cache), rows, own)
    return Fills(fill, newest, resident, cache, rows)
