# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Bring your own Flax model
#
# A model that uses Flax's attention gets a cache in one line. This notebook shows it for nnx and
# for linen: before, after, and the difference between them. Parameters do not change, so
# checkpoints load as they are.

# %%
# Does nothing where jaxkv is installed already. The jax that is here stays as it is:
# pip is told to keep its version, and refuses if jaxkv cannot work with it.
try:
    import jaxkv
except ImportError:
    from importlib import metadata, util
    from pathlib import Path

    source = ".." if Path("../jaxkv/__init__.py").exists() else "jaxkv"
    keep_jax = f"jax=={metadata.version('jax')}" if util.find_spec("jax") else "jax"
    # %pip install -q {source} {keep_jax}

# %% [markdown]
# ## An nnx model, as it may be anywhere
#
# Two blocks of attention and a feed-forward layer, with learned positions. Nothing in it knows
# of caches.

# %%
import functools

import jax
import jax.numpy as jnp
from flax import nnx

import jaxkv

VOCABULARY, WIDTH, HEADS, KV_HEADS, CONTEXT = 64, 32, 4, 2, 48


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, num_kv_heads=KV_HEADS, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(x)))


class Decoder(nnx.Module):
    def __init__(self, rngs):
        self.tokens = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens, start=0, mask=None):
        x = self.tokens(tokens) + self.positions(start + jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


model = Decoder(nnx.Rngs(0))
prompts = jax.random.randint(jax.random.key(1), (2, 6), 0, VOCABULARY)

# %% [markdown]
# Without a cache every new token computes all tokens before it again, and each length is a
# program of its own to compile.


# %%
@nnx.jit
def next_tokens(model, tokens):
    return model(tokens, mask=nnx.make_causal_mask(tokens))[:, -1:].argmax(-1)


expected = prompts
for _ in range(4):
    expected = jnp.concatenate([expected, next_tokens(model, expected)], axis=1)
print(expected)

# %% [markdown]
# ## After
#
# ```diff
#  model = Decoder(nnx.Rngs(0))
# +add_caches(model, max_context_length=CONTEXT, batch_size=2)
# ```
#
# `add_caches` gives every `nnx.MultiHeadAttention` in the model an `attention_fn` that keeps a
# cache. Prompts and single tokens go through the same call. Under `nnx.jit` with the model
# donated, the cache is updated where it is.

# %%
from jaxkv.integrations.nnx import add_caches, map_caches

add_caches(model, max_context_length=CONTEXT, batch_size=2)


@functools.partial(nnx.jit, donate_argnums=0)
def step(model, tokens, start):
    return model(tokens, start)[:, -1:].argmax(-1)


def generate(tokens, count):
    new = [step(model, tokens, 0)]
    for position in range(tokens.shape[1], tokens.shape[1] + count - 1):
        new.append(step(model, new[-1], position))
    return jnp.concatenate([tokens, *new], axis=1)


print("the same tokens:", bool((generate(prompts, 4) == expected).all()))
model.blocks[0].attention.attention_fn.cache.get_value()

# %% [markdown]
# The verbs of jaxkv work on all caches of a model at once: start over, roll back, look whether
# tokens were dropped because the cache was full.

# %%
map_caches(jaxkv.check, model)
map_caches(jaxkv.reset, model)
print("once more:", bool((generate(prompts, 4) == expected).all()))
map_caches(functools.partial(jaxkv.truncate, length=6), model)
print(model.blocks[0].attention.attention_fn.cache.get_value())

# %% [markdown]
# ## Prompts of different lengths, and eight bits a number
#
# A padding mask, as Flax models have it, says which tokens are real. Each sequence counts its
# own. Any codec stores the keys and values, here in half the bytes of bfloat16.

# %%
model = Decoder(nnx.Rngs(0))
add_caches(model, max_context_length=CONTEXT, batch_size=2, codec=jaxkv.Int8())

real = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
prefill = nnx.jit(lambda model, tokens, mask: model(tokens, mask=mask))
prefill(model, prompts, nnx.make_attention_mask(real, real))
cache = model.blocks[0].attention.attention_fn.cache.get_value()
print(cache)
cache

# %% [markdown]
# ## What Flax's own `decode=True` does
#
# It takes one token at a time; its cache has one length for the whole batch; and when it is
# full, it writes over the newest token and says nothing.

# %%
flax_own = nnx.MultiHeadAttention(HEADS, WIDTH, decode=True, rngs=nnx.Rngs(0))
flax_own.init_cache((1, 4, WIDTH))  # room for 4 tokens
hidden = jax.random.normal(jax.random.key(2), (1, 9, WIDTH))
try:
    flax_own(hidden[:, :3])
except ValueError as error:
    print("a prompt:", error)
for token in range(9):
    output = flax_own(hidden[:, token : token + 1])
print(f"9 tokens into 4 slots: no error, all finite: {bool(jnp.isfinite(output).all())}")

# %% [markdown]
# ```diff
# -from flax.nnx import MultiHeadAttention
# +from jaxkv.integrations.nnx import MultiHeadAttention
# ```
#
# is the other way to change a model: the same arguments, the same parameters, `decode=True`
# and `init_cache` as before, over a jaxkv cache.

# %%
from jaxkv.integrations.nnx import MultiHeadAttention

drop_in = MultiHeadAttention(HEADS, WIDTH, decode=True, rngs=nnx.Rngs(0))
nnx.update(drop_in, nnx.state(flax_own, nnx.Param))  # its parameters load
drop_in.init_cache((1, 4, WIDTH))
print("a prompt:", drop_in(hidden[:, :3]).shape)
try:
    drop_in(hidden[:, 3:])
except jaxkv.CacheFullError as error:
    print("and 6 more:", error)

# %% [markdown]
# ## linen
#
# ```diff
#  nn.MultiHeadDotProductAttention(
#      num_heads=4,
# +    attention_fn=CachedAttention(config),
#  )
# ```
#
# The cache stands in the collection `cache`, as Flax's own does.

# %%
from flax import linen as nn

from jaxkv.integrations.linen import CachedAttention

config = jaxkv.KVCacheConfig(
    num_layers=1, max_context_length=CONTEXT, num_kv_heads=HEADS, head_dim=8, batch_size=1,
    codec=jaxkv.Dense("float32"),
)  # fmt: skip


class LinenBlocks(nn.Module):
    config: jaxkv.KVCacheConfig | None = None

    @nn.compact
    def __call__(self, x, mask=None):
        for _ in range(2):
            hook = {"attention_fn": CachedAttention(self.config)} if self.config else {}
            attention = nn.MultiHeadDotProductAttention(num_heads=HEADS, **hook)
            x = x + attention(nn.LayerNorm()(x), mask=mask)
        return x


variables = jax.jit(LinenBlocks(config).init)(jax.random.key(0), hidden)
before = jax.jit(LinenBlocks().apply)(
    {"params": variables["params"]}, hidden, mask=nn.make_causal_mask(hidden[..., 0])
)


@functools.partial(jax.jit, donate_argnames="cache")
def linen_step(params, cache, x):
    variables = {"params": params, "cache": cache}
    output, changed = LinenBlocks(config).apply(variables, x, mutable=["cache"])
    return output, changed["cache"]


outputs, cache = [], variables["cache"]
for piece in (hidden[:, :6], hidden[:, 6:7], hidden[:, 7:8], hidden[:, 8:]):
    output, cache = linen_step(variables["params"], cache, piece)
    outputs.append(output)
print("the same:", bool(jnp.allclose(jnp.concatenate(outputs, axis=1), before, atol=1e-5)))

# %% [markdown]
# ## The explicit way
#
# The hooks keep a cache for each layer. Where every microsecond counts, one cache for all
# layers is the better thing: two arrays, whatever the depth. It is an ordinary argument, and
# in a scan over layers it is carried. Nothing in the module changes then, so `jax.jit` takes it,
# as the pytree that it is: `nnx.jit` looks through all of it in Python, before and after each call
# (for 12 layers 12 ms against 0.4).

# %%
blocks = Decoder(nnx.Rngs(0)).blocks
config = jaxkv.KVCacheConfig(
    num_layers=2, max_context_length=CONTEXT, num_kv_heads=KV_HEADS, head_dim=8, batch_size=1
)


@functools.partial(jax.jit, donate_argnums=2)
def explicit_step(blocks, x, cache):
    for layer, block in enumerate(blocks):
        attention, hidden = block.attention, block.norm(x)
        cache = jaxkv.append(cache, attention.key(hidden), attention.value(hidden), layer=layer)
        x = x + attention.out(jaxkv.attend(cache, attention.query(hidden), layer=layer))
        x = x + block.down(nnx.gelu(block.up(x)))
    return x, jaxkv.advance(cache, x.shape[1])


cache = jaxkv.create(config)
for piece in (hidden[:, :6], hidden[:, 6:7], hidden[:, 7:8]):
    output, cache = explicit_step(blocks, piece, cache)
cache

# %% [markdown]
# ## Your own attention class
#
# Models like Flax's Gemma example have an attention of their own: there is nothing for `add_caches`
# to find. Without a cache it may look like this, with rope on queries and keys:


# %%
def rope(vectors, positions):  # [batch, tokens, heads, head_dim], [batch, tokens]
    pairs = vectors.shape[-1] // 2
    angles = positions[..., None, None] * 100.0 ** (-jnp.arange(pairs) / pairs)
    first, second = jnp.split(vectors, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class OwnAttention(nnx.Module):
    def __init__(self, rngs):
        self.query = nnx.LinearGeneral(WIDTH, (HEADS, 8), rngs=rngs)
        self.key = nnx.LinearGeneral(WIDTH, (KV_HEADS, 8), rngs=rngs)
        self.value = nnx.LinearGeneral(WIDTH, (KV_HEADS, 8), rngs=rngs)
        self.out = nnx.LinearGeneral((HEADS, 8), WIDTH, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        query, key = rope(self.query(x), positions), rope(self.key(x), positions)
        return self.out(jax.nn.dot_product_attention(query, key, self.value(x), is_causal=True))


# %% [markdown]
# With a cache: positions go on from those before, keys and values are appended, and queries attend
# to all so far. The model counts its tokens once, at the end.


# %%
class WithCache(OwnAttention):
    def __call__(self, x, cache, layer):
        positions = jaxkv.next_positions(cache, x.shape[1])
        query, key = rope(self.query(x), positions), rope(self.key(x), positions)
        cache = jaxkv.append(cache, key, self.value(x), layer=layer)
        return self.out(jaxkv.attend(cache, query, layer=layer)), cache


class OwnModel(nnx.Module):
    def __init__(self, rngs, attention):
        self.tokens = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.attentions = nnx.List([attention(rngs) for _ in range(2)])

    def __call__(self, tokens, cache=None):
        x = self.tokens(tokens)
        for layer, attention in enumerate(self.attentions):
            if cache is None:
                x = x + attention(x)
            else:
                mixed, cache = attention(x, cache, layer)
                x = x + mixed
        logits = self.tokens.attend(x)
        return logits if cache is None else (logits, jaxkv.advance(cache, tokens.shape[1]))


before, after = OwnModel(nnx.Rngs(0), OwnAttention), OwnModel(nnx.Rngs(0), WithCache)
config = config.replace(codec=jaxkv.Dense("float32"), batch_size=2)
run, cache = jax.jit(lambda model, tokens, cache: model(tokens, cache)), jaxkv.create(config)
pieces = []
for piece in (prompts[:, :4], prompts[:, 4:5], prompts[:, 5:]):
    logits, cache = run(after, piece, cache)
    pieces.append(logits)
whole = jax.jit(lambda model, tokens: model(tokens))(before, prompts)
print("the same:", bool(jnp.allclose(jnp.concatenate(pieces, axis=1), whole, atol=1e-5)))

# %% [markdown]
# `model(tokens, cache) -> (logits, cache)` is what `jaxkv.generate` and `jaxkv.Engine` take, and a
# module that holds its caches is one through `AsModel`:

# %%
from jaxkv.integrations.nnx import AsModel

print(jaxkv.generate(after, prompts.tolist(), max_new_tokens=4, config=config).tokens)
held = Decoder(nnx.Rngs(0))
add_caches(held, max_context_length=1, batch_size=1)
held = AsModel(held, lambda model, tokens, positions: model(tokens, start=positions[:, :1]))
result = jaxkv.generate(held, prompts.tolist(), max_new_tokens=4, max_context_length=CONTEXT)
print("as before:", result.tokens == expected[:, prompts.shape[1] :].tolist())
