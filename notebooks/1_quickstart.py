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
# # Quickstart
#
# jaxkv keeps the keys and values that a transformer decodes with. The cache is an immutable
# pytree with preallocated buffers; a few pure functions read and update it, in place under
# `jax.jit` with donation.
#
# This notebook needs no network once jaxkv is installed, and no accelerator.

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
# ## A cache and its size
#
# A config is the shape of a cache. It knows the exact bytes before any device is touched.

# %%
import functools

import jax
import jax.numpy as jnp

import jaxkv

config = jaxkv.KVCacheConfig(num_layers=2, max_context_length=64, num_kv_heads=2, head_dim=16)
print(f"{config.describe()}: {config.size_bytes:,} bytes, {config.bytes_per_token} a token")

cache = jaxkv.create(config)
print(cache)

# %% [markdown]
# ## A decode step by hand
#
# A small transformer with random weights: 4 query heads share 2 KV heads (GQA). In each layer it
# appends the new keys and values, then attends to all of them. `advance` counts the tokens once
# a step, after the last layer. The same function serves prefill and decode.

# %%
vocabulary, hidden_size, num_heads = 256, 64, 4


def random_params(key):
    def weights(*shape):
        nonlocal key
        key, subkey = jax.random.split(key)
        return jax.random.normal(subkey, shape) / shape[0] ** 0.5

    queries, keys = num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "tokens": weights(vocabulary, hidden_size),
        "positions": weights(config.max_context_length, hidden_size),
        "layers": [
            {
                "query": weights(hidden_size, queries),
                "key": weights(hidden_size, keys),
                "value": weights(hidden_size, keys),
                "out": weights(queries, hidden_size),
            }
            for _ in range(config.num_layers)
        ],
    }


@functools.partial(jax.jit, donate_argnames="cache")
def step(params, tokens, cache):
    positions = jaxkv.next_positions(cache, len(tokens))
    hidden = params["tokens"][tokens] + params["positions"][positions]
    for layer, weights in enumerate(params["layers"]):
        queries, keys, values = (
            (hidden @ weights[name]).reshape(len(tokens), -1, config.head_dim)
            for name in ("query", "key", "value")
        )
        cache = jaxkv.append(cache, keys, values, layer=layer)
        mixed = jaxkv.attend(cache, queries, layer=layer)
        hidden = hidden + mixed.reshape(len(tokens), -1) @ weights["out"]
    return hidden @ params["tokens"].T, jaxkv.advance(cache, len(tokens))


params = random_params(jax.random.key(0))

# %% [markdown]
# First the prompt in one step (prefill), then token by token (decode). `step` takes the cache
# donated, so rebind it: the old one is gone, its buffer lives on in the new one.

# %%
prompt = jnp.array([72, 101, 108, 108, 111, 44, 32])
pointer = cache.storage["data"].unsafe_buffer_pointer()

logits, cache = step(params, prompt, cache)
print(cache)

new_tokens = []
for _ in range(20):
    next_token = logits[-1:].argmax(-1)  # greedy, [1]
    new_tokens.append(next_token)
    logits, cache = step(params, next_token, cache)

jaxkv.check(cache)  # raises if tokens were dropped because the cache was full
print(cache)
print("the same buffer:", cache.storage["data"].unsafe_buffer_pointer() == pointer)

# %% [markdown]
# Decoding token by token gives the logits that one step over all tokens gives.

# %%
tokens = jnp.concatenate([prompt, *new_tokens])
all_logits, _ = step(params, tokens, jaxkv.create(config))
print("equal:", bool(jnp.allclose(logits[-1], all_logits[-1], atol=1e-4)))

# %% [markdown]
# ## A session
#
# A session holds a cache for as long as a `with` block lasts, and frees its memory at the end,
# whether the block ends normally or by an exception. A tracker is the ledger of who holds
# device memory and for what.

# %%
tracker = jaxkv.MemoryTracker()
tracker.track(params, purpose="weights")

with jaxkv.session(config, tracker=tracker) as session:
    _, session.cache = step(params, prompt, session.cache)
    print(session.report())
    print(f"\nledger: {tracker.total_usage('kv_cache'):,} bytes of KV cache")

print(f"after:  {tracker.total_usage('kv_cache'):,} bytes of KV cache")

# %% [markdown]
# ## Will it fit?
#
# `plan` allocates nothing. Here: Llama 3 8B on a card of 24 GB. Its weights take 16.1 GB as
# bfloat16, which leaves 7.9 GB for the cache. Two sequences of 32K tokens do not fit as bfloat16;
# as int8 they do. Without a size, `plan` asks the device that is here.

# %%
llama3_8b = jaxkv.KVCacheConfig(
    num_layers=32, max_context_length=32_768, num_kv_heads=8, head_dim=128, batch_size=2
)
print(jaxkv.plan(llama3_8b, "7.9GB"))

# %% [markdown]
# ## A model that writes code
#
# jaxkv comes with a small model: 3.8 million parameters, bytes as tokens, trained on Python's
# standard library. `generate` runs the loop from above for any `model(tokens, cache)`, and
# hands over the new tokens as they arrive.

# %%
model, tokenizer = jaxkv.models.load()


def stream(number, new_tokens):
    print(tokenizer.decode(new_tokens), end="", flush=True)


text = "def read_lines(path):\n    "
print(text, end="")
result = jaxkv.generate(
    model,
    [tokenizer.encode(text).ids],
    max_new_tokens=240,
    sampling=jaxkv.Sampling(temperature=0.7, top_p=0.95),
    seed=0,
    on_tokens=stream,
)

# %%
timings = result.timings
print(f"cache:  {result.config.describe()}, {result.config.size_bytes:,} bytes")
print(f"speed:  {timings.decode_tokens_per_second:,.0f} tokens a second")

# %% [markdown]
# ## A batch, sampled in several ways
#
# Prompts of a batch may differ in length. One `Sampling` serves a call, each prompt has its own
# seed, and a sequence depends on its own prompt and seed alone, not on its batch.

# %%
texts = ["class Stack:\n    def push(self", "import os\n"]
prompts = [tokenizer.encode(text).ids for text in texts]

for sampling in [
    jaxkv.Sampling(),  # greedy: the most likely token
    jaxkv.Sampling(temperature=0.8, top_p=0.9),
    jaxkv.Sampling(temperature=1.0, top_k=5),
]:
    result = jaxkv.generate(model, prompts, max_new_tokens=60, sampling=sampling, seed=[1, 2])
    print(sampling)
    for text, tokens in zip(texts, result.tokens, strict=True):
        print("   ", repr(text + tokenizer.decode(tokens)))

# %%
alone = jaxkv.generate(model, prompts[1:], max_new_tokens=60, sampling=sampling, seed=[2])
print("the same without its neighbour:", alone.tokens[0] == result.tokens[1])
