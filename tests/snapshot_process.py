"""One process of several: `python -m tests.snapshot_process PORT NUMBER PROCESSES FOLDER`.

A snapshot of one device goes to a mesh, to a file of each process, and from there to another mesh.
"""

import pathlib
import sys

import jax
import pytest
from jax.sharding import AxisType

import jaxkv
from jaxkv.snapshot import inspect

# By the number of processes and of their devices: a mesh, another, and whose parts a process needs
# to go from the one to the other.
MESHES = {
    (2, 1): ({"heads": 2}, {"heads": 2}, lambda own: {own}),
    (2, 4): ({"context": 8}, {"batch": 2, "heads": 4}, lambda own: {0, 1}),
    (4, 2): (
        {"batch": 4, "heads": 2},
        {"batch": 2, "heads": 4},
        lambda own: {own // 2 * 2, own // 2 * 2 + 1},
    ),
}


def over(sizes):
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))
    return {"mesh": mesh, "axes": jaxkv.Axes(**{what: what for what in sizes})}


def opened_files(run):
    """What it gives, and the names of the files that are opened meanwhile and have a ``.kv.``."""
    names, listening = set(), [True]

    def listen(event, arguments):
        if event == "open" and listening and ".kv." in str(arguments[0]):
            names.add(pathlib.Path(arguments[0]).name)

    sys.addaudithook(listen)
    result = run()
    listening.clear()
    return result, names


def main(port, number, processes, folder):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(number))
    number, folder = int(number), pathlib.Path(folder)
    first, second, needed = MESHES[int(processes), jax.local_device_count()]
    cache = jaxkv.load(folder / "one", **over(first))  # which one device has saved
    file = folder / "first.kv"
    jaxkv.save(cache, file, model="another model")
    jaxkv.save(cache, file, model="a model")  # in the place of the old one
    parts = inspect(file).parts
    names = [parts.path(file, each).name for each in range(int(processes))]
    assert sorted(each.name for each in folder.glob("first.kv.*")) == sorted(names)
    other, opened = opened_files(lambda: jaxkv.load(file, model="a model", **over(second)))
    assert opened == {names[each] for each in needed(number)}, opened
    jaxkv.save(other, folder / "second.kv")

    if number == 1:  # whose part is lost
        (folder / names[1]).rename(folder / "away")
    failed = f"{names[1]} is missing: .*first.kv is in {processes} parts"
    with pytest.raises(jaxkv.SnapshotError, match=failed):
        jaxkv.load(file, **over(first))
    path, error = folder / "new.kv", jaxkv.SnapshotError
    if number == 1:  # whose part has nowhere to go
        path, error = folder / "no-such-folder" / "new.kv", OSError
    with pytest.raises(error, match="no-such-folder"):
        jaxkv.save(cache, path)
    left = [*folder.glob("new.kv"), *folder.glob(f"new.kv.*.{number}-of-{processes}")]
    assert left == []  # others may be about to remove theirs
    print("right", number)


if __name__ == "__main__":
    main(*sys.argv[1:])
