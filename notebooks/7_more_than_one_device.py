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
# # More than one device
#
# A cache that outgrows one device takes one more argument: the names of the mesh axes that split
# it. The functions stay the same, and each device works on what it holds. Eight devices are made
# of one CPU here; with GPUs or TPUs leave the first line out.

# %%
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

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
# ## Who holds what
#
# KV heads over devices (tensor parallel), sequences over devices (data parallel), or the tokens of
# each sequence over devices, for contexts that no device could hold. Two of them go together.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxkv

AUTO = jax.sharding.AxisType.Auto
CONFIG = jaxkv.KVCacheConfig(
    num_layers=4, max_context_length=1024, num_kv_heads=8, head_dim=64, batch_size=8
)
SPLITS = {
    "heads": {"heads": 8},
    "sequences": {"batch": 8},
    "sequences and heads": {"batch": 2, "heads": 4},
    "tokens": {"context": 8},
}


def spread_over(**sizes):
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AUTO,) * len(sizes))
    return {"mesh": mesh, "axes": jaxkv.Axes(**{what: what for what in sizes})}


figure, plots = plt.subplots(1, len(SPLITS), figsize=(12, 3), sharey=True)
for plot, (name, sizes) in zip(plots, SPLITS.items(), strict=True):
    cache = jaxkv.create(CONFIG, **spread_over(**sizes))
    owner = np.zeros((8, 8))  # of the first tokens of each sequence, or of each of its heads
    for shard in cache.storage["data"].addressable_shards:
        slots, heads = shard.index[2], shard.index[3]
        rows = range(*slots.indices(CONFIG.num_slots))[:: CONFIG.num_slots // 8]
        first = (slots.start or 0) // (CONFIG.num_slots // 8)
        if "context" in sizes:
            owner[:, shard.device.id % 8] = shard.device.id
        else:
            owner[first : first + max(len(rows), 1), heads] = shard.device.id
    plot.imshow(owner, cmap="tab10", vmin=0, vmax=9)
    plot.set_title(f"by {name}")
    plot.set_xlabel("position" if "context" in sizes else "KV head")
plots[0].set_ylabel("sequence")
figure.suptitle("Which of eight devices holds what")
plt.show()

# %% [markdown]
# ## A step
#
# Nothing changes in the code of a model. On each device an append writes what is its own, and
# `attend` reads what is its own; only where tokens are split are outputs merged, by the
# log-sum-exp of their scores. Keys and values never move.

# %%
rng = np.random.default_rng(0)
queries = rng.standard_normal((8, 5, 16, 64), np.float32)
keys, values = rng.standard_normal((2, 8, 5, 8, 64), np.float32)


@jax.jit
def step(cache):
    cache = jaxkv.append(cache, keys, values, layer=0)
    return jaxkv.advance(cache, 5), jaxkv.attend(cache, queries, layer=0)


_, expected = step(jaxkv.create(CONFIG))
for name, sizes in SPLITS.items():
    _, output = step(jaxkv.create(CONFIG, **spread_over(**sizes)))
    print(f"by {name:20} to 2e-6 as on one device: {jnp.abs(output - expected).max() <= 2e-6}")

# %% [markdown]
# ## A model
#
# `generate` and `session` take the same two arguments, `Engine` for heads. Several hosts are the
# same once `jax.distributed.initialize` was called.

# %%
model, tokenizer = jaxkv.models.load()
prompt = tokenizer.encode("def area(width, height):\n").ids
answers = [
    jaxkv.generate(model, [prompt] * 4, max_new_tokens=48, **place)
    for place in ({}, spread_over(batch=4), spread_over(context=8))
]
print(tokenizer.decode([*prompt, *answers[0].tokens[0]]))
assert answers[0].tokens == answers[1].tokens == answers[2].tokens

# %% [markdown]
# ## Will it fit?
#
# `plan` takes a mesh that is not here, and says what each device holds. Where there are more
# devices than KV heads, each head is on several; splitting the tokens as well saves the copies.

# %%
llama = jaxkv.cache_config("Llama-3-70B", max_context_length=131_072, batch_size=16)
for sizes in ({"heads": 8}, {"heads": 16}, {"heads": 8, "context": 2}):
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    plan = jaxkv.plan(llama, "80GB", mesh=mesh, axes=jaxkv.Axes(**{what: what for what in sizes}))
    fits = "fits" if plan.fits else "does not fit"
    print(f"{sizes}: {plan.needed_bytes:,} bytes on each device, {fits} in 80 GB")
    print(f"  copies of each KV head: {plan.head_copies}")
