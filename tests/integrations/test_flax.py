"""The hook and the drop-in module, in nnx and linen alike, held to Flax's own attention.

An `attention(kind, ...)` of each library is a function of its inputs that remembers what it was
given. All kinds of one library have the same parameters. Outside jit every new shape compiles
each operation anew, so these tests share theirs: two sequences, 12, 4 or 1 tokens.
"""

import importlib
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxkv
from jaxkv.addressing import ADDRESSINGS
from jaxkv.codecs import CODECS
from jaxkv.integrations import linen as kv_linen
from jaxkv.integrations import nnx as kv_nnx
from jaxkv.integrations.attention import refuse_unserved

FLAX = tuple(int(part) for part in flax.__version__.split(".")[:3])
HEADS, WIDTH, LENGTH = 2, 8, 12
PREFILL_CHUNK_AND_TOKENS = (4, 4, 1, 1, 1, 1)
CACHED = ["hook", "drop-in"]  # ours, in place of Flax's "decode"


def hook_config(batch, kv_heads=HEADS, length=LENGTH, codec=None, **fields):
    return jaxkv.KVCacheConfig(
        5,  # of a whole model: a hook takes one
        length,
        kv_heads,
        WIDTH // HEADS,
        batch_size=int(np.prod(batch)) if batch else None,
        codec=codec or jaxkv.Dense("float32"),
        **fields,
    )


def nnx_attention(kind, batch=(2,), dtype=None, init_cache=None, **fields):
    make = kv_nnx.MultiHeadAttention if kind == "drop-in" else nnx.MultiHeadAttention
    if kind == "hook":
        config = hook_config(batch, fields.get("num_kv_heads", HEADS), **init_cache or {})
        fields["attention_fn"] = kv_nnx.CachedAttention(config)
    decode = kind in ("drop-in", "decode")
    module = make(HEADS, WIDTH, decode=decode, dtype=dtype, rngs=nnx.Rngs(0), **fields)
    if decode:
        module.init_cache((*batch, LENGTH, WIDTH), **init_cache or {})
    return module


def linen_attention(kind, batch=(2,), dtype=None, init_cache=None, **fields):
    make = linen.MultiHeadDotProductAttention
    if kind == "drop-in":
        make = kv_linen.MultiHeadDotProductAttention
        fields.update(init_cache or {})
    if kind == "hook":
        config = hook_config(batch, **init_cache or {})
        fields["attention_fn"] = kv_linen.CachedAttention(config)
    decode = kind in ("drop-in", "decode")
    module = make(HEADS, decode=decode, dtype=dtype, **fields)
    variables = module.init(jax.random.key(0), jnp.zeros((*batch, LENGTH, WIDTH), dtype))

    def attend(*inputs, **options):
        output, changed = module.apply(variables, *inputs, mutable=["cache"], **options)
        variables.update(changed)
        return output

    return attend


LIBRARIES = {"nnx": nnx_attention, "linen": linen_attention}
each_library = pytest.mark.parametrize("attention", LIBRARIES.values(), ids=LIBRARIES)
each_kind = pytest.mark.parametrize("kind", CACHED)


def random_input(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((*shape, WIDTH)), dtype)


def in_chunks(attend, x, sizes, **options):
    """What the pieces give, one after the other, along the axis of tokens."""
    ends = np.cumsum(sizes)
    assert ends[-1] == x.shape[-2]
    pieces = jnp.split(x, ends[:-1], axis=-2)
    return jnp.concatenate([attend(piece, **options) for piece in pieces], axis=-2)


def causal(x):
    return linen.make_causal_mask(x[..., 0])


MODULES = [(library, kind, (2,)) for library in LIBRARIES for kind in CACHED]
OTHER_BATCHES = [("nnx", "hook", ()), ("linen", "drop-in", (2, 3))]


@pytest.mark.slow
@pytest.mark.parametrize(("library", "kind", "batch"), MODULES + OTHER_BATCHES, ids=str)
def test_prefill_chunks_and_tokens_give_what_flax_gives_at_once(library, kind, batch):
    attention, x = LIBRARIES[library], random_input(*batch, LENGTH)
    expected = attention("flax", batch)(x, mask=causal(x))
    actual = in_chunks(attention(kind, batch), x, PREFILL_CHUNK_AND_TOKENS)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@each_library
def test_tokens_one_by_one_give_what_flax_gives_one_by_one(attention):
    x = random_input(2, LENGTH)
    expected = in_chunks(attention("decode"), x, [1] * LENGTH)
    actual = in_chunks(attention("drop-in"), x, [1] * LENGTH)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_fewer_kv_heads_and_normalized_queries_and_keys():
    x, fields = random_input(2, LENGTH), {"num_kv_heads": 1, "normalize_qk": True}
    expected = nnx_attention("flax", **fields)(x, mask=causal(x))
    actual = in_chunks(nnx_attention("drop-in", **fields), x, (4, 4, 4))
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "codec", "addressing"),
    [("nnx", "int8", "contiguous"), ("nnx", "float32", "paged"), ("linen", "int8", "ring")],
)
def test_codec_and_addressing_arrive(library, codec, addressing):
    """What they do is tested in the core."""
    attention = LIBRARIES[library]
    stores = {"codec": CODECS[codec], "addressing": ADDRESSINGS[addressing]}
    x = random_input(2, LENGTH)
    expected = attention("flax")(x, mask=causal(x))
    by_hook, by_module = (
        in_chunks(attention(kind, init_cache=stores), x, (4, 4, 4)) for kind in CACHED
    )
    np.testing.assert_array_equal(by_hook, by_module)
    np.testing.assert_allclose(by_hook, expected, atol=0.05 if codec == "int8" else 1e-6)
    assert codec == "float32" or np.abs(by_hook - expected).max() > 1e-5


# --- sequences of different lengths ------------------------------------------------------------


@each_kind
@each_library
def test_a_padding_mask_says_how_long_each_prompt_is(attention, kind):
    prompts, tokens = random_input(2, 4), random_input(2, 1, seed=1)
    counts = [4, 2]
    real = np.arange(4) < np.array(counts)[:, None]
    mask = linen.combine_masks(linen.make_attention_mask(real, real), causal(prompts))
    attend = attention(kind)
    outputs = np.concatenate([attend(prompts, mask=mask), attend(tokens)], axis=1)
    # Without padding, and then whatever: no token sees a later one.
    packed = random_input(2, LENGTH, seed=2)
    packed = packed.at[0, :5].set(jnp.concatenate([prompts[0], tokens[0]]))
    packed = packed.at[1, :3].set(jnp.concatenate([prompts[1, :2], tokens[1]]))
    expected = attention("flax")(packed, mask=causal(packed))
    np.testing.assert_allclose(outputs[0], expected[0, :5], atol=1e-6)
    np.testing.assert_allclose(outputs[1, [0, 1, 4]], expected[1, :3], atol=1e-6)


@each_library
def test_num_tokens_says_the_same_as_a_mask(attention):
    x = random_input(2, 4)
    real = np.arange(4) < np.array([[4], [1]])
    by_mask, by_number = attention("drop-in"), attention("drop-in")
    a = by_mask(x, mask=linen.make_attention_mask(real, real))
    b = by_number(x, num_tokens=jnp.array([4, 1]))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(by_mask(x[:, :1]), by_number(x[:, :1]))


LEFT_PADDING = np.arange(4) >= np.array([[0], [2]])
BAD_MASKS = {
    "left padding": linen.make_attention_mask(LEFT_PADDING, LEFT_PADDING),
    "a token cannot see itself": ~np.eye(4, dtype=bool)[None, None],
}


@pytest.mark.parametrize("mask", BAD_MASKS.values(), ids=BAD_MASKS)
def test_a_mask_that_a_cache_cannot_follow(mask):
    x, mask = random_input(2, 4), jnp.asarray(mask)
    attend = nnx_attention("drop-in")
    with pytest.raises(ValueError, match="causally, and pads on the right"):
        attend(x, mask=mask)
    # Inside jit its values are not known, and the result must be unmistakable.
    output = nnx.jit(lambda attend, mask: attend(x, mask=mask))(nnx_attention("drop-in"), mask)
    assert np.isnan(output).any()


@each_library
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": np.ones((2, 1, 1, LENGTH), bool)}, "over the 4 new tokens"),
        ({"mask": np.ones((2, 1, 4, 4), bool), "num_tokens": 4}, "Say once"),
        ({"sow_weights": True}, "no weights to sow"),
    ],
)
def test_what_is_refused(attention, options, message):
    with pytest.raises(ValueError, match=message):
        attention("drop-in")(random_input(2, 4), **options)


@each_kind
@each_library
@pytest.mark.parametrize(("tokens", "keys"), [(4, 7), (1, 4)])
def test_keys_of_another_length_are_cross_attention(attention, kind, tokens, keys):
    with pytest.raises(ValueError, match=f"Queries are of {tokens} tokens, keys of {keys}, "):
        attention(kind)(random_input(2, tokens), random_input(2, keys))


@each_library
def test_dropout_is_refused_unless_deterministic(attention):
    x = random_input(2, 4)
    for kind in CACHED:
        attend = attention(kind, dropout_rate=0.5, deterministic=True)
        np.testing.assert_array_equal(attend(x), attention(kind)(x))
    with pytest.raises(ValueError, match="no dropout over a cache"):
        refuse_unserved(None, 0.5, deterministic=False, sow_weights=False)


# --- the four defects of decode=True -----------------------------------------------------------


@each_kind
@each_library
def test_defect_1_more_than_one_token_at_a_time(attention, kind):
    """google/flax issue 1317."""
    x = random_input(2, 4)
    with pytest.raises(ValueError, match="cache shape error"):
        attention("decode")(x)
    assert attention(kind)(x).shape == x.shape


@each_kind
@each_library
def test_defect_2_a_full_cache_is_not_silent(attention, kind):
    """Flax's own writes over the last slot, and carries on."""
    x = random_input(2, LENGTH + 1)
    theirs, ours = attention("decode"), attention(kind)
    silent = in_chunks(theirs, x, [1] * (LENGTH + 1))[:, -1:]
    forgotten = jnp.delete(x, LENGTH - 1, axis=1)
    expected = attention("flax")(forgotten, mask=causal(forgotten))
    np.testing.assert_allclose(silent, expected[:, -1:], atol=1e-6)
    in_chunks(ours, x[:, :LENGTH], (4, 4, 4))
    with pytest.raises(jaxkv.CacheFullError, match="holds 12 of 12 tokens, and 1 more were given"):
        ours(x[:, LENGTH:])


@each_kind
def test_defect_3_is_causal_while_decoding(kind):
    """google/flax issue 5591: the causal mask of a single query leaves it the first key alone.

    Flax 0.12.11 mended it.
    """
    x = random_input(2, LENGTH)
    true = nnx_attention("flax")(x, is_causal=True)
    theirs = in_chunks(nnx_attention("decode"), x, [1] * LENGTH, is_causal=True)
    ours = in_chunks(nnx_attention(kind), x, PREFILL_CHUNK_AND_TOKENS, is_causal=True)
    assert (np.abs(theirs - true).max() > 0.1) == (FLAX < (0, 12, 11))
    np.testing.assert_allclose(ours, true, atol=1e-6)


@each_kind
def test_defect_4_a_bfloat16_module_with_the_default_cache(kind):
    x = random_input(2, 1, dtype=jnp.bfloat16)
    with pytest.raises(TypeError, match="arguments to have the same dtypes"):
        nnx_attention("decode", dtype=jnp.bfloat16)(x)
    output = nnx_attention(kind, dtype=jnp.bfloat16)(x)
    assert output.dtype == jnp.bfloat16
    with jax.numpy_dtype_promotion("standard"):  # Flax's needs it
        expected = nnx_attention("flax", dtype=jnp.bfloat16)(x)
    np.testing.assert_allclose(output.astype(float), expected.astype(float), atol=0.02)


def test_and_a_fifth_nnx_view_makes_no_cache():
    x = random_input(2, 4)
    options = {"decode": True, "batch_size": 2, "max_length": LENGTH}
    theirs = nnx.view(nnx.MultiHeadAttention(HEADS, WIDTH, rngs=nnx.Rngs(0)), **options)
    with pytest.raises(ValueError, match="cache not initialized"):
        theirs(x[:, :1])
    trained = kv_nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0))
    ours = nnx.view(trained, **options, codec=jaxkv.Dense("float32"))
    np.testing.assert_allclose(ours(x), trained(x, mask=causal(x)), atol=1e-6)
    assert trained.kv_attention is None
    with pytest.raises(TypeError, match="batch_size= and max_length="):
        nnx.view(trained, decode=True)


@pytest.mark.parametrize("library", ["nnx", "linen"])
def test_a_missing_flax_is_named(monkeypatch, library):
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.delitem(sys.modules, f"jaxkv.integrations.{library}")
    with pytest.raises(ImportError, match=r"needs Flax, which is not installed: pip install"):
        importlib.import_module(f"jaxkv.integrations.{library}")
