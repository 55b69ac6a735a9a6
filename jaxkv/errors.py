"""Every error that jaxkv raises on purpose: what happened, what was got, what to do."""


class JaxkvError(Exception):
    """Base of all jaxkv errors, for callers that want to catch any of them."""


class ConfigError(JaxkvError, ValueError):
    """A `KVCacheConfig` has bad fields; the message names each, with what is allowed."""


class CacheFullError(JaxkvError, ValueError):
    """More tokens than a sequence has slots for. The cache is as it was before the call."""


class CacheClosedError(JaxkvError, RuntimeError):
    """A cache was used after its session ended or after its buffers were donated."""


class CacheAllocationError(JaxkvError, MemoryError):
    """A cache does not fit in the memory of its device; the message says what would fit."""


class CheckpointError(JaxkvError, ValueError):
    """A model folder that cannot be loaded; the message names the file and the tensor."""


class PoolFullError(JaxkvError, RuntimeError):
    """Not enough pages of a paged pool are free now. Nothing changed; try when others are done."""


class UnknownRequestError(JaxkvError, LookupError):
    """A request that was never admitted, or has ended. Nothing changed."""


class BookkeepingError(JaxkvError, AssertionError):
    """The books of a page pool contradict themselves: a bug, or somebody changed them."""


class SnapshotError(JaxkvError, ValueError):
    """A saved cache that cannot be used: damaged, or of another model, prompt or kind of cache."""
