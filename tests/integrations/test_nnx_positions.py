"""`add_caches` warns of models that decode wrongly because they number each call's tokens from 0.

Whether a model does is computed: its tokens one by one over caches beside all at once in Flax.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv.integrations.nnx import CachedAttention, add_caches

VOCABULARY, WIDTH, LENGTH = 11, 8, 8
TOKENS = jnp.array([[3, 1, 4], [1, 5, 9]])


class NoPositions(nnx.Module):
    """The usual GPT, but for what tells it where a token stands."""

    stacked = False

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.tokens = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, tokens):
        return self.run(self.tokens(tokens))

    def run(self, x):
        return self.tokens.attend(x + self.attention(x, is_causal=True))


class Arange(NoPositions):
    def __call__(self, tokens):
        return self.run(self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[-1])))


class Sliced(NoPositions):
    def __call__(self, tokens):
        return self.run(self.tokens(tokens) + self.positions.embedding[: tokens.shape[-1]])


class Sines(NoPositions):
    def __call__(self, tokens):
        angles = jnp.arange(tokens.shape[-1], dtype=jnp.float32)[:, None] * jnp.linspace(
            0.1, 1, WIDTH
        )
        return self.run(self.tokens(tokens) + jnp.sin(angles))


class WithDropout(NoPositions):
    def __call__(self, tokens):
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        return self.run(self.dropout(x))


class Stacked(Arange):
    """Layers as nnx.scan has them, and bfloat16, whose rounding is coarse."""

    def __init__(self):
        super().__init__()

        @nnx.vmap(in_axes=0)
        def layers(rngs):
            return nnx.MultiHeadAttention(
                2, WIDTH, decode=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs
            )

        self.attention = layers(nnx.Rngs(0).split(2))

    def run(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def over_layers(x, attention):
            return x + attention(x, is_causal=True)

        return over_layers(x.astype(jnp.bfloat16), self.attention).astype(jnp.float32)


class StackedWithoutPositions(Stacked):
    def __call__(self, tokens):
        return self.run(self.tokens(tokens))


class FromItsCache(NoPositions):
    def __call__(self, tokens):
        hook, positions = self.attention.attention_fn, jnp.arange(tokens.shape[-1])
        if isinstance(hook, CachedAttention):
            positions = jaxkv.next_positions(hook.cache.get_value(), tokens.shape[-1])
        return self.run(self.tokens(tokens) + self.positions(positions))


class WithACounter(NoPositions):
    def __init__(self):
        super().__init__()
        self.count = nnx.Variable(jnp.array(0))

    def __call__(self, tokens):
        positions = self.count[...] + jnp.arange(tokens.shape[-1])
        self.count[...] += tokens.shape[-1]
        return self.run(self.tokens(tokens) + self.positions(positions))


class Asking(NoPositions):
    def __call__(self, tokens, positions):
        return self.run(self.tokens(tokens) + self.positions(positions))


class AskingPolitely(Asking):
    def __call__(self, tokens, position_ids=None):
        if position_ids is None:
            position_ids = jnp.arange(tokens.shape[-1])
        return super().__call__(tokens, position_ids)


ARE_WRONG = [Arange, Sliced, Sines, WithDropout, Stacked]
ARE_RIGHT = [NoPositions, FromItsCache, WithACounter]


def with_caches(kind):
    """The model, and what add_caches said of it."""
    model = kind()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        add_caches(model, max_context_length=LENGTH, batch_size=2)
    return model, [str(warning.message) for warning in said]


SLOW = [pytest.param(StackedWithoutPositions, marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", ARE_WRONG + ARE_RIGHT + SLOW)
def test_a_warning_comes_exactly_where_decoding_is_wrong(kind):
    model, said = with_caches(kind)
    model.eval()
    plain = kind()
    plain.eval()
    with jax.numpy_dtype_promotion("standard"):  # Flax's attention in bfloat16 needs it
        expected = plain(TOKENS)[:, -1]
    model(TOKENS[:, :2])
    wrong = np.abs(model(TOKENS[:, 2:])[:, -1] - expected).max()
    assert (wrong > 0.05) == bool(said)
    assert all(f"{kind.__name__} treats" in text for text in said)
    assert (kind in ARE_WRONG) == bool(said)


@pytest.mark.parametrize("kind", [Asking, AskingPolitely])
def test_a_model_that_takes_positions_raises_no_alarm(kind):
    model, said = with_caches(kind)
    assert said == []
    for tokens in (TOKENS[:, :2], TOKENS[:, 2:]):
        cache = model.attention.attention_fn.cache.get_value()
        logits = model(tokens, jaxkv.next_positions(cache, tokens.shape[-1]))
    np.testing.assert_allclose(logits[:, -1], Arange()(TOKENS)[:, -1], atol=1e-5)


def test_the_trial_leaves_no_trace():
    model, _ = with_caches(WithACounter)
    assert model.count[...] == 0
    assert model.attention.attention_fn.cache.get_value().lengths.tolist() == [0, 0]


def test_nothing_is_said_under_a_trace():
    """There are no values to compare, and nothing may be added to the program."""
    model = nnx.eval_shape(lambda: with_caches(Arange)[0])
    assert model.attention.attention_fn.cache.get_value().lengths.shape == (2,)
