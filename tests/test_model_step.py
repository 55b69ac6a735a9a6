"""Models that are functions, other weights in the same program, and weights that are exchanged."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxkv

VOCABULARY = 24
CONFIG = jaxkv.KVCacheConfig(1, 32, 1, 4, batch_size=1)
POOL = CONFIG.replace(batch_size=2, addressing=jaxkv.Paged(4, 16))


def follow(table, tokens, cache):
    """A "model" whose answer to a token is in a table."""
    return 9 * jax.nn.one_hot(table[tokens], VOCABULARY), jaxkv.advance(cache, tokens.shape[-1])


def tables(number, length=3):
    """For each number another answer to each token, and what follows a prompt that ends with 1."""
    step = number + 1
    answers = [(1 + step * n) % VOCABULARY for n in range(1, length + 1)]
    return jnp.arange(step, VOCABULARY + step) % VOCABULARY, answers


class Follower:
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
    "an object": Follower,
    "a method": lambda table: Follower(table).step,
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
@pytest.mark.slow
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


class Module(nnx.Module):
    def __init__(self, table):
        self.table = nnx.Param(table)

    def __call__(self, tokens, cache):
        return follow(self.table[...], tokens, cache)


held = Module(jnp.zeros(VOCABULARY, jnp.int32))


def by_global(tokens, cache):
    return held(tokens, cache)


def exchanging(kind):
    """A model, and a function that puts another table into it."""
    if kind == "a dict":
        weights = {"table": None}
        return lambda tokens, cache: follow(weights["table"], tokens, cache), (
            lambda table: weights.update(table=table)
        )
    if kind == "an object":
        model = Follower(None)
        return model, lambda table: setattr(model, "table", table)
    if kind == "a global":
        return by_global, held.table.set_value
    module = Module(jnp.zeros(VOCABULARY, jnp.int32))
    if kind == "nnx":
        return module, module.table.set_value
    step = jax.jit(lambda table, tokens, cache: follow(table, tokens, cache))
    return lambda *given: step(module.table[...], *given), module.table.set_value


KINDS = ["nnx", "nnx in a closure", "a dict", "an object", "a global"]


@pytest.mark.parametrize("kind", KINDS)
def test_generate_answers_with_the_weights_of_now(kind):
    model, exchange = exchanging(kind)
    for number in range(2):
        table, expected = tables(number)
        exchange(table)
        assert by_generate(model) == expected


PROMPT = [3, 7, 2, 9, 11, 5, 1]


@pytest.mark.slow_cases("^(?!nnx$)")
@pytest.mark.parametrize("kind", KINDS)
def test_an_idle_engine_answers_with_the_weights_of_now_and_keeps_no_others(kind):
    model, exchange = exchanging(kind)
    exchange(tables(5)[0])
    with jaxkv.Engine(model, POOL, prefill_chunk=4, decode_steps=4) as engine:
        for number in range(2):
            table, expected = tables(number)
            exchange(table)
            old, table = weakref.ref(table), None
            requests = [engine.submit(PROMPT, max_new_tokens=3) for _ in range(2)]
            engine.run()
            assert [request.tokens for request in requests] == [expected] * 2
            assert [request.num_cached for request in requests] == [0, 6]
        exchange(jnp.zeros(VOCABULARY, jnp.int32))
        gc.collect()
        assert old() is None


@pytest.mark.parametrize("kind", ["nnx", "a dict"])
def test_weights_exchanged_under_requests_are_an_error_until_it_is_said_what_to_do(kind):
    model, exchange = exchanging(kind)
    (first, before), (second, after) = tables(0, length=9), tables(1, length=9)
    exchange(first)
    with jaxkv.Engine(model, POOL, prefill_chunk=4, decode_steps=1) as engine:
        begun, late, *waiting = (engine.submit(PROMPT, max_new_tokens=9) for _ in range(4))
        stream = engine.stream(begun)
        assert [next(stream), next(stream)] == before[:2]
        exchange(second)
        for go_on in (engine.step, engine.run, lambda: next(engine.stream(waiting[0]))):
            with pytest.raises(
                jaxkv.ModelChangedError, match="exchanged, and 2 requests have begun"
            ):
                go_on()
        exchange(first)
        engine.step()
        with pytest.raises(jaxkv.ModelChangedError, match="2 requests have begun with the old"):
            engine.update(model)
        assert (begun.tokens, late.tokens) == (before[:3], before[:2])
        exchange(second)
        engine.update(model, restart=True)
        engine.pages.check()
        with pytest.raises(jaxkv.ModelChangedError, match="begun anew with other weights after 2"):
            next(stream)
        assert list(engine.stream(begun)) == after
        engine.run()
        assert [request.tokens for request in (late, *waiting)] == [after] * 3
        assert [begun.num_cached, late.num_cached] == [0, 6]
        engine.pages.check()


def test_weights_that_were_donated_are_named():
    table, expected = tables(0)
    model = jax.tree_util.Partial(follow, table)
    with jaxkv.Engine(model, POOL, prefill_chunk=4, decode_steps=4) as engine:
        engine.submit(PROMPT, max_new_tokens=3)
        table.delete()
        with pytest.raises(jaxkv.ModelChangedError, match="1 of the model's arrays were deleted"):
            engine.run()
        with pytest.raises(RuntimeError, match="deleted"):
            by_generate(lambda tokens, cache: follow(table, tokens, cache))
        request = engine.submit(PROMPT, max_new_tokens=3)
        engine.update(jax.tree_util.Partial(follow, tables(0)[0]), restart=True)
        engine.run()
        assert request.tokens == expected
