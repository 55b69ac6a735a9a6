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
# # Your own policy
#
# A long context fills memory with tokens that nobody will look at again. A *policy* says which
# tokens are worth keeping: it is any function that scores them, for one layer of one sequence.
# `compress` keeps the best in each head, and the memory of the rest is free.

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
# ## A context, and what comes after
#
# The small model that comes along reads Python, a byte a token. `observed` is the same model,
# which returns its queries too: many policies look at what the newest tokens attend to.

# %%
import jax
import jax.numpy as jnp

import jaxkv

model, tokenizer = jaxkv.models.load()

context = '''class Stack:
    """A last-in, first-out list of items."""

    def __init__(self, items=()):
        self._items = list(items)

    def push(self, item):
        self._items.append(item)

    def pop(self):
        if not self._items:
            raise IndexError("pop from an empty stack")
        return self._items.pop()


class Queue:
    """A first-in, first-out list of items."""

    def __init__(self, items=()):
'''
after = """        self._items = list(items)

    def push(self, item):
        self._items.append(item)
"""
prompt, continuation = (jnp.array(tokenizer.encode(text).ids) for text in (context, after))

config = model.cache_config(max_context_length=len(prompt) + len(continuation))
read = jax.jit(lambda tokens, cache: jaxkv.observed(model, window=32)(tokens, cache))
_, cache, queries = read(prompt, jaxkv.create(config))
print(cache)
print("queries:", queries.shape, "= [layers, window, heads, head_dim]")


# %% [markdown]
# ## Ten lines
#
# A policy gets the keys and values that a layer holds, the newest queries, and the position of
# each token, and returns a score for each KV head and token. The first of these needs the values
# alone: attention to a value near zero changes nothing. The second asks what the newest queries
# attend to, as SnapKV does, and weighs that by the size of the value.


# %%
def large_values(keys, values, queries, positions):
    return jnp.linalg.norm(values, axis=-1).T  # [kv_heads, tokens]


def attended_and_large(keys, values, queries, positions):
    newest = jaxkv.policies.query_positions(queries, positions)
    weights = jaxkv.policies.attention_weights(queries, keys, newest, positions)
    attended = weights.mean(axis=(1, 2))  # over the query heads of a KV head, and the window
    return attended * large_values(keys, values, queries, positions)


small = jaxkv.compress(cache, large_values, keep=0.25, recent=32)
print(small)
print("next position:", int(small.lengths), "- held by each head:", small.index.positions.shape[-1])


# %% [markdown]
# ## Is it any good?
#
# How well does the model still know what comes after, in bits a byte? On either side of a policy
# stand a random choice and the whole context. A quarter of the tokens is kept, the newest 32 among
# them.


# %%
@jax.jit
def surprise(cache):
    """Bits that each byte of the continuation costs, but the first."""
    logits, _ = model(continuation, cache)
    logprobs = jax.nn.log_softmax(logits[:-1])
    told = jnp.take_along_axis(logprobs, continuation[1:, None], axis=-1)
    return -told.mean() / jnp.log(2.0)


policies = {
    "random": jaxkv.policies.Random(),
    "the newest": jaxkv.policies.SinksAndRecent(),
    "attended": attended_and_large,
    "large": large_values,
}
print(f"{'everything':11}{float(surprise(cache)):.2f}")
for name, policy in policies.items():
    kept = jaxkv.compress(cache, policy, keep=0.25, queries=queries, recent=32)
    print(f"{name:11}{float(surprise(kept)):.2f}")

# %% [markdown]
# ## While decoding
#
# `evicting` is a model whose cache never fills up. Here each head keeps 48 tokens, and 16 new
# ones fit beside them; whenever those are used up, the policy chooses again. The shapes stay, so
# nothing is compiled again, and memory is the same at any length.

# %%
budget = jaxkv.Kept(
    tokens=48, new=16, num_layers=config.num_layers, num_kv_heads=config.num_kv_heads
)
cache = jaxkv.create(config.replace(max_context_length=100_000, addressing=budget))
step = jax.jit(jaxkv.evicting(model, large_values, recent=16), donate_argnames="cache")

for start in range(0, len(prompt) - 15, 16):
    logits, cache = step(prompt[start : start + 16], cache)
print(f"{int(cache.lengths)} tokens went through {cache.config.num_slots} slots")
print("compiled for", step._cache_size(), "shape")
held = cache.index.positions[0]  # of the first layer
before = (held < int(cache.lengths) - 64).sum(axis=1)
print("tokens of each head that a window of 64 would have lost:", before.tolist())

# %% [markdown]
# ## Where people use it
#
# `generate` compresses a prompt's cache before it answers, by a policy of your own or by the name
# of one that is shipped; `jaxkv generate --policy snapkv --keep 0.5` is the same in a shell.
# `evaluate` asks about contexts that policies have compressed, as does
# `jaxkv eval --policy mine.py:large_values`. Here, the perplexity of what follows a context:

# %%
from jaxkv.evaluation import evaluate

result = jaxkv.generate(
    model, [prompt.tolist()], max_new_tokens=24, policy=attended_and_large, keep=0.5
)
print(result.config.describe())

policies = {"mine": large_values, "snapkv": "snapkv"}
for score in evaluate(model, tokenizer, policies, context=320, samples=1, keep=[0.25]):
    print(f"{score.policy:16}{score.perplexity:.2f}")
