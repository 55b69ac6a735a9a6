"""jaxkv: key/value caches for JAX. Pure functions over an immutable pytree."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxkv import exported  # noqa: F401, lets jax.export serialize caches
from jaxkv.addressing import Addressing, Chunked, Contiguous, Kept, Paged, Ring
from jaxkv.attention import attend, attend_cross, explain, fetched_blocks, observed
from jaxkv.cache.axes import Axes
from jaxkv.cache.config import KVCacheConfig
from jaxkv.cache.cross import cross_layer, write_cross
from jaxkv.cache.host import offload, prefetch
from jaxkv.cache.hybrid import HybridCache, HybridConfig
from jaxkv.cache.keep_path import keep_path
from jaxkv.cache.kv_cache import KVCache
from jaxkv.cache.newest import Newest
from jaxkv.cache.rearrange import copy_pages, fork, select
from jaxkv.cache.regroup import gather, spread
from jaxkv.cache.shards import partition_specs
from jaxkv.cache.state import StateConfig
from jaxkv.cache.states import copy_state, real_tokens, restore_state, state, with_state
from jaxkv.cache.verbs import (
    advance,
    append,
    check,
    layer,
    next_positions,
    padded_after,
    reset,
    truncate,
)
from jaxkv.codecs import Centred, Codec, Dense, Float8, Int8, KeysValues, Rope, Rotated, Stair
from jaxkv.errors import (
    CacheAllocationError,
    CacheClosedError,
    CacheFullError,
    CheckpointError,
    ConfigError,
    JaxkvError,
    ModelChangedError,
    PoolFullError,
    SnapshotError,
    UnknownRequestError,
)
from jaxkv.memory import MemoryTracker, Plan, Purpose, plan, session
from jaxkv.memory.create import create
from jaxkv.models.known import cache_config
from jaxkv.models.shape import wide_at_the_ends
from jaxkv.placement import HostMemory
from jaxkv.serve.calibration import calibrate
from jaxkv.serve.generate import Generation, Speculation, Timings, generate
from jaxkv.serve.sampling import Sampling, sample

if TYPE_CHECKING:
    from jaxkv import (  # noqa: F401, for type checkers
        codecs,
        compression,
        drafts,
        evaluation,
        integrations,
        models,
        paging,
        plots,
        policies,
        serve,
        snapshot,
    )
    from jaxkv.compression.compress import compress
    from jaxkv.compression.evict import evict, evicting
    from jaxkv.policies import reconstruction_scores
    from jaxkv.quality import measure_error
    from jaxkv.serve import Engine
    from jaxkv.snapshot.load import load
    from jaxkv.snapshot.prefix import load_prefix
    from jaxkv.snapshot.save import save

__version__ = "0.11.1"

__all__ = [
    "Addressing",
    "Axes",
    "CacheAllocationError",
    "CacheClosedError",
    "CacheFullError",
    "Centred",
    "CheckpointError",
    "Chunked",
    "Codec",
    "ConfigError",
    "Contiguous",
    "Dense",
    "Engine",
    "Float8",
    "Generation",
    "HostMemory",
    "HybridCache",
    "HybridConfig",
    "Int8",
    "JaxkvError",
    "KVCache",
    "KVCacheConfig",
    "Kept",
    "KeysValues",
    "MemoryTracker",
    "ModelChangedError",
    "Newest",
    "Paged",
    "Plan",
    "PoolFullError",
    "Purpose",
    "Ring",
    "Rope",
    "Rotated",
    "Sampling",
    "SnapshotError",
    "Speculation",
    "Stair",
    "StateConfig",
    "Timings",
    "UnknownRequestError",
    "advance",
    "append",
    "attend",
    "attend_cross",
    "cache_config",
    "calibrate",
    "check",
    "compress",
    "copy_pages",
    "copy_state",
    "create",
    "cross_layer",
    "evict",
    "evicting",
    "explain",
    "fetched_blocks",
    "fork",
    "gather",
    "generate",
    "keep_path",
    "layer",
    "load",
    "load_prefix",
    "measure_error",
    "models",
    "next_positions",
    "observed",
    "offload",
    "padded_after",
    "partition_specs",
    "plan",
    "plots",
    "prefetch",
    "real_tokens",
    "reconstruction_scores",
    "reset",
    "restore_state",
    "sample",
    "save",
    "select",
    "session",
    "spread",
    "state",
    "truncate",
    "wide_at_the_ends",
    "with_state",
    "write_cross",
]


# What not everybody needs, imported when it is first asked for: modules, and names of them.
_MODULES = (
    "codecs",
    "compression",
    "drafts",
    "evaluation",
    "integrations",
    "models",
    "paging",
    "plots",
    "policies",
    "serve",
    "snapshot",
)
_NAMES = {
    "Engine": "serve",
    "compress": "compression",
    "evict": "compression",
    "evicting": "compression",
    "load": "snapshot",
    "load_prefix": "snapshot",
    "measure_error": "quality",
    "reconstruction_scores": "policies",
    "save": "snapshot",
}


if not TYPE_CHECKING:  # a type checker knows all names, and flags any other

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"jaxkv.{name}")
        if name not in _NAMES:
            raise AttributeError(f"module 'jaxkv' has no attribute {name!r}")
        # Kept, so that it is looked up once.
        globals()[name] = getattr(importlib.import_module(f"jaxkv.{_NAMES[name]}"), name)
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, "__version__"})
