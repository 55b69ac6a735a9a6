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
# # How much is lost
#
# A codec stores a number in fewer bits and loses something. How much, and does the model notice?
# This notebook measures both, and sets them against the least that any codec could lose.

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
# ## Error against bits
#
# Vectors of independent Gaussian numbers are the hardest there are: no structure to use. Shannon
# showed how small the error can be at best: each bit halves it. Here each codec stores the same
# vectors in a cache and gives them back; the bits count all that it keeps, scales included.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import jaxkv
from jaxkv.codecs import CODECS

TOKENS, HEAD_DIM = 512, 128
keys, values = jax.random.normal(jax.random.key(0), (2, TOKENS, 1, HEAD_DIM))


@functools.partial(jax.jit, static_argnums=0)
def relative_error(config, keys, values):
    cache = jaxkv.append(jaxkv.create(config), keys, values, layer=0)
    given, stored = jnp.stack([keys, values]), jnp.stack(jaxkv.layer(cache, 0)).astype(jnp.float32)
    return jnp.sqrt(jnp.mean((given - stored) ** 2) / jnp.mean(given**2))


def bits_and_error(codec):
    config = jaxkv.KVCacheConfig(1, TOKENS, num_kv_heads=1, head_dim=HEAD_DIM, codec=codec)
    error = float(relative_error(config, keys, values))
    return 8 * config.bytes_per_token / (2 * HEAD_DIM), error


# Centring finds nothing to take away here; see below.
plain = [name for name in CODECS if name != "float32" and not name.endswith("centred")]
errors = {name: bits_and_error(CODECS[name]) for name in plain}
for name, (bits, error) in errors.items():
    print(f"{name:18} {bits:6.3f} bits, relative error {error:.2g}")

axes = jaxkv.plots.error_by_bits(errors)

# %% [markdown]
# ## Does the model notice?
#
# The small model that comes along reads a text of its own kind, once with an exact cache and
# once with each codec. What counts is its distribution of the next byte: the Kullback-Leibler
# divergence says how much worse one would do who believed the second where the first is true.
# A trained model's keys have a mean, which the centred codecs take away before they round.

# %%
TEXT = '''\
class Queue:
    """Items wait in the order in which they came."""

    def __init__(self, items=()):
        self._items = list(items)

    def __len__(self):
        return len(self._items)

    def put(self, item):
        self._items.append(item)

    def get(self):
        if not self._items:
            raise IndexError("get from an empty queue")
        return self._items.pop(0)


class Stack(Queue):
    """The item that came last goes first."""

    def get(self):
        if not self._items:
            raise IndexError("get from an empty stack")
        return self._items.pop()
'''

model, tokenizer = jaxkv.models.load()
tokens = jnp.array(tokenizer.encode(TEXT).ids)


@jax.jit
def read(tokens, cache):
    logits, cache = model(tokens, cache)
    return jax.nn.log_softmax(logits), cache


def divergence(expected, actual):
    """Kullback-Leibler, in nats a token."""
    return float((jnp.exp(expected) * (expected - actual)).sum(-1).mean())


def cache_with(codec):
    return jaxkv.create(model.cache_config(max_context_length=len(tokens), codec=codec))


exact = read(tokens, cache_with(CODECS["float32"]))[0]
losses = {}
for name in ["int8", "rotated4", "rotated4-centred", "rotated2-centred"]:
    cache = cache_with(CODECS[name])
    bits = 8 * cache.config.bytes_per_token / (2 * 5 * 2 * 64)
    losses[name] = bits, divergence(exact, read(tokens, cache)[0])

needed = -float(jnp.take_along_axis(exact[:-1], tokens[1:, None], axis=-1).mean())
print(f"{len(tokens)} bytes of text; the model needs {needed:.1f} nats for each")
print("eight bits cost it less than a thousandth of that:", losses["int8"][1] < needed / 1000)

axes = jaxkv.plots.error_by_bits(losses, quantity="KL divergence (nats a token)", limit=False)

# %% [markdown]
# ## Fewer tokens instead of fewer bits
#
# The other way to a smaller cache is to keep the tokens that matter. A policy scores them,
# `compress` keeps the best, and both ways combine. Here the model reads all but the last 64
# bytes, half of what it read is dropped, and it goes on.

# %%
from jaxkv import compression, policies

POLICIES = {
    "newest": policies.SinksAndRecent(),
    "KeyDiff": policies.KeyDiff(),
    "random": policies.Random(),
}
start, rest = tokens[:-64], tokens[-64:]
_, cache = read(start, cache_with(CODECS["float32"]))
expected, _ = read(rest, cache)

score = jax.jit(compression.score, static_argnames="policy")
compress = jax.jit(functools.partial(jaxkv.compress, keep=len(start) // 2, new=len(rest)))
lost = {}
for name, policy in POLICIES.items():
    small = compress(cache, score(cache, policy=policy))
    lost[name] = divergence(expected, read(rest, small)[0])
print(f"{cache.size_bytes:,} bytes, and {small.size_bytes:,} with half of the tokens")

figure, axes = plt.subplots(figsize=(7, 2.2), layout="constrained")
bars = axes.barh(list(lost), list(lost.values()), color="#0072B2")
axes.bar_label(bars, fmt="%.2g", padding=3)
axes.set(xlabel="KL divergence (nats a token)", title="What forgetting half of the tokens costs")
axes.margins(x=0.12)

# %% [markdown]
# The newest tokens do best here, because the next bytes of a program depend on those just before
# them. A question about something far back would see it the other way round.
#
# A policy of your own is a function of one layer's keys, values, queries and positions; see
# `jaxkv.policies`. A codec of your own is one file with `encode` and `decode`; see
# `jaxkv.codecs`.
