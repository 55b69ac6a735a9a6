"""Decode on a CPU at the rate of memory: `native.cc`, compiled on the machine that runs it.

XLA's CPU backend has no loop over slots that keeps up with memory (ARCHITECTURE.md, "Reading on a
CPU"). Where a C++ compiler is found, the source beside this file is compiled once for this very
processor and kept in the user's cache folder; where none is, `attend` takes another way, and
`explain` says so. ``JAXKV_NATIVE=0`` in the environment turns it off.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from jaxkv.addressing.contiguous import ContiguousIndex
from jaxkv.attention.blockwise import blockwise
from jaxkv.attention.request import Grouped, Request
from jaxkv.codecs import Dense, Int8
from jaxkv.kv_cache import KVCache

_SOURCE = pathlib.Path(__file__).with_name("native.cc")
_TARGET = "jaxkv_decode"
_LANES = 16
_NO_SINK = -1e30
# Not -ffast-math: linked into a library, it changes how the whole process rounds denormals.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC", "-w")


def cannot_serve(cache: KVCache, tokens: int) -> str | None:
    """Why this call is not for the native kernel, or None."""
    config = cache.config
    if jax.default_backend() != "cpu":
        return f"it reads on a CPU, and the backend is {jax.default_backend()}"
    if tokens != 1:
        return f"it serves one token a sequence, and this call has {tokens}"
    if not isinstance(config.codec, Dense | Int8):
        return f"it cannot read {config.codec.name}"
    if not isinstance(cache.index, ContiguousIndex):
        return f"it cannot read {config.addressing.name} caches"
    if config.head_dim % _LANES:
        return f"head_dim {config.head_dim} is not a multiple of {_LANES}"
    return _register()


def should_not_serve(cache: KVCache, tokens: int, heads: int) -> str | None:
    """Why another implementation is the better choice, or None."""
    if (devices := jax.local_device_count("cpu")) > 1:
        return f"this process has {devices} CPU devices, and a sharded cache would be gathered"
    return None


@jax.custom_jvp
def native(request: Request) -> Grouped:
    """Attend with one query a sequence."""
    codes, *scales = request.cache.storage.values()
    queries = request.queries[:, :, 0]  # [batch, kv_heads, group, head_dim]
    sinks = request.sinks
    if sinks is None:
        sinks = jnp.full(queries.shape[1:3], _NO_SINK, jnp.float32)
    output = jax.ffi.ffi_call(
        _TARGET, jax.ShapeDtypeStruct(queries.shape, jnp.float32), vmap_method="sequential"
    )(
        codes,
        scales[0] if scales else jnp.zeros(0, jnp.uint16),
        jnp.asarray(request.layer, jnp.int32),
        queries,
        request.positions[:, 0],
        request.lengths,
        sinks,
        capacity=np.int64(request.cache.index.capacity),
        window=np.int64(request.window or 0),
        softcap=np.float32(request.softcap or 0),
    )
    return output[:, :, None]


@native.defjvp
def _native_jvp(primals, tangents):
    """The kernel has no derivative of its own; the blockwise form's is the same function's."""
    return jax.jvp(blockwise, primals, tangents)


@functools.cache
def _register() -> str | None:
    """Compile if needed, load, and tell XLA. Returns what stood in the way, or None."""
    if os.environ.get("JAXKV_NATIVE") == "0":
        return "JAXKV_NATIVE=0 turns it off"
    candidates = (os.environ.get("CXX") or "c++", "g++", "clang++")
    compiler = next(filter(None, map(shutil.which, candidates)), None)
    if compiler is None:
        return "no C++ compiler was found (c++, g++ or $CXX), which it is built with once"
    try:
        library = ctypes.CDLL(os.fspath(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        return f"it could not be built: {_summary(error)}"
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(library.JaxkvDecode), platform="cpu")
    return None


def _built(compiler: str) -> pathlib.Path:
    """The compiled library, named by all that it depends on."""
    native_flag = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    command = [compiler, *_FLAGS, native_flag, f"-I{jax.ffi.include_dir()}"]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    depends_on = [_SOURCE.read_bytes(), version, command, jaxlib.__version__, _processor()]
    digest = hashlib.sha256(repr(depends_on).encode()).hexdigest()
    folder = _cache_folder()
    library = folder / f"native-{digest[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Built beside its place and moved there whole: two processes may do this at once.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = os.path.join(scratch, "native.so")
            subprocess.run(
                [*command, os.fspath(_SOURCE), "-o", built],
                capture_output=True,
                check=True,
                timeout=120,
            )
            os.replace(built, library)
    return library


def _cache_folder() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(root) / "jaxkv"


def _processor() -> str:
    """What "native" means here: a cache folder may be shared by unlike machines."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _summary(error: Exception) -> str:
    output = getattr(error, "stderr", None)
    lines = output.decode(errors="replace").strip().splitlines() if output else []
    return lines[0] if lines else str(error)
