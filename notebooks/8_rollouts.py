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
# # Rollouts for reinforcement learning
#
# A policy answers each prompt several times, a trainer scores the answers and changes the weights,
# and so on. The engine answers: prompts that begin alike share their pages, the log-probabilities
# are those that the trainer computes, and new weights compile nothing. Nothing here needs an
# accelerator or a network.

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
# ## A policy and a trainer
#
# The policy is a small decoder with random weights; yours may be any `model(tokens, cache)`. The
# trainer needs no cache: it computes the log-probabilities of a whole text's tokens at once, and
# takes a step of policy gradient on rewards less their group's mean (GRPO, Shao et al., 2024).
# `jax.jit` takes an nnx module as it is, a pytree, and calls it with less Python than `nnx.jit`.

# %%
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxkv
from jaxkv.models import Decoder, DecoderConfig

VOCABULARY, GROUP, NEW = 64, 8, 16
shape = DecoderConfig(VOCABULARY, 32, 64, num_layers=2, num_heads=4, num_kv_heads=2)
policy = Decoder(shape, rngs=nnx.Rngs(0))


def logprobs(policy, texts):
    logits, _ = policy(texts[:, :-1], None)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), texts[:, 1:, None], axis=-1)[..., 0]


score = jax.jit(logprobs)


@jax.jit
def train(policy, texts, advantages):
    graph, weights, rest = nnx.split(policy, nnx.Param, ...)

    def loss(weights):
        answers = logprobs(nnx.merge(graph, weights, rest), texts)[:, -NEW:]
        return -(answers * advantages[:, None]).mean()

    step = jax.tree.map(lambda weight, slope: weight - 2 * slope, weights, jax.grad(loss)(weights))
    return nnx.merge(graph, step, rest)


# %% [markdown]
# ## Rounds
#
# Four prompts begin with the same 32 tokens, and each is answered eight times, with a seed for each
# answer. The reward is the share of even tokens. `engine.update` gives the engine the new weights,
# and forgets what was computed with the old ones.

# %%
start = np.random.default_rng(0).integers(VOCABULARY, size=32).tolist()
prompts = [[*start, *range(number, number + 8)] for number in range(4)]

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
)

pool = jaxkv.Paged(page_size=8, num_pages=128)
config = policy.cache_config(max_context_length=64, batch_size=16, addressing=pool)
with jaxkv.Engine(
    policy, config, sampling=jaxkv.Sampling(temperature=1.0), prefill_chunk=16
) as engine:
    for number in range(4):
        before, computed = len(compiled), engine.figures.prefilled_tokens
        rollouts = [
            engine.submit(prompt, max_new_tokens=NEW, seed=100 * number + one)
            for prompt in prompts
            for one in range(GROUP)
        ]
        engine.run()

        texts = jnp.array([[*rollout.prompt.tokens, *rollout.tokens] for rollout in rollouts])
        of_engine = jnp.array([rollout.logprobs for rollout in rollouts])
        apart = float(jnp.abs(score(policy, texts)[:, -NEW:] - of_engine).max())

        rewards = (texts[:, -NEW:] % 2 == 0).mean(axis=1).reshape(-1, GROUP)
        advantages = (rewards - rewards.mean(axis=1, keepdims=True)).reshape(-1)
        policy = train(policy, texts, advantages)
        engine.update(policy)

        print(f"round {number}: log-probabilities equal to 2e-5: {apart < 2e-5}")
        computed = engine.figures.prefilled_tokens - computed
        print(f"  {sum(map(len, prompts)) * GROUP:,} prompt tokens, {computed} of them computed")
        print(f"  compiled anything: {len(compiled) > before}")
        print(f"random: mean reward {float(rewards.mean()):.3f}")
