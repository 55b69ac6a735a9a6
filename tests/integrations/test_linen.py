"""Hooks and caches in linen models, and Flax's own decoding tests on the drop-in module."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxkv
from jaxkv.integrations.linen import CachedAttention, MultiHeadDotProductAttention, map_caches
from jaxkv.integrations.nnx import MultiHeadAttention
from tests.compiled import assert_in_place, compiled_as_users_do
from tests.integrations.test_flax import causal, in_chunks, random_input

LAYERS, HEADS, WIDTH, LENGTH = 2, 2, 8, 12
CONFIG = jaxkv.KVCacheConfig(
    LAYERS, LENGTH, HEADS, WIDTH // HEADS, batch_size=2, codec=jaxkv.Dense("float32")
)
LONG = CONFIG.replace(max_context_length=1 << 19)  # as shapes alone


class Model(nn.Module):
    """As a user wrote it, with the attention function as a field, as in Flax's examples."""

    config: jaxkv.KVCacheConfig | None = None

    @nn.compact
    def __call__(self, x, mask=None):
        for _ in range(LAYERS):
            hook = {"attention_fn": CachedAttention(self.config)} if self.config else {}
            x = x + nn.MultiHeadDotProductAttention(HEADS, **hook)(x, mask=mask)
        return x


class CarriedModel(nn.Module):
    """One cache for all layers in the collection ``cache``, carried through a scan over them."""

    config: jaxkv.KVCacheConfig

    @nn.compact
    def __call__(self, x):
        held = self.variable("cache", "kv_cache", jaxkv.create, self.config)

        def one_layer(module, state, layer):
            x, cache = state
            query, key, value = (
                nn.DenseGeneral((HEADS, WIDTH // HEADS), name=name)(x)
                for name in ("query", "key", "value")
            )
            cache = jaxkv.append(cache, key, value, layer=layer)
            mixed = jaxkv.attend(cache, query, layer=layer)
            return (x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(mixed), cache), None

        scan = nn.scan(one_layer, variable_axes={"params": 0}, split_rngs={"params": True})
        (x, cache), _ = scan(self, (x, held.value), jnp.arange(LAYERS))
        if not self.is_initializing():
            held.value = jaxkv.advance(cache, x.shape[-2])
        return x


MODELS = {"hooks": Model, "carried": CarriedModel}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def donating(model):
    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, cache, x):
        output, changed = model.apply({"params": params, "cache": cache}, x, mutable=["cache"])
        return output, changed["cache"]

    return step


@each_model
def test_a_donated_step_decodes_and_keeps_its_buffers(make):
    model, x = make(CONFIG), random_input(2, LENGTH)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    params, cache, step = variables["params"], variables["cache"], donating(model)
    expected, _ = step(params, jax.tree.map(jnp.copy, cache), x)

    def pointers():
        leaves = jax.tree.leaves(cache)
        return sorted(leaf.unsafe_buffer_pointer() for leaf in leaves if leaf.ndim > 1)

    def decode(piece):
        nonlocal cache
        output, cache = step(params, cache, piece)
        return output

    before = pointers()
    actual = in_chunks(decode, x, (6, 4, 1, 1))
    np.testing.assert_allclose(actual, expected, atol=2e-6)
    assert pointers() == before
    assert step._cache_size() == 4  # one program a shape: 12, 6, 4, 1 tokens
    if make is Model:
        np.testing.assert_allclose(
            actual, Model().apply({"params": params}, x, mask=causal(x)), atol=2e-6
        )


@each_model
def test_a_donated_step_is_in_place(make):
    model, x = make(LONG), jax.ShapeDtypeStruct((2, 1, WIDTH), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    lowered = donating(model).lower(variables["params"], variables["cache"], x)
    compiled = compiled_as_users_do(lowered)
    held = LONG if make is CarriedModel else LONG.replace(num_layers=1)
    assert_in_place(compiled, jax.eval_shape(lambda: jaxkv.create(held)))


def test_fewer_kv_heads_where_the_module_projects_so():
    class Grouped(nn.Module):
        @nn.compact
        def __call__(self, query, key):
            config = CONFIG.replace(num_kv_heads=1)
            return CachedAttention(config)(query, key, key)

    query, key = jnp.ones((2, 3, 4, 4)), jnp.ones((2, 3, 1, 4))
    output, changed = Grouped().apply({}, query, key, mutable=["cache"])
    assert output.shape == query.shape
    assert jax.tree.leaves(map_caches(jaxkv.check, changed))


def test_verbs_over_the_variables():
    model, x = Model(CONFIG), random_input(2, 4)
    variables = model.init(jax.random.key(0), x)
    first, changed = model.apply(variables, x, mutable=["cache"])
    again = map_caches(jaxkv.reset, changed)
    second, changed = model.apply(variables | again, x, mutable=["cache"])
    np.testing.assert_array_equal(first, second)
    apply = jax.jit(functools.partial(model.apply, mutable=["cache"]))
    for _ in range(3):  # sixteen tokens in all, for twelve slots
        _, changed = apply(variables | changed, x)
    with pytest.raises(jaxkv.CacheFullError, match="Tokens were dropped"):
        map_caches(jaxkv.check, changed)


def test_verbs_over_layers_that_are_scanned():
    """Their caches stand in one collection, stacked, and a verb is for one."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            hook = CachedAttention(CONFIG)
            return x + nn.MultiHeadDotProductAttention(HEADS, attention_fn=hook)(x), None

    axes = {"params": 0, "cache": 0}
    scan = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=LAYERS)
    model, x = scan(), random_input(2, 7)
    variables = jax.jit(model.init)(jax.random.key(0), x, None)
    apply = jax.jit(functools.partial(model.apply, mutable=["cache"]))
    (expected, _), _ = apply(variables, x, None)
    _, changed = apply(variables, x[:, :6], None)
    changed = map_caches(functools.partial(jaxkv.select, rows=np.array([1, 0])), changed)
    changed = map_caches(jaxkv.check, changed)
    (actual, _), changed = apply(variables | changed, x[::-1, 6:], None)
    np.testing.assert_allclose(actual, expected[::-1, 6:], atol=2e-6)
    _, changed = apply(variables | changed, x, None)  # fourteen tokens in all, for twelve slots
    with pytest.raises(jaxkv.CacheFullError, match="Tokens were dropped"):
        map_caches(jaxkv.check, changed)


def test_parameters_load_both_ways_and_a_cache_needs_no_init():
    x = random_input(2, LENGTH)
    theirs = nn.MultiHeadDotProductAttention(HEADS)
    ours = MultiHeadDotProductAttention(HEADS, decode=True, max_context_length=LENGTH)
    from_theirs, from_ours = (
        module.init(jax.random.key(0), x)["params"] for module in (theirs, ours)
    )
    jax.tree.map(np.testing.assert_array_equal, from_theirs, from_ours)
    expected = theirs.apply({"params": from_ours}, x, mask=causal(x))
    actual, _ = ours.apply({"params": from_theirs}, x, mutable=["cache"])
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    nobody_said = MultiHeadDotProductAttention(HEADS, decode=True)
    with pytest.raises(ValueError, match="its length is not known"):
        nobody_said.apply({"params": from_theirs}, x, mutable=["cache"])


# --- Flax's own tests of decoding (tests/linen/linen_attention_test.py), on the drop-in module ---


@pytest.mark.parametrize(("spatial_shape", "tokens_axis"), [((5,), 1), ((6, 5), 2)])
def test_decoding(spatial_shape, tokens_axis):
    inputs = jax.random.normal(jax.random.key(0), (2, *spatial_shape, 12))
    module = MultiHeadDotProductAttention(num_heads=3, qkv_features=12)
    decode_module = module.clone(decode=True)
    initial = jax.jit(decode_module.init)(jax.random.key(1), inputs)
    params, state = initial["params"], initial["cache"]
    causal_mask = nn.make_causal_mask(jnp.ones((2, *spatial_shape)))
    reference = jax.jit(module.apply)({"params": params}, inputs, mask=causal_mask)

    def body(state, x):
        x = jnp.expand_dims(x, tokens_axis)
        variables = {"params": params, "cache": state}
        y, changed = decode_module.apply(variables, x, mutable=["cache"])
        return changed["cache"], y

    _, outputs = jax.lax.scan(body, state, jnp.moveaxis(inputs, tokens_axis, 0))
    outputs = jnp.moveaxis(outputs.squeeze(tokens_axis + 1), 0, tokens_axis)
    np.testing.assert_allclose(outputs, reference, atol=1e-6)


def test_autoregressive_receptive_field():
    """Each token depends on all before it and none after: here also by the cache's gradient."""
    x = jax.random.normal(jax.random.key(0), (1, 10, 1))
    module = MultiHeadDotProductAttention(1, decode=True, kernel_init=nn.initializers.ones)
    variables = module.init(jax.random.key(1), x)
    outputs = jax.jit(lambda x: module.apply(variables, x, mutable=["cache"])[0][0, :, 0])
    depends = np.abs(jax.jacobian(outputs)(x)[:, 0, :, 0]) > 1e-5
    np.testing.assert_array_equal(depends, np.tri(10, dtype=bool))


def test_autoregressive_decode_with_x64():
    with jax.enable_x64(True):
        x = jnp.ones((1, 4, 4), jnp.float32)
        module = MultiHeadDotProductAttention(num_heads=2, qkv_features=4, decode=True)
        variables = jax.jit(module.init)(jax.random.key(0), x)
        step = jax.jit(functools.partial(module.apply, mutable=["cache"]))
        for start in (0, 1):
            output, changed = step(variables, x[:, start : start + 1])
            variables = variables | changed
            assert output.shape == (1, 1, 4)
        assert variables["cache"]["kv_cache"].config.max_context_length == 4
        assert variables["cache"]["kv_cache"].lengths.tolist() == [2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "fields"),
    [(jnp.float32, {"normalize_qk": True}), (jnp.float16, {"use_bias": False})],
    ids=["float32", "float16"],
)
def test_nnx_attention_equivalence(dtype, fields):
    """tests/nnx/nn/attention_test.py; here a prompt of four, where Flax's can have but a token."""
    x = random_input(2, 4, dtype=dtype)
    ours = MultiHeadAttention(2, WIDTH, decode=True, rngs=nnx.Rngs(0), dtype=dtype, **fields)
    ours.init_cache(x.shape)
    module = MultiHeadDotProductAttention(2, decode=True, dtype=dtype, **fields)
    variables = module.init(jax.random.key(42), x)
    for path, leaf in jax.tree.leaves_with_path(variables["params"]):
        part, name = (key.key for key in path)
        getattr(getattr(ours, part), name)[...] = leaf
    expected, _ = module.apply(variables, x, mutable=["cache"])
    np.testing.assert_array_equal(ours(x), expected)
