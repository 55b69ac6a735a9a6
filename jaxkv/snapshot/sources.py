"""What a save reads: the tokens of a cache, one device's or those of several together."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.addressing import Index
from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.kv_cache import KVCache
from jaxkv.cache.shards import everywhere
from jaxkv.codecs import leaf_specs
from jaxkv.programs import one_program
from jaxkv.snapshot.group import Group
from jaxkv.snapshot.kept import KeptSource
from jaxkv.snapshot.on_devices import parts_of
from jaxkv.snapshot.places import Places, buffer_of_layers, places_of, written_of
from jaxkv.snapshot.split import Share, Split, shares_of


class Source(Protocol):
    """A cache to be saved: what the file says of it, and its tensors."""

    @property
    def described(self) -> Group: ...

    def pieces(self, sequence: int, leaf: str) -> Iterator[np.ndarray]:
        """One sequence's positions, or a leaf of its codec, layer by layer."""
        ...

    def state(self, name: str) -> np.ndarray:
        """What its codec has learned."""
        ...


class Sources(NamedTuple):
    """Those of one kind of layer: of its cache and, where it has one, that of its newest tokens."""

    own: Source
    newest: Source | None

    @classmethod
    def of(cls, cache: KVCache) -> "Sources":
        """All on one device."""
        own: Source = KeptSource.of(cache) if cache.index.per_head else OneSource.of(cache)
        return cls(own, None if cache.newest is None else OneSource.of(cache.newest))

    @property
    def described(self) -> Group:
        newest = None if self.newest is None else self.newest.described.held
        return dataclasses.replace(self.own.described, newest=newest)

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """A tensor of the file by its name in `Group.layout`."""
        source = self.own
        if self.newest is not None and name.startswith("newest."):
            source, name = self.newest, name.removeprefix("newest.")
        if name in source.described.config.codec_state:
            return iter([source.state(name)])
        sequence, leaf = name.split(".", 1)
        return source.pieces(int(sequence), leaf)


@dataclasses.dataclass(frozen=True)
class OneSource:
    """A cache of one device, and where its tokens are."""

    cache: KVCache
    places: list[Places]

    @classmethod
    def of(cls, cache: KVCache) -> "OneSource":
        return cls(cache, places_of(cache.index))

    @property
    def described(self) -> Group:
        written = tuple(written_of(self.cache.index).tolist())
        return Group(self.cache.config, written, tuple(len(p.slots) for p in self.places))

    def pieces(self, sequence: int, leaf: str) -> Iterator[np.ndarray]:
        positions, slots = self.places[sequence]
        if leaf == "positions":
            yield positions
            return
        config, layers = self.cache.config, buffer_of_layers(self.cache, leaf)
        dtype = leaf_specs(config.codec, config.head_dim)[leaf].dtype
        for layer in range(config.num_layers):
            yield np.asarray(layers[layer][:, slots]).view(jnp.dtype(dtype))

    def state(self, name: str) -> np.ndarray:
        return np.asarray(self.cache.codec_state[name])


@dataclasses.dataclass(frozen=True)
class SharedSource:
    """A cache that is spread over devices, the tokens of each where they are."""

    described: Group
    places: list[Places]
    split: Split
    sources: Mapping[Share, Source]

    def pieces(self, sequence: int, leaf: str) -> Iterator[np.ndarray]:
        if leaf == "positions":
            yield self.places[sequence].positions
            return
        held, config = self.described.held[sequence], self.described.config
        parts = []
        for share, source in self.sources.items():
            rows = self.split.sequences(share, len(self.described.held))
            if sequence in rows:
                parts.append((share, source.pieces(sequence - rows.start, leaf)))
        for _ in range(config.num_layers):
            pieces = [(share, next(layers)) for share, layers in parts]
            sides, _, _, *vector = pieces[0][1].shape
            shape = (sides, held, config.num_kv_heads, *vector)
            whole = np.empty(shape, pieces[0][1].dtype)
            for share, piece in pieces:
                heads = self.split.kv_heads(share, config.num_kv_heads)
                whole[:, share.context :: self.split.context, heads.start : heads.stop] = piece
            yield whole

    def state(self, name: str) -> np.ndarray:
        config = self.described.config
        shape, dtype = config.codec_state[name]
        whole = np.empty(shape, dtype)
        for share, source in self.sources.items():
            heads = self.split.kv_heads(share, config.num_kv_heads)
            whole[:, :, heads.start : heads.stop] = source.state(name)
        return whole


Shares = Mapping[Share, list[Sources]]  # what is held of each kind of layer


def sources_of_shares(cache: AnyCache) -> Shares:
    """What devices of this process hold of a cache that is spread, each share once."""
    spread = cache.groups[0].spread
    if spread is None:
        return {}
    _, shares = shares_of(spread, cache.config)
    found: dict[Share, list[Sources]] = {}
    for group in cache.groups:
        here: dict[Share, KVCache] = {}
        for device, part in parts_of(group).items():
            here.setdefault(shares[device], part)
        for share, part in here.items():
            found.setdefault(share, []).append(Sources.of(part))
    return found


def sources_of_all(cache: AnyCache, split: Split, shares: Shares) -> list[Sources]:
    """What of a cache that is spread is in some shares, as one; what is described is all of it."""
    indices = iter(jax.device_get(_indices(cache)))

    def source(cache: KVCache, of: dict[Share, Any]) -> SharedSource:
        index = next(indices)
        lengths = index.lengths.reshape(-1).tolist()
        places = places_of(index) if split.context == 1 else [_all_of(each) for each in lengths]
        held = tuple(len(each.positions) for each in places)
        described = Group(cache.config, tuple(written_of(index).tolist()), held)
        return SharedSource(described, places, split, of)

    found = []
    for number, group in enumerate(cache.groups):
        own = source(group, {share: each[number].own for share, each in shares.items()})
        newest = None
        if group.newest is not None:
            of = {share: each[number].newest for share, each in shares.items()}
            newest = source(group.newest, of)
        found.append(Sources(own, newest))
    return found


def _all_of(length: int) -> Places:
    positions = np.arange(length, dtype=np.int32)
    return Places(positions, positions)


@one_program()
def _indices(cache: AnyCache) -> list[Index]:
    caches = [each for group in cache.groups for each in (group, group.newest) if each is not None]
    return everywhere(cache, [each.index for each in caches])
