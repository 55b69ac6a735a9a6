"""How programs are made in tests: thousands of small ones, which run a few times each."""

import contextlib
import os
import pathlib
import threading
import time
from importlib import metadata

FLAGS = " --xla_cpu_parallel_codegen_split_count=1"
AS_USERS_DO = {}  # compiler options of what is proved about a compiled program
minor = int(metadata.version("jaxlib").split(".")[1])
if minor < 11:  # which has two ways to compile a fusion
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
    AS_USERS_DO["xla_cpu_use_fusion_emitters"] = True

# Programs per MLIR context, which keeps their types and constants for as long as it lives.
_USES = 50
_KEPT = 7 * 24 * 60 * 60  # seconds


def folder_of_programs():
    """Where JAX finds what XLA has compiled for tests in this run or an earlier one, of this week.

    Keys are the program, the processor, versions and flags: what is found would be compiled.
    """
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(root) / "jaxkv" / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    for program in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process may be at it
            if program.stat().st_mtime < time.time() - _KEPT:
                program.unlink()
    return str(folder)


@contextlib.contextmanager
def compiling_anew():
    """Leave the folder of programs alone for a while."""
    _use_the_folder(False)
    try:
        yield
    finally:
        _use_the_folder(True)


def _use_the_folder(wanted):
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", wanted)
    compilation_cache.reset_cache()  # which asks for that once


def make_few_mlir_contexts():
    """As JAX does by itself from 0.12 on: one takes 4 ms, a small program little more."""
    from jax._src.interpreters import mlir

    make, held = mlir.make_ir_context, threading.local()

    def make_or_reuse():
        held.uses = getattr(held, "uses", 0) + 1
        if held.uses % _USES == 1:
            held.context = make()
        return held.context

    if minor < 12:
        mlir.make_ir_context = make_or_reuse
