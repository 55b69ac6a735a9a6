"""Caches whose layers differ: groups of layers, each a cache of its own, under one layer number."""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, Self, TypeVar

import jax
from jaxtyping import Array, Bool, Int

from jaxkv.addressing import Contiguous
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
      cross: for layers with cross-attention, the config of each kind of keys and values of an
        encoder's tokens, beside those of the text or in their place. ``max_context_length`` is the
        most encoder tokens per sequence, ``batch_size`` that of the groups.
      cross_of_layer: for each layer of the model, the number of its kind in ``cross``, -1 for one
        without cross-attention. ``()``: no layer has any.

    Raises:
      ConfigError: groups that do not fit together, or layers that do not fit them.

    >>> import jaxkv
    >>> full = jaxkv.KVCacheConfig(2, 8192, num_kv_heads=4, head_dim=64)
    >>> local = dataclasses.replace(full, num_layers=4, addressing=jaxkv.Ring(window=512))
    >>> config = HybridConfig((local, full), group_of_layer=(0, 0, 1, 0, 0, 1))
    >>> config.num_layers, config.size_bytes == local.size_bytes + full.size_bytes
    (6, True)

    Whisper-tiny, whose 4 layers attend to the text and to 1,500 encoder tokens:

    >>> text = jaxkv.KVCacheConfig(4, 448, num_kv_heads=6, head_dim=64)
    >>> audio = text.replace(max_context_length=1500)
    >>> whisper = HybridConfig((text,), (0,) * 4, cross=(audio,), cross_of_layer=(0,) * 4)
    >>> whisper.size_bytes == 2 * 4 * 6 * 64 * 2 * (448 + 1500)
    True
    """

    groups: tuple[KVCacheConfig, ...]
    group_of_layer: tuple[int, ...]
    source_of_layer: tuple[int, ...] = ()
    states: tuple[StateConfig, ...] = ()
    cross: tuple[KVCacheConfig, ...] = ()
    cross_of_layer: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in ("groups", "states", "cross"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for field in ("group_of_layer", "cross_of_layer"):
            object.__setattr__(self, field, tuple(map(int, getattr(self, field))))
        self._check_sources()
        self._check_states()
        self._check_cross()
        held = [group.num_layers for group in self.groups]
        named = [len(self.layers_of(number)) for number in range(len(self.groups))]
        keeps_more = {layer for each in self.states for layer in each.layers}
        keeps_more |= {layer for layer, number in enumerate(self.cross_of_layer) if number >= 0}
        layers = enumerate(self.group_of_layer)
        known = all(0 <= group < len(held) or layer in keeps_more for layer, group in layers)
        if held != named or not known or not held:
            raise ConfigError(
                f"HybridConfig: group_of_layer must name each group as often as it has layers, "
                f"{held} times, and be -1 for layers with nothing but a state or cross-attention, "
                f"got {list(self.group_of_layer)}."
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

    def _check_cross(self) -> None:
        held = [each.num_layers for each in self.cross]
        named = [self.cross_of_layer.count(number) for number in range(len(held))]
        known = set(self.cross_of_layer) <= {-1, *range(len(held))}
        every = len(self.cross_of_layer) == (self.num_layers if held else 0)
        if held != named or not known or not every:
            raise ConfigError(
                f"HybridConfig: cross_of_layer must name, for {self.num_layers} layers, each of "
                f"cross as often as it has layers, {held} times, and be -1 for the others, got "
                f"{list(self.cross_of_layer)}."
            )
        for each in self.cross:
            plain = each.addressing == Contiguous() and each.placement is None
            if not plain or each.newest is not None:
                raise ConfigError(
                    "HybridConfig: keys and values of cross-attention are on the device and "
                    f"contiguous, without newest tokens, got {each.addressing}, {each.placement} "
                    f"and {each.newest}."
                )

    def _source(self, layer: int) -> int:
        return self.source_of_layer[layer] if self.source_of_layer else layer

    @property
    def kinds(self) -> tuple[KVCacheConfig | StateConfig, ...]:
        """All that layers keep: the groups, the states, and what cross-attention reads."""
        return (*self.groups, *self.states, *self.cross)

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
        """Exact bytes of all keys and values, and of the states."""
        return sum(each.size_bytes for each in self.kinds)

    @property
    def index_bytes(self) -> int:
        """Exact bytes of what stands beside them."""
        return sum(each.index_bytes for each in self.kinds)

    def replace(self, **fields: Any) -> Self:
        """The same with other ``max_context_length``, ``batch_size`` or ``codec`` in all groups.

        Of cross-attention ``batch_size`` and ``codec`` are replaced, and not the encoder's tokens.
        """
        groups = tuple(group.replace(**fields) for group in self.groups)

        def of(names: set[str], kinds: tuple[Any, ...]) -> tuple[Any, ...]:
            own = {name: fields[name] for name in fields.keys() & names}
            return tuple(each.replace(**own) for each in kinds)

        states = of({"batch_size"}, self.states)
        cross = of({"batch_size", "codec"}, self.cross)
        return dataclasses.replace(self, groups=groups, states=states, cross=cross)

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
            raise ValueError(f"layer {layer} keeps {self._instead_of_text(layer)}")
        if to_write and source != layer:
            raise ValueError(
                f"layer {layer} keeps no keys and values: it reads those of layer {source}. "
                "attend reads them; leave append out."
            )
        return group, self.layers_of(group).index(source)

    def _instead_of_text(self, layer: int) -> str:
        """What a layer keeps that has no keys and values of the text, and the verbs for it."""
        if self.cross_of_layer and self.cross_of_layer[layer] >= 0:
            return (
                "keys and values of an encoder's tokens alone, and none of the text. "
                "jaxkv.attend_cross reads them, and jaxkv.write_cross writes them."
            )
        return (
            "a state, and neither keys nor values. jaxkv.state reads it, and jaxkv.with_state "
            "writes it."
        )

    @property
    def codec_name(self) -> str:
        """The names of the codecs, each once, for messages and tables."""
        kinds = (*self.groups, *self.cross)
        return " + ".join(dict.fromkeys(each.codec_name for each in kinds))

    def to_dict(self) -> dict[str, Any]:
        """Its fields as plain values."""
        groups = [group.to_dict() for group in self.groups]
        layers: dict[str, Any] = {"group_of_layer": list(self.group_of_layer)}
        if self.source_of_layer:
            layers["source_of_layer"] = list(self.source_of_layer)
        if self.states:
            layers["states"] = [each.to_dict() for each in self.states]
        if self.cross:
            layers["cross"] = [each.to_dict() for each in self.cross]
            layers["cross_of_layer"] = list(self.cross_of_layer)
        return {"groups": groups, **layers}

    def describe(self) -> str:
        """One line for messages."""
        kinds = [each.describe() for each in self.groups]
        kinds += [each.describe() for each in self.states]
        kinds += [f"cross-attention: {each.describe()}" for each in self.cross]
        return " + ".join(f"({each})" for each in kinds)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["groups", "states", "cross"],
    meta_fields=["config"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class HybridCache:
    """One cache value for layers that differ. Made by `create` from a `HybridConfig`.

    The verbs take it as they take a `KVCache`; ``layer`` counts over all groups, and is static.

    Attributes:
      groups: a `KVCache` for each group of layers.
      config: the static description.
      states: a `StateCache` for each kind of state.
      cross: for each kind of keys and values of an encoder's tokens a `KVCache`, whose lengths are
        numbers of encoder tokens.

    >>> import jaxkv
    >>> group = jaxkv.KVCacheConfig(1, 64, num_kv_heads=1, head_dim=4)
    >>> cache = jaxkv.create(HybridConfig((group, group), group_of_layer=(0, 1)))
    >>> len(cache.groups), cache.size_bytes
    (2, 2048)
    """

    groups: tuple[KVCache, ...]
    config: HybridConfig
    states: tuple[StateCache, ...] = ()
    cross: tuple[KVCache, ...] = ()

    @property
    def kinds(self) -> tuple[KVCache | StateCache, ...]:
        """All that layers keep: the groups, the states, and what cross-attention reads."""
        return (*self.groups, *self.states, *self.cross)

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
        """Bytes of all keys, values and states; equal to ``config.size_bytes``."""
        return sum(each.size_bytes for each in self.kinds)

    def with_groups(
        self,
        groups: Sequence[KVCache],
        states: Sequence[StateCache] | None = None,
        cross: Sequence[KVCache] | None = None,
    ) -> "HybridCache":
        """The same layers in these groups, states and cross-attention; what it has if None."""
        kept = self.states if states is None else tuple(states)
        read = self.cross if cross is None else tuple(cross)
        config = dataclasses.replace(
            self.config,
            groups=tuple(group.config for group in groups),
            states=tuple(each.config for each in kept),
            cross=tuple(each.config for each in read),
        )
        return HybridCache(tuple(groups), config, kept, read)

    def __repr__(self) -> str:
        kinds = [repr(each) for each in (*self.groups, *self.states)]
        kinds += [f"cross-attention: {each!r}" for each in self.cross]
        size = format_bytes(self.config.size_bytes)
        return f"HybridCache({self.config.num_layers} layers, {size}: {', '.join(kinds)})"

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        """What treescope shows: an object to unfold."""
        from treescope import repr_lib

        return repr_lib.render_object_constructor(
            object_type=type(self),
            attributes={
                "groups": self.groups,
                "states": self.states,
                "cross": self.cross,
                "config": self.config,
            },
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


def locate_cross(config: AnyConfig, layer: Any) -> tuple[int, int]:
    """The number in ``cross`` of what a layer's cross-attention reads, and its number there.

    Raises:
      IndexError, TypeError: as `check_static_layer`.
      ValueError: the layer has no cross-attention.
    """
    layer = check_static_layer(config, layer)
    kinds = config.cross_of_layer or (-1,) * config.num_layers
    if (number := kinds[layer]) < 0:
        having = [other for other, kind in enumerate(kinds) if kind >= 0]
        raise ValueError(
            f"layer {layer} has no cross-attention: those that do are "
            f"{having or 'none of this cache'}."
        )
    return number, kinds[:layer].count(number)


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
