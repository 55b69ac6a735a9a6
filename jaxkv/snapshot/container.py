"""A file that is whole or refused: safetensors, written atomically, read with no byte left over.

The header is a function of the manifest, the layout and the checksums. A reader computes it
again and compares, so that offsets, sizes, order and spelling need no checks of their own, and a
file can ask for no memory that its manifest does not explain.
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxkv.errors import SnapshotError

# What the safetensors format calls them.
_CODES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "int32": "I32", "uint32": "U32", "int16": "I16", "uint16": "U16", "int8": "I8", "uint8": "U8",
}  # fmt: skip
_NO_CHECKSUM = "0" * 64
_MAX_HEADER_BYTES = 16 << 20
_METADATA = "__metadata__"


class Spec(NamedTuple):
    """A tensor to be."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return jnp.dtype(self.dtype).itemsize * math.prod(self.shape)


Layout = dict[str, Spec]


def write(
    path: Path,
    manifest: dict[str, Any],
    layout: Layout,
    pieces: Callable[[str], Iterable[np.ndarray]],
) -> None:
    """Write a file that appears under its name only when all of it is on disk.

    Args:
      path: replaced if it is there.
      manifest: JSON values.
      layout: the tensors, by name.
      pieces: of the tensor of a name, one after the other in memory order.

    Raises:
      OSError: nothing was replaced, and nothing is left behind.
    """
    layout = _in_file_order(layout)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            # Until the last bytes are there the checksums are none, and so the file is refused.
            file.write(_header(manifest, layout, dict.fromkeys(layout, _NO_CHECKSUM)))
            checksums = {name: _write_tensor(file, pieces(name)) for name in layout}
            file.seek(0)
            file.write(_header(manifest, layout, checksums))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def read_manifest(path: Path) -> Any:
    """What `write` was given, from the header alone. The tensors are neither read nor checked.

    Raises:
      OSError: no such file.
      SnapshotError: not a file that `write` wrote.
    """
    with path.open("rb") as file:
        return _read_header(path, file)[1]


@contextlib.contextmanager
def opened(
    path: Path,
    layout_of: Callable[[Any], Layout],
    wanted: Callable[[str], bool] = lambda name: True,
    may_lack: Callable[[str], bool] = lambda name: False,
) -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
    """The manifest and the tensors of a file, every byte checked, mapped but not copied.

    Args:
      path: the file.
      layout_of: manifest -> the tensors that it must have. It raises for a bad manifest.
      wanted: name -> whether the tensor is read; of others nothing is.
      may_lack: name -> whether an older file is whole without the tensor.

    Yields:
      The manifest and read-only arrays, which must not be used after the block.

    Raises:
      OSError: no such file.
      SnapshotError: a file that is not, bit for bit, what `write` wrote.
    """
    with path.open("rb") as file:
        header, manifest, checksums = _read_header(path, file)
        complete = layout_of(manifest).items()
        held = {name: spec for name, spec in complete if name in checksums or not may_lack(name)}
        layout = _in_file_order(held)
        named = checksums.keys() == layout.keys()
        if not named or header != _header(manifest, layout, checksums):
            raise SnapshotError(
                f"{path} is damaged: its header does not describe the tensors of the cache that "
                "it names. Save it again."
            )
        size = os.fstat(file.fileno()).st_size
        expected = len(header) + sum(spec.size_bytes for spec in layout.values())
        if size != expected:
            raise SnapshotError(
                f"{path} is {'truncated' if size < expected else 'damaged'}: it has {size:,} "
                f"bytes, and its header describes {expected:,}. Copy or save it again."
            )
        with contextlib.closing(_Mapped(file)) as mapped:
            every = mapped.tensors(layout, len(header))
            tensors = {name: tensor for name, tensor in every if wanted(name)}
            _verify(path, tensors, checksums)
            yield manifest, tensors


class _Mapped:
    """A memory map that can be closed although stray references to its arrays are left."""

    def __init__(self, file: BinaryIO):
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def tensors(self, layout: Layout, offset: int) -> Iterator[tuple[str, np.ndarray]]:
        for name, (dtype, shape) in layout.items():
            array = np.frombuffer(self._map, jnp.dtype(dtype), math.prod(shape), offset)
            offset += array.nbytes
            yield name, array.reshape(shape)

    def close(self) -> None:
        with contextlib.suppress(BufferError):
            self._map.close()


def _read_header(path: Path, file: BinaryIO) -> tuple[bytes, Any, dict[str, str]]:
    """The header's bytes, the manifest and the checksums; the seal over both holds."""
    not_ours = f"{path} is not a snapshot that jaxkv saved"
    size, start = os.fstat(file.fileno()).st_size, file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
        raise SnapshotError(f"{not_ours}, or it is truncated: its {size:,} bytes hold no header.")
    header = file.read(length)
    metadata = _parsed(header, not_ours).get(_METADATA)
    if not isinstance(metadata, dict) or metadata.keys() != {"jaxkv", "sha256", "seal"}:
        raise SnapshotError(f"{not_ours}: its header lacks jaxkv's metadata.")
    texts = metadata["jaxkv"], metadata["sha256"]
    if not all(isinstance(text, str) for text in texts) or metadata["seal"] != _seal(*texts):
        raise SnapshotError(f"{path} is damaged: its header fails its checksum. Save it again.")
    manifest, checksums = (_parsed(text, not_ours) for text in texts)
    return start + header, manifest, checksums


def _parsed(text: str | bytes, not_ours: str) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key stands there twice")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"{not_ours}: its header is not the JSON of one ({error}).") from error
    if not isinstance(value, dict):
        raise SnapshotError(f"{not_ours}: its header is no JSON object.")
    return value


def _header(manifest: Any, layout: Layout, checksums: dict[str, str]) -> bytes:
    texts = _canonical(manifest), _canonical(checksums)
    metadata = {"jaxkv": texts[0], "sha256": texts[1], "seal": _seal(*texts)}
    table: dict[str, Any] = {_METADATA: metadata}
    end = 0
    for name, spec in layout.items():
        begin, end = end, end + spec.size_bytes
        code, shape = _CODES[jnp.dtype(spec.dtype).name], list(spec.shape)
        table[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    text = _canonical(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _seal(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _in_file_order(layout: Layout) -> Layout:
    """Wide numbers first, so that each tensor is aligned to its own."""

    def order(item: tuple[str, Spec]) -> tuple[int, str]:
        return -jnp.dtype(item[1].dtype).itemsize, item[0]

    return dict(sorted(layout.items(), key=order))


def _write_tensor(file: BinaryIO, pieces: Iterable[np.ndarray]) -> str:
    checksum = hashlib.sha256()
    for piece in pieces:
        data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
        checksum.update(data)
        file.write(data)
    return checksum.hexdigest()


def _verify(path: Path, tensors: dict[str, np.ndarray], checksums: dict[str, str]) -> None:
    def checksum(name: str) -> str:
        return hashlib.sha256(tensors[name].reshape(-1).view(np.uint8).data).hexdigest()

    with ThreadPoolExecutor(min(len(tensors), os.cpu_count() or 1) or 1) as pool:
        found = dict(zip(tensors, pool.map(checksum, tensors), strict=True))
    if bad := sorted(name for name in tensors if found[name] != checksums[name]):
        raise SnapshotError(
            f"{path} is damaged: {', '.join(bad)} fails its checksum. Copy or save it again."
        )


def _sync_folder(folder: Path) -> None:
    """Write the folder to disk, so that the new file's name outlives a power cut."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
