"""Going on from a saved cache."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from jaxkv.addressing import Addressing
from jaxkv.cache.axes import Axes, Spread
from jaxkv.cache.create import create
from jaxkv.cache.hybrid import AnyCache, AnyConfig, HybridConfig
from jaxkv.cache.newest import Newest
from jaxkv.cache.state import StateConfig
from jaxkv.codecs import Codec
from jaxkv.errors import CacheFullError, ConfigError, SnapshotError
from jaxkv.memory.allocate import allocate
from jaxkv.programs import moves_data, on_device
from jaxkv.snapshot import container, manifest, parts, states
from jaxkv.snapshot.fill_shares import fill_of_group, wanted_by
from jaxkv.snapshot.fingerprint import differences, fingerprint
from jaxkv.snapshot.kept import check_kept
from jaxkv.snapshot.manifest import Manifest
from jaxkv.snapshot.parts import Wanted, every_share
from jaxkv.snapshot.processes import all_or_none
from jaxkv.snapshot.save import Tokens, token_ids
from jaxkv.snapshot.split import Share, Split


def inspect(
    path: str | os.PathLike[str],
    *,
    codec: Codec | None = None,
    addressing: Addressing | None = None,
) -> Manifest:
    """What a saved cache is: config, lengths, model. Reads the header alone.

    Args:
      path: the file.
      codec, addressing: those that it was saved with, if they are not jaxkv's own.

    Raises:
      OSError: no such file.
      SnapshotError: not a file that `save` wrote.
    """
    file = Path(path)
    return manifest.read(file, container.read_manifest(file), codec, addressing)


@moves_data
def load(
    path: str | os.PathLike[str],
    *,
    tokens: Tokens | None = None,
    model: Any = None,
    max_context_length: int | None = None,
    addressing: Addressing | None = None,
    codec: Codec | None = None,
    newest: Newest | None = None,
    device: Any = None,
    mesh: Mesh | None = None,
    axes: Axes | None = None,
    into: AnyCache | None = None,
    rows: Sequence[int] | None = None,
    max_encoder_length: int | None = None,
) -> AnyCache:
    """The cache that `save` wrote: what comes after is bitwise what it would have been.

    The whole file is checked before any memory of the device is touched. It is mapped, and goes
    to the device (each shard to its own) some hundred tokens at a time. Of one that several
    processes wrote, each process that loads it opens only the parts that its devices need some of.
    With several processes all of them call this, and where one fails all do.

    Args:
      path: the file.
      tokens: the ids that it must have been filled with.
      model: the model that must have written it: what `save` was given.
      max_context_length: of the new cache; as it was if None. Say it for a file that you do not
        trust, which could ask for all memory there is.
      addressing: of the new cache; as it was if None. A ring keeps the newest tokens alone, so
        what it saved fits no larger window.
      codec: the one that it was saved with, if it is not one of jaxkv's own.
      newest: the finer copies that it must have; whichever it has if None.
      device: where the new cache lives: a `jax.Device` or `jax.sharding.Sharding`.
      mesh, axes: the devices over which the new cache is spread and how, as in `jaxkv.create`,
        whatever it was spread over when it was saved. A compressed one is read by one device first.
      into: a cache to load into instead of a new one, of the same layers, heads and codec. It is
        donated: use the one that is returned. Pages of a pool must be assigned before.
      rows: which sequences of ``into`` the file's are; all if None.
      max_encoder_length: of what the new cache's cross-attention reads; as it was if None. Say it
        too for a file that you do not trust.

    Raises:
      OSError: no such file.
      SnapshotError: a file that is damaged, or of another model, prompt or kind of cache; a part
        that is missing, damaged or of another save; another process could not load it.
      CacheFullError: longer than the context, or than the pages assigned.
      CacheAllocationError: the new cache does not fit in memory.
      ValueError: rows that ``into`` has not, or not as many as the file's sequences.

    >>> import tempfile, jaxkv
    >>> cache = jaxkv.advance(jaxkv.create(jaxkv.KVCacheConfig(1, 16, 1, 4)), 3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jaxkv.save(cache, f"{folder}/prefix.kv")
    ...     longer = jaxkv.load(f"{folder}/prefix.kv", max_context_length=64)
    >>> int(longer.lengths), longer.config.max_context_length
    (3, 64)
    """
    file = Path(path)
    spread = Spread.of(mesh, axes) if into is None else into.groups[0].spread
    if spread is not None and device is not None:
        raise ValueError(f"load: give device= or axes=, not both; got {device} and {axes}.")

    def new(saved: Manifest) -> AnyCache:
        lengths = max_context_length, max_encoder_length
        return _new(file, saved, *lengths, addressing, device, spread)

    with contextlib.ExitStack() as stack:
        with all_or_none(spread):
            wanted = wanted_by(into, spread)
            saved, tensors = stack.enter_context(opened(file, codec, addressing, wanted))
            if spread is not None:
                _check_heads_share_tokens(file, saved)
                states.check_processes((*saved.states, *saved.cross), spread, "load")
            if model is not None:
                check_model(file, saved, model)
            if newest is not None:
                _check_newest(file, saved, newest)
            if tokens is not None:
                _check_tokens(file, saved, tensors, tokens)
            if into is None:
                cache, chosen = new(saved), list(range(len(saved.lengths)))
            else:
                chosen = _checked_rows(file, saved, into, rows)
                cache = jax.tree.map(on_device, into)
            fills = [
                fill_of_group(file, saved, number, group, chosen, tensors)
                for number, group in enumerate((*cache.groups, *cache.cross))
            ]
        filled = [fill() for fill in fills]  # once all of them are known to fit
        of_states = [
            states.filled(state, kind, saved.lengths, chosen, tensors)
            for kind, state in enumerate(cache.states)
        ]
    of_text = len(cache.groups)
    return cache.with_groups(filled[:of_text], of_states, filled[of_text:])


@contextlib.contextmanager
def opened(
    file: Path,
    codec: Codec | None,
    addressing: Addressing | None,
    wanted: Wanted = every_share,
) -> Iterator[tuple[Manifest, dict[str, Any]]]:
    """What a file says of itself and its tensors, every byte checked; see `container.opened`.

    Vectors come as `Vectors`, but for those of compressed caches. Of a file in parts only those
    are there that are wanted.
    """

    def layout_of(json: Any) -> container.Layout:
        return manifest.read(file, json, codec, addressing).layout()

    with container.opened(file, layout_of, may_lack=Manifest.may_lack) as (json, tensors):
        saved = manifest.read(file, json, codec, addressing)
        for name, spec in saved.layout().items():
            if name not in tensors:
                tensors[name] = np.zeros(spec.shape, spec.dtype)
        beside = (*saved.token_layout(), *saved.state_layout())
        tokens = {name: tensors.pop(name) for name in beside}
        if saved.parts is None:
            for number, group in enumerate(saved.groups):
                if group.is_compressed:
                    check_kept(file, saved, number, tensors)
            yield saved, tokens | parts.together(Split(), saved.kinds, {Share(0, 0, 0): tensors})
            return
        needed = functools.partial(wanted, saved.config)
        with parts.opened(file, saved.parts, saved.groups, saved.lengths, needed) as vectors:
            yield saved, tokens | vectors


def _check_newest(file: Path, saved: Manifest, newest: Newest) -> None:
    for group in saved.groups:
        if group.config.newest != newest:
            raise SnapshotError(
                f"{file} was saved with newest={group.config.newest}, and newest={newest} was "
                "asked for."
            )


def _check_heads_share_tokens(file: Path, saved: Manifest) -> None:
    for group in saved.groups:
        if group.is_compressed:
            raise SnapshotError(
                f"{file} was saved after jaxkv.compress, whose heads keep tokens of their own, and "
                "is loaded on one device. Bring it to the mesh with jaxkv.spread then."
            )


def _new(
    file: Path,
    saved: Manifest,
    max_context_length: int | None,
    max_encoder_length: int | None,
    addressing: Addressing | None,
    device: Any,
    spread: Spread | None,
) -> AnyCache:
    fields = {"max_context_length": max_context_length, "addressing": addressing}
    try:
        config = saved.config.replace(**{name: value for name, value in fields.items() if value})
        config = _with_encoder_length(config, max_encoder_length)
    except ConfigError as error:
        raise SnapshotError(f"{file} does not fit what was asked for: {error}") from error
    longest = max(saved.lengths)
    if longest > config.max_context_length:
        raise CacheFullError(
            f"The saved cache holds {longest} tokens, more than max_context_length="
            f"{config.max_context_length}."
        )
    for each, own in zip(saved.cross, config.cross, strict=True):
        if (longest := max(each.held)) > own.max_context_length:
            raise CacheFullError(
                f"{file} holds {longest} tokens of an encoder, more than max_encoder_length="
                f"{own.max_context_length}."
            )
    _check_compressed(file, saved, config)
    if isinstance(device, Sharding):
        return create(config, device=device)
    if spread is not None:
        return allocate(config, mesh=spread.mesh, axes=spread.axes)
    return allocate(config, device=device)


def _with_encoder_length(config: AnyConfig, length: int | None) -> AnyConfig:
    if length is None or not isinstance(config, HybridConfig):
        return config
    cross = tuple(each.replace(max_context_length=length) for each in config.cross)
    return dataclasses.replace(config, cross=cross)


def _checked_rows(
    file: Path, saved: Manifest, into: AnyCache, rows: Sequence[int] | None
) -> list[int]:
    """The rows of ``into`` that the file's sequences go to."""
    check_kind(file, saved, into, "newest")
    count = into.config.batch_size or 1
    chosen = list(range(count)) if rows is None else [int(row) for row in rows]
    if len(chosen) != len(saved.lengths) or len(set(chosen)) != len(chosen):
        raise ValueError(
            f"load: the file has {len(saved.lengths)} sequences, each for a row of its own; got "
            f"rows {chosen}."
        )
    if any(not 0 <= row < count for row in chosen):
        raise ValueError(f"load: rows must be from 0 to {count - 1}, got {chosen}.")
    return chosen


def check_kind(file: Path, saved: Manifest, into: AnyCache, *also: str) -> None:
    """Raise SnapshotError unless codec, heads, layers and the fields in ``also`` are the file's."""
    layers = into.config.group_of_layer
    if saved.group_of_layer != layers:
        raise SnapshotError(
            f"{file} has layers in groups {saved.group_of_layer}, and the cache to load it into "
            f"{layers}."
        )
    if saved.source_of_layer != into.config.source_of_layer:
        raise SnapshotError(
            f"{file} has layers that read those of {saved.source_of_layer or 'no other'}, and the "
            f"cache to load it into {into.config.source_of_layer or 'of no other'}."
        )
    kept = [each.replace(batch_size=None, by_head=()) for each in into.config.states]
    if [each.replace(batch_size=None, by_head=()) for each in saved.states] != kept:
        raise SnapshotError(
            f"{file} has {_described(saved.states)}, and the cache to load it into "
            f"{_described(kept)}."
        )
    if saved.cross_of_layer != into.config.cross_of_layer:
        raise SnapshotError(
            f"{file} has cross-attention in layers {_having(saved.cross_of_layer)}, and the cache "
            f"to load it into in {_having(into.config.cross_of_layer)}."
        )
    theirs = [group.config for group in saved.kinds]
    ours = [cache.config for cache in (*into.groups, *into.cross)]
    fields = ("num_layers", "num_kv_heads", "head_dim", "value_dim", "values_in_keys", "codec")
    for field in (*fields, *also):
        saved_as, wanted = ([getattr(c, field) for c in configs] for configs in (theirs, ours))
        if saved_as != wanted:
            raise SnapshotError(
                f"{file} has {field} {saved_as}, and the cache to load it into {wanted}."
            )

    _check_compressed(file, saved, into.config)


def _having(cross_of_layer: tuple[int, ...]) -> list[int] | str:
    """The numbers of layers that have some."""
    return [layer for layer, number in enumerate(cross_of_layer) if number >= 0] or "none"


def _described(kinds: Sequence[StateConfig]) -> str:
    return " and ".join(f"{each.describe()} ({each.arrays})" for each in kinds) or "no state"


def _check_compressed(file: Path, saved: Manifest, config: AnyConfig) -> None:
    """Chosen tokens of each head go to a cache of such, and others to others."""
    for group, wanted in zip(saved.groups, config.groups, strict=True):
        if group.is_compressed != wanted.addressing.per_head:
            raise SnapshotError(
                f"{file} was saved {'after' if group.is_compressed else 'before'} jaxkv.compress, "
                f"with {group.config.addressing.name} addressing, and cannot be loaded with "
                f"{wanted.addressing.name}: load it with the addressing that it was saved with."
            )


def check_model(file: Path, saved: Manifest, model: Any) -> None:
    """Refuse the file of another model."""
    given = fingerprint(model)
    if saved.model is None:
        raise SnapshotError(
            f"{file} does not say which model wrote it. Save it with model=, or load it without."
        )
    if different := differences(saved.model, given):
        raise SnapshotError(f"{file} is of another model: {'; '.join(different)}.")


def _check_tokens(file: Path, saved: Manifest, tensors: dict[str, Any], tokens: Tokens) -> None:
    if not saved.has_tokens:
        raise SnapshotError(
            f"{file} does not say which tokens it holds. Save it with tokens=, or load it without."
        )
    try:
        given = token_ids(tokens, saved.config.batch_size, saved.lengths)
    except ValueError as error:
        raise SnapshotError(f"{file} is of another prompt: {error}") from error
    for sequence, ids in enumerate(given):
        held = tensors[f"{sequence}.tokens"]
        if (different := np.flatnonzero(held != ids)).size:
            place = int(different[0])
            raise SnapshotError(
                f"{file} is of another prompt: token {place} of sequence {sequence} is "
                f"{held[place]} in the file and {ids[place]} here."
            )
