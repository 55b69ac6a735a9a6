"""jaxkv: key/value caches for JAX. Pure functions over an immutable pytree."""

from jaxkv.addressing import Addressing, Contiguous
from jaxkv.attention import attend, explain
from jaxkv.cache import (
    KVCache,
    advance,
    append,
    check,
    create,
    layer,
    next_positions,
    reset,
    truncate,
)
from jaxkv.codecs import Codec, Dense
from jaxkv.config import KVCacheConfig
from jaxkv.errors import (
    CacheAllocationError,
    CacheClosedError,
    CacheFullError,
    CheckpointError,
    ConfigError,
    JaxkvError,
)

__version__ = "0.1.0"
