"""The memory of the machine itself: for devices, such as a CPU, that report none of their own."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Bound(NamedTuple):
    """One thing that limits what this process may allocate."""

    source: str
    limit_bytes: int
    free_bytes: int


def tightest_bound() -> Bound:
    """The machine's memory, its cgroup's limit or RLIMIT_AS: whichever leaves least."""
    bounds = [_physical(), *_cgroups(), *_address_space()]
    return min(bounds, key=lambda bound: bound.free_bytes)


def process_bytes() -> tuple[int, int]:
    """Resident bytes of this process, now and at their peak."""
    import psutil

    now = psutil.Process().memory_info().rss
    try:
        import resource
    except ImportError:  # Windows
        return now, now
    unit = 1 if sys.platform == "darwin" else 1024
    return now, max(now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _physical() -> Bound:
    import psutil

    memory = psutil.virtual_memory()
    return Bound("physical memory", memory.total, memory.available)


def _address_space() -> Iterator[Bound]:
    try:
        import resource
    except ImportError:  # Windows
        return
    import psutil

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        used = psutil.Process().memory_info().vms
        yield Bound("RLIMIT_AS", limit, max(limit - used, 0))


def _cgroups(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[Bound]:
    """The limit of each memory cgroup, version 1 or 2, that this process is in."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _limits_up(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _limits_up(root / "memory", path, *names)


def _limits_up(
    mount: Path, path: str, limit_name: str, usage_name: str, reclaimable: str
) -> Iterator[Bound]:
    """From a cgroup's folder up to its mount: a parent's limit holds for its children.

    In a container the path is often the host's and not there; the mount itself then is
    the container's own cgroup.
    """
    folder = mount / path.lstrip("/")
    for level in (folder, *folder.parents):
        # A missing file, or the word "max": no limit at this level.
        with contextlib.suppress(OSError, ValueError):
            limit = int((level / limit_name).read_text())
            used = int((level / usage_name).read_text())
            statistics = (level / "memory.stat").read_text().split()
            cached = dict(zip(statistics[::2], statistics[1::2], strict=True))
            used -= int(cached.get(reclaimable, 0))  # page cache, given up when memory is short
            yield Bound("cgroup limit", limit, max(limit - used, 0))
        if level == mount:
            return
