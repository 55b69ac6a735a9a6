"""The file under a snapshot: whole or refused, whatever a crash or another program made of it."""

import json
import os

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxkv.errors import SnapshotError
from jaxkv.snapshot import container
from jaxkv.snapshot.container import Spec, opened, read_manifest, write

TENSORS = {
    "codes": np.arange(24, dtype=np.int8).reshape(2, 3, 4),
    "numbers": np.linspace(0, 1, 5, dtype=np.float32),
    "nothing": np.zeros((2, 0), np.int32),
}
LAYOUT = {name: Spec(array.dtype.name, array.shape) for name, array in TENSORS.items()}


def write_tensors(path, tensors=TENSORS, manifest=None):
    def in_halves(name):
        return np.array_split(tensors[name], 2)

    write(path, manifest or {"a": [1, "é"]}, LAYOUT, in_halves)


def read_tensors(path):
    with opened(path, lambda manifest: LAYOUT) as (manifest, tensors):
        return manifest, {name: array.copy() for name, array in tensors.items()}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype
        np.testing.assert_array_equal(actual[name], array)


def test_what_is_written_is_read_by_us_and_by_safetensors(tmp_path):
    path = tmp_path / "file"
    write_tensors(path)
    manifest, tensors = read_tensors(path)
    assert manifest == read_manifest(path) == {"a": [1, "é"]}
    assert_equal(tensors, TENSORS)
    assert_equal(safetensors.numpy.load_file(path), TENSORS)
    with safetensors.safe_open(path, framework="numpy") as file:
        assert json.loads(file.metadata()["jaxkv"]) == manifest


def test_numbers_are_aligned(tmp_path):
    write_tensors(tmp_path / "file")
    with opened(tmp_path / "file", lambda manifest: LAYOUT) as (_, tensors):
        assert all(array.flags.aligned for array in tensors.values())


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"", "no header"),
        (b"\xff" * 64, "no header"),
        (b"\x02" + bytes(7), "no header"),
        (safetensors.numpy.save({"a": np.zeros(3)}), "lacks jaxkv's metadata"),
        ((2).to_bytes(8, "little") + b"[]", "no JSON object"),
        ((9).to_bytes(8, "little") + b'{"a":1,"a":2}'[:9], "not the JSON"),
        ((13).to_bytes(8, "little") + b'{"a":1,"a":2}', "stands there twice"),
        ((100_000).to_bytes(8, "little") + b'{"a":' * 20_000, "not the JSON"),
        ((9_005).to_bytes(8, "little") + b'{"a":' + b"9" * 9000 + b"}", "not the JSON"),
    ],
)
def test_other_files_are_refused(tmp_path, contents, reason):
    (tmp_path / "file").write_bytes(contents)
    with pytest.raises(SnapshotError, match=reason):
        read_tensors(tmp_path / "file")


def test_every_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "file"
    write_tensors(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x11
        path.write_bytes(damaged)
        with pytest.raises(SnapshotError):
            read_tensors(path)


@pytest.mark.parametrize("change", [-1, -40, -100_000, +1], ids=str)
def test_a_file_of_another_size_is_refused(tmp_path, change):
    path = tmp_path / "file"
    write_tensors(path)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" if change > 0 else whole[: max(len(whole) + change, 0)])
    with pytest.raises(SnapshotError, match=r"truncated|damaged"):
        read_tensors(path)


# --- crashes -------------------------------------------------------------------------------------


class Recorder:
    """Stands between `write` and the disk, and writes down what reaches it, in order."""

    def __init__(self, file, log):
        self._file, self._log = file, log

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data):
        self._log.append(("write", self._file.tell(), bytes(data)))
        self._file.write(data)


@pytest.fixture
def log(monkeypatch):
    log, fdopen, fsync, replace = [], os.fdopen, os.fsync, os.replace

    def sync(descriptor):
        log.append(("sync",))
        fsync(descriptor)

    def put_in_place(source, target):
        log.append(("replace",))
        replace(source, target)

    monkeypatch.setattr(container.os, "fdopen", lambda *given: Recorder(fdopen(*given), log))
    monkeypatch.setattr(container.os, "fsync", sync)
    monkeypatch.setattr(container.os, "replace", put_in_place)
    return log


def test_a_half_written_file_is_refused_at_every_byte(tmp_path, log):
    write_tensors(tmp_path / "file")
    writes = [entry[1:] for entry in log if entry[0] == "write"]
    assert [entry[0] for entry in log[len(writes) :]] == ["sync", "replace", "sync"]
    whole, contents, half = (tmp_path / "file").read_bytes(), b"", tmp_path / "half"
    for offset, data in writes:
        for count in range(len(data)):
            torn = contents[:offset] + data[:count] + contents[offset + count :]
            half.write_bytes(torn)
            if torn != whole:
                with pytest.raises(SnapshotError):
                    read_tensors(half)
        contents = contents[:offset] + data + contents[offset + len(data) :]
    assert contents == whole


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_tensors(tmp_path / "file")
    others = {name: array + 1 for name, array in TENSORS.items()}

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_tensors(tmp_path / "file", others)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert_equal(read_tensors(tmp_path / "file")[1], TENSORS)
