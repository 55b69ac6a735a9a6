"""The tensors of a Hugging Face folder: found by name, checked, and read one at a time."""

import abc
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxkv.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What the safetensors format calls them -> numpy's.
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PIECE = 1 << 24  # bytes of each of two tensors that are compared at once


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies, and what it is; nothing of it is in memory yet."""

    name: str
    file: Path
    stored_dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def equals(self, other: "StoredTensor") -> bool:
        """Whether both have the same dtype, shape and bits; they are read in pieces."""
        if (self.stored_dtype, self.shape) != (other.stored_dtype, other.shape):
            return False
        with self.file.open("rb") as mine, other.file.open("rb") as others:
            mine.seek(self.offset)
            others.seek(other.offset)
            sizes = (min(_PIECE, self.num_bytes - at) for at in range(0, self.num_bytes, _PIECE))
            return all(mine.read(size) == others.read(size) for size in sizes)

    def read(self) -> np.ndarray:
        """Its numbers, as they are stored.

        Not through a memory map: pages of one that were read count as memory of the process,
        so that it would seem to hold the weights twice (measured: 1088 MB for 512).

        Raises:
          CheckpointError: a dtype that is not a float of 16 or 32 bits.
        """
        if self.stored_dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.file}: tensor {self.name} is stored as {self.stored_dtype}; "
                f"expected one of {', '.join(_DTYPES)}. Quantized weights are not supported."
            )
        return self._read(_DTYPES[self.stored_dtype])

    def read_bytes(self) -> np.ndarray:
        """A tensor of bytes, as formats that pack numbers store them.

        Raises:
          CheckpointError: it is something else.
        """
        if self.stored_dtype != "U8":
            raise CheckpointError(
                f"{self.file}: tensor {self.name} is stored as {self.stored_dtype}; expected U8."
            )
        return self._read("uint8")

    def _read(self, dtype: str) -> np.ndarray:
        count = int(np.prod(self.shape))
        numbers = np.fromfile(self.file, jnp.dtype(dtype), count, offset=self.offset)
        return numbers.reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class PartOfTensor(abc.ABC):
    """From ``start`` to ``stop`` along an axis of a stored tensor: stands where a tensor does."""

    whole: Any
    start: int
    stop: int

    @property
    def name(self) -> str:
        name: str = self.whole.name
        return name

    @property
    def file(self) -> Path:
        file: Path = self.whole.file
        return file

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @abc.abstractmethod
    def read(self) -> np.ndarray:
        """Its numbers."""


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder by its name, from one file or from the shards of an index.

    Raises:
      CheckpointError: no weights, or a file that is missing, damaged or not what the index says.
    """
    if (folder / SINGLE_FILE).exists():
        return _tensors_of(folder / SINGLE_FILE)
    if not (folder / INDEX_FILE).exists():
        raise CheckpointError(_no_weights(folder))
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{folder / INDEX_FILE}: expected an object under weight_map.")
    shards = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not (folder / shard).exists():
            raise CheckpointError(
                f"{folder / INDEX_FILE} lists {shard}, which is not in the folder."
            )
        shards[shard] = _tensors_of(folder / shard)
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{folder / INDEX_FILE} says that {shard} has {name}; it has not."
            )
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      CheckpointError: no such file, or no JSON object in it.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got a {type(contents).__name__}.")
    return contents


def _tensors_of(file: Path) -> dict[str, StoredTensor]:
    import safetensors

    try:
        with safetensors.safe_open(file, framework="numpy"):
            pass  # it checks that the header is sound and covers the file exactly
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}); {file.stat().st_size} bytes are "
            "there. Copy or download it again."
        ) from error
    with file.open("rb") as opened:
        header_size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(header_size))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            name,
            file,
            entry["dtype"],
            tuple(entry["shape"]),
            8 + header_size + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def _no_weights(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    others = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    found = f" Convert {', '.join(others)} to safetensors first." if others else ""
    if whole := [name for name in names if name.endswith(".gguf")]:
        found = f" Give the file itself: {folder / whole[0]}."
    return f"{folder} has no weights: expected {SINGLE_FILE} or {INDEX_FILE}.{found}"
