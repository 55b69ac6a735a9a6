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
# # Will it fit?
#
# A cache can take more memory than the model. jaxkv knows its exact bytes before a device is
# touched, says what would fit where something does not, and keeps a ledger of what is held
# while the program runs. Nothing here needs an accelerator or a network.

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
# ## How large is a cache?
#
# `cache_config` takes the name of a public model, or a folder with its `config.json`. Keys and
# values of all layers, two bytes a number:

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import jaxkv
from jaxkv.show.text import format_bytes

MODELS = ["Qwen2.5-0.5B", "Llama-3.2-1B", "Llama-3-8B", "Qwen3-32B", "Llama-3.1-405B"]
LENGTHS = [2048, 8192, 32_768, 131_072]

print(f"{'tokens of one sequence':22}", *(f"{length:>10,}" for length in LENGTHS))
for name in MODELS:
    sizes = [jaxkv.cache_config(name, max_context_length=length).size_bytes for length in LENGTHS]
    print(f"{name:22}", *(f"{format_bytes(size):>10}" for size in sizes))

# %% [markdown]
# ## Does it fit?
#
# Llama 3 8B on a card of 24 GB: its weights take 16.1 GB as bfloat16, and leave 7.9 GB. Two
# sequences of 32K tokens do not fit, and `plan` says what does. The same question from a shell:
# `jaxkv plan Llama-3-8B --context 32k --batch 2 --device 24GB`.

# %%
llama = jaxkv.cache_config("Llama-3-8B", max_context_length=32_768, batch_size=2)
answer = jaxkv.plan(llama, "7.9GB")
print(answer)

# %% [markdown]
# ## What does each codec buy?
#
# The answer is an object too. Its rows are the same cache, stored by each codec.

# %%
SHOWN = ["float32", "bfloat16", "int8", "rotated4", "rotated3", "rotated2"]
rows = [row for row in answer.codecs if row.codec in SHOWN]
figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
lengths = [row.max_context_length / 1024 for row in rows]
bars = axes.barh([row.codec for row in rows], lengths, color="#0072B2")
axes.bar_label(bars, fmt="%.0fK", label_type="center", color="white")
axes.axvline(32, color="black", linestyle="--", linewidth=1, label="asked for: 32K")
axes.set(xlabel="longest context (1,024 tokens)", title="Two sequences of Llama 3 8B in 7.9 GB")
_ = axes.legend(frameon=False, loc="lower right")

# %% [markdown]
# ## Layers with a window
#
# Some models attend to the newest tokens only in most of their layers. Those layers need a
# window of slots, whatever the context.

# %%
for name in ["Gemma-3-4B", "Gemma-3-27B", "gpt-oss-20b"]:
    rings = jaxkv.cache_config(name, max_context_length=131_072)
    everything = jaxkv.cache_config(name, max_context_length=131_072, chunk=None)
    sizes = f"{format_bytes(everything.size_bytes):>8} -> {format_bytes(rings.size_bytes):>8}"
    print(f"{name:12} {sizes}  ({everything.size_bytes / rings.size_bytes:.1f} times smaller)")

# %% [markdown]
# ## The plan equals the fact
#
# Not about: to the byte, scales and lengths included.

# %%
small = jaxkv.cache_config("Qwen2.5-0.5B", max_context_length=256)
for name, codec in jaxkv.codecs.CODECS.items():
    config = small.replace(codec=codec)
    planned = jaxkv.plan(config, "1GB").needed_bytes
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(jaxkv.create(config)))
    print(f"{name:16} planned {planned:>10,} bytes, held {held:>10,} bytes")
    assert planned == held

# %% [markdown]
# ## Who holds what
#
# A tracker is a ledger. A session allocates a cache, counts it, and frees it when the block
# ends, also by an exception. Here: weights, then two requests at once, one after them in eight
# bits.

# %%
tracker = jaxkv.MemoryTracker()
weights = jnp.zeros(8_000_000, jnp.bfloat16)
tracker.track(weights, purpose="weights", name="a small model")


@functools.partial(jax.jit, donate_argnums=0)
def prefill(cache):
    """What a model does with a prompt of 700 tokens, without the model."""
    vectors = jnp.ones((700, 2, 64))

    def one_layer(layer, cache):
        return jaxkv.append(cache, vectors, vectors, layer=layer)

    cache = jax.lax.fori_loop(0, cache.config.num_layers, one_layer, cache)
    return jaxkv.advance(cache, 700)


request = jaxkv.cache_config("Qwen2.5-0.5B", max_context_length=1024)
with jaxkv.session(request, tracker=tracker) as first:
    first.cache = prefill(first.cache)
    with jaxkv.session(request, tracker=tracker) as second:
        second.cache = prefill(second.cache)
        print(f"two requests: {format_bytes(tracker.total_usage('kv_cache'))} of KV cache")
    print(first.cache)
with jaxkv.session(request.replace(codec=jaxkv.Int8()), tracker=tracker) as third:
    third.cache = prefill(third.cache)
    print(f"in eight bits: {format_bytes(tracker.total_usage('kv_cache'))} of KV cache")
print(f"after: {tracker.total_usage('kv_cache')} bytes of KV cache")
print(f"peak:  {format_bytes(tracker.peak_usage())}")

axes = jaxkv.plots.memory_over_time(tracker)

# %% [markdown]
# ## When it does not fit
#
# A session that does not fit fails before it touches memory. The message says what the device
# has free, the longest context and the largest batch that would fit, and the codecs that help.

# %%
huge = jaxkv.cache_config("Llama-3.1-405B", max_context_length=1 << 20, batch_size=16)
try:
    with jaxkv.session(huge):
        pass
except jaxkv.CacheAllocationError as error:
    print(f"{format_bytes(huge.size_bytes)}: {type(error).__name__}")
