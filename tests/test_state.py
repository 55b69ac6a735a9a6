"""State per sequence: what verbs do to it, beside keys and values and in place."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.integrations.transformers import to_hf
from tests.compiled import compile_donating

WIDTH = 4
KEPT = jaxkv.StateConfig(
    (0, 2), [("sum", (2, WIDTH), "float32"), ("last", (WIDTH,), "bfloat16")], batch_size=2
)
ATTENDS = jaxkv.KVCacheConfig(2, 16, 1, WIDTH, batch_size=2, codec=jaxkv.Dense("float32"))
# Layer 0 keeps a state alone, layer 1 attends alone, and layer 2 does both.
CONFIG = jaxkv.HybridConfig((ATTENDS,), group_of_layer=(-1, 0, 0), states=(KEPT,))
DECAY = 0.5


def tokens_of(seed, count):
    return np.random.default_rng(seed).standard_normal((2, count, WIDTH), np.float32)


def step(cache, x, num_tokens=None):
    """Each stateful layer adds up the tokens it is given, older ones by less."""
    real = jaxkv.real_tokens(cache, x.shape[1], num_tokens)
    for layer in (0, 1, 2):
        if layer != 1:
            kept = jaxkv.state(cache, layer)
            total, last = kept["sum"], kept["last"]
            for token in range(x.shape[1]):
                row = real[:, token, None]
                added = DECAY * total + x[:, token, None]
                total = jnp.where(row[..., None], added, total)
                last = jnp.where(row, x[:, token].astype(last.dtype), last)
            cache = jaxkv.with_state(cache, layer, {"sum": total, "last": last})
        if layer != 0:
            vectors = x[:, :, None]
            cache = jaxkv.append(cache, vectors, vectors, layer=layer, num_tokens=num_tokens)
    return jaxkv.advance(cache, x.shape[1] if num_tokens is None else num_tokens)


def sums(x):
    """What is kept after these tokens of one sequence."""
    total = np.zeros(WIDTH)
    for token in x:
        total = DECAY * total + token
    return total


def assert_holds(cache, texts, layer=2):
    kept = jaxkv.state(cache, layer)
    assert cache.lengths.tolist() == [len(text) for text in texts]
    for row, text in enumerate(texts):
        np.testing.assert_allclose(kept["sum"][row, 1], sums(text), rtol=1e-5)
        last = text[-1] if len(text) else np.zeros(WIDTH)
        np.testing.assert_allclose(kept["last"][row].astype(jnp.float32), last, rtol=1e-2)


def filled(count=5, seed=0):
    x = tokens_of(seed, count)
    return x, step(jaxkv.create(CONFIG), jnp.asarray(x))


def test_state_goes_on_by_steps_with_padding_and_begins_anew():
    x, cache = filled()
    more = tokens_of(1, 3)
    run = jax.jit(step, donate_argnums=0)
    cache = run(cache, jnp.asarray(more), jnp.array([1, 3]))
    assert_holds(cache, [[*x[0], *more[0, :1]], [*x[1], *more[1]]])
    told = jaxkv.padded_after(cache, jnp.array([0, 2]))
    cache = jaxkv.padded_after(step(told, jnp.asarray(more)), None)
    assert_holds(cache, [[*x[0], *more[0, :1]], [*x[1], *more[1], *more[1, :2]]])
    cache = jaxkv.reset(jaxkv.check(cache))
    assert_holds(cache, [[], []])
    assert_holds(jaxkv.check(run(cache, jnp.asarray(more))), more)


def test_a_row_that_rests_keeps_its_state_whatever_is_written():
    x, cache = filled()
    told = jaxkv.padded_after(cache, jnp.array([0, 1]))
    new = {name: jnp.full_like(kept, 7) for name, kept in jaxkv.state(cache, 0).items()}
    told = jaxkv.advance(jaxkv.with_state(told, 0, new), 1)
    kept = jaxkv.state(jaxkv.padded_after(told, None), 0)
    np.testing.assert_allclose(kept["sum"][0, 1], sums(x[0]), rtol=1e-5)
    assert (kept["sum"][1] == 7).all()


def test_bytes_are_those_of_the_leaves():
    cache = jaxkv.create(CONFIG)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert CONFIG.size_bytes + CONFIG.index_bytes == held
    assert cache.size_bytes == CONFIG.size_bytes == ATTENDS.size_bytes + KEPT.size_bytes
    assert KEPT.size_bytes == 2 * 2 * (2 * WIDTH * 4 + WIDTH * 2)
    with jaxkv.session(CONFIG) as session:
        assert session.tracker.total_usage() == held
    assert jaxkv.plan(CONFIG, "1GB").needed_bytes == held
    assert jaxkv.plan(CONFIG, held).max_context_length == 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_in_place(dtype):
    """In a loop too, each layer by what the one before makes of its own."""
    large = dataclasses.replace(KEPT, arrays=(("sum", (2, WIDTH, 1 << 16), dtype),))
    config = dataclasses.replace(CONFIG, states=(large,))
    cache = jax.eval_shape(lambda: jaxkv.create(config))

    def one_step(_, carry):
        cache, x = carry
        for layer in (0, 2):
            total = jaxkv.state(cache, layer)["sum"] * jnp.asarray(DECAY, dtype) + x
            cache = jaxkv.with_state(cache, layer, {"sum": total})
            x = total.mean()
        return jaxkv.advance(cache, 1), x

    def steps(cache, x):
        return jax.lax.fori_loop(0, 3, one_step, (cache, x))

    compiled = compile_donating(steps, cache, jax.ShapeDtypeStruct((), dtype))
    assert not re.search(rf"\[2,2,{WIDTH},{1 << 16}\]\S* copy\(", compiled.as_text())
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= config.size_bytes
    assert memory.temp_size_in_bytes <= 1.1 * config.states[0].size_bytes  # of new ones, float32


def test_sequences_are_chosen_and_repeated():
    x, cache = filled()
    assert_holds(jaxkv.select(cache, [1, 0, 1]), [x[1], x[0], x[1]])
    single = dataclasses.replace(
        CONFIG, groups=(ATTENDS.replace(batch_size=None),), states=(KEPT.replace(batch_size=None),)
    )
    alone = jaxkv.create(single)
    alone = jaxkv.with_state(
        alone, 2, {"sum": jnp.ones((2, WIDTH)), "last": jnp.zeros(WIDTH, jnp.bfloat16)}
    )
    forked = jaxkv.fork(jaxkv.advance(alone, 1), 3)
    assert jaxkv.state(forked, 2)["sum"].tolist() == [[[1.0] * WIDTH] * 2] * 3
    assert forked.config.states[0].batch_size == 3


def test_a_rollback_goes_to_nothing_or_to_a_copy():
    x, cache = filled()
    copied = jaxkv.copy_state(cache)
    more = jnp.asarray(tokens_of(1, 3))
    longer = step(cache, more)
    with pytest.raises(ValueError, match=r"cannot roll back to \[6, 6\].*restore_state"):
        jaxkv.truncate(longer, 6)
    assert jaxkv.truncate(longer, 9).lengths.tolist() == [8, 8]
    unsound = jax.jit(jaxkv.truncate)(longer, 6)
    with pytest.raises(ValueError, match="cannot roll back"):
        jaxkv.check(jax.jit(jaxkv.advance)(unsound, 1))
    back = jax.jit(jaxkv.restore_state, donate_argnums=0)(longer, copied)
    assert_holds(jaxkv.check(back), x)
    again = step(back, more)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(step(cache, more)), strict=True):
        assert (one == other).all()
    with pytest.raises(ValueError, match=r"copy is of \[5, 5\] tokens"):
        jaxkv.restore_state(jaxkv.create(CONFIG), copied)
    with pytest.raises(ValueError, match="of a cache of this config"):
        jaxkv.restore_state(jaxkv.select(cache, [0]), copied)


def test_a_file_goes_on_bit_for_bit(tmp_path):
    _, cache = filled()
    cache = step(cache, jnp.asarray(tokens_of(1, 2)), jnp.array([0, 2]))
    cache = jaxkv.select(cache, [1, 0])
    jaxkv.save(cache, tmp_path / "file", tokens=[[1] * 7, [1] * 5])
    assert jaxkv.snapshot.inspect(tmp_path / "file").config == cache.config
    loaded = jaxkv.load(tmp_path / "file")
    into = jaxkv.load(tmp_path / "file", into=filled(count=3, seed=8)[1], rows=[1, 0])
    for found in (loaded, jaxkv.select(into, [1, 0])):
        for layer in (0, 2):
            kept, expected = jaxkv.state(found, layer), jaxkv.state(cache, layer)
            assert all((kept[name] == expected[name]).all() for name in expected)
        more = jnp.asarray(tokens_of(2, 1))
        assert (jaxkv.layer(step(found, more), 2)[0] == jaxkv.layer(step(cache, more), 2)[0]).all()
        assert jaxkv.check(step(found, more)).lengths.tolist() == [8, 6]
    other = dataclasses.replace(KEPT, arrays=KEPT.arrays[:1])
    with pytest.raises(jaxkv.SnapshotError, match="layers of state"):
        jaxkv.load(
            tmp_path / "file", into=jaxkv.create(dataclasses.replace(CONFIG, states=(other,)))
        )


def test_host_memory_takes_keys_and_values_alone():
    x, cache = filled()
    assert_holds(step(jaxkv.prefetch(jaxkv.offload(cache)), jnp.asarray(x)), np.tile(x, (1, 2, 1)))


REFUSED = {
    "append": (lambda c: jaxkv.append(c, *[jnp.ones((2, 1, 1, 4))] * 2, layer=0), "keeps a state"),
    "attend": (lambda c: jaxkv.attend(c, jnp.ones((2, 1, 1, 4)), layer=0), "keeps a state"),
    "layer": (lambda c: jaxkv.layer(c, 0), "keeps a state"),
    "state": (lambda c: jaxkv.state(c, 1), "keeps no state: those that do are"),
    "no state": (lambda c: jaxkv.state(jaxkv.create(ATTENDS), 1), "none of this cache"),
    "shapes": (lambda c: jaxkv.with_state(c, 0, {"sum": jnp.ones(2)}), r"keeps sum \[2, 2, 4\]"),
    "compress": (lambda c: jaxkv.compress(c, keep=2, policy=max), "keep a state"),
    "evict": (lambda c: jaxkv.evict(c, max, tokens=2), "keep a state"),
    "to_hf": (lambda c: to_hf(c), "keep a state"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_state_cannot_do_is_refused_by_name(what):
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call(jaxkv.create(CONFIG))


BAD = {
    "no layers": (lambda: jaxkv.StateConfig((), KEPT.arrays), "layers must be"),
    "no arrays": (lambda: jaxkv.StateConfig((0,), ()), "arrays must be"),
    "twice": (lambda: jaxkv.StateConfig((0,), [KEPT.arrays[0]] * 2), "arrays must be"),
    "no such layer": (
        lambda: dataclasses.replace(CONFIG, states=(KEPT.replace(layers=(0, 3)),)),
        "states must be of layers 0 to 2",
    ),
    "nothing kept": (lambda: dataclasses.replace(CONFIG, states=()), "group_of_layer must name"),
    "another batch": (
        lambda: dataclasses.replace(CONFIG, states=(KEPT.replace(batch_size=3),)),
        "same batch_size",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_configs_say_what_is_wrong(what):
    made, message = BAD[what]
    with pytest.raises(jaxkv.ConfigError, match=message):
        made()
