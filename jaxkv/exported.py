"""What `jax.export` needs to write a cache's structure into a file: its static part, as JSON."""

import dataclasses
import json
from typing import Any

import jax.export
import numpy as np

from jaxkv.addressing import (
    Chunked,
    Contiguous,
    Kept,
    KeptByHead,
    Paged,
    PagedIndex,
    PolicyState,
    Ring,
)
from jaxkv.addressing.contiguous import ContiguousIndex
from jaxkv.addressing.kept import KeptEvenlyIndex
from jaxkv.addressing.kept_by_head import KeptByHeadIndex
from jaxkv.addressing.ring import RingIndex
from jaxkv.cache.config import KVCacheConfig
from jaxkv.cache.hybrid import HybridCache, HybridConfig
from jaxkv.cache.kv_cache import KVCache
from jaxkv.cache.newest import Newest, NewestIndex, NewestSlots
from jaxkv.cache.state import StateCache, StateConfig, StateIndex
from jaxkv.codecs import CODECS, KeysValues, Rope
from jaxkv.placement import Bounds, HostMemory, Resident

_NODES = (
    *(KVCache, HybridCache, StateCache, StateIndex, Resident, Bounds, PolicyState),
    *(ContiguousIndex, PagedIndex, RingIndex, KeptEvenlyIndex, KeptByHeadIndex, NewestIndex),
)
_STATIC = {
    kind.__name__: kind
    for kind in (
        *(KVCacheConfig, HybridConfig, StateConfig, HostMemory, Newest),
        *(Chunked, Contiguous, Paged, Ring, Kept, KeptByHead, NewestSlots),
        *map(type, CODECS.values()),
        *(KeysValues, Rope),
    )
}
_KIND = "kind"  # no class has a field of this name


def _plain(static: Any) -> Any:
    if type(static) in _STATIC.values():
        names = [field.name for field in dataclasses.fields(static)]
        fields = {name: _plain(getattr(static, name)) for name in names}
        return {_KIND: type(static).__name__, **fields}
    if isinstance(static, tuple | list):
        return [_plain(part) for part in static]
    if isinstance(static, np.generic):
        return static.item()
    if static is None or isinstance(static, bool | int | float | str):
        return static
    raise TypeError(
        f"jax.export: {static!r} is not of jaxkv, and cannot be written into a file. Export a "
        "function of jax.tree.leaves(cache), with the cache made of them inside: "
        "jax.tree.unflatten(jax.tree.structure(cache), leaves)."
    )


def _built(plain: Any) -> Any:
    if isinstance(plain, dict):
        fields = {name: _built(value) for name, value in plain.items() if name != _KIND}
        return _STATIC[plain[_KIND]](**fields)
    return tuple(map(_built, plain)) if isinstance(plain, list) else plain


for _node in _NODES:
    jax.export.register_pytree_node_serialization(
        _node,
        serialized_name=f"jaxkv.{_node.__name__}",
        serialize_auxdata=lambda static: json.dumps(_plain(static)).encode(),
        deserialize_auxdata=lambda text: _built(json.loads(text.decode())),
    )
