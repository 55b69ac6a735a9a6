"""The newest tokens by a finer codec: what a query reads of which copy, against plain lists."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxkv
from jaxkv.cache.newest import NewestSlots
from jaxkv.native import unavailable
from tests.compiled import assert_in_place, compile_donating
from tests.oracle import (
    OPTIONS,
    SMALL,
    Oracle,
    assert_same_storage,
    attention,
    jit,
    layer_step,
    padded,
    poisoned,
    random_step,
    shuffled,
    step,
)

ROPE = jaxkv.Rope.of(100.0, rotary_dim=16)
CENTRED = jaxkv.Centred(jaxkv.Rotated(2), ROPE)
# The cache's codec, and that of its newest tokens: turned alike, one of them alone, or neither.
CODECS = {
    "centred": (CENTRED, jaxkv.Centred(jaxkv.Rotated(4))),
    "coarse turned": (jaxkv.KeysValues(jaxkv.Rotated(3), jaxkv.Int8()), jaxkv.Dense("float32")),
    "fine turned": (jaxkv.Dense("bfloat16"), jaxkv.Rotated(4)),
}
# Each step's width and the real tokens of each sequence, then to how many it is rolled back: more
# at once than the ring holds, a few, one at a time, and on after rollbacks of both kinds.
STEPS = [
    *((5, (5, 4, 0), None), (5, (2, 1, 2), None), (1, (1, 1, 0), 3), (1, (1, 0, 1), None)),
    *((1, (1, 1, 1), 4), (5, (2, 2, 1), None)),
]


class BothCopies:
    """Every token as either codec keeps it, and the rule for which of them a query reads."""

    def __init__(self, config):
        self.coarse, self.fine = Oracle(config), Oracle(config.newest_config)
        self.tokens = config.newest_config.addressing.tokens
        self.first = [0] * (config.batch_size or 1)

    def step(self, queries, keys, values, num_tokens, **options):
        before = self.lengths
        for oracle in (self.coarse, self.fine):
            oracle.step(queries, keys, values, num_tokens)
        outputs = np.zeros(queries.shape)
        for place in np.ndindex(len(queries), len(before)):
            for token, position in enumerate(range(before[place[1]], self.lengths[place[1]])):
                seen = [
                    self.read(*place, position, number)
                    for number in self.coarse._seen(list(range(position + 1)))
                ]
                outputs[place][token] = attention(queries[place][token], seen, **options)
        return outputs

    def read(self, layer, sequence, position, number):
        held = max(self.first[sequence], self.lengths[sequence] - self.tokens)
        fine = number >= held and number > position - self.tokens
        return (self.fine if fine else self.coarse).tokens[layer][sequence][number]

    def truncate(self, length):
        for sequence, held in enumerate(self.lengths):
            lost = max(self.first[sequence], held - self.tokens)
            self.first[sequence] = min(lost, length, held)
        self.coarse.truncate(length)
        self.fine.truncate(length)

    @property
    def lengths(self):
        return [len(tokens) for tokens in self.coarse.tokens[0]]


def config_of(codecs="centred", tokens=3, addressing="contiguous", **fields):
    codec, finer = CODECS[codecs]
    shape = {"num_layers": 2, "max_context_length": 12, "num_kv_heads": 2, "head_dim": 16}
    kind = {"codec": codec, "newest": jaxkv.Newest(tokens, finer)}
    if addressing == "host memory":
        kind["placement"] = jaxkv.HostMemory(resident=5, block=4, blocks_per_query=3)
    else:
        kind["addressing"] = SMALL[addressing]
    return jaxkv.KVCacheConfig(**(shape | kind | fields))


@functools.partial(jit, static_argnames="options")
def run_layer(options, *arguments):
    one_token = arguments[2].shape[-3] == 1
    implementation = "native" if one_token and unavailable() is None else "blockwise"
    if arguments[0].config.placement is not None:
        implementation = "streamed"
    return layer_step(*arguments, implementation=implementation, **OPTIONS[options])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codecs", "addressing", "options", "tokens"),
    [
        ("centred", "contiguous", "together", 3),
        ("centred", "paged", "plain", 2),
        ("coarse turned", "contiguous", "plain", 1),
        ("coarse turned", "ring", "plain", 20),
        ("fine turned", "contiguous", "sinks", 20),
        ("fine turned", "ring", "window", 2),
        ("fine turned", "paged", "softcap", 3),
        ("fine turned", "host memory", "together", 2),
    ],
)
def test_attention_is_that_of_the_rule(monkeypatch, codecs, addressing, options, tokens):
    monkeypatch.setattr("jaxkv.attention.blockwise.QUERY_BLOCK", 2)
    monkeypatch.setattr("jaxkv.attention.blockwise.KEY_BLOCK", 4)
    config = config_of(codecs, tokens, addressing, batch_size=3)
    cache, oracle = shuffled(poisoned(jaxkv.create(config))), BothCopies(config)
    for number, (width, counts, length) in enumerate(STEPS):
        arrays = random_step(config, width, heads=4, seed=number)
        counts = np.array(counts, np.int32)
        expected = oracle.step(*arrays, counts, **OPTIONS[options])
        arrays = [padded(array, counts, np.nan) for array in arrays]
        run = functools.partial(run_layer, options)
        cache, outputs = step(cache, *arrays, counts, run=run)
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
        if length is not None and addressing != "ring":
            cache = jaxkv.truncate(cache, length)
            oracle.truncate(length)


@settings(max_examples=25, deadline=None)
@given(
    window=st.integers(1, 5),
    moves=st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=12),
)
def test_a_ring_claims_what_it_holds_and_no_more(window, moves):
    """Whatever was appended and taken back; a plain list is written as the slots say."""
    capacity = 12
    index = NewestSlots(window).init(capacity, None)
    slots = [-1] * window
    for rolls_back, count in moves:
        length = int(index.lengths)
        after = max(length - count, 0) if rolls_back else length + count  # and past the end
        end = min(after, capacity)
        positions = np.arange(length, after, dtype=np.int32)
        if positions.size:
            for position, slot in zip(positions, index.slots(positions).tolist(), strict=True):
                if slot >= 0:
                    slots[slot] = position
        index = index.with_lengths(np.int32(after))
        claimed = np.asarray(index.key_positions(0, index.lengths, 0, index.extent))
        truth = {slot: p for slot, p in enumerate(slots) if max(end - window, 0) <= p < end}
        assert {s: p for s, p in enumerate(claimed.tolist()) if p >= 0} == truth
        assert min(truth.values(), default=end) == max(int(index.first_position(after)), 0)


@pytest.mark.slow_cases(r"centred|coarse")
@pytest.mark.parametrize("codecs", CODECS)
def test_one_token_at_a_time_stores_bitwise_what_bulk_stores(codecs):
    config = config_of(codecs)
    first, more = (random_step(config, width, heads=2)[1:] for width in (4, 5))
    run = functools.partial(jit, static_argnames="layer")(jaxkv.append)
    start = jaxkv.advance(run(jaxkv.create(config), first[0][1], first[1][1], layer=1), 4)
    bulk = run(start, more[0][1], more[1][1], layer=1)
    for token in range(5):
        one = (side[1, token : token + 1] for side in more)
        start = jaxkv.advance(run(start, *one, layer=1), 1)
    assert_same_storage(start, bulk)
    assert_same_storage(start.newest, bulk.newest)


def test_a_cache_that_grew_outside_jit_can_be_donated():
    cache = jaxkv.truncate(jaxkv.advance(jaxkv.create(config_of()), 5), 4)
    cache = jax.jit(lambda cache: jaxkv.advance(cache, 1), donate_argnums=0)(cache)
    assert int(cache.lengths) == int(cache.newest.lengths) == 5


@pytest.mark.parametrize(
    "place",
    [
        {"addressing": jaxkv.Kept(6, 2, num_layers=2, num_kv_heads=2)},
        {"addressing": jaxkv.Paged(4, num_pages=9)},
        {"placement": jaxkv.HostMemory(resident=5, blocks_per_query=3)},
    ],
    ids=["kept", "pool", "host memory"],
)
def test_its_bytes_are_announced_wherever_the_cache_is(place):
    config = config_of(batch_size=2).replace(**place)
    cache = jaxkv.create(config)
    assert cache.size_bytes == config.size_bytes
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert held == config.size_bytes + config.index_bytes


@pytest.mark.slow
@pytest.mark.parametrize("codecs", CODECS)
def test_what_is_left_by_compression_is_read_natively_too(codecs):
    if reason := unavailable():
        pytest.skip(reason)
    config = config_of(codecs, addressing="paged", batch_size=2)
    runs = {
        name: functools.partial(step, run=jit(functools.partial(layer_step, implementation=name)))
        for name in ("blockwise", "native")
    }
    cache, _ = runs["blockwise"](jaxkv.create(config), *random_step(config, 7, heads=4))
    scores = np.random.default_rng(0).standard_normal((2, 2, 2, 12), np.float32)
    small = jaxkv.compress(cache, scores, keep=3, new=4, sinks=0)
    for seed in range(2):
        arrays = random_step(config, 1, heads=4, seed=seed + 1)
        _, expected = runs["blockwise"](small, *arrays)
        small, outputs = runs["native"](small, *arrays)
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_its_bytes_are_announced(batch_size):
    config = config_of(batch_size=batch_size)
    cache = jaxkv.create(config)
    slots, centres = (12 + 3) * (batch_size or 1), 2 * 2 * 2 * 2 * 16 * 4
    coarse, finer = (2 * 2 * 2 * (16 * bits // 8 + 2) for bits in (2, 4))
    assert config.size_bytes == cache.size_bytes
    assert config.size_bytes == (
        slots - 3 * (batch_size or 1)
    ) * coarse + 2 * centres + finer * 3 * (batch_size or 1)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert held == config.size_bytes + config.index_bytes


@pytest.mark.slow_cases(r"centred|coarse")
@pytest.mark.parametrize("codecs", CODECS)
def test_a_decode_step_is_in_place(codecs):
    config = config_of(codecs, max_context_length=1 << 17)
    cache = jax.eval_shape(lambda: jaxkv.create(config))
    arrays = [array[0] for array in random_step(config, 1, heads=2)]
    compiled = compile_donating(
        lambda cache, *arrays: layer_step(cache, 1, *arrays), cache, *arrays
    )
    assert_in_place(compiled, cache, temp_share=0.1)


def test_copies_of_a_sequence_take_its_newest_tokens_along():
    config, run = config_of("fine turned"), functools.partial(run_layer, "plain")
    arrays = random_step(config, 1, heads=4)
    cache, _ = step(jaxkv.create(config), *arrays, run=run)
    pair = jaxkv.fork(cache, 2)
    assert pair.size_bytes == pair.config.size_bytes
    following = random_step(config, 1, heads=4, seed=1)
    _, expected = step(cache, *following, run=run)
    _, outputs = step(pair, *(np.stack([array, array], axis=1) for array in following), run=run)
    for sequence in range(2):
        np.testing.assert_allclose(outputs[:, sequence], expected, rtol=1e-5, atol=1e-6)


def test_newest_tokens_of_two_chunks_of_a_text_are_refused():
    newest = jaxkv.Newest(4, jaxkv.Dense("float32"))
    with pytest.raises(jaxkv.ConfigError, match=r"newest must be None: .* Chunked\(size=4"):
        jaxkv.KVCacheConfig(1, 8, 1, 4, addressing=jaxkv.Chunked(4), newest=newest)
