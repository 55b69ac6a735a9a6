"""Addressings of a user's own, made with public names alone, do all that jaxkv's do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxkv
from jaxkv.addressing import Plain, PlainIndex
from jaxkv.attention import IMPLEMENTATIONS
from jaxkv.attention.cudnn import attend as cudnn
from jaxkv.attention.mosaic import attend as mosaic
from tests.decoders import sharp_decoder
from tests.oracle import config_of, filled
from tests.test_attention import HOST, SHAPE, assert_equals_oracle, small_blocks  # noqa: F401


@dataclasses.dataclass(frozen=True)
class Backwards(Plain):
    """Each sequence owns a run of slots, and fills it from its end."""

    name = "backwards"

    def num_slots(self, max_context_length, batch_size):
        return max_context_length * (batch_size or 1)

    def index_bytes(self, max_context_length, batch_size):
        return 4 * (batch_size or 1)

    def init(self, max_context_length, batch_size):
        shape = () if batch_size is None else (batch_size,)
        return BackwardsIndex(jnp.zeros(shape, jnp.int32), max_context_length)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["lengths"], meta_fields=["capacity"]
)
@dataclasses.dataclass(frozen=True)
class BackwardsIndex(PlainIndex):
    lengths: jax.Array
    capacity: int

    extent = run = room = property(lambda self: self.capacity)

    def with_lengths(self, lengths):
        return dataclasses.replace(self, lengths=lengths)

    def slots(self, positions):
        ends = jnp.arange(1, self.lengths.size + 1).reshape(*self.lengths.shape, 1) * self.capacity
        exists = (positions >= 0) & (positions < self.capacity)
        return jnp.where(exists, ends - 1 - positions, -1)

    def key_positions(self, layer, lengths, start, size):
        positions = self.capacity - 1 - start - jnp.arange(size)
        return jnp.where(positions < lengths[..., None], positions, -1)

    def read(self, leaf, layer, start, size):
        own = lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
        own = own.reshape(len(own), *self.lengths.shape, self.capacity, *own.shape[2:])
        return lax.dynamic_slice_in_dim(own, start, size, axis=1 + self.lengths.ndim)

    def select(self, rows):
        slots = self.capacity * rows[:, None] + jnp.arange(self.capacity)
        return self.with_lengths(self.lengths.reshape(-1)[rows]), slots.reshape(-1)


@dataclasses.dataclass(frozen=True)
class Mirrored(Plain):
    """Pages of a shared pool, each of which is filled from its end."""

    page_size: int
    num_pages: int

    name = "mirrored"

    def num_slots(self, max_context_length, batch_size):
        return self.page_size * self.num_pages

    def index_bytes(self, max_context_length, batch_size):
        return 4 * (batch_size or 1) * (1 + -(-max_context_length // self.page_size))

    def init(self, max_context_length, batch_size):
        batch = () if batch_size is None else (batch_size,)
        table = jnp.full((*batch, -(-max_context_length // self.page_size)), -1, jnp.int32)
        return MirroredIndex(jnp.zeros(batch, jnp.int32), table, self.page_size, max_context_length)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["lengths", "table"],
    meta_fields=["page_size", "capacity"],
)
@dataclasses.dataclass(frozen=True)
class MirroredIndex(PlainIndex):
    lengths: jax.Array
    table: jax.Array
    page_size: int
    capacity: int

    shared = True
    pages = property(lambda self: self)
    run = property(lambda self: self.page_size)
    extent = property(lambda self: self.table.shape[-1] * self.page_size)

    @property
    def room(self):
        held = jnp.cumprod(self.table >= 0, axis=-1, dtype=jnp.int32).sum(-1)
        return jnp.minimum(held * self.page_size, self.capacity)

    def with_lengths(self, lengths):
        return dataclasses.replace(self, lengths=lengths)

    def with_table(self, table):
        return dataclasses.replace(self, table=table)

    def places(self, logical):
        return self._pages(logical).clip(0) * self.page_size + logical % self.page_size

    def slots(self, positions):
        exists = (positions >= 0) & (positions < self.capacity) & (self._pages(positions) >= 0)
        return jnp.where(exists, self.places(self._mirror(positions)), -1)

    def key_positions(self, layer, lengths, start, size):
        logical = start + jnp.arange(size)
        positions = self._mirror(logical)
        held = (positions < jnp.minimum(lengths, self.capacity)[..., None]) & (
            self._pages(logical) >= 0
        )
        return jnp.where(held, positions, -1)

    def read(self, leaf, layer, start, size):
        places = self.places(start + jnp.arange(size))
        return jnp.take(lax.dynamic_index_in_dim(leaf, layer, keepdims=False), places, axis=1)

    def select(self, rows):
        table = self.table.reshape(-1, self.table.shape[-1])[rows]
        return dataclasses.replace(self, lengths=self.lengths.reshape(-1)[rows], table=table), None

    def _pages(self, slots):
        numbers = jnp.clip(slots // self.page_size, 0, self.table.shape[-1] - 1)
        numbers = jnp.broadcast_to(numbers, (*self.lengths.shape, slots.shape[-1]))
        return jnp.take_along_axis(self.table, numbers, axis=-1)

    def _mirror(self, slots):
        first = slots // self.page_size * self.page_size
        return first + self.page_size - 1 - slots % self.page_size


@pytest.mark.slow_cases("float32|streamed")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("codec", "batch_size"), [("int8", 3), ("float32", None)])
def test_its_attention_equals_the_oracle(codec, batch_size, implementation):
    config = config_of(codec, **SHAPE, batch_size=batch_size).replace(addressing=Backwards())
    assert_equals_oracle(config, implementation, heads=4, options="together")


def test_a_kernel_that_needs_an_order_of_slots_refuses_it():
    config = jaxkv.KVCacheConfig(1, 64, 1, 64, addressing=Backwards())
    cache = jax.eval_shape(lambda: jaxkv.create(config))
    assert mosaic.cannot_read(cache, 1) == "it cannot read backwards caches"
    assert cudnn.cannot_read(cache, 1) is None
    with pytest.raises(jaxkv.ConfigError, match="blocks_per_query needs blocks that stay"):
        config.replace(placement=jaxkv.HostMemory(blocks_per_query=1))


@pytest.mark.parametrize("placement", [None, HOST], ids=["device", "host memory"])
def test_its_files_come_back(placement, tmp_path):
    config = config_of(**SHAPE, batch_size=2).replace(addressing=Backwards(), placement=placement)
    cache, _ = filled(config, 6)
    jaxkv.save(cache, tmp_path / "file")
    with pytest.raises(jaxkv.SnapshotError, match="'Backwards', which jaxkv does not know"):
        jaxkv.load(tmp_path / "file")
    for addressing in (Backwards(), jaxkv.Contiguous()):
        into = jaxkv.create(config.replace(addressing=addressing, placement=None))
        loaded = jaxkv.load(tmp_path / "file", addressing=Backwards(), into=into)
        for layer in range(config.num_layers):
            np.testing.assert_array_equal(in_order(loaded, layer), in_order(cache, layer))


def in_order(cache, layer):
    """Keys and values of one layer by their positions."""
    positions = cache.index.key_positions(layer, cache.lengths, 0, cache.index.extent)
    order = jnp.argsort(positions, axis=-1)[..., -int(cache.lengths.max()) :, None, None]
    return np.stack([np.take_along_axis(side, order, -3) for side in jaxkv.layer(cache, layer)])


def test_an_engine_runs_on_its_pool():
    model, prompts = sharp_decoder(), [[3, 1, 4, 1, 5, 9, 2], [3, 1, 4, 1, 5, 2]]
    fields = {"max_context_length": 24, "batch_size": 2, "codec": jaxkv.Dense("float32")}
    answers = {}
    for addressing in (Mirrored(4, num_pages=8), jaxkv.Paged(4, num_pages=8)):
        config = model.cache_config(**fields, addressing=addressing)
        with jaxkv.Engine(model, config, prefill_chunk=4, decode_steps=2) as engine:
            requests = [engine.submit(prompt, max_new_tokens=8) for prompt in prompts]
            engine.run()
            assert engine.pages.usage().hit_tokens > 0
        answers[addressing.name] = [request.tokens for request in requests]
    assert answers["mirrored"] == answers["paged"]
