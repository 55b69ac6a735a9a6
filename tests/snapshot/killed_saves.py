"""``kill -9`` at chosen points of a save: a program, for it takes itself as a victim.

``python -m tests.snapshot.killed_saves OLD NEW TARGET COUNT`` writes NEW's contents over TARGET,
which holds OLD's, COUNT times, and is killed each time at another place: between and within
writes, before and after each fsync and the rename. After each death TARGET must be OLD or NEW
to the byte, and what else is left must be NEW or refused. Prints how many were which.
"""

import collections
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path
from unittest import mock

from jaxkv.errors import SnapshotError
from jaxkv.snapshot import container, manifest


class Reaper:
    """Counts the moments of a save, and kills at one of them."""

    def __init__(self, moment=None):
        self.moment, self.passed = moment, 0

    def tick(self):
        if self.passed == self.moment:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed += 1

    def around(self, call):
        def watched(*arguments):
            self.tick()
            result = call(*arguments)
            self.tick()
            return result

        return watched


class Watched:
    """A file whose every write comes in four parts that reach the disk one by one."""

    def __init__(self, file, reaper):
        self._file, self._reaper = file, reaper

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data):
        quarter = len(data) // 4 + 1
        for start in range(0, len(data), quarter):
            self._file.write(data[start : start + quarter])
            self._file.flush()
            self._reaper.tick()


def save_again(source, target, reaper):
    """What `jaxkv.save` does with the contents of ``source``, watched."""
    fdopen, layout = os.fdopen, layout_of(source)
    watched = {
        "fdopen": lambda *given: Watched(fdopen(*given), reaper),
        "fsync": reaper.around(os.fsync),
        "replace": reaper.around(os.replace),
    }
    with (
        container.opened(source, lambda json: layout) as (json, tensors),
        mock.patch.multiple(os, **watched),
    ):
        container.write(target, json, layout, lambda name: [tensors[name]])


def layout_of(path):
    return manifest.read(path, container.read_manifest(path)).layout()


def in_a_child(function):
    """Run it in a process of its own; the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        function()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def is_refused(path):
    try:
        with container.opened(path, lambda json: manifest.read(path, json).layout()):
            return False
    except SnapshotError:
        return True


def main(old, new, target, count):
    contents = {old.read_bytes(): "old", new.read_bytes(): "new"}
    shutil.copy(old, target)
    reaper = Reaper()
    save_again(new, target, reaper)
    assert contents[target.read_bytes()] == "new"  # a save gives the same bytes again
    found = collections.Counter()
    for number in range(count):
        shutil.copy(old, target)
        victim = Reaper(number * reaper.passed // count)
        assert in_a_child(lambda victim=victim: save_again(new, target, victim)) == signal.SIGKILL
        found[contents[target.read_bytes()]] += 1
        for left in target.parent.glob(f".{target.name}.*"):
            assert contents.get(left.read_bytes()) == "new" or is_refused(left)
            left.unlink()
    print(f"{count} kills: {found['old']} old, {found['new']} new, 0 wrong")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # JAX warns of forks; no child here uses JAX
    main(*map(Path, sys.argv[1:4]), int(sys.argv[4]))
