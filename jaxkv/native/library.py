"""The native library: the sources beside this file, compiled once for this very processor.

It is kept in the user's cache folder. Where no C++ compiler is found, its users take another
way, and say so (`jaxkv.explain`). ``JAXKV_NATIVE=0`` in the environment turns it off.

XLA must know it before a program that another process compiled is loaded. So what was built on
this machine before is registered when jaxkv is imported.
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
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jaxlib

from jaxkv.devices import is_concrete, platform_at

_FOLDER = pathlib.Path(__file__).parent
# Custom call targets of XLA -> symbols of the library.
_TARGETS = {"jaxkv_decode": "JaxkvDecode", "jaxkv_products": "JaxkvProducts"}
# Not -ffast-math: linked into a library, it changes how the whole process rounds denormals.
_FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno"),
    *("-fPIC", "-pthread", "-w"),
)
_loaded: ctypes.CDLL | None = None
_MOST_SECONDS = 300  # on a busy machine; a quiet one takes some 15


@functools.cache
def unavailable() -> str | None:
    """What stands in the way of the library's use, or None once XLA knows it."""
    global _loaded
    if os.environ.get("JAXKV_NATIVE") == "0":
        return "JAXKV_NATIVE=0 turns it off"
    if (compiler := _compiler()) is None:
        return "no C++ compiler was found (c++, g++ or $CXX), which it is built with once"
    try:
        _loaded = library = ctypes.CDLL(os.fspath(built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        return f"it could not be built: {_summary(error)}"
    for target, symbol in _TARGETS.items():
        handler = jax.ffi.pycapsule(getattr(library, symbol))
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
    return None


def register_if_built() -> None:
    """Let XLA know the library where that takes no compilation."""
    if (compiler := _compiler()) is not None and _place(compiler).exists():
        unavailable()


def prefer_large_pages(arrays: Any) -> None:
    """Put new arrays of a CPU on large pages, beside other work; where that cannot be, nothing.

    A kernel asks for it too, when it first reads a buffer: but then a token is waited for, and
    moving the pages takes the time of several.
    """
    if _loaded is None:
        return
    for array in jax.tree.leaves(arrays):
        if is_concrete(array) and platform_at(array.sharding) == "cpu":
            for shard in array.addressable_shards:
                pointer = ctypes.c_void_p(shard.data.unsafe_buffer_pointer())
                _loaded.JaxkvPreferLargePages(pointer, ctypes.c_int64(shard.data.nbytes))


def built(compiler: str) -> pathlib.Path:
    """The compiled library."""
    library = _place(compiler)
    if not library.exists():
        folder = library.parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Built beside its place and moved there whole: two processes may do this at once.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            new = os.path.join(scratch, "native.so")
            with ThreadPoolExecutor() as pool:
                objects = list(
                    pool.map(functools.partial(_compiled, compiler, scratch), _sources())
                )
            _run([compiler, "-shared", "-pthread", *objects, "-o", new])
            os.replace(new, library)
    return library


def _compiled(compiler: str, folder: str, source: pathlib.Path) -> str:
    """The object file that is made of a source."""
    result = os.path.join(folder, f"{source.stem}.o")
    _run([*_command(compiler), "-c", os.fspath(source), "-o", result])
    return result


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, check=True, timeout=_MOST_SECONDS)


def _sources() -> list[pathlib.Path]:
    return sorted(_FOLDER.glob("*.cc"))


def _compiler() -> str | None:
    candidates = (os.environ.get("CXX") or "c++", "g++", "clang++")
    return next(filter(None, map(shutil.which, candidates)), None)


def _command(compiler: str) -> list[str]:
    native_flag = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return [compiler, *_FLAGS, native_flag, f"-I{jax.ffi.include_dir()}"]


def _place(compiler: str) -> pathlib.Path:
    """Where the library is once it is built: named by all that it depends on."""
    sources = [*_sources(), *sorted(_FOLDER.glob("*.h"))]
    contents = [source.read_bytes() for source in sources]
    status = os.stat(compiler)  # another version is another file
    depends_on = [
        *(contents, _command(compiler), status.st_size, status.st_mtime_ns),
        *(jaxlib.__version__, _processor()),
    ]
    digest = hashlib.sha256(repr(depends_on).encode()).hexdigest()
    return _cache_folder() / f"native-{digest[:16]}.so"


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
    if isinstance(error, subprocess.TimeoutExpired):
        return f"the compiler took longer than {error.timeout:.0f} s"
    output = getattr(error, "stderr", None)
    lines = output.decode(errors="replace").strip().splitlines() if output else []
    return lines[0] if lines else str(error)
