"""Where arrays are, and what a program of them may be compiled for.

Inside jit that is not known yet: the platform is chosen when the program is lowered, by where its
arguments are or by who exports it. So nothing here asks for the process's backend.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
from jax import lax
from jax.sharding import AxisType

if TYPE_CHECKING:
    # An extension type without stubs, which a type checker takes for a variable.
    Device: TypeAlias = Any
else:
    from jax import Device

PLATFORMS = ("cpu", "gpu", "tpu")  # those on which something differs; any other is as a TPU


def is_concrete(*arrays: Any) -> bool:
    """Whether all of these have values: inside jit traced arrays do not."""
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)


def default_device() -> Device:
    """The device on which JAX puts arrays when none is named."""
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if default is None or isinstance(default, str):
        return jax.local_devices(backend=default)[0]
    return default


def platform_at(place: Any) -> str:
    """The platform of a device or a sharding; of the default device for None."""
    place = default_device() if place is None else place
    return next(iter(getattr(place, "device_set", [place]))).platform


@functools.cache
def local_gpu() -> Device | None:
    """The first GPU of this process, which stands for those that programs are lowered for."""
    try:
        return jax.local_devices(backend="gpu")[0]
    except RuntimeError:
        return None


def platform_of(*arrays: Any) -> str | None:
    """The platform that a program of these arrays runs on; None while one of them is traced."""
    if not is_concrete(*arrays):
        return None
    held = (array for array in arrays if isinstance(array, jax.Array) and array.committed)
    devices = (next(iter(array.sharding.device_set)) for array in held)
    return (next(devices, None) or default_device()).platform


def num_devices_of(array: Any) -> int:
    """Devices that an array may be spread over.

    One inside a `jax.shard_map`, where a kernel is given the shard that its device has.
    """
    if not is_concrete(array):
        mesh = jax.typeof(array).sharding.mesh
        axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
        return math.prod(size for size, kind in axes if kind != AxisType.Manual)
    sharding = getattr(array, "sharding", None)
    return 1 if sharding is None else sharding.num_devices


def by_platform(runs: Mapping[str, Callable[..., Any]], *operands: Any) -> Any:
    """What the run of the platform gives that the program is lowered for.

    Args:
      runs: for each of `PLATFORMS`, or for some: lowering for another is an error then.
    """
    different = set(runs.values())
    if len(runs) == len(PLATFORMS) and len(different) == 1:
        return different.pop()(*operands)
    own = {"cpu": ["cpu"], "gpu": ["cuda", "rocm"]}
    named = {name: run for platform, run in runs.items() for name in own.get(platform, [])}
    return lax.platform_dependent(*operands, default=runs.get("tpu"), **named)
