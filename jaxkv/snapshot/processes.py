"""What the processes of a mesh tell each other while they write or read files together."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkv.cache.axes import Spread
from jaxkv.errors import SnapshotError

_BYTES = 4096  # of a text that is told


def processes_of(spread: Spread) -> list[int]:
    """The numbers of the processes whose devices are in the mesh, in its order."""
    return list(dict.fromkeys(device.process_index for device in spread.mesh.devices.flat))


def told(spread: Spread | None, text: str) -> dict[int, str]:
    """What every process of the mesh said here, by its number. All of them must come here."""
    if spread is None or len(processes_of(spread)) == 1:
        return {jax.process_index(): text}
    own = np.zeros((1, _BYTES), np.uint8)
    data = text.encode()[:_BYTES]
    own[0, : len(data)] = np.frombuffer(data, np.uint8)
    devices = spread.mesh.devices.reshape(-1)
    mesh = Mesh(devices, ("devices",))
    rows = jax.make_array_from_callback(
        (len(devices), _BYTES), NamedSharding(mesh, PartitionSpec("devices")), lambda _: own
    )
    whole = jax.jit(lambda rows: rows, out_shardings=NamedSharding(mesh, PartitionSpec()))(rows)
    found = np.asarray(whole.addressable_data(0))
    texts = (bytes(row).rstrip(b"\0").decode(errors="ignore") for row in found)
    return {device.process_index: said for device, said in zip(devices, texts, strict=True)}


@contextlib.contextmanager
def all_or_none(spread: Spread | None) -> Iterator[None]:
    """A block that fails in every process of the mesh where it fails in one.

    Raises:
      SnapshotError: it failed elsewhere, and why. Where it failed its own error goes on.
    """
    try:
        yield
    except Exception as error:
        told(spread, f"{type(error).__name__}: {error}")
        raise
    failed = {number: said for number, said in told(spread, "").items() if said}
    if failed:
        number, said = next(iter(failed.items()))
        raise SnapshotError(f"process {number} failed, and so all of them stop here. {said}")
