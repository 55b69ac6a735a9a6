import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

import jaxkv
from jaxkv.memory import MemoryTracker, Session, session
from jaxkv.memory.plan import needed_bytes

CONFIG = jaxkv.KVCacheConfig(2, 16, num_kv_heads=1, head_dim=4, codec=jaxkv.Dense("float32"))
BATCH = jaxkv.KVCacheConfig(1, 8, num_kv_heads=1, head_dim=4, batch_size=3)


def _step(cache):
    cache = jaxkv.append(cache, jnp.ones((2, 1, 4)), jnp.ones((2, 1, 4)), layer=1)
    return jaxkv.advance(cache, 2)


step = jax.jit(_step, donate_argnums=0)


class BoomError(Exception):
    pass


def test_the_cache_lives_through_donated_updates_and_dies_with_the_block():
    tracker = MemoryTracker()
    with session(CONFIG, tracker=tracker) as held:
        assert isinstance(held, Session)
        first = held.cache
        for _ in range(3):
            held.cache = step(held.cache)
        last = held.cache
        assert first.lengths.is_deleted()
        assert int(last.lengths) == 6
        assert tracker.total_usage("kv_cache") == needed_bytes(CONFIG)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(last))
    assert tracker.total_usage() == 0
    assert tracker.peak_usage() == needed_bytes(CONFIG)
    with pytest.raises(jaxkv.CacheClosedError, match="donated or deleted"):
        jaxkv.append(last, jnp.ones((1, 1, 4)), jnp.ones((1, 1, 4)), layer=0)


def test_the_device_asked_for_holds_it_and_counts_it():
    tracker, device = MemoryTracker(), jax.devices()[5]
    with session(CONFIG, tracker=tracker, device=device) as held:
        assert held.cache.lengths.devices() == {device}
        assert tracker.total_usage(device=device) == needed_bytes(CONFIG)
        assert tracker.total_usage(device=jax.devices()[0]) == 0


def test_use_after_exit_says_what_to_do():
    with session(CONFIG) as held:
        kept = held.cache
    with pytest.raises(jaxkv.CacheClosedError, match="inside the `with"):
        _ = held.cache
    with pytest.raises(jaxkv.CacheClosedError, match="Open another session"):
        held.cache = kept


def test_a_cache_donated_away_says_what_to_do_until_it_is_rebound():
    with session(CONFIG) as held:
        cache = step(held.cache)
        with pytest.raises(jaxkv.CacheClosedError, match=r"session\.cache = step\("):
            _ = held.cache
        held.cache = cache
        assert int(held.cache.lengths) == 2


def test_what_cannot_be_the_sessions_cache():
    other = jaxkv.create(BATCH)
    with session(CONFIG) as held:
        with pytest.raises(TypeError, match=r"a tuple.*logits, session\.cache = step"):
            held.cache = (jnp.zeros(3), held.cache)
        with pytest.raises(ValueError, match=r"num_layers 1 instead of 2.*batch_size 3 instead"):
            held.cache = other

        @jax.jit
        def leak(cache):
            held.cache = cache
            return cache

        with pytest.raises(TypeError, match=r"set session\.cache to it outside"):
            leak(held.cache)
        assert int(held.cache.lengths) == 0


def test_an_exception_frees_too_and_passes_through():
    tracker = MemoryTracker()
    try:
        with session(CONFIG, tracker=tracker) as held:
            held.cache = step(held.cache)
            kept = held.cache
            raise BoomError
    except BoomError:
        passed = True
    assert passed
    assert kept.lengths.is_deleted()
    assert tracker.total_usage() == 0


@pytest.mark.slow
def test_a_thousand_sessions_leave_nothing(live_arrays):
    tracker = MemoryTracker()
    model = tracker.track(1000, purpose="weights")
    before, events = live_arrays(), len(tracker.history)
    for number in range(1000):
        try:
            with session(CONFIG, tracker=tracker) as held:
                if number % 3:
                    held.cache = step(held.cache)
                if number % 5 == 0:
                    step(held.cache)  # donated, and not rebound
                if number % 2:
                    raise BoomError
        except BoomError:
            pass
    assert live_arrays() == before
    assert tracker.allocations == (model,)
    assert tracker.total_usage() == 1000
    assert tracker.total_usage("kv_cache") == 0
    assert tracker.peak_usage("kv_cache") == needed_bytes(CONFIG)
    assert len(tracker.history) - events == 2000


def test_sessions_nest():
    tracker = MemoryTracker()
    with session(CONFIG, tracker=tracker) as outer:
        with session(BATCH, tracker=tracker) as inner:
            assert inner.cache.config == BATCH
            assert tracker.total_usage() == needed_bytes(CONFIG) + needed_bytes(BATCH)
        outer.cache = step(outer.cache)
        assert tracker.total_usage() == needed_bytes(CONFIG)
        assert int(outer.cache.lengths) == 2
    assert tracker.total_usage() == 0


def test_sessions_in_many_threads(live_arrays):
    tracker = MemoryTracker()
    before = live_arrays()

    def request(number):
        steps = number % 7
        with session(CONFIG, tracker=tracker, device=jax.devices()[0]) as held:
            for _ in range(steps):
                held.cache = step(held.cache)
            return int(held.cache.lengths) == 2 * steps

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(request, range(64)))
    assert live_arrays() == before
    assert tracker.total_usage() == 0
    assert needed_bytes(CONFIG) <= tracker.peak_usage() <= 8 * needed_bytes(CONFIG)


def test_what_cannot_fit_is_refused_and_the_ledger_untouched(fake_stats, live_arrays):
    fake_stats(bytes_limit=1000, bytes_in_use=400)
    tracker, before = MemoryTracker(), live_arrays()
    with (
        pytest.raises(jaxkv.CacheAllocationError, match=r"600 B free of 1\.0 kB; 9 tokens would"),
        session(CONFIG, tracker=tracker),
    ):
        pytest.fail("the block was entered")
    assert tracker.history == ()
    assert live_arrays() == before


def test_a_tracker_that_fails_leaves_no_cache(live_arrays):
    class Broken(MemoryTracker):
        def track(self, *args, **kwargs):
            raise BoomError

    before = live_arrays()
    with pytest.raises(BoomError), session(CONFIG, tracker=Broken()):
        pytest.fail("the block was entered")
    assert live_arrays() == before


def test_report(fake_stats):
    fake_stats(bytes_limit=24 * 10**9, bytes_in_use=10**9, peak_bytes_in_use=2 * 10**9)
    with session(CONFIG) as held:
        held.cache = step(held.cache)
        assert held.report() == (
            "KV cache  16 tokens x 2 layers x 1 KV heads x 4, float32\n"
            "planned   1.0 kB (1,028 bytes)\n"
            "held      1.0 kB (1,028 bytes)\n"
            "tokens    2 of 16\n"
            "device    cpu:0: 1.0 GB in use, 2.0 GB at peak, 24.0 GB in all (memory_stats)"
        )
        step(held.cache)
        assert "tokens    unknown: the cache was donated" in held.report()
        assert "held      0 B" in held.report()
    assert "tokens    none: the session has ended" in held.report()


def test_report_of_a_batch_on_a_device_without_stats():
    with session(BATCH) as held:
        advance = jax.jit(functools.partial(jaxkv.advance, num_tokens=jnp.array([1, 5, 2])))
        held.cache = advance(held.cache)
        report = held.report()
    assert "tokens    8 in 3 sequences, the longest 5 of 8" in report
    assert "\nprocess   " in report
    assert "resident" in report
