"""A user's own loop: trees of guesses as in Medusa and EAGLE, and the tokens of plain decode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from tests.models.variants import model_of, token_ids
from tests.oracle import jit

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


@jit
def logits_of(net, tokens, cache=None, ancestors=None):
    return net(tokens, cache, ancestors=ancestors)


KINDS_OF_LAYERS = ["gemma3", "deepseek_v3", "gpt2", "llama4", "gemma3n", "gpt_oss"]


@pytest.mark.slow_cases("^(?!(gemma3|deepseek_v3)$)")
@pytest.mark.parametrize("variant", KINDS_OF_LAYERS)
def test_the_models_here_take_trees(variant):
    """Each branch has the logits of its own text, and so has what follows the one that is kept."""
    known, net = token_ids(variant), model_of(variant)
    text, tree, after = known[:11], known[11:19], known[19:20]
    texts = [np.concatenate([text, tree[row], tree[[i]]]) for i, row in enumerate(ANCESTORS)]
    path = np.flatnonzero(ANCESTORS[-1])
    texts.append(np.concatenate([text, tree[path], after]))
    padded = np.stack([np.pad(each, (0, 20 - len(each))) for each in texts])
    expected = logits_of(net, jnp.asarray(padded))[0]
    expected = [logits[len(each) - 1] for logits, each in zip(expected, texts, strict=True)]

    cache = jaxkv.create(net.cache_config(max_context_length=24, chunk=11))
    _, cache = logits_of(net, jnp.asarray(text), cache)
    found, cache = logits_of(net, jnp.asarray(tree), cache, jnp.asarray(ANCESTORS))
    np.testing.assert_allclose(found, np.stack(expected[:-1]), atol=2e-4)
    cache = jaxkv.keep_path(cache, jnp.asarray(path), len(tree))
    assert int(cache.lengths) == len(text) + len(path)
    found, _ = logits_of(net, jnp.asarray(after), cache)
    np.testing.assert_allclose(found[0], expected[-1], atol=2e-4)


def test_trees_that_a_model_cannot_take_are_refused():
    tokens = jnp.asarray(token_ids("qwen3_next")[: len(PARENTS)])
    net = model_of("qwen3_next")
    cache = jaxkv.create(net.cache_config(max_context_length=24))
    with pytest.raises(jaxkv.ConfigError, match="layers that keep a state would take in all"):
        net(tokens, cache, ancestors=ANCESTORS)
    with pytest.raises(ValueError, match="ancestors= are of tokens that go into a cache"):
        net(tokens, ancestors=ANCESTORS)
