"""Every update is in place, proved from the compiled program, for every kind of cache."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxkv
from jaxkv.addressing import ADDRESSINGS
from jaxkv.attention import IMPLEMENTATIONS
from tests.compiled import assert_in_place, compile_donating, compiled_as_users_do
from tests.oracle import EACH_ONCE, KINDS, ROTATED, SMALL, layer_step, random_step, step

LAYERS, KV_HEADS, HEAD_DIM, SLOTS = 3, 2, 16, 1 << 20


def abstract_cache(codec, addressing="contiguous", batch_size=None):
    """A cache of some 400 MB of float32, as shapes alone: nothing is allocated."""
    config = jaxkv.KVCacheConfig(
        num_layers=LAYERS,
        max_context_length=SLOTS // (batch_size or 1),
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        batch_size=batch_size,
        codec=KINDS[codec],
        addressing=ADDRESSINGS[addressing],
    )
    return jax.eval_shape(lambda: jaxkv.create(as_large(config)))


def as_large(config):
    """With a ring of as many slots as other caches have."""
    if config.addressing.name == "chunked":
        return config.replace(addressing=jaxkv.Chunked(config.max_context_length))
    if config.addressing.name != "ring":
        return config
    return config.replace(addressing=jaxkv.Ring(window=config.max_context_length - 127))


def vectors(cache, tokens=1):
    shape = (*cache.config.batch_shape, tokens, KV_HEADS, HEAD_DIM)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def append(cache, keys):
    return jaxkv.append(cache, keys, keys, layer=1)


def append_ragged(cache, keys):
    num_tokens = jnp.arange(cache.lengths.size).reshape(cache.lengths.shape) % 2
    return jaxkv.advance(
        jaxkv.append(cache, keys, keys, layer=1, num_tokens=num_tokens), num_tokens
    )


def append_in_a_layer_scan(cache, keys):
    def one_layer(cache, layer):
        return jaxkv.append(cache, keys, keys, layer=layer), None

    return jaxkv.advance(lax.scan(one_layer, cache, jnp.arange(LAYERS))[0], 1)


def append_in_a_while_loop(cache, keys):
    def one_token(state):
        token, cache = state
        for layer in range(LAYERS):
            cache = jaxkv.append(cache, keys, keys, layer=layer)
        return token + 1, jaxkv.advance(cache, 1)

    return lax.while_loop(lambda state: state[0] < 5, one_token, (0, cache))[1]


def decode_layer(cache, hidden, layer, implementation=None):
    keys, values = jnp.split(hidden, 2, axis=-2)
    cache = jaxkv.append(cache, keys, values, layer=layer)
    output = jaxkv.attend(cache, hidden, layer=layer, implementation=implementation)
    return cache, hidden + output


def decode(cache, keys, implementation=None):
    """Each layer's input depends on the layer before, as in a model."""
    hidden = jnp.repeat(keys, 2, axis=-2)
    for layer in range(cache.config.num_layers):
        cache, hidden = decode_layer(cache, hidden, layer, implementation)
    return jaxkv.advance(cache, 1), hidden


def decode_blockwise(cache, keys):
    return decode(cache, keys, "blockwise")


def decode_natively(cache, keys):
    if reason := IMPLEMENTATIONS["native"].cannot_serve(cache, tokens=1):
        pytest.skip(reason)
    return decode(cache, keys, "native")


def decode_in_a_layer_scan(cache, keys):
    def one_layer(state, layer):
        return decode_layer(*state, layer, "blockwise"), None

    state = cache, jnp.repeat(keys, 2, axis=-2)
    (cache, hidden), _ = lax.scan(one_layer, state, jnp.arange(LAYERS))
    return jaxkv.advance(cache, 1), hidden


PROGRAMS = [
    append,
    append_ragged,
    append_in_a_layer_scan,
    append_in_a_while_loop,
    decode_blockwise,
    decode_natively,
    decode_in_a_layer_scan,
]


def cases():
    """Every program and kind, batch or not in turns; the slow to compile in one that has it all."""
    for number, (program, (codec, addressing)) in enumerate(itertools.product(PROGRAMS, EACH_ONCE)):
        batch_size = None if number % 2 else 4
        if codec not in ROTATED or program is decode_in_a_layer_scan:
            name = f"{program.__name__}-{codec}-{addressing}-{batch_size}"
            yield pytest.param(program, codec, addressing, batch_size, id=name)


@pytest.mark.slow_cases(r"append_in_a|-float(16|8)-|rotated|chunked")
@pytest.mark.parametrize(("program", "codec", "addressing", "batch_size"), list(cases()))
def test_in_place(program, codec, addressing, batch_size):
    cache = abstract_cache(codec, addressing, batch_size)
    # A block of float32, and of codes on the way to it, beside a cache that is an eighth as large.
    share = 0.04 if codec in ROTATED else 0.01
    if addressing in ("ring", "chunked"):  # what each slot holds, 4 bytes for each
        share = 0.03
    assert_in_place(compile_donating(program, cache, vectors(cache)), cache, temp_share=share)


@pytest.mark.slow_cases(r"rotated")
@pytest.mark.parametrize("codec", KINDS)
def test_a_prefill_chunk_is_written_in_place(codec):
    cache = abstract_cache(codec)
    assert_in_place(compile_donating(append, cache, vectors(cache, tokens=256)), cache)


@pytest.mark.slow_cases(r"rotated")
@pytest.mark.parametrize("codec", KINDS)
def test_a_donated_step_keeps_its_buffers(codec):
    config = jaxkv.KVCacheConfig(2, 64, 2, 4, codec=KINDS[codec])
    cache = jaxkv.create(config)
    run = jax.jit(step, donate_argnums=0)
    where = {name: leaf.unsafe_buffer_pointer() for name, leaf in cache.storage.items()}
    for tokens in (4, 1, 1):
        cache, _ = run(cache, *random_step(config, tokens, heads=2))
    assert where == {name: leaf.unsafe_buffer_pointer() for name, leaf in cache.storage.items()}


# --- the proof can fail ------------------------------------------------------------------------


def scan_with_the_cache_as_inputs_and_outputs(cache, keys):
    def one_layer(_, leaf):
        return None, leaf.at[:, 3].set(keys[0])

    storage = {name: lax.scan(one_layer, None, leaf)[1] for name, leaf in cache.storage.items()}
    return jaxkv.KVCache(storage, cache.index, cache.config)


def write_by_comparing_every_slot(cache, keys):
    here = (jnp.arange(SLOTS) == cache.lengths)[:, None, None]
    storage = {name: jnp.where(here, keys[0], leaf) for name, leaf in cache.storage.items()}
    return jaxkv.KVCache(storage, cache.index, cache.config)


def read_what_was_before(cache, keys):
    return append(cache, keys), cache.storage["data"].at[0, 0, 0].add(1.0)


BAD_PROGRAMS = [
    (scan_with_the_cache_as_inputs_and_outputs, "of a whole leaf|of the cache"),
    (write_by_comparing_every_slot, "(select|broadcast) of a whole leaf"),
    (read_what_was_before, "copy of a whole leaf"),
]


@pytest.mark.parametrize(("program", "reason"), BAD_PROGRAMS)
def test_the_proof_fails_for_a_bad_program(program, reason):
    cache = abstract_cache("float32")
    with pytest.raises(AssertionError, match=reason):
        assert_in_place(compile_donating(program, cache, vectors(cache)), cache)


def test_the_proof_fails_without_donation():
    cache = abstract_cache("float32")
    compiled = compiled_as_users_do(jax.jit(append).lower(cache, vectors(cache)))
    with pytest.raises(AssertionError, match=r"copy of a whole leaf|not aliased"):
        assert_in_place(compiled, cache)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="XLA:CPU updates bfloat16 since 0.11")
def test_the_proof_fails_for_a_bfloat16_buffer_on_a_cpu():
    cache = abstract_cache("bfloat16")
    buffer = jax.ShapeDtypeStruct(cache.storage["data"].shape, jnp.bfloat16)
    native = jaxkv.KVCache({"data": buffer}, cache.index, cache.config)
    with pytest.raises(AssertionError, match="convert of a whole leaf"):
        assert_in_place(compile_donating(append, native, vectors(cache)), native)


# --- sharded over KV heads ---------------------------------------------------------------------


@pytest.mark.full_cases(r"^b?float16")
@pytest.mark.slow_cases(r"^(?!int8-contiguous)")
@pytest.mark.devices(8)
@pytest.mark.parametrize(("codec", "addressing"), EACH_ONCE)
def test_a_cache_sharded_over_heads_stays_so(codec, addressing):
    mesh = jax.make_mesh((8,), ("heads",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, None, None, "heads"))
    config = jaxkv.KVCacheConfig(
        2, 32768, 8, 4, batch_size=2, codec=KINDS[codec], addressing=ADDRESSINGS[addressing]
    )
    config = as_large(config)
    keys = np.random.default_rng(0).standard_normal((2, 1, 8, 4), np.float32)
    plain, sharded = jaxkv.create(config), jaxkv.create(config, device=sharding)
    run, compiled = jax.jit(decode), compile_donating(decode, sharded, keys)
    # A block of float32, beside vectors of one byte or two.
    assert_in_place(compiled, sharded, temp_share=0.2 if codec in ROTATED else 0.1)
    assert "all-gather" not in compiled.as_text()
    assert sharded.lengths.sharding.is_fully_replicated
    assert len(sharded.lengths.sharding.device_set) == 8
    for _ in range(3):
        plain, expected = run(plain, keys)
        sharded, outputs = compiled(sharded, keys)
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    for name, leaf in sharded.storage.items():
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        np.testing.assert_allclose(
            leaf.astype(jnp.float32), plain.storage[name].astype(jnp.float32), rtol=1e-5
        )


@pytest.mark.slow_cases(r"ring|paged")
@pytest.mark.devices(8)
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("addressing", ADDRESSINGS)
def test_in_a_mesh_with_explicit_axes_too(monkeypatch, addressing, implementation):
    monkeypatch.setattr("jaxkv.attention.blockwise.KEY_BLOCK", 8)
    mesh = jax.make_mesh((8,), ("heads",), axis_types=(AxisType.Explicit,))
    config = jaxkv.KVCacheConfig(
        2, 32, 8, 4, batch_size=2, codec=KINDS["float32"], addressing=SMALL[addressing]
    )
    arrays = [each[0] for each in random_step(config, 3, heads=16)]
    _, expected = layer_step(jaxkv.create(config), 1, *arrays)
    with jax.set_mesh(mesh):
        by_head = NamedSharding(mesh, PartitionSpec(None, None, "heads"))
        of_cache = NamedSharding(mesh, PartitionSpec(None, None, None, "heads"))
        cache = jaxkv.create(config, device=of_cache)
        sharded = [jax.device_put(each, by_head) for each in arrays]
        run = functools.partial(layer_step, implementation=implementation)
        cache, output = jax.jit(run, static_argnums=1)(cache, 1, *sharded)
        assert cache.storage["data"].sharding.spec[3] == "heads"
        assert output.sharding.spec[2] == "heads"
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
