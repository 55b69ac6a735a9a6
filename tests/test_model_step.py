"""Models that are functions: their arrays are arguments, and a new one of the same kind is no new program."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv

VOCABULARY = 24
CONFIG = jaxkv.KVCacheConfig(1, 32, 1, 4, batch_size=1)
POOL = CONFIG.replace(batch_size=2, addressing=jaxkv.Paged(4, 16))


@pytest.fixture
def compilations():
    """A list that grows with each program that XLA compiles."""
    durations = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield durations
    jax.monitoring.unregister_event_duration_listener(listen)


def follow(table, tokens, cache):
    """A "model" whose answer to a token is in a table."""
    return 9 * jax.nn.one_hot(table[tokens], VOCABULARY), jaxkv.advance(cache, tokens.shape[-1])


def tables(number):
    """Another answer to each token for each number, and what follows three tokens from 1 on."""
    steps = np.arange(VOCABULARY) + number + 1
    return jnp.asarray(steps % VOCABULARY), [(1 + n * (number + 1)) % VOCABULARY for n in (1, 2, 3)]


class Counting:
    def __init__(self, table):
        self.table = table

    def __call__(self, tokens, cache):
        return follow(self.table, tokens, cache)

    def step(self, tokens, cache):
        return follow(self.table, tokens, cache)


def within_jit(table):
    step = jax.jit(lambda tokens, cache: follow(table, tokens, cache))
    return lambda tokens, cache: step(tokens, cache)


MODELS = {
    "a function": lambda table: lambda tokens, cache: follow(table, tokens, cache),
    "a partial": lambda table: functools.partial(follow, table),
    "under jit": lambda table: jax.jit(lambda tokens, cache: follow(table, tokens, cache)),
    "jit within": within_jit,
    "an object": Counting,
    "a method": lambda table: Counting(table).step,
    "a pytree": lambda table: jax.tree_util.Partial(follow, table),
}


def by_generate(model):
    return jaxkv.generate(model, [[3, 1]], max_new_tokens=3, config=CONFIG).tokens[0]


def by_engine(model):
    with jaxkv.Engine(model, POOL, prefill_chunk=4, decode_steps=4) as engine:
        request = engine.submit([3, 1], max_new_tokens=3)
        engine.run()
        return request.tokens


@pytest.mark.parametrize("answer", [by_generate, by_engine])
def test_other_weights_are_no_other_program_and_the_old_ones_are_let_go(answer, compilations):
    for kind, made in MODELS.items():
        left = []
        for number in range(3):
            table, expected = tables(number)
            left.append(weakref.ref(table))
            assert answer(made(table)) == expected, kind
            del table
            if number == 0:
                compilations.clear()
        assert compilations == [], kind
        gc.collect()
        assert [table() for table in left] == [None] * 3, kind
