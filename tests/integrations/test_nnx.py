"""Hooks and caches under nnx's transforms: one trace a shape, in place, state where it belongs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv.integrations.nnx import AsModel, MultiHeadAttention, add_caches, map_caches
from tests.compiled import assert_in_place, compiled_as_users_do
from tests.integrations.test_flax import random_input

LAYERS, HEADS, WIDTH, LENGTH = 2, 2, 8, 12
CONFIG = jaxkv.KVCacheConfig(
    LAYERS, LENGTH, HEADS, WIDTH // HEADS, batch_size=2, codec=jaxkv.Dense("float32")
)
LONG = CONFIG.replace(max_context_length=1 << 19)  # as shapes alone


class Block(nnx.Module):
    def __init__(self, rngs, **fields):
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs, **fields)

    def __call__(self, x, **options):
        return x + self.attention(x, **options)


class Model(nnx.Module):
    """As a user wrote it: nothing in it knows of caches."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])

    def __call__(self, x, **options):
        for block in self.blocks:
            x = block(x, **options)
        return x


class Explicit(nnx.Module):
    """The same from the same parameters, over one cache that it is given."""

    def __init__(self):
        self.blocks = Model().blocks

    def one_layer(self, layer, attention, x, cache):
        cache = jaxkv.append(cache, attention.key(x), attention.value(x), layer=layer)
        mixed = jaxkv.attend(cache, attention.query(x), layer=layer)
        return x + attention.out(mixed), cache

    def __call__(self, x, cache):
        for layer, block in enumerate(self.blocks):
            x, cache = self.one_layer(layer, block.attention, x, cache)
        return x, jaxkv.advance(cache, x.shape[-2])


class Stateful(Explicit):
    """And over one that it holds: in a variable, or as an attribute of its own."""

    def __init__(self, config, holds):
        super().__init__()
        self.holds = holds
        cache = jaxkv.create(config)
        self.cache = nnx.Cache(cache) if holds == "variable" else cache

    def __call__(self, x):
        if self.holds == "variable":
            x, cache = super().__call__(x, self.cache.get_value())
            self.cache.set_value(cache)
        else:
            x, self.cache = super().__call__(x, self.cache)
        return x


def with_hooks(config):
    model = Model()
    add_caches(
        model,
        max_context_length=config.max_context_length,
        batch_size=config.batch_size,
        codec=config.codec,
    )
    return model


KINDS = {
    "hooks": with_hooks,
    "variable": functools.partial(Stateful, holds="variable"),
    "attribute": functools.partial(Stateful, holds="attribute"),
}
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def abstract_cache(config):
    return jax.eval_shape(lambda: jaxkv.create(config))


def call(model, x, **options):
    return model(x, **options)


def expected_outputs(x):
    return nnx.jit(functools.partial(call, is_causal=True))(Model(), x)


def assert_decodes(step, sizes=(6, 4, 1, 1)):
    x = random_input(2, LENGTH)
    pieces = jnp.split(x, np.cumsum(sizes)[:-1], axis=1)
    actual = jnp.concatenate([step(piece) for piece in pieces], axis=1)
    np.testing.assert_allclose(actual, expected_outputs(x), atol=2e-6)


@each_kind
def test_jit_traces_once_a_shape_and_keeps_its_buffers(make):
    traces = []

    @functools.partial(nnx.jit, donate_argnums=0)
    def step(model, x):
        traces.append(x.shape)
        return model(x)

    model = make(CONFIG)

    def pointers():
        leaves = jax.tree.leaves(nnx.state(model, nnx.Cache, jax.Array)[0])
        return sorted(leaf.unsafe_buffer_pointer() for leaf in leaves if leaf.ndim > 1)

    before = pointers()
    assert_decodes(functools.partial(step, model))
    assert traces == [(2, 6, WIDTH), (2, 4, WIDTH), (2, 1, WIDTH)]
    assert pointers() == before


@pytest.mark.parametrize(("kind", "tokens"), [("hooks", 1), ("hooks", 4), ("variable", 1)])
def test_a_donated_step_is_in_place(kind, tokens):
    make = KINDS[kind]
    model = nnx.eval_shape(lambda: make(LONG))
    x = jax.ShapeDtypeStruct((2, tokens, WIDTH), jnp.float32)
    compiled = compiled_as_users_do(nnx.jit(call, donate_argnums=0).lower(model, x))
    assert_in_place(
        compiled, abstract_cache(LONG.replace(num_layers=1 if make is with_hooks else 2))
    )


def test_split_and_merge_under_jax_jit_with_donation():
    graph, params, cache = nnx.split(with_hooks(CONFIG), nnx.Param, nnx.Cache)
    assert jax.tree.structure(params) == jax.tree.structure(nnx.state(Model(), nnx.Param))

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, cache, x):
        model = nnx.merge(graph, params, cache)
        return model(x), nnx.state(model, nnx.Cache)

    def decode(x):
        nonlocal cache
        output, cache = step(params, cache, x)
        return output

    assert_decodes(decode)


@pytest.mark.slow
def test_remat():
    model = with_hooks(CONFIG)
    for block in model.blocks:
        block.attention.attention_fn.cache.set_value(jaxkv.create(CONFIG.replace(num_layers=1)))
    step = nnx.jit(lambda model, x: nnx.remat(call)(model, x))
    assert_decodes(functools.partial(step, model))


def stacked_blocks(**fields):
    """The parameters of all layers in one array each, as nnx.scan takes them."""

    @nnx.vmap(in_axes=0)
    def make(rngs):
        return Block(rngs, **fields)

    return make(nnx.Rngs(0).split(LAYERS))


def causal_scan(blocks, x):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def over_layers(x, block):
        return block(x, is_causal=True)

    return over_layers(x, blocks)


@pytest.mark.slow
def test_hooks_in_a_layer_scan():
    blocks, x = stacked_blocks(), random_input(2, LENGTH)
    expected = nnx.jit(causal_scan)(stacked_blocks(), x)
    add_caches(blocks, max_context_length=LENGTH, batch_size=2, codec=CONFIG.codec)
    step = nnx.jit(causal_scan, donate_argnums=0)
    step(blocks, x[:, :11])
    map_caches(functools.partial(jaxkv.select, rows=np.array([1, 0])), blocks)
    actual = step(blocks, x[::-1, 11:])
    np.testing.assert_allclose(actual, expected[::-1, 11:], atol=2e-6)
    map_caches(jaxkv.check, blocks)
    step(blocks, x[:, 11:])  # one too many, dropped inside jit
    with pytest.raises(jaxkv.CacheFullError, match="Tokens were dropped"):
        map_caches(jaxkv.check, blocks)


def test_layers_that_are_stacked_elsewhere():
    @nnx.vmap(out_axes=1)
    def make(rngs):
        return Block(rngs)

    blocks = make(nnx.Rngs(0).split(LAYERS))
    with pytest.raises(ValueError, match=r"got \[8, 2, 2, 4\]. Stack layers on the first axis"):
        add_caches(blocks, max_context_length=LENGTH, batch_size=2)
    assert blocks.attention.attention_fn is nnx.dot_product_attention


def scan_with_the_cache_carried(blocks, x, cache):
    @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)
    def over_layers(state, block, layer):
        return Explicit.one_layer(None, layer, block.attention, *state)

    x, cache = over_layers((x, cache), blocks, jnp.arange(LAYERS))
    return x, jaxkv.advance(cache, x.shape[-2])


@pytest.mark.slow
def test_a_layer_scan_that_carries_the_cache():
    blocks, x = stacked_blocks(), random_input(2, LENGTH)
    step = nnx.jit(scan_with_the_cache_carried, donate_argnums=2)
    first, cache = step(blocks, x[:, :11], jaxkv.create(CONFIG))
    second, cache = step(blocks, x[:, 11:], cache)
    actual = jnp.concatenate([first, second], axis=1)
    np.testing.assert_allclose(actual, nnx.jit(causal_scan)(blocks, x), atol=2e-6)
    assert cache.lengths.tolist() == [LENGTH, LENGTH]


@pytest.mark.slow
def test_a_layer_scan_that_carries_the_cache_is_in_place():
    blocks, cache = stacked_blocks(), abstract_cache(LONG)
    step = nnx.jit(scan_with_the_cache_carried, donate_argnums=2)
    lowered = step.lower(blocks, jnp.zeros((2, 1, WIDTH)), cache)
    assert_in_place(compiled_as_users_do(lowered), cache)


# --- the verbs over a model --------------------------------------------------------------------


@pytest.mark.parametrize("make", [KINDS["hooks"], KINDS["attribute"]], ids=["hooks", "attribute"])
def test_reset_truncate_and_check_a_model(make):
    model, x = make(CONFIG), random_input(2, LENGTH)
    step = nnx.jit(call)
    first = step(model, x[:, :6])
    map_caches(jaxkv.reset, model)
    np.testing.assert_array_equal(step(model, x[:, :6]), first)
    map_caches(functools.partial(jaxkv.truncate, length=4), model)
    step(model, x[:, 4:10])
    map_caches(jaxkv.check, model)
    step(model, x[:, :6])  # four too many, dropped inside jit
    with pytest.raises(jaxkv.CacheFullError, match="Tokens were dropped"):
        map_caches(jaxkv.check, model)


class EncoderDecoder(nnx.Module):
    """The usual one, of a layer each."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.encoder, self.decoder, self.cross = (
            nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs) for _ in range(3)
        )

    def __call__(self, source, target):
        x = target + self.decoder(target, is_causal=True)
        return x + self.cross(x, source + self.encoder(source))


def test_an_encoder_decoder_keeps_its_encoder_and_cross_attention():
    source, target = random_input(2, 5), random_input(2, LENGTH, seed=1)
    expected, model = EncoderDecoder()(source, target), EncoderDecoder()
    add_caches(model, max_context_length=LENGTH, batch_size=2)
    with pytest.raises(ValueError, match="Queries are of 12 tokens, keys of 5, values of 5"):
        model(source, target)
    model = EncoderDecoder()
    add_caches(model.decoder, max_context_length=LENGTH, batch_size=2)  # as the message says
    actual = [model(source, target[:, :11]), model(source, target[:, 11:])]
    np.testing.assert_allclose(jnp.concatenate(actual, axis=1), expected, atol=2e-6)


def test_features_of_two_kinds_are_cross_attention():
    cross = nnx.MultiHeadAttention(HEADS, WIDTH, in_kv_features=6, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="in_kv_features=6 is cross-attention"):
        add_caches(cross, max_context_length=LENGTH)


def test_a_model_without_attention_modules():
    with pytest.raises(
        ValueError, match=r"in this Linear. An attention class of your own .*notebooks/2"
    ):
        add_caches(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), max_context_length=8)


def test_parameters_load_both_ways():
    theirs = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(1))
    ours = MultiHeadAttention(HEADS, WIDTH, decode=True, rngs=nnx.Rngs(2))
    ours.init_cache((2, LENGTH, WIDTH))
    x = random_input(2, LENGTH)
    expected = theirs(x, is_causal=True)
    nnx.update(ours, nnx.state(theirs, nnx.Param))
    np.testing.assert_allclose(ours(x), expected, atol=1e-6)
    np.testing.assert_array_equal(ours(x, decode=False, is_causal=True), expected)
    other = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(3))
    nnx.update(other, nnx.state(ours, nnx.Param))
    np.testing.assert_array_equal(other(x, is_causal=True), expected)


class Gpt(nnx.Module):
    """As a user wrote it, with tokens, positions and logits."""

    def __init__(self):
        rngs = nnx.Rngs(1)
        self.tokens = nnx.Embed(32, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(16, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])

    def __call__(self, tokens, positions, **options):
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x, **options)
        return self.tokens.attend(9 * x)


def with_positions(model, tokens, positions):
    return model(tokens, positions)


@pytest.mark.slow_cases("snapkv")
@pytest.mark.parametrize(
    "options", [{}, {"policy": "snapkv", "keep": 1.0}], ids=["plain", "snapkv"]
)
def test_a_model_that_holds_its_caches_generates(options):
    """Tokens are Flax's own, by its attention over the whole text each time."""

    @jax.jit
    def logits(model, text):
        positions = jnp.arange(16, dtype=jnp.int32)
        mask = nnx.make_causal_mask(text)
        return model(text, positions, mask=mask)

    plain, model = Gpt(), Gpt()
    add_caches(model, max_context_length=1, batch_size=1)
    prompts = [[3, 7, 1, 12, 30], [9, 4]]
    adapted = AsModel(model, with_positions)
    result = jaxkv.generate(
        adapted, prompts, max_new_tokens=6, max_context_length=16, prefill_chunk=4, **options
    )
    for prompt, tokens in zip(prompts, result.tokens, strict=True):
        text = np.zeros((1, 16), np.int32)
        text[0, : len(prompt) + 6] = prompt + tokens
        expected = logits(plain, jnp.asarray(text))[0].argmax(axis=-1)
        assert tokens == expected[len(prompt) - 1 :][:6].tolist()


def test_what_is_no_model_that_holds_caches():
    with pytest.raises(ValueError, match="no CachedAttention in this Gpt"):
        AsModel(Gpt())
    blocks = stacked_blocks()
    add_caches(blocks, max_context_length=1, batch_size=1)
    with pytest.raises(ValueError, match=r"stacked for nnx.scan .* Give it layers in an nnx.List"):
        AsModel(blocks)
