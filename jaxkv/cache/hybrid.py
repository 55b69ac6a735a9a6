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
from jaxkv.cache.state import StateCache, StateConfig
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
      source_of_layer: for each layer, the layer whose keys and values it reads: itself, or an
        earlier one, and then it keeps none (Gemma 3n's last 15 of 35). ``()``: all keep their own.
      states: the kinds of state per sequence that layers keep, in place of keys and values (their
        ``group_of_layer`` is -1) or beside them; see `StateConfig`.

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
    source_of_layer: tuple[int, ...] = ()
    states: tuple[StateConfig, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        object.__setattr__(self, "group_of_layer", tuple(map(int, self.group_of_layer)))
        object.__setattr__(self, "states", tuple(self.states))
        self._check_sources()
        self._check_states()
        held = [group.num_layers for group in self.groups]
        named = [len(self.layers_of(number)) for number in range(len(self.groups))]
        stateful = {layer for each in self.states for layer in each.layers}
        layers = enumerate(self.group_of_layer)
        known = all(0 <= group < len(held) or layer in stateful for layer, group in layers)
        if held != named or not known or not held:
            raise ConfigError(
                f"HybridConfig: group_of_layer must name each group as often as it has layers, "
                f"{held} times, and be -1 for layers with nothing but a state, got "
                f"{list(self.group_of_layer)}."
            )
        for field in ("max_context_length", "batch_size"):
            kinds = self.groups if field == "max_context_length" else self.kinds
            values = [getattr(kind, field) for kind in kinds]
            if len(set(values)) > 1:
                raise ConfigError(f"HybridConfig: all groups need the same {field}, got {values}.")

    def _check_sources(self) -> None:
        """Sources as ints, none where each layer has its own."""
        every, sources = range(self.num_layers), tuple(map(int, self.source_of_layer))
        object.__setattr__(self, "source_of_layer", () if sources == tuple(every) else sources)
        fits = len(sources) in (0, len(every)) and all(
            0 <= source <= layer
            and sources[source] == source
            and self.group_of_layer[source] == self.group_of_layer[layer]
            for layer, source in zip(every, sources, strict=False)
        )
        if not fits:
            raise ConfigError(
                f"HybridConfig: source_of_layer must name, for each of {len(every)} layers, itself "
                f"or an earlier layer of its group that keeps its own, got {list(sources)}."
            )

    def _check_states(self) -> None:
        layers = [layer for each in self.states for layer in each.layers]
        if len(set(layers)) < len(layers) or not set(layers) <= set(range(self.num_layers)):
            raise ConfigError(
                f"HybridConfig: states must be of layers 0 to {self.num_layers - 1}, each in one "
                f"at most, got {layers}."
            )

    def _source(self, layer: int) -> int:
        return self.source_of_layer[layer] if self.source_of_layer else layer

    @property
    def kinds(self) -> tuple[KVCacheConfig | StateConfig, ...]:
        """All that layers keep: the groups, and the states."""
        return (*self.groups, *self.states)

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
        """Exact bytes of the keys and values of all groups, and of the states."""
        return sum(each.size_bytes for each in self.kinds)

    @property
    def index_bytes(self) -> int:
        """Exact bytes of what stands beside them."""
        return sum(each.index_bytes for each in self.kinds)

    def replace(self, **fields: Any) -> Self:
        """The same with other ``max_context_length``, ``batch_size`` or ``codec`` in all groups."""
        groups = tuple(group.replace(**fields) for group in self.groups)
        of_states = {name: fields[name] for name in fields.keys() & {"batch_size"}}
        states = tuple(each.replace(**of_states) for each in self.states)
        return dataclasses.replace(self, groups=groups, states=states)

    @property
    def host_bytes(self) -> int:
        """Exact bytes in host memory, of all groups."""
        return sum(group.host_bytes for group in self.groups)

    def layers_of(self, group: int) -> tuple[int, ...]:
        """The numbers of a group's layers that keep their own, counted over all groups."""
        return tuple(
            layer
            for layer, number in enumerate(self.group_of_layer)
            if number == group and self._source(layer) == layer
        )

    def locate(self, layer: Any, *, to_write: bool = False) -> tuple[int, int]:
        """The group of a layer, and the number there of the one whose keys and values it reads.

        Raises:
          IndexError: no such layer.
          TypeError: it is traced, and layers of a hybrid cache are arrays of different shapes.
          ValueError: it keeps none, or is to be written and keeps none of its own.
        """
        layer = check_static_layer(self, layer)
        source, group = self._source(layer), self.group_of_layer[layer]
        if group < 0:
            raise ValueError(
                f"layer {layer} keeps a state, and neither keys nor values. jaxkv.state reads it, "
                "and jaxkv.with_state writes it."
            )
        if to_write and source != layer:
            raise ValueError(
                f"layer {layer} keeps no keys and values: it reads those of layer {source}. "
                "attend reads them; leave append out."
            )
        return group, self.layers_of(group).index(source)

    @property
    def codec_name(self) -> str:
        """The names of the codecs, each once, for messages and tables."""
        return " + ".join(dict.fromkeys(group.codec_name for group in self.groups))

    def to_dict(self) -> dict[str, Any]:
        """Its fields as plain values."""
        groups = [group.to_dict() for group in self.groups]
        layers: dict[str, Any] = {"group_of_layer": list(self.group_of_layer)}
        if self.source_of_layer:
            layers["source_of_layer"] = list(self.source_of_layer)
        if self.states:
            layers["states"] = [each.to_dict() for each in self.states]
        return {"groups": groups, **layers}

    def describe(self) -> str:
        """One line for messages."""
        return " + ".join(f"({each.describe()})" for each in self.kinds)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["groups", "states"], meta_fields=["config"]
)
@dataclasses.dataclass(frozen=True, repr=False)
class HybridCache:
    """One cache value for layers that differ. Made by `create` from a `HybridConfig`.

    The verbs take it as they take a `KVCache`; ``layer`` counts over all groups, and is static.

    Attributes:
      groups: a `KVCache` for each group of layers.
      config: the static description.
      states: a `StateCache` for each kind of state.

    >>> import jaxkv
    >>> group = jaxkv.KVCacheConfig(1, 64, num_kv_heads=1, head_dim=4)
    >>> cache = jaxkv.create(HybridConfig((group, group), group_of_layer=(0, 1)))
    >>> len(cache.groups), cache.size_bytes
    (2, 2048)
    """

    groups: tuple[KVCache, ...]
    config: HybridConfig
    states: tuple[StateCache, ...] = ()

    @property
    def kinds(self) -> tuple[KVCache | StateCache, ...]:
        """All that layers keep: the groups, and the states."""
        return (*self.groups, *self.states)

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
        """Bytes of keys, values and states; equal to ``config.size_bytes``."""
        return sum(each.size_bytes for each in self.kinds)

    def with_groups(
        self, groups: Sequence[KVCache], states: Sequence[StateCache] | None = None
    ) -> "HybridCache":
        """The same layers in these groups, with these states; those that it has if None."""
        kept = self.states if states is None else tuple(states)
        config = dataclasses.replace(
            self.config,
            groups=tuple(group.config for group in groups),
            states=tuple(each.config for each in kept),
        )
        return HybridCache(tuple(groups), config, kept)

    def __repr__(self) -> str:
        groups = ", ".join(map(repr, self.kinds))
        size = format_bytes(self.config.size_bytes)
        return f"HybridCache({self.config.num_layers} layers, {size}: {groups})"

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        """What treescope shows: an object to unfold."""
        from treescope import repr_lib

        return repr_lib.render_object_constructor(
            object_type=type(self),
            attributes={"groups": self.groups, "states": self.states, "config": self.config},
            path=path,
            subtree_renderer=subtree_renderer,
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: each group, and how full it is."""
        size = f"{format_bytes(self.config.size_bytes)} ({self.config.size_bytes:,} bytes)"
        heading = occupancy_html("HybridCache", f"{self.config.num_layers} layers, {size}", [], "")
        groups = "".join(each._repr_html_() for each in self.kinds)
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
