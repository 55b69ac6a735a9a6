"""Caches whose layers differ: groups of layers, each a cache of its own, under one layer number."""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, Self, TypeVar

import jax
from jaxtyping import Array, Bool, Int

from jaxkv.cache.config import KVCacheConfig
from jaxkv.cache.kv_cache import KVCache
from jaxkv.devices import is_concrete
from jaxkv.errors import ConfigError
from jaxkv.show.html import occupancy_html
from jaxkv.show.text import format_bytes


@dataclasses.dataclass(frozen=True)
class HybridConfig:
    """Layers with different windows, head counts, head sizes or codecs in one cache.

    Args:
      groups: the config of each kind of layer, with its number of layers. The same
        ``max_context_length`` and ``batch_size`` in all.
      group_of_layer: for each layer of the model, the number of its group.

    Raises:
      ConfigError: groups that do not fit together, or layers that do not fit them.

    >>> import jaxkv
    >>> full = jaxkv.KVCacheConfig(2, 8192, num_kv_heads=4, head_dim=64)
    >>> local = dataclasses.replace(full, num_layers=4, addressing=jaxkv.Ring(window=512))
    >>> config = HybridConfig((local, full), group_of_layer=(0, 0, 1, 0, 0, 1))
    >>> config.num_layers, config.size_bytes == local.size_bytes + full.size_bytes
    (6, True)
    """

    groups: tuple[KVCacheConfig, ...]
    group_of_layer: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        object.__setattr__(self, "group_of_layer", tuple(map(int, self.group_of_layer)))
        held = [group.num_layers for group in self.groups]
        named = [self.group_of_layer.count(number) for number in range(len(self.groups))]
        if held != named or sum(held) != len(self.group_of_layer) or not held:
            raise ConfigError(
                f"HybridConfig: group_of_layer must name each group as often as it has layers, "
                f"{held} times, got {list(self.group_of_layer)}."
            )
        for field in ("max_context_length", "batch_size"):
            values = [getattr(group, field) for group in self.groups]
            if len(set(values)) > 1:
                raise ConfigError(f"HybridConfig: all groups need the same {field}, got {values}.")

    @property
    def num_layers(self) -> int:
        return len(self.group_of_layer)

    @property
    def max_context_length(self) -> int:
        return self.groups[0].max_context_length

    @property
    def batch_size(self) -> int | None:
        return self.groups[0].batch_size

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.groups[0].batch_shape

    @property
    def size_bytes(self) -> int:
        """Exact bytes of the keys and values of all groups."""
        return sum(group.size_bytes for group in self.groups)

    @property
    def index_bytes(self) -> int:
        """Exact bytes of what stands beside them."""
        return sum(group.index_bytes for group in self.groups)

    def replace(self, **fields: Any) -> Self:
        """The same with other ``max_context_length``, ``batch_size`` or ``codec`` in all groups."""
        groups = tuple(group.replace(**fields) for group in self.groups)
        return dataclasses.replace(self, groups=groups)

    @property
    def host_bytes(self) -> int:
        """Exact bytes in host memory, of all groups."""
        return sum(group.host_bytes for group in self.groups)

    def layers_of(self, group: int) -> tuple[int, ...]:
        """The numbers of a group's layers, counted over all groups."""
        return tuple(layer for layer, number in enumerate(self.group_of_layer) if number == group)

    def locate(self, layer: Any) -> tuple[int, int]:
        """The group of a layer, and its number within the group.

        Raises:
          IndexError: no such layer.
          TypeError: it is traced, and layers of a hybrid cache are arrays of different shapes.
        """
        layer = check_static_layer(self, layer)
        group = self.group_of_layer[layer]
        return group, self.group_of_layer[:layer].count(group)

    @property
    def codec_name(self) -> str:
        """The names of the codecs, each once, for messages and tables."""
        return " + ".join(dict.fromkeys(group.codec_name for group in self.groups))

    def to_dict(self) -> dict[str, Any]:
        """Its fields as plain values."""
        groups = [group.to_dict() for group in self.groups]
        return {"groups": groups, "group_of_layer": list(self.group_of_layer)}

    def describe(self) -> str:
        """One line for messages."""
        return " + ".join(f"({group.describe()})" for group in self.groups)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["groups"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True, repr=False)
class HybridCache:
    """One cache value for layers that differ. Made by `create` from a `HybridConfig`.

    The verbs take it as they take a `KVCache`; ``layer`` counts over all groups, and is static.

    Attributes:
      groups: a `KVCache` for each group of layers.
      config: the static description.

    >>> import jaxkv
    >>> group = jaxkv.KVCacheConfig(1, 64, num_kv_heads=1, head_dim=4)
    >>> cache = jaxkv.create(HybridConfig((group, group), group_of_layer=(0, 1)))
    >>> len(cache.groups), cache.size_bytes
    (2, 2048)
    """

    groups: tuple[KVCache, ...]
    config: HybridConfig

    @property
    def lengths(self) -> Int[Array, "*batch"]:
        """Tokens in each sequence."""
        return self.groups[0].lengths

    @property
    def overflowed(self) -> Bool[Array, "*batch"]:
        """True for a sequence that some group could not hold all tokens of."""
        return functools.reduce(lambda a, b: a | b, (group.overflowed for group in self.groups))

    @property
    def size_bytes(self) -> int:
        """Bytes of the keys and values; equal to ``config.size_bytes``."""
        return sum(group.size_bytes for group in self.groups)

    def with_groups(self, groups: Sequence[KVCache]) -> "HybridCache":
        """The same layers in these groups."""
        configs = tuple(group.config for group in groups)
        config = dataclasses.replace(self.config, groups=configs)
        return HybridCache(tuple(groups), config)

    def __repr__(self) -> str:
        groups = ", ".join(map(repr, self.groups))
        size = format_bytes(self.config.size_bytes)
        return f"HybridCache({self.config.num_layers} layers, {size}: {groups})"

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        """What treescope shows: an object to unfold."""
        from treescope import repr_lib

        return repr_lib.render_object_constructor(
            object_type=type(self),
            attributes={"groups": self.groups, "config": self.config},
            path=path,
            subtree_renderer=subtree_renderer,
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: each group, and how full it is."""
        size = f"{format_bytes(self.config.size_bytes)} ({self.config.size_bytes:,} bytes)"
        heading = occupancy_html("HybridCache", f"{self.config.num_layers} layers, {size}", [], "")
        groups = "".join(group._repr_html_() for group in self.groups)
        return f'{heading}<div style="margin-left: 16px">{groups}</div>'


# What functions that do not care how layers are kept take and return.
AnyConfig = KVCacheConfig | HybridConfig
AnyCache = KVCache | HybridCache
SameCache = TypeVar("SameCache", bound=AnyCache)  # of the type that was given


def check_static_layer(config: AnyConfig, layer: Any) -> int:
    """A layer number that exists.

    Raises:
      IndexError: it does not.
      TypeError: it is traced, and layers of a hybrid cache are arrays of different shapes.
    """
    if not is_concrete(layer):
        raise TypeError(
            "the layer of a hybrid cache must be a plain int: its layers have different shapes, so "
            "a scan cannot go over all of them. Scan over the layers of each group instead."
        )
    number, count = operator.index(layer), config.num_layers
    if not 0 <= number < count:
        raise IndexError(f"layer {number} is out of range: the cache has layers 0 to {count - 1}.")
    return number
