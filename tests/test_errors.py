"""Every misuse of the cache raises the documented error, and says what was got and expected."""

import jax
import jax.numpy as jnp
import pytest

import jaxkv

SHAPE = {"num_layers": 2, "max_context_length": 8, "num_kv_heads": 2, "head_dim": 4}
SINGLE = jaxkv.KVCacheConfig(**SHAPE)
BATCH = jaxkv.KVCacheConfig(**SHAPE, batch_size=3)


def zeros(*shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


def append(config, keys, values=None, layer=0, **options):
    values = keys if values is None else values
    return jaxkv.append(jaxkv.create(config), keys, values, layer=layer, **options)


def attend(config, queries, layer=0, **options):
    return jaxkv.attend(jaxkv.create(config), queries, layer=layer, **options)


KEYS, QUERIES, BATCH_KEYS = zeros(3, 2, 4), zeros(3, 4, 4), zeros(3, 3, 2, 4)

MISUSES = {
    "append to a layer too high": (
        lambda: append(SINGLE, KEYS, layer=2),
        IndexError,
        "layer 2 is out of range: the cache has layers 0 to 1",
    ),
    "append to a negative layer": (
        lambda: append(SINGLE, KEYS, layer=-1),
        IndexError,
        "layer -1 is out of range",
    ),
    "append to a layer in a device array": (
        lambda: append(SINGLE, KEYS, layer=jnp.int32(7)),
        IndexError,
        "layer 7 is out of range",
    ),
    "append to a layer that is no integer": (
        lambda: append(SINGLE, KEYS, layer=0.5),
        TypeError,
        "float",
    ),
    "attend to a layer too high": (
        lambda: attend(SINGLE, QUERIES, layer=2),
        IndexError,
        "layers 0 to 1",
    ),
    "read a layer too high": (
        lambda: jaxkv.layer(jaxkv.create(SINGLE), 2),
        IndexError,
        "layers 0 to 1",
    ),
    "keys without heads": (
        lambda: append(SINGLE, zeros(3, 4)),
        ValueError,
        r"keys must be \[tokens, kv_heads, head_dim\] = \['tokens', 2, 4\], got \[3, 4\]",
    ),
    "keys with other heads": (
        lambda: append(SINGLE, zeros(3, 4, 4)),
        ValueError,
        r"= \[3, 2, 4\], got \[3, 4, 4\]",
    ),
    "keys with another head_dim": (
        lambda: append(SINGLE, zeros(3, 2, 5)),
        ValueError,
        r"= \[3, 2, 4\], got \[3, 2, 5\]",
    ),
    "keys with a batch for a single sequence": (
        lambda: append(SINGLE, BATCH_KEYS),
        ValueError,
        r"= \[3, 2, 4\], got \[3, 3, 2, 4\]",
    ),
    "keys without a batch": (
        lambda: append(BATCH, KEYS),
        ValueError,
        r"keys must be \[batch, tokens, kv_heads, head_dim\] = \[3, 3, 2, 4\], got \[3, 2, 4\]",
    ),
    "values unlike keys": (
        lambda: append(SINGLE, KEYS, zeros(2, 2, 4)),
        ValueError,
        r"values must be .* = \[3, 2, 4\], got \[2, 2, 4\]",
    ),
    "integer keys": (
        lambda: append(SINGLE, zeros(3, 2, 4, dtype="int32")),
        TypeError,
        "keys must be a float array, got int32",
    ),
    "integer values": (
        lambda: append(SINGLE, KEYS, zeros(3, 2, 4, dtype="int8")),
        TypeError,
        "values must be a float array, got int8",
    ),
    "integer queries": (
        lambda: attend(SINGLE, zeros(3, 4, 4, dtype="int32")),
        TypeError,
        "queries must be a float array, got int32",
    ),
    "query heads that KV heads do not divide": (
        lambda: attend(SINGLE, zeros(3, 3, 4)),
        ValueError,
        r"\[tokens, a multiple of 2, 4\], got \[3, 3, 4\]",
    ),
    "queries with another head_dim": (
        lambda: attend(SINGLE, zeros(3, 4, 8)),
        ValueError,
        r"\[tokens, a multiple of 2, 4\], got \[3, 4, 8\]",
    ),
    "queries of another batch": (
        lambda: attend(BATCH, zeros(2, 3, 4, 4)),
        ValueError,
        r"\[3, tokens, a multiple of 2, 4\], got \[2, 3, 4, 4\]",
    ),
    "a window of nothing": (
        lambda: attend(SINGLE, QUERIES, window=0),
        ValueError,
        "window must be an int of at least 1, got 0",
    ),
    "a softcap of nothing": (
        lambda: attend(SINGLE, QUERIES, softcap=0.0),
        ValueError,
        "softcap must be positive, got 0.0",
    ),
    "sinks of other heads": (
        lambda: attend(SINGLE, QUERIES, sink_logits=zeros(2)),
        ValueError,
        r"sink_logits must be \[heads\] = \[4\], got \[2\]",
    ),
    "an unknown implementation": (
        lambda: attend(SINGLE, QUERIES, implementation="flash"),
        ValueError,
        "implementation must be one of .*reference, blockwise.*, got 'flash'",
    ),
    "an implementation that cannot serve": (
        lambda: attend(SINGLE, zeros(9, 4, 4), implementation="native"),
        ValueError,
        "implementation 'native' cannot serve this call: it serves up to 8 tokens",
    ),
    "more real tokens than tokens": (
        lambda: append(SINGLE, KEYS, num_tokens=4),
        ValueError,
        "num_tokens must be from 0 to 3, the tokens given, got 4",
    ),
    "a negative number of tokens": (
        lambda: attend(BATCH, zeros(3, 3, 4, 4), num_tokens=jnp.array([1, -1, 2])),
        ValueError,
        r"num_tokens must be from 0 to 3, the tokens given, got \[1, -1, 2\]",
    ),
    "numbers of tokens of another batch": (
        lambda: append(BATCH, BATCH_KEYS, num_tokens=jnp.array([1, 2])),
        ValueError,
        r"num_tokens must be an int or int32\[3\], got int32\[2\]",
    ),
    "advance of a batch for a single sequence": (
        lambda: jaxkv.advance(jaxkv.create(SINGLE), jnp.array([3])),
        ValueError,
        r"num_tokens must be an int, got int32\[1\]",
    ),
    "advance backwards": (
        lambda: jaxkv.advance(jaxkv.create(SINGLE), -1),
        ValueError,
        "num_tokens must be at least 0, got -1",
    ),
    "advance by a fraction": (
        lambda: jaxkv.advance(jaxkv.create(SINGLE), 1.5),
        ValueError,
        "num_tokens must be an int, got float",
    ),
    "truncate to a negative length": (
        lambda: jaxkv.truncate(jaxkv.create(SINGLE), -1),
        ValueError,
        "length must be at least 0, got -1",
    ),
    "more positions than int32 has room for": (
        lambda: jaxkv.create(SINGLE.replace(max_context_length=2**30)),
        jaxkv.ConfigError,
        r"1073741824 tokens.* must both be below 2\*\*30.* Use a smaller max_context_length",
    ),
    "more places for vectors than int32 has room for": (
        lambda: jaxkv.create(BATCH.replace(batch_size=2**15, max_context_length=2**14)),
        jaxkv.ConfigError,
        r"536870912 slots x 2 KV heads.*below 2\*\*30",
    ),
    "a compressed cache in pages with a window": (
        lambda: jaxkv.Kept(4, 4, num_layers=2, num_kv_heads=2, within=jaxkv.Paged(window=3)),
        ValueError,
        r"within Contiguous\(\) or Paged\(\) without a window, got .*window=3",
    ),
    "newest tokens that are none": (
        lambda: jaxkv.Newest(0),
        ValueError,
        "Newest: tokens must be an int of at least 1, got 0",
    ),
    "newest tokens that are no Newest": (
        lambda: SINGLE.replace(newest=16),
        jaxkv.ConfigError,
        r"newest must be jaxkv.Newest\(...\) or None, got 16",
    ),
    "truncate of another batch": (
        lambda: jaxkv.truncate(jaxkv.create(BATCH), jnp.array([1, 2])),
        ValueError,
        r"length must be an int or int32\[3\], got int32\[2\]",
    ),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse(misuse):
    call, error, message = MISUSES[misuse]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("misuse", ["keys with other heads", "append to a layer too high"])
def test_misuse_is_found_while_tracing(misuse):
    call, error, message = MISUSES[misuse]
    with pytest.raises(error, match=message):
        jax.eval_shape(call)


DONATED_USES = {
    "check": jaxkv.check,
    "append": lambda cache: jaxkv.append(cache, KEYS, KEYS, layer=0),
    "attend": lambda cache: jaxkv.attend(cache, QUERIES, layer=0),
    "advance": lambda cache: jaxkv.advance(cache, 1),
    "layer": lambda cache: jaxkv.layer(cache, 0),
    "next_positions": lambda cache: jaxkv.next_positions(cache, 1),
    "truncate": lambda cache: jaxkv.truncate(cache, 0),
    "reset": jaxkv.reset,
}


@pytest.mark.parametrize("use", DONATED_USES)
def test_a_donated_cache_is_closed(use):
    cache = jaxkv.create(SINGLE)
    survivor = jax.jit(lambda cache: jaxkv.advance(cache, 1), donate_argnums=0)(cache)
    with pytest.raises(jaxkv.CacheClosedError, match=r"donated or deleted.*Rebind it"):
        DONATED_USES[use](cache)
    assert "donated" in repr(cache)
    DONATED_USES[use](survivor)


BASES = {
    jaxkv.ConfigError: ValueError,
    jaxkv.CacheFullError: ValueError,
    jaxkv.CacheClosedError: RuntimeError,
    jaxkv.CacheAllocationError: MemoryError,
    jaxkv.CheckpointError: ValueError,
    jaxkv.PoolFullError: RuntimeError,
    jaxkv.UnknownRequestError: LookupError,
}


@pytest.mark.parametrize("error", BASES)
def test_each_error_is_also_the_builtin_that_callers_know(error):
    assert issubclass(error, BASES[error])
    assert issubclass(error, jaxkv.JaxkvError)
