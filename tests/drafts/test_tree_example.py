"""A user's own loop: trees of guesses as in Medusa and EAGLE, and the tokens of plain decode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv

HEADS, HEAD_DIM, VOCABULARY, DEPTH = 2, 16, 12, 3
RANDOM = np.random.default_rng(5)
VECTORS = RANDOM.standard_normal((VOCABULARY, HEADS, HEAD_DIM), np.float32)
HEAD = 4 * RANDOM.standard_normal((HEADS * HEAD_DIM, VOCABULARY), np.float32)
WAVES = 1 / 10 ** np.linspace(0, 2, HEAD_DIM // 2, dtype=np.float32)


def turned(vectors, positions):
    """Rope."""
    angles = (positions[..., None].astype(jnp.float32) * WAVES)[..., None, :]
    first, second = jnp.split(vectors, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def model(tokens, cache, ancestors=None):
    positions = jaxkv.next_positions(cache, tokens.shape[-1], ancestors=ancestors)
    values = jnp.asarray(VECTORS)[tokens]
    keys = turned(values, positions)
    cache = jaxkv.append(cache, keys, values, layer=0)
    mixed = jaxkv.attend(cache, keys, layer=0, ancestors=ancestors) + values
    logits = mixed.reshape(*tokens.shape, -1) @ jnp.asarray(HEAD)
    return logits, jaxkv.advance(cache, tokens.shape[-1])


# --- the tree, in 40 lines ---------------------------------------------------------------------

# The last token, two guesses of what follows it, three of what follows these, and two more.
PARENTS = np.array([-1, 0, 0, 1, 1, 2, 3, 4])
RANKS = np.array([0, 0, 1, 0, 1, 0, 0, 0])  # the likeliest, or the next likeliest
ANCESTORS = np.zeros((len(PARENTS), len(PARENTS)), bool)
for token, parent in enumerate(PARENTS[1:], start=1):
    ANCESTORS[token] = ANCESTORS[parent]
    ANCESTORS[token, parent] = True


def guessed(likely, last):
    """``likely[token]`` are what may follow a token: heads of the model, or a smaller model."""
    tokens = [last]
    for parent, rank in zip(PARENTS[1:], RANKS[1:], strict=True):
        tokens.append(likely[tokens[parent], rank])
    return jnp.stack(tokens, axis=-1)


def accepted(tokens, drawn):
    """The path of guesses that were drawn, -1 after its end, and the draw after each token."""
    path = [jnp.zeros(len(tokens), jnp.int32)]
    for _ in range(DEPTH):
        at = path[-1][:, None]
        right = (at == PARENTS) & (tokens == jnp.take_along_axis(drawn, at, axis=1)) & (at >= 0)
        path.append(jnp.where(right.any(1), right.argmax(1), -1).astype(jnp.int32))
    path = jnp.stack(path, axis=1)
    new = jnp.take_along_axis(drawn, jnp.maximum(path, 0), axis=1)
    return path, jnp.where(path < 0, -1, new)


@functools.partial(jax.jit, static_argnames="sampling", donate_argnames="cache")
def step(cache, last, likely, seeds, sampling):
    tokens = guessed(likely, last)
    positions = jaxkv.next_positions(cache, len(PARENTS), ancestors=ANCESTORS) + 1
    logits, cache = model(tokens, cache, ANCESTORS)
    seeds = jnp.repeat(seeds, len(PARENTS))
    logits, places = logits.reshape(len(seeds), -1), positions.reshape(-1)
    drawn, _ = jaxkv.sample(logits, sampling, seeds=seeds, positions=places)
    drawn = drawn.reshape(tokens.shape)
    path, new = accepted(tokens, drawn)
    return jaxkv.keep_path(cache, path, len(PARENTS)), new


# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_a_tree_of_guesses_says_what_plain_decode_says(temperature):
    prompts, seeds, sampling = [[5, 1, 3], [7, 7, 2]], [3, 4], jaxkv.Sampling(temperature)
    config = jaxkv.KVCacheConfig(1, 64, HEADS, HEAD_DIM, batch_size=2)
    options = {"config": config, "max_new_tokens": 30, "seed": seeds, "sampling": sampling}
    plain = jaxkv.generate(model, prompts, **options).tokens

    pairs = np.concatenate([each[:10] for each in plain])  # what the guesses know of the answer
    likely = np.stack([np.roll(np.arange(VOCABULARY), -shift) for shift in (1, 2)], axis=1)
    likely[pairs[:-1], 0] = pairs[1:]
    cache = jaxkv.create(config)
    _, cache = model(jnp.array(prompts)[:, :-1], cache)
    answers, last, steps = [[], []], jnp.array(prompts)[:, -1], 0
    while min(map(len, answers)) < 30:
        cache, new = step(cache, last, jnp.asarray(likely), jnp.array(seeds), sampling)
        for answer, tokens in zip(answers, np.asarray(new), strict=True):
            answer += tokens[tokens >= 0].tolist()
        last, steps = jnp.array([answer[-1] for answer in answers]), steps + 1
    assert [answer[:30] for answer in answers] == plain
    assert steps < 25
