"""A snapshot of several processes: a file of each with what its devices held, named by the first.

The parts stand beside the file that names them, each under a name of its own, so that an older
snapshot is whole until the new one is.
"""

import contextlib
import dataclasses
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxkv.cache.axes import Spread
from jaxkv.cache.hybrid import AnyConfig
from jaxkv.errors import SnapshotError
from jaxkv.snapshot import container
from jaxkv.snapshot.group import Group
from jaxkv.snapshot.processes import processes_of, told
from jaxkv.snapshot.split import Share, Split, shares_of
from jaxkv.snapshot.vectors import Vectors

_ID = re.compile(r"[0-9a-f]{16}")
Tensors = dict[str, Any]
# Whether some of a share is needed, of a cache that is split so.
Wanted = Callable[[AnyConfig, Split, Share], bool]


def every_share(config: AnyConfig, split: Split, share: Share) -> bool:
    """What a cache of one device wants."""
    return True


@dataclasses.dataclass(frozen=True)
class Parts:
    """Where the vectors of a snapshot are that is in several files.

    Attributes:
      id: of the save, which is part of the files' names.
      split: how sequences, KV heads and tokens are cut.
      files: the shares that are in each.
    """

    id: str
    split: Split
    files: tuple[tuple[Share, ...], ...]

    @classmethod
    def of(cls, spread: Spread, config: AnyConfig) -> "Parts | None":
        """A file per process, with the shares that its devices have first; None for one process."""
        processes = processes_of(spread)
        if len(processes) == 1:
            return None
        id = told(spread, secrets.token_hex(8))[processes[0]]
        split, shares = shares_of(spread, config)
        first: dict[Share, int] = {}
        for device, share in shares.items():
            first.setdefault(share, device.process_index)
        files = (
            tuple(share for share, process in first.items() if process == number)
            for number in processes
        )
        return cls(id, split, tuple(files))

    @classmethod
    def of_json(cls, json: Any) -> "Parts":
        """Its fields checked, but for what they have to do with the cache.

        Raises:
          ValueError: no such fields, or shares that are missing or in two files.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(json, dict) or json.keys() != fields:
            raise ValueError(f"expected an object with {', '.join(sorted(fields))}.")
        if not isinstance(json["id"], str) or not _ID.fullmatch(json["id"]):
            raise ValueError("the id of parts must be 16 hexadecimal digits.")
        split = Split(*_counts(json["split"]))
        files = tuple(tuple(Share(*_counts(each)) for each in file) for file in json["files"])
        listed = [share for file in files for share in file]
        count = split.batch * split.heads * split.context
        if len(listed) != count or set(listed) != set(split.shares):
            raise ValueError(f"its parts must have each of {count} shares once.")
        return cls(json["id"], split, files)

    def check(self, config: AnyConfig) -> None:
        """Refuse a split that no cache of this config has.

        Raises:
          ValueError: naming what cannot be.
        """
        for group in config.groups:
            heads, context = (self.split.heads, group.num_kv_heads), self.split.context
            whole = group.addressing.window is not None or group.newest is not None
            if (
                (config.batch_size or 1) % self.split.batch
                or max(heads) % min(heads)
                or group.addressing.per_head
                or (context > 1 and (whole or not group.addressing.by_position))
            ):
                raise ValueError(f"{group.describe()} cannot be split by {self.split}.")

    def path(self, file: Path, number: int) -> Path:
        """Of a part, beside the file that names it."""
        return file.with_name(f"{file.name}.{self.id}.{number}-of-{len(self.files)}")

    def check_here(self, file: Path) -> None:
        """Refuse to name parts that other processes have written and this one does not see.

        Raises:
          SnapshotError: naming one.
        """
        for number in range(len(self.files)):
            if not self.path(file, number).exists():
                raise SnapshotError(
                    f"{self.path(file, number)} was written by another process, and is not there: "
                    "all processes must save to a folder that they share."
                )

    def layout(
        self, number: int, groups: tuple[Group, ...], lengths: tuple[int, ...]
    ) -> container.Layout:
        """The tensors of a part: those of a snapshot of each share, by its numbers."""
        return {
            f"{_prefix(share)}{kind}.{name}": spec
            for share in self.files[number]
            for kind, group in enumerate(groups)
            for name, spec in self.split.group(share, group).layout(self._lengths(share, lengths))
        }

    def to_json(self, number: int) -> dict[str, Any]:
        """What a part says of itself."""
        return {"format": 2, "part": number, "of": self.id}

    def _lengths(self, share: Share, lengths: tuple[int, ...]) -> tuple[int, ...]:
        rows = self.split.sequences(share, len(lengths))
        return tuple(self.split.tokens(share, lengths[row]) for row in rows)


def parts_named_by(file: Path) -> list[Path]:
    """The parts of the snapshot that a file is; none where it is no such file."""
    with contextlib.suppress(OSError, SnapshotError, ValueError, LookupError, TypeError):
        parts = Parts.of_json(container.read_manifest(file)["parts"])
        return [parts.path(file, number) for number in range(len(parts.files))]
    return []


def remove(files: list[Path]) -> None:
    """Of those, all that are there and can be removed: what is left of them harms nobody."""
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink()


def share_of(name: str) -> tuple[Share, str]:
    """The share of a part's tensor, and the tensor's name in a snapshot of the share alone."""
    *numbers, rest = name.split(".", 3)
    return Share(*map(int, numbers)), rest


@contextlib.contextmanager
def opened(
    file: Path,
    parts: Parts,
    groups: tuple[Group, ...],
    lengths: tuple[int, ...],
    wanted: Callable[[Split, Share], bool],
) -> Iterator[Tensors]:
    """The tensors of the shares that are wanted; other parts are not even opened.

    Raises:
      SnapshotError: naming a part that is missing, damaged, or of another save.
    """
    shares = {share for share in parts.split.shares if wanted(parts.split, share)}
    found: dict[Share, Tensors] = {share: {} for share in shares}
    with contextlib.ExitStack() as stack:
        for number, of_file in enumerate(parts.files):
            if shares.isdisjoint(of_file):
                continue
            part, expected = parts.path(file, number), parts.to_json(number)
            if not part.exists():
                raise SnapshotError(
                    f"{part} is missing: {file} is in {len(parts.files)} parts beside it. Copy "
                    "them together."
                )

            def layout_of(
                json: Any, number: int = number, part: Path = part, expected: Any = expected
            ) -> container.Layout:
                if json != expected:
                    raise SnapshotError(
                        f"{part} is not part {number} of {file}: it says that it is {json}, and "
                        f"{expected} was expected. Copy the parts of one save together."
                    )
                return parts.layout(number, groups, lengths)

            tensors = stack.enter_context(
                container.opened(part, layout_of, lambda name: share_of(name)[0] in shares)
            )[1]
            for name, tensor in tensors.items():
                share, rest = share_of(name)
                found[share][rest] = tensor
        yield together(parts.split, groups, found)


def together(
    split: Split, groups: tuple[Group, ...], shares: Mapping[Share, Mapping[str, np.ndarray]]
) -> Tensors:
    """The tensors of a whole snapshot, of those of its shares: vectors as `Vectors`."""
    tensors: Tensors = {}
    for share, parts in shares.items():
        for name, array in parts.items():
            number, rest = name.split(".", 1)
            group, prefix = groups[int(number)], f"{number}."
            if group.of_newest is not None and rest.startswith("newest."):
                group, prefix, rest = group.of_newest, f"{prefix}newest.", rest[len("newest.") :]
            heads = split.kv_heads(share, group.config.num_kv_heads)
            if rest in group.config.codec_state:
                shape = group.config.codec_state[rest][0]
                whole = tensors.setdefault(prefix + rest, np.zeros(shape, array.dtype))
                whole[:, :, heads.start : heads.stop] = array
                continue
            sequence, leaf = rest.split(".", 1)
            row = split.sequences(share, len(group.held))[int(sequence)]
            whole_name = f"{prefix}{row}.{leaf}"
            if group.is_compressed or leaf == "positions":
                tensors[whole_name] = array
                continue
            every = range(group.config.num_kv_heads)
            vectors = tensors.setdefault(whole_name, Vectors({}, split.context, every))
            vectors.arrays[heads.start, share.context] = array
    return tensors


def _prefix(share: Share) -> str:
    return "".join(f"{number}." for number in share)


def _counts(json: Any) -> list[int]:
    if not isinstance(json, list) or len(json) != 3:
        raise ValueError("a split and a share must be three numbers.")
    if not all(type(each) is int and 0 <= each < 1 << 31 for each in json):
        raise ValueError("the numbers of a split and of a share must be ints of at least 0.")
    return json
