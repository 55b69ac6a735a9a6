"""Codecs of a user's own, made with public names alone: without state, and with state."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.attention import IMPLEMENTATIONS
from tests.decoders import TABLE
from tests.oracle import SMALL, Oracle, filled, random_step, run_step
from tests.test_attention import assert_equals_oracle, small_blocks  # noqa: F401


@dataclasses.dataclass(frozen=True)
class PowersOfTwo(jaxkv.Codec):
    """int8 under a scale that is a power of two: kernels may read it, for it says how."""

    @property
    def name(self):
        return "powers of two"

    @property
    def levels(self):
        return tuple(range(-128, 128))

    def leaves(self, head_dim):
        return {"whole": ((head_dim,), "int8"), "unit": ((), "bfloat16")}

    def encode(self, vectors):
        wide = vectors.astype(jnp.float32)
        largest = jnp.max(jnp.abs(wide), axis=-1)
        unit = jnp.exp2(jnp.ceil(jnp.log2(jnp.maximum(largest, 1e-30) / 127)))
        whole = jnp.round(wide / unit[..., None]).astype(jnp.int8)
        return {"whole": whole, "unit": unit.astype("bfloat16")}

    def decode(self, leaves, head_dim, dtype):
        unit = leaves["unit"].astype(jnp.float32)[..., None]
        return (leaves["whole"].astype(jnp.float32) * unit).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Learned(jaxkv.Codec):
    """int8 under a scale per side and head, less a mean of values and a slope of positions.

    Both are learned from the first tokens of a cache, and two arrays hold them.
    """

    slope = 0.125

    @property
    def name(self):
        return "learned"

    def leaves(self, head_dim):
        return {"codes": ((head_dim,), "int8")}

    def state(self, head_dim):
        return {"scale": ((), "float32"), "mean": ((head_dim,), "float32", 1)}

    def encode(self, vectors):
        return {"codes": jnp.zeros(vectors.shape, jnp.int8)}

    def decode(self, leaves, head_dim, dtype):
        return jnp.zeros(leaves["codes"].shape, dtype)

    def update_state(self, state, vectors, positions, lengths):
        real = (positions >= 0)[..., None, None]
        values = jnp.where(real, vectors[1].astype(jnp.float32), 0)
        tokens = tuple(range(positions.ndim))
        mean = values.sum(tokens) / jnp.maximum(real.sum(dtype=jnp.float32), 1)
        largest = jnp.abs(self._less(vectors, mean, positions[..., None]))
        largest = jnp.where(real, largest, 0).max((*(axis + 1 for axis in tokens), -1))
        fresh = {"scale": largest / 127, "mean": mean[None]}
        unset = jnp.all(lengths == 0) & ~jnp.any(state["scale"])
        return jax.tree.map(functools.partial(jnp.where, unset), fresh, state)

    def encode_tokens(self, vectors, state, positions):
        less = self._less(vectors, state["mean"][0], positions[..., None])
        scale = self._by_token(state, less)
        codes = jnp.where(scale == 0, 0, less / jnp.where(scale == 0, 1, scale))
        return {"codes": jnp.clip(jnp.round(codes), -127, 127).astype(jnp.int8)}

    def decode_tokens(self, leaves, head_dim, dtype, state, positions, *, rotated=False):
        codes = leaves["codes"].astype(jnp.float32)
        less = codes * self._by_token(state, codes)
        return self._less(less, -state["mean"][0], -positions).astype(dtype)

    def _less(self, vectors, mean, positions):
        keys, values = vectors.astype(jnp.float32)
        drift = self.slope * positions[..., None].astype(jnp.float32)
        return jnp.stack([keys - drift, values - mean])

    def _by_token(self, state, vectors):
        scale = state["scale"]
        return scale.reshape(2, *(1,) * (vectors.ndim - 3), -1, 1)


CODECS = {"without state": PowersOfTwo(), "with state": Learned()}
codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


def config_of(codec, **fields):
    shape = {"max_context_length": 10, "num_kv_heads": 2, "head_dim": 16, "batch_size": 3}
    return jaxkv.KVCacheConfig(2, codec=codec, **(shape | fields))


def pairs():
    """The product of codecs and addressings; implementations and batches take turns."""
    for number, addressing in enumerate(SMALL):
        for implementation in ("reference", "blockwise", "streamed"):
            yield addressing, implementation, 3 if number else None


@pytest.mark.slow_cases("ring|reference|streamed|with state-paged")
@pytest.mark.parametrize(("addressing", "implementation", "batch_size"), list(pairs()))
@codecs
def test_it_equals_the_oracle(codec, addressing, implementation, batch_size):
    config = config_of(codec, addressing=SMALL[addressing], batch_size=batch_size)
    assert_equals_oracle(config, implementation, heads=4)


@pytest.mark.parametrize("addressing", ["contiguous", "paged"])
def test_the_native_kernel_reads_the_levels_that_it_declares(addressing):
    assert_equals_oracle(config_of(PowersOfTwo(), addressing=SMALL[addressing]), "native", heads=4)


def test_no_kernel_reads_what_declares_none():
    cache = jaxkv.create(config_of(Learned()))
    for name in ("native", "mosaic"):
        reason = IMPLEMENTATIONS[name].cannot_serve(cache, 1, IMPLEMENTATIONS[name].platform)
        assert reason is not None, name
    assert "learned" in IMPLEMENTATIONS["native"].cannot_serve(cache, 1, "cpu")


def test_state_is_set_once_and_travels():
    cache, _ = filled(config_of(Learned()), 5)
    state = jax.tree.map(np.asarray, cache.codec_state)
    assert {name: array.shape for name, array in state.items()} == {
        "scale": (2, 2, 2),
        "mean": (2, 1, 2, 16),
    }
    assert all(array.all() for array in state.values())
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((cache.storage, cache.codec_state)))
    assert cache.size_bytes == cache.config.size_bytes == held
    later = run_step(jaxkv.reset(cache), *random_step(cache.config, 3, heads=2, seed=5))[0]
    policy = jaxkv.policies.SinksAndRecent()
    moved = {
        "reset": later,
        "truncated": jaxkv.truncate(cache, 2),
        "forked": jaxkv.fork(cache, 2),
        "selected": jaxkv.select(cache, [1]),
        "compressed": jaxkv.compress(cache, policy, keep=4, new=2),
        "offloaded": jaxkv.prefetch(jaxkv.offload(cache)),
    }
    for name, other in moved.items():
        assert other.codec_state.keys() == state.keys(), name
        jax.tree.map(np.testing.assert_array_equal, other.codec_state, state)


@codecs
def test_a_compressed_cache_decodes_each_head_at_its_own_positions(codec):
    """All tokens kept, in whatever order: attention is what it was."""
    cache, oracle = filled(config_of(codec), 5)
    scores = np.random.default_rng(0).standard_normal((2, 3, 2, 5), np.float32)
    kept = jaxkv.compress(cache, jnp.asarray(scores), keep=5, new=2, sinks=0)
    arrays = random_step(cache.config, 1, heads=4, seed=3)
    expected = oracle.step(*arrays)
    np.testing.assert_allclose(run_step(kept, *arrays)[1], expected, rtol=1e-5, atol=1e-5)


@codecs
def test_a_file_goes_on_bit_for_bit(codec, tmp_path):
    cache, _ = filled(config_of(codec), 4)
    jaxkv.save(cache, tmp_path / "file")
    with pytest.raises(jaxkv.SnapshotError, match="give the one that it was saved with"):
        jaxkv.load(tmp_path / "file")
    loaded = jaxkv.load(tmp_path / "file", codec=codec)
    arrays = random_step(cache.config, 1, heads=4, seed=3)
    for ours, theirs in zip(run_step(loaded, *arrays), run_step(cache, *arrays), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    if codec.state(16):
        other, _ = filled(config_of(codec), 4, seed=1)
        with pytest.raises(jaxkv.SnapshotError, match="saved with other mean"):
            jaxkv.load(tmp_path / "file", codec=codec, into=other)


def test_a_name_that_a_file_has_already_is_refused(tmp_path):
    numbers = jaxkv.Kept(4, 2, num_layers=2, num_kv_heads=2, sums=("whole",))
    cache = jaxkv.create(config_of(PowersOfTwo(), addressing=numbers))
    with pytest.raises(jaxkv.SnapshotError, match=r"called 0\.0\.whole.*another name"):
        jaxkv.save(cache, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def attend_and_look_up(tokens, cache):
    """Keys, values and queries of its one layer are rows of a table, and so are logits."""
    vectors = jnp.asarray(TABLE)[tokens]
    cache = jaxkv.append(cache, vectors, vectors, layer=0)
    mixed = jaxkv.attend(cache, vectors, layer=0)
    logits = jnp.einsum("btkd,vkd->btv", mixed, jnp.asarray(TABLE)[::-1])
    return logits, jaxkv.advance(cache, tokens.shape[-1])


@codecs
def test_an_engine_answers_as_the_oracle_does(codec):
    config = config_of(codec, addressing=jaxkv.Paged(page_size=8, num_pages=8))
    config = config.replace(num_layers=1, max_context_length=32)
    prompt, count = [3, 1, 4, 1, 5], 4
    with jaxkv.Engine(attend_and_look_up, config, prefill_chunk=8) as engine:
        request = engine.submit(prompt, max_new_tokens=count)
        engine.run()
    # All but the last token of a prompt are prefilled.
    oracle, given, expected = Oracle(config.replace(batch_size=1)), np.array(prompt[-1:]), []
    (constants,) = jaxkv.calibrate(attend_and_look_up, config=config)
    oracle.state = [{name: array[0] for name, array in constants.items()}]
    oracle.step(*[TABLE[prompt[:-1]][None, None]] * 3)
    for _ in range(count):
        rows = TABLE[given][None, None]
        mixed = oracle.step(rows, rows, rows)[0, 0, -1]
        given = np.array([int(np.argmax(np.einsum("kd,vkd->v", mixed, TABLE[::-1])))])
        expected.append(int(given[0]))
    assert request.tokens == expected
