"""Every error that jaxkv raises on purpose: what happened, what was got, what to do."""


class JaxkvError(Exception):
    """Base of all jaxkv errors, for callers that want to catch any of them.

    >>> import jaxkv
    >>> try:
    ...     jaxkv.KVCacheConfig(0, 8, 1, 4)
    ... except jaxkv.JaxkvError as error:
    ...     print(type(error).__name__)
    ConfigError
    """


class ConfigError(JaxkvError, ValueError):
    """A `KVCacheConfig` has bad fields; the message names each, with what is allowed.

    >>> import jaxkv
    >>> jaxkv.KVCacheConfig(num_layers=0, max_context_length=8, num_kv_heads=1, head_dim=4)
    Traceback (most recent call last):
    jaxkv.errors.ConfigError: KVCacheConfig: num_layers must be an int of at least 1, got 0.
    """


class CacheFullError(JaxkvError, ValueError):
    """More tokens than a sequence has slots for. The cache is as it was before the call.

    >>> import jaxkv
    >>> jaxkv.advance(jaxkv.create(jaxkv.KVCacheConfig(1, 8, 1, 4)), 9)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    jaxkv.errors.CacheFullError: KV cache full: holds 0 of 8 tokens, and 9 more were given...
    """


class CacheClosedError(JaxkvError, RuntimeError):
    """A cache was used after its session ended or after its buffers were donated.

    >>> import jaxkv
    >>> with jaxkv.session(jaxkv.KVCacheConfig(1, 8, 1, 4)) as session:
    ...     pass
    >>> session.cache  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    jaxkv.errors.CacheClosedError: This session has ended and its KV cache is freed...
    """


class CacheAllocationError(JaxkvError, MemoryError):
    """A cache does not fit in the memory of its device; the message says what would fit.

    >>> import jaxkv
    >>> huge = jaxkv.KVCacheConfig(128, 1 << 30, num_kv_heads=128, head_dim=128)
    >>> with jaxkv.session(huge):
    ...     pass  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    jaxkv.errors.CacheAllocationError: ...
    """


class CheckpointError(JaxkvError, ValueError):
    """A model folder that cannot be loaded; the message names the file and the tensor.

    >>> import pathlib, tempfile, jaxkv
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "config.json").write_text('{"model_type": "mystery"}')
    ...     jaxkv.models.load(folder)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    jaxkv.errors.CheckpointError: ...
    """


class PoolFullError(JaxkvError, RuntimeError):
    """Not enough pages of a paged pool are free now. Nothing changed; try when others are done.

    >>> import jaxkv.paging
    >>> pages = jaxkv.paging.PageAllocator(4, page_size=2)
    >>> _ = pages.admit("a", pages.prompt([1, 2, 3, 4, 5]))
    >>> pages.admit("b", pages.prompt([6, 7, 8]))
    Traceback (most recent call last):
    jaxkv.errors.PoolFullError: 1 of 4 pages are free: no room for 3 tokens now.
    """


class UnknownRequestError(JaxkvError, LookupError):
    """A request that was never admitted, or has ended. Nothing changed.

    >>> import jaxkv.paging
    >>> jaxkv.paging.PageAllocator(4).release("nobody")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    jaxkv.errors.UnknownRequestError: ...
    """


class ModelChangedError(JaxkvError, RuntimeError):
    """Weights of a model were deleted, or exchanged while requests run. Nothing was computed.

    >>> import jax, jaxkv
    >>> def follow(step, tokens, cache):  # a "model" that answers token + step
    ...     return jax.nn.one_hot(tokens + step, 9), jaxkv.advance(cache, tokens.shape[-1])
    >>> model = jax.tree_util.Partial(follow, jax.numpy.int32(1))
    >>> model.args[0].delete()  # as a training step does that takes weights donated
    >>> config = jaxkv.KVCacheConfig(1, 8, 1, 4, batch_size=1)
    >>> jaxkv.generate(model, [[1]], max_new_tokens=1, config=config)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    jaxkv.errors.ModelChangedError: 1 of the model's arrays were deleted...
    """


class BookkeepingError(JaxkvError, AssertionError):
    """The books of a page pool contradict themselves: a bug, or somebody changed them."""


class SnapshotError(JaxkvError, ValueError):
    """A saved cache that cannot be used: damaged, or of another model, prompt or kind of cache.

    >>> import pathlib, tempfile, jaxkv
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "cache.kv")
    ...     _ = file.write_bytes(b"something else")
    ...     jaxkv.load(file)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    jaxkv.errors.SnapshotError: ...
    """
