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
# # Many requests
#
# Requests of different lengths come and go. Reserving the longest context for each wastes most
# of the memory; so the cache is cut into pages, and a request holds as many as its tokens need.
# Prompts that begin alike share the pages of their beginning. `Engine` runs the whole of it.

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
# ## A pool of pages
#
# The small model that comes along reads bytes. Four requests may run at once, each up to 512
# tokens. All of that at once would be 128 pages of 16 tokens; the pool has 64.

# %%
import jaxkv
from jaxkv.show.text import format_bytes

model, tokenizer = jaxkv.models.load()
config = model.cache_config(
    max_context_length=512, batch_size=4, addressing=jaxkv.Paged(page_size=16, num_pages=64)
)
reserved = config.replace(addressing=jaxkv.Contiguous())
print(f"pool of pages:                {format_bytes(config.size_bytes)}")
print(f"longest context for each row: {format_bytes(reserved.size_bytes)}")

# %% [markdown]
# ## Eight requests, four at a time
#
# All begin with the same class and go on in their own way, like chats with one system prompt.
# `step` is one round: it admits whoever fits, computes prompts in chunks, and decodes some
# tokens of everybody.

# %%
START = '''\
class Account:
    """Money of one customer."""

    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        self.balance = self.balance + amount

    '''
ENDINGS = [
    "def withdraw(", "def __repr__(", "def close(", "def transfer(self, other, ",
    "@property\n    def ", "def __eq__(", "def interest(self, rate", "def is_empty(",
]  # fmt: skip
prompts = [tokenizer.encode(START + ending).ids for ending in ENDINGS]


def run_all(engine, watch=lambda usage: None):
    requests = [engine.submit(prompt, max_new_tokens=48) for prompt in prompts]
    while engine.busy:
        engine.step()
        watch(engine.pages.usage())
    return requests


history = []
with jaxkv.Engine(model, config) as engine:
    requests = run_all(engine, lambda usage: history.append(usage.by_use))
    shared_answers, with_sharing = [request.tokens for request in requests], engine.figures

for ending, tokens in zip(ENDINGS[:3], shared_answers[:3], strict=True):
    print(f"    {ending}{tokenizer.decode(tokens)}\n    ...")

# %%
axes = jaxkv.plots.pool_occupancy(
    **{use: [pages[use] for pages in history] for use in ("sequences", "shared", "cached", "free")}
)

# %% [markdown]
# The first requests compute the class; those after them find its pages, as long as nobody needs
# the space for something else. A found page holds the bits that computing it again would give,
# so no answer changes.

# %%
with jaxkv.Engine(model, config, sharing=False) as engine:
    requests = run_all(engine)
    alone_answers, without_sharing = [request.tokens for request in requests], engine.figures

print("the same answers:", alone_answers == shared_answers)
print(f"prompt tokens computed: {without_sharing.prefilled_tokens} without sharing,", end=" ")
print(f"{with_sharing.prefilled_tokens} with")

# %% [markdown]
# ## Forks
#
# Several answers to one prompt, as in reinforcement learning: the prompt is computed once, and a
# fork goes on from there with a seed of its own. Pages are copied when they are written to, not
# before.

# %%
hot = jaxkv.Sampling(temperature=0.9)
with jaxkv.Engine(model, config, sampling=hot) as engine:
    first = engine.submit(prompts[0], max_new_tokens=48, seed=0)
    while not first.tokens:
        engine.step()
    rollouts = [first, *(engine.fork(first, seed=seed) for seed in (1, 2, 3))]
    axes = jaxkv.plots.pool_occupancy(**engine.pages.usage().by_use)
    engine.run()

for rollout in rollouts:
    print(repr(tokenizer.decode(rollout.tokens)))

# %% [markdown]
# ## One request as it comes
#
# `stream` yields the tokens of a request and runs the engine, for all requests, meanwhile.

# %%
with jaxkv.Engine(model, config, sampling=hot) as engine:
    engine.submit(prompts[1], max_new_tokens=48)
    request = engine.submit(prompts[2], max_new_tokens=48, seed=7)
    print(ENDINGS[2], end="")
    for token in engine.stream(request):
        print(tokenizer.decode([token]), end="", flush=True)
    print(f"\n\n{request.num_cached} of {len(prompts[2])} prompt tokens were in the pool")

# %% [markdown]
# ## A pool that is too small
#
# When pages run out, the request that came last gives its pages back and waits. Later it is
# computed again and goes on where it was: later, but the same.

# %%
tight = config.replace(addressing=jaxkv.Paged(page_size=16, num_pages=36))
with jaxkv.Engine(model, tight, sharing=False) as engine:
    requests = run_all(engine)
    print(f"{engine.figures.preemptions} preemptions, the same answers:", end=" ")
    print([request.tokens for request in requests] == shared_answers)

# %% [markdown]
# ## Several tokens per step
#
# Code repeats itself. A draft guesses what comes next, `NGram(5)` from what followed the last time
# that the newest five tokens stood there, and the model checks several guesses in one step. The
# answer is the one without a draft; only the steps are fewer. What was guessed is green.

# %%
repeating = START + "".join(
    f"def is_{kind}(self):\n        return self.kind == {kind!r}\n\n    "
    for kind in ("open", "closed", "frozen")
)
prompt, new = tokenizer.encode(repeating + "def is_").ids, 120
plain = jaxkv.generate(model, [prompt], max_new_tokens=new)
drafted = jaxkv.generate(model, [prompt], max_new_tokens=new, draft=jaxkv.drafts.NGram(5))
worth = drafted.speculation
print("the same answer:", drafted.tokens == plain.tokens)
print(f"{worth.steps} steps for {new} tokens: {worth.tokens_per_step:.1f} per step")
for token, guessed in zip(drafted.tokens[0], worth.guessed[0], strict=True):
    text = tokenizer.decode([token])
    print(f"\033[30;42m{text}\033[0m" if guessed else text, end="")
