"""What a snapshot says of itself: plain JSON, of which every field is checked when read."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxkv.addressing import ADDRESSINGS, Addressing, Kept, KeptByHead
from jaxkv.cache.config import KVCacheConfig
from jaxkv.cache.hybrid import AnyConfig, HybridConfig
from jaxkv.cache.newest import Newest
from jaxkv.cache.state import StateConfig
from jaxkv.codecs import CODECS, Codec, KeysValues, Rope
from jaxkv.errors import SnapshotError
from jaxkv.snapshot import states
from jaxkv.snapshot.container import Layout, Spec
from jaxkv.snapshot.fingerprint import Fingerprint
from jaxkv.snapshot.group import Group
from jaxkv.snapshot.parts import Parts

FORMATS = (1, 2)  # one file; several, of which the first names the others
_LARGEST = 2**31 - 1
_SINCE_0_7 = ".sinks"  # of a `Centred` codec's state; zeros for all that was stored before
_SHAPE = ("num_layers", "max_context_length", "num_kv_heads", "head_dim", "batch_size")
_VALUES = ("value_dim", "values_in_keys")  # only where values are not as wide as keys, beside them


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `jaxkv.snapshot.inspect` shows.

    Attributes:
      saved_by: the version of jaxkv.
      lengths: tokens of each sequence.
      model: the fingerprint of the model that wrote the cache, or None.
      has_tokens: whether the token ids are in the file too.
      groups: one, or for a hybrid cache one a kind of layer.
      group_of_layer: as in `HybridConfig`; None for a plain cache.
      source_of_layer: as in `HybridConfig`.
      states: as in `HybridConfig`.
      cross: likewise, one a kind, whose tokens are those of an encoder.
      cross_of_layer: as in `HybridConfig`.
      parts: where the vectors are, if several processes saved them; None for in this file.
    """

    saved_by: str
    lengths: tuple[int, ...]
    model: Fingerprint | None
    has_tokens: bool
    groups: tuple[Group, ...]
    group_of_layer: tuple[int, ...] | None
    source_of_layer: tuple[int, ...] = ()
    parts: Parts | None = None
    states: tuple[StateConfig, ...] = ()
    cross: tuple[Group, ...] = ()
    cross_of_layer: tuple[int, ...] = ()

    @property
    def config(self) -> AnyConfig:
        """The config of the cache that was saved."""
        configs, cross = (
            tuple(group.config for group in kinds) for kinds in (self.groups, self.cross)
        )
        if self.group_of_layer is None:
            return configs[0]
        layers = self.group_of_layer, self.source_of_layer
        return HybridConfig(configs, *layers, self.states, cross, self.cross_of_layer)

    @property
    def kinds(self) -> tuple[Group, ...]:
        """All that has tokens: the groups, and what cross-attention reads."""
        return (*self.groups, *self.cross)

    def lengths_of(self, number: int) -> tuple[int, ...]:
        """The tokens of each sequence in one of `kinds`."""
        return self.lengths if number < len(self.groups) else self.kinds[number].held

    def layout(self) -> Layout:
        """Its tensors: ``sequence.tokens`` and, where it has no parts, ``group.sequence.leaf``."""
        tensors = [*self._vectors()] if self.parts is None else []
        tensors += [*self.token_layout().items(), *self.state_layout().items()]
        layout = dict(tensors)
        if len(layout) < len(tensors):
            names = [name for name, _ in tensors]
            twice = {name for name in names if names.count(name) > 1}
            raise SnapshotError(
                f"Two tensors of the file would be called {', '.join(sorted(twice))}. Give the "
                "state of the codec or policy another name."
            )
        return layout

    @staticmethod
    def may_lack(name: str) -> bool:
        """Whether files of jaxkv 0.6 are without this tensor, which is zeros then."""
        return name.endswith(_SINCE_0_7)

    def token_layout(self) -> Layout:
        """Those of the token ids."""
        rows = enumerate(self.lengths) if self.has_tokens else ()
        return {f"{row}.tokens": Spec("int32", (length,)) for row, length in rows}

    def state_layout(self) -> Layout:
        """Those of the states."""
        return states.layout_of(self.states, len(self.lengths))

    def _vectors(self) -> Iterator[tuple[str, Spec]]:
        for number, group in enumerate(self.kinds):
            for name, spec in group.layout(self.lengths_of(number)):
                yield f"{number}.{name}", spec

    def to_json(self) -> dict[str, Any]:
        groups = [_group_json(group) for group in self.groups]
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if not self.source_of_layer:  # so that files stay what they were
            del fields["source_of_layer"]
        fields["states"] = states.to_json(self.states)
        fields["cross"] = [_group_json(group) for group in self.cross]
        for name in ("states", "cross", "cross_of_layer"):
            if not fields[name]:
                del fields[name]
        parts = fields.pop("parts")
        if parts is None:  # as files ever were
            return {"format": 1, **fields, "groups": groups}
        return {"format": 2, **fields, "groups": groups, "parts": dataclasses.asdict(parts)}


def read(
    path: Path, json: Any, codec: Codec | None = None, addressing: Addressing | None = None
) -> Manifest:
    """The manifest in a file's header.

    Args:
      path: for messages.
      json: what the header says.
      codec, addressing: those of the saved cache, where jaxkv does not know them by name.

    Raises:
      SnapshotError: a field that is missing, not there in this format, or out of its range.
    """
    reader = _Reader(path, codec, addressing)
    if isinstance(json, dict) and json.get("format") not in FORMATS:
        raise SnapshotError(
            f"{path} has format {json.get('format')!r}; this version of jaxkv reads "
            f"{' and '.join(map(str, FORMATS))}. It was saved by {json.get('saved_by')!r}."
        )
    if isinstance(json, dict) and "part" in json:
        raise SnapshotError(f"{path} is one part of a snapshot. Load the file that names it.")
    try:
        return reader.manifest(json)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        if isinstance(error, SnapshotError):
            raise
        raise SnapshotError(f"{path} does not describe a cache: {error}") from error


class _Reader:
    def __init__(self, path: Path, codec: Codec | None, addressing: Addressing | None):
        self._path = path
        self._given = {"codec": codec, "addressing": addressing}

    def manifest(self, json: Any) -> Manifest:
        in_parts = isinstance(json, dict) and json.get("format") == 2
        names = "saved_by lengths model has_tokens groups group_of_layer"
        names += " source_of_layer" * (isinstance(json, dict) and "source_of_layer" in json)
        also: tuple[str, ...] = ("format", *("parts",) * in_parts)
        later = ("states", "cross", "cross_of_layer")
        also += tuple(name for name in later if isinstance(json, dict) and name in json)
        saved_by, lengths, model, has_tokens, groups, group_of_layer, *sources = self._fields(
            json, names, also=also
        )
        if not isinstance(saved_by, str) or not isinstance(has_tokens, bool):
            raise ValueError("saved_by must be text and has_tokens true or false.")
        if not isinstance(groups, list) or not groups:
            raise ValueError("groups must be a list of at least one.")
        if group_of_layer is not None:  # -1 for layers with nothing but a state
            group_of_layer = self._counts("group_of_layer", group_of_layer, least=-1)
        of_groups = tuple(self._group(group, lengths) for group in groups)
        manifest = Manifest(
            saved_by,
            self._counts("lengths", lengths),
            self._model(model),
            has_tokens,
            of_groups,
            group_of_layer,
            self._counts("source_of_layer", sources[0]) if sources else (),
            Parts.of_json(json["parts"]) if in_parts else None,
            states.of_json(json.get("states", []), of_groups[0].config.batch_size),
            self._cross(json.get("cross", [])),
            self._counts("cross_of_layer", json.get("cross_of_layer", []), least=-1),
        )
        if group_of_layer is None and len(groups) > 1:
            raise ValueError("several groups need a group_of_layer.")
        sequences = manifest.config.batch_size or 1  # a HybridConfig checks what it is made of
        if len(lengths) != sequences:
            raise ValueError(f"{len(lengths)} lengths for {sequences} sequences.")
        if manifest.parts is not None:
            manifest.parts.check(manifest.config)
        if any(len(each.held) != sequences for each in manifest.cross):
            raise ValueError(f"cross must have lengths of {sequences} sequences.")
        if manifest.cross and manifest.parts is not None:
            raise ValueError("cross must be in one file.")
        return manifest

    def _cross(self, json: Any) -> tuple[Group, ...]:
        if not isinstance(json, list):
            raise ValueError("cross must be a list.")
        return tuple(self._group(each, each["held"]) for each in json)

    def _group(self, json: Any, lengths: list[int]) -> Group:
        has_newest = isinstance(json, dict) and "newest" in json
        names = "config written held" + " newest" * has_newest
        config_json, *numbers = self._fields(json, names)
        config = self._config(config_json, has_newest)
        counts = [self._counts(*named) for named in zip(names.split()[1:], numbers, strict=True)]
        if any(len(each) != len(lengths) for each in counts):
            raise ValueError("lengths, written, held and newest must have one number per sequence.")
        group = Group(config, *counts)
        for each in filter(None, (group, group.of_newest)):
            self._check_held(each, lengths)
        return group

    def _check_held(self, group: Group, lengths: list[int]) -> None:
        config = group.config
        heads = config.num_layers * config.num_kv_heads if group.is_compressed else 1
        own = config.addressing.num_slots(config.max_context_length, None)  # of one sequence
        most = config.num_slots * heads
        for length, reach, count in zip(lengths, group.written, group.held, strict=True):
            fits = count <= (most if group.is_compressed else min(length, own))
            if not fits or length > min(reach, config.max_context_length):
                raise ValueError(
                    f"a sequence of {length} tokens cannot hold {count}, have been written up to "
                    f"{reach}, and stand in a context of {config.max_context_length}."
                )

    def _config(self, json: Any, has_newest: bool) -> KVCacheConfig:
        values = _VALUES if isinstance(json, dict) and _VALUES[0] in json else ()
        names = (*_SHAPE, "codec", "addressing", *values) + ("newest",) * has_newest
        fields = dict(zip(names, self._fields(json, " ".join(names)), strict=True))
        shape = [fields[name] for name in (*_SHAPE, *values[:1])]
        self._counts("the shape of a cache", [1 if count is None else count for count in shape])
        if values and not isinstance(fields["values_in_keys"], bool):
            raise ValueError("values_in_keys must be true or false.")
        config = KVCacheConfig(
            **{name: fields[name] for name in (*_SHAPE, *values)},
            codec=self._known("codec", fields["codec"], CODECS),
            addressing=self._known("addressing", fields["addressing"], ADDRESSINGS),
            newest=self._known("newest", fields["newest"], CODECS) if has_newest else None,
        )
        if config.num_slots > _LARGEST or config.size_bytes > _LARGEST**2:
            raise ValueError(f"{config.describe()} is larger than any memory.")
        return config

    def _known(self, what: str, json: Any, table: Mapping[str, Any]) -> Any:
        """The codec or addressing that a file names: of the table's kinds, or the one given."""
        given = self._given.get(what)
        if given is not None and _kind_json(given) == json:
            return given
        also = (KeysValues, Rope, Kept, KeptByHead, Newest)
        kinds = {kind.__name__: kind for kind in (*map(type, table.values()), *also)}
        name, fields = self._fields(json, "kind fields")
        if not isinstance(name, str) or name not in kinds or not isinstance(fields, dict):
            raise SnapshotError(
                f"{self._path} was saved with the {what} {name!r}, which jaxkv does not know: give "
                f"the one that it was saved with as {what}=."
            )
        value = _made(json, kinds)
        if _kind_json(value) != json:
            raise ValueError(f"{what} {json!r} is not {value!r}.")
        return value

    def _model(self, json: Any) -> Fingerprint | None:
        if json is None:
            return None
        if not isinstance(json, dict) or not all(isinstance(fact, str) for fact in json.values()):
            raise ValueError("model must be facts by name.")
        return json

    def _counts(self, what: str, json: Any, least: int = 0) -> tuple[int, ...]:
        if not isinstance(json, list) or not all(
            type(count) is int and least <= count <= _LARGEST for count in json
        ):
            raise ValueError(f"{what} must be ints from {least} to {_LARGEST}.")
        return tuple(json)

    def _fields(self, json: Any, names: str, also: tuple[str, ...] = ()) -> list[Any]:
        wanted = names.split()
        if not isinstance(json, dict) or json.keys() != {*wanted, *also}:
            raise ValueError(f"expected an object with {names}.")
        return [json[name] for name in wanted]


def _config_json(config: KVCacheConfig) -> dict[str, Any]:
    values = _VALUES if config.pair.unlike else ()
    shape = {field: getattr(config, field) for field in (*_SHAPE, *values)}
    kinds = {"codec": _kind_json(config.codec), "addressing": _kind_json(config.addressing)}
    if config.newest is not None:
        kinds["newest"] = _kind_json(config.newest)
    return {**shape, **kinds}


def _group_json(group: Group) -> dict[str, Any]:
    """Omits ``newest`` for a group without `Newest` tokens, so that files stay what they were."""
    counts = {"written": group.written, "held": group.held}
    if group.newest is not None:
        counts["newest"] = group.newest
    return {"config": _config_json(group.config), **counts}


def _kind_json(value: Any) -> dict[str, Any]:
    """A codec or an addressing: its class and its fields."""
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    named = {field.name: getattr(value, field.name) for field in fields if field.init}
    unsaid = {
        field.name
        for field in fields
        if "later" in field.metadata and named[field.name] == field.default
    }
    plain = {name: _as_lists(each) for name, each in named.items() if name not in unsaid}
    return {"kind": type(value).__name__, "fields": plain}


def _made(json: Any, kinds: Mapping[str, Any]) -> Any:
    """The inverse of `_as_lists`."""
    if isinstance(json, list):
        return tuple(_made(item, kinds) for item in json)
    if isinstance(json, dict):
        kind = kinds[json["kind"]]
        fields = {name: _made(value, kinds) for name, value in json["fields"].items()}
        known = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
        unsaid = {each.name: each.metadata["unsaid"] for each in known if "unsaid" in each.metadata}
        return kind(**(unsaid | fields))
    return json


def _as_lists(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _kind_json(value)
    if isinstance(value, tuple):
        return [_as_lists(item) for item in value]
    return value if isinstance(value, str | int | float | None) else repr(value)
