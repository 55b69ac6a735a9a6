"""How programs are made in tests: thousands of small ones, which run a few times each."""

import atexit
import os
import shutil
import tempfile
import threading
from importlib import metadata

FLAGS = " --xla_cpu_parallel_codegen_split_count=1"
AS_USERS_DO = {}  # compiler options of what is proved about a compiled program
minor = int(metadata.version("jaxlib").split(".")[1])
if minor < 11:  # which has two ways to compile a fusion
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
    AS_USERS_DO["xla_cpu_use_fusion_emitters"] = True

# Programs per MLIR context, which keeps their types and constants for as long as it lives.
_USES = 50


def folder_of_one_run():
    """Where its processes keep programs for each other."""
    folder = tempfile.mkdtemp(prefix="jaxkv-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def compile_each_program_once():
    """Let XLA compile what no process of this run has compiled: keys are programs and versions."""
    import jax
    from jax._src import lru_cache

    def put(cache, key, value):
        """Whole or not at all: JAX's own leaves a part to be read by other processes."""
        path = cache.path / f"{key}{lru_cache._CACHE_SUFFIX}"
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(value)
        part.replace(path)

    lru_cache.LRUCache.put = put
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


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
