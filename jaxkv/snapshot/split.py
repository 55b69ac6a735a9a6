"""A cache in blocks: of its sequences, of its KV heads, and every n-th of its tokens."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxkv.cache.axes import Spread
from jaxkv.cache.hybrid import AnyConfig
from jaxkv.devices import Device
from jaxkv.snapshot.group import Group


class Share(NamedTuple):
    """What one device holds: the number of its block of sequences, of heads and of tokens."""

    batch: int
    heads: int
    context: int


class Split(NamedTuple):
    """How many blocks of each there are. Position p is in block p modulo those of the context."""

    batch: int = 1
    heads: int = 1
    context: int = 1

    @property
    def shares(self) -> Iterator[Share]:
        return itertools.starmap(Share, itertools.product(*map(range, self)))

    def sequences(self, share: Share, count: int) -> range:
        """Of so many, those of a share."""
        size = count // self.batch
        return range(share.batch * size, (share.batch + 1) * size)

    def kv_heads(self, share: Share, count: int) -> range:
        """Of so many, those of a share; where there are more blocks, some have the same one."""
        first = share.heads * count // self.heads
        return range(first, first + max(count // self.heads, 1))

    def tokens(self, share: Share, count: int) -> int:
        """How many of so many are a share's."""
        return len(range(share.context, count, self.context))

    def group(self, share: Share, group: Group) -> Group:
        """What a share has of one kind of layer."""
        rows = self.sequences(share, len(group.held))
        heads = self.kv_heads(share, group.config.num_kv_heads)
        return dataclasses.replace(
            group.of_sequences(rows),
            config=group.config.replace(num_kv_heads=len(heads)),
            held=tuple(self.tokens(share, group.held[row]) for row in rows),
        )

    def overlaps(self, share: Share, other: "Split", others: Share, config: AnyConfig) -> bool:
        """Whether a share has some of what one of another split of the same cache has."""
        count = config.batch_size or 1
        rows = self.sequences(share, count), other.sequences(others, count)
        heads = [
            (self.kv_heads(share, group.num_kv_heads), other.kv_heads(others, group.num_kv_heads))
            for group in config.groups
        ]
        common = math.gcd(self.context, other.context)
        same_tokens = share.context % common == others.context % common
        return same_tokens and _meet(*rows) and any(_meet(*pair) for pair in heads)


def shares_of(spread: Spread, config: AnyConfig) -> tuple[Split, dict[Device, Share]]:
    """How a cache is split over a mesh, and what each of its devices has; some have the same."""
    copies = min(spread.copies(group) for group in config.groups)
    split = Split(spread.size("batch"), spread.size("heads") // copies, spread.size("context"))
    shares = {}
    for place, device in np.ndenumerate(spread.mesh.devices):
        at = dict(zip(spread.mesh.axis_names, place, strict=True))
        batch, heads, context = (at.get(name, 0) for name in dataclasses.astuple(spread.axes))
        shares[device] = Share(batch, heads // copies, context)
    return split, shares


def _meet(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)
