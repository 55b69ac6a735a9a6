"""The header of a GGUF file: what it says of its model, and where its tensors lie.

The package ``gguf`` has a reader too. It believes every length in a file, so that one of 50 bytes
makes it collect 2**34 numbers, and it takes seconds for a vocabulary.
"""

import dataclasses
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxkv.counts import ceil_div
from jaxkv.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # of tensors, where the file does not say
_MOST_AXES = 4
# By the number that a file has for a type of value.
_NUMBERS = {
    number: np.dtype(name)
    for number, name in (
        *((0, "u1"), (1, "i1"), (2, "<u2"), (3, "<i2"), (4, "<u4"), (5, "<i4"), (6, "<f4")),
        *((7, "bool"), (10, "<u8"), (11, "<i8"), (12, "<f8")),
    )
}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies: the number of its type, its shape as numpy has it, its first byte."""

    name: str
    file: Path
    type: int
    shape: tuple[int, ...]
    offset: int

    def check(self, num_bytes: int) -> None:
        """Refuse a file that ends before so many bytes of the tensor."""
        size = self.file.stat().st_size
        if self.offset + num_bytes > size:
            raise CheckpointError(
                f"{self.file} ends too soon: tensor {self.name} takes bytes {self.offset} to "
                f"{self.offset + num_bytes}, and {size} are there. Copy or download it again."
            )

    def read(self, num_bytes: int) -> np.ndarray:
        """So many bytes from its beginning on."""
        self.check(num_bytes)
        return np.fromfile(self.file, np.uint8, num_bytes, offset=self.offset)


@dataclasses.dataclass(frozen=True)
class Header:
    """What a GGUF file says.

    Attributes:
      file: itself.
      metadata: by key; an array of numbers is numpy's, one of texts a list.
      places: of the tensors, by the names that they have in the file.
    """

    file: Path
    metadata: dict[str, Any]
    places: dict[str, Place]


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as GGUF files do."""
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a GGUF file of version 2 or 3.

    Raises:
      CheckpointError: another file, one that ends within its header, or one part of several.
      FileNotFoundError: no such file.
    """
    file = Path(path)
    with file.open("rb") as opened:
        taken = _Taken(opened, file)
        if taken.bytes(len(_MAGIC)) != _MAGIC:
            raise CheckpointError(f"{file} is not a GGUF file: it does not begin with GGUF.")
        _check_version(taken.bytes(4), file)
        num_tensors, num_values = taken.number("<u8"), taken.number("<u8")
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = taken.text()
            if key in metadata:
                raise CheckpointError(f"{file}: its header has {key} twice.")
            metadata[key] = taken.value(key)
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(
                f"{file}: general.alignment must be a power of two, got {alignment!r:.60}."
            )
        places: dict[str, Place] = {}
        for _ in range(num_tensors):
            place = taken.place()
            if place.name in places:
                raise CheckpointError(f"{file}: its header has tensor {place.name} twice.")
            places[place.name] = place
        start = ceil_div(opened.tell(), alignment) * alignment
    parts = metadata.get("split.count", 1)
    if parts != 1:
        raise CheckpointError(
            f"{file} is one of {parts} parts of a model. Make them one file: "
            "llama-gguf-split --merge FIRST_PART OUTPUT."
        )
    moved = {
        name: dataclasses.replace(place, offset=start + place.offset)
        for name, place in places.items()
    }
    return Header(file, metadata, moved)


def _check_version(written: bytes, file: Path) -> None:
    if int.from_bytes(written, "big") in _VERSIONS:
        raise CheckpointError(
            f"{file} is a GGUF file for big-endian machines, which is not supported. Convert the "
            "model for little-endian ones."
        )
    version = int.from_bytes(written, "little")
    if version not in _VERSIONS:
        raise CheckpointError(f"{file} is GGUF version {version}; supported are 2 and 3.")


class _Taken:
    """The bytes of a header in their order. No length in it is believed before it is compared."""

    def __init__(self, opened: BinaryIO, file: Path):
        self._opened, self._file = opened, file
        self._left = file.stat().st_size

    def bytes(self, count: int) -> bytes:
        if count > self._left:
            raise CheckpointError(
                f"{self._file} is cut off or damaged: its header goes on for {count} bytes where "
                f"{self._left} are left. Copy or download it again."
            )
        self._left -= count
        return self._opened.read(count)

    def number(self, dtype: str | np.dtype) -> Any:
        dtype = np.dtype(dtype)
        number = np.frombuffer(self.bytes(dtype.itemsize), dtype)[0]
        # 0.00001 as it was written, not as the float64 nearest to its float32.
        return float(str(number)) if dtype == np.float32 else number.item()

    def text(self) -> str:
        (length,) = struct.unpack("<Q", self.bytes(8))
        written = self.bytes(length)
        try:
            return written.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self._file}: {written[:40]!r} in its header is not UTF-8."
            ) from error

    def value(self, key: str) -> Any:
        kind = self.number("<u4")
        if kind == _ARRAY:
            return self._array(key)
        return self.text() if kind == _STRING else self.number(self._dtype(kind, key))

    def _array(self, key: str) -> Any:
        kind, count = self.number("<u4"), self.number("<u8")
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        dtype = self._dtype(kind, key)
        return np.frombuffer(self.bytes(count * dtype.itemsize), dtype)

    def _dtype(self, kind: int, key: str) -> np.dtype:
        if kind not in _NUMBERS:
            what = "an array of arrays" if kind == _ARRAY else f"of the unknown type {kind}"
            raise CheckpointError(f"{self._file}: {key:.80} is {what}, which is not supported.")
        return _NUMBERS[kind]

    def place(self) -> Place:
        name, num_axes = self.text(), self.number("<u4")
        if not 1 <= num_axes <= _MOST_AXES:
            raise CheckpointError(
                f"{self._file}: tensor {name:.80} has {num_axes} axes; expected 1 to {_MOST_AXES}."
            )
        shape = tuple(self.number("<u8") for _ in range(num_axes))[::-1]
        return Place(name, self._file, self.number("<u4"), shape, self.number("<u8"))
