"""What XLA compiled, kept for the next time."""

import os
import pathlib

import jax

# Programs that took less to compile are not kept.
_LEAST_SECONDS = 0.1


def keep_compiled() -> None:
    """Switch on JAX's compilation cache, in a folder of jaxkv's own unless the user has named one.

    Keys of the cache are the program, jax's version and the device, so what is found is what would
    be compiled.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(root) / "jaxkv" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
