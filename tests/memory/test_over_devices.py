"""Memory of what is spread over devices: each counts what it holds, and is held to its limit."""

import contextlib
import gc
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType

import jaxkv
from jaxkv.memory import MemoryTracker, device_memory, plan
from jaxkv.memory.cards import CARDS
from jaxkv.memory.device import live_array_bytes
from jaxkv.models import Decoder, DecoderConfig, loading
from jaxkv.models.parameters import PARAMETERS, weight_bytes

pytestmark = pytest.mark.devices(8)

CONFIG = jaxkv.KVCacheConfig(2, 64, num_kv_heads=8, head_dim=16, batch_size=8)
EACH = 2 * 2 * 64 * 8 * 8 * 16 * 2 // 8 + 4 * 4  # bytes: vectors, and lengths of four sequences


def over(**sizes):
    types = (AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), types)
    return {"mesh": mesh, "axes": jaxkv.Axes(**{what: what for what in sizes})}


def live_bytes():
    """The most that arrays of other tests still take on a device."""
    gc.collect()
    return max(map(live_array_bytes, jax.devices()))


def test_ledger_and_report_count_on_each_device_what_it_holds():
    tracker, place = MemoryTracker(), over(batch=2, heads=4)
    assert plan(CONFIG, "1GB", **place).needed_bytes == EACH
    with jaxkv.session(CONFIG, tracker=tracker, **place) as session:
        usage = [tracker.total_usage("kv_cache", device) for device in jax.devices()]
        assert usage == [EACH] * 8
        assert tracker.total_usage() == 8 * EACH
        facts = dict(line.split("  ", 1) for line in session.report().splitlines())
        for words in ("planned on each", "held on each"):
            assert facts[words].strip() == f"65.6 kB ({EACH:,} bytes)"
        rows = [line.split()[:3] for line in tracker.report().splitlines() if "cpu:" in line]
        assert rows == [[f"cpu:{number}", "65.6", "kB"] for number in range(8)]
    assert [tracker.total_usage(device=device) for device in jax.devices()] == [0] * 8


def test_the_device_with_least_room_decides():
    place, limit = over(batch=8), live_bytes() + EACH + 1000
    with jaxkv.session(CONFIG, limit=limit, **place):
        pass
    in_the_way = jax.device_put(jnp.zeros(1 << 23, jnp.float32), jax.devices()[5])
    limit = live_array_bytes(jax.devices()[5]) + EACH - 100
    with (
        pytest.raises(
            jaxkv.CacheAllocationError, match=r"65.5 kB on each of 8 .* on cpu:5 with a limit"
        ),
        jaxkv.session(CONFIG, limit=limit, **place),
    ):
        pass
    in_the_way.delete()


def test_a_plan_counts_tokens_of_all_devices_and_bytes_of_each():
    config = jaxkv.KVCacheConfig(32, 8192, num_kv_heads=8, head_dim=128, batch_size=16)
    one = plan(config, "10GB")
    many = plan(config, "10GB", **over(batch=2, context=4))
    assert many.config == config
    assert 7 < one.needed_bytes / many.needed_bytes < 8.1
    assert many.max_context_length == 4 * ((10**10 - 8 * 4) // (2 * 32 * 8 * 8 * 128 * 2))
    assert many.max_batch_size == 2 * (10**10 // (2 * 32 * 2048 * 8 * 128 * 2 + 4))
    beside = plan(config, "10GB", weights=9 * 10**9)
    assert not beside.fits
    assert beside.max_batch_size == (10**10 - 9 * 10**9) // (2 * 32 * 8192 * 8 * 128 * 2 + 4) == 0
    assert "; the weights leave 1.0 GB" in str(beside)
    assert "no, the weights alone are 1.0 GB too large" in str(
        plan(config, "8GB", weights=9 * 10**9)
    )


def test_copies_of_kv_heads_are_named_with_their_cost():
    config = CONFIG.replace(num_kv_heads=2)
    place = over(heads=8)
    # A device holds one head of two, where an eighth of both would do.
    own = 2 * 2 * 64 * 8 * 16 * 2
    words = "each KV head is on 4 devices, so that 49.2 kB of what each holds are copies"
    assert own - own // 4 == 49_152
    assert f"copies       {words}" in str(plan(config, "1GB", **place))
    cache = jaxkv.create(config, **place)
    assert jaxkv.explain(cache, heads=8).startswith(f"copies: {words}")
    assert "copies" not in jaxkv.explain(jaxkv.create(CONFIG, **place))
    assert "copies" not in str(plan(config, "1GB", **over(heads=2, context=4)))


def parameters(model):
    return jax.tree.leaves(nnx.state(model, nnx.Param))


@pytest.mark.slow
def test_a_model_and_its_cache_that_no_device_can_hold(tmp_path, monkeypatch):
    shape = {"num_layers": 2, "num_heads": 8, "num_kv_heads": 8, "head_dim": 16}
    config = DecoderConfig(512, 64, 256, **shape)
    whole = Decoder(config, rngs=nnx.Rngs(0))
    jaxkv.models.save(whole, tmp_path)
    weights = sum(leaf.nbytes for leaf in parameters(whole))
    cache_config = whole.cache_config(max_context_length=64, batch_size=8)
    cache = cache_config.size_bytes
    prompts = [[number, 2, 3] for number in range(1, 9)]
    expected = jaxkv.generate(whole, prompts, max_new_tokens=6, config=cache_config).tokens
    del whole
    # Of each device: half of what the weights take, or the cache.
    place, budget = over(heads=8), min(weights, cache) // 2
    assert not plan(cache_config, budget).fits
    assert not plan(cache_config, 2 * budget, weights=weights).fits
    gc.collect()
    before = {device: live_array_bytes(device) for device in jax.devices()}
    largest = []

    def watch(_):
        for device in jax.devices():
            assert live_array_bytes(device) - before[device] <= budget
        for array in jax.live_arrays():
            if id(array) not in known:
                largest.append(math.prod(array.sharding.shard_shape(array.shape)) * 4)

    @contextlib.contextmanager
    def watching(*_):
        yield watch

    known = {id(array) for array in jax.live_arrays()}
    monkeypatch.setattr(loading, "progress_bar", watching)
    model, _ = jaxkv.models.load(tmp_path, **place)
    assert max(largest) == 512 * 64 * 4 // 8  # a part of the embedding or of the head
    assert plan(cache_config, budget, weights=model, **place).fits
    limit = budget + max(before.values())
    with (
        pytest.raises(jaxkv.CacheAllocationError, match="Failed to allocate"),
        jaxkv.session(cache_config, limit=limit),
    ):
        pass
    with jaxkv.session(cache_config, limit=limit, **place):
        watch(None)
    answer = jaxkv.generate(model, prompts, max_new_tokens=6, config=cache_config, **place)
    assert answer.tokens == expected
    watch(None)


@pytest.mark.slow_cases("[14]")
@pytest.mark.parametrize("devices", [1, 4, 8])
def test_weights_of_a_folder_are_what_loading_puts_on_a_device(tmp_path, devices):
    config = DecoderConfig(60, 16, 32, num_layers=1, num_heads=8, num_kv_heads=4, head_dim=4)
    jaxkv.models.save(Decoder(config, rngs=nnx.Rngs(0)), tmp_path)
    mesh = jax.make_mesh((devices,), ("heads",), (AxisType.Auto,), devices=jax.devices()[:devices])
    model, _ = jaxkv.models.load(tmp_path, mesh=mesh, axes=jaxkv.Axes(heads="heads"))
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in parameters(model))
    for path in (tmp_path, tmp_path / "config.json"):
        assert weight_bytes(path, dtype="float32", devices=devices) == 4 * held


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "inner", "heads", "kv_heads", "vocabulary", "tied"),
    [
        ("Llama-3-8B", 32, 4096, 14336, 32, 8, 128256, False),
        ("Llama-3-70B", 80, 8192, 28672, 64, 8, 128256, False),
        ("Llama-2-13B", 40, 5120, 13824, 40, 40, 32000, False),
        ("Mistral-7B", 32, 4096, 14336, 32, 8, 32000, False),
        ("SmolLM2-135M", 30, 576, 1536, 9, 3, 49152, True),
    ],
)
def test_parameters_of_public_models(
    name, layers, hidden, inner, heads, kv_heads, vocabulary, tied
):
    attention = 2 * hidden * hidden + 2 * hidden * hidden // heads * kv_heads
    layer = attention + 3 * hidden * inner + 2 * hidden
    tables = vocabulary * hidden * (1 if tied else 2)
    assert PARAMETERS[name] == layers * layer + tables + hidden


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "heads", "queries", "experts", "inner", "dense", "vocabulary"),
    [
        ("DeepSeek-V2", 60, 5120, 128, 1536, (160, 2, 1536), 12288, 1, 102400),
        ("DeepSeek-V2-Lite", 27, 2048, 16, None, (64, 2, 1408), 10944, 1, 102400),
        ("DeepSeek-V3", 61, 7168, 128, 1536, (256, 1, 2048), 18432, 3, 129280),
        ("Kimi-K2", 61, 7168, 64, 1536, (384, 1, 2048), 18432, 1, 163840),
    ],
)
def test_parameters_of_public_models_with_latents(
    name, layers, hidden, heads, queries, experts, inner, dense, vocabulary
):
    """Heads of 128 + 64 numbers, latents of 512 + 64."""
    asked = hidden * heads * 192
    if queries:
        asked = hidden * queries + queries + queries * heads * 192
    latents = hidden * (512 + 64) + 512 + 512 * heads * 256
    routed, shared, size = experts
    mixture = hidden * routed + (routed + shared) * 3 * hidden * size
    if "V2" not in name:
        mixture += routed  # what corrects their scores
    each = asked + latents + heads * 128 * hidden + 2 * hidden
    whole = layers * each + dense * 3 * hidden * inner + (layers - dense) * mixture
    assert PARAMETERS[name] == whole + 2 * vocabulary * hidden + hidden


@pytest.mark.parametrize(
    ("name", "experts", "every"),
    [("Llama-4-Scout-17B-16E", 16, 1), ("Llama-4-Maverick-17B-128E", 128, 2)],
)
def test_parameters_of_llama_4(name, experts, every):
    """In layers with experts, one more for all tokens; in the others an MLP of twice their size."""
    hidden, inner, vocabulary = 5120, 8192, 202_048
    attention = 2 * hidden * (40 + 8) * 128 + 2 * hidden
    mixture = hidden * experts + (experts + 1) * 3 * hidden * inner
    dense = 3 * hidden * 2 * inner
    layers = 48 * attention + 48 // every * mixture + (48 - 48 // every) * dense
    assert PARAMETERS[name] == layers + 2 * vocabulary * hidden + hidden


@pytest.mark.parametrize(
    ("name", "layers", "inner"), [("Gemma-3n-E2B", 30, 8192), ("Gemma-3n-E4B", 35, 16_384)]
)
def test_parameters_of_gemma_3n(name, layers, inner):
    """Four streams, inputs of 256 per layer, LAuReL of rank 64; the head is the embedding."""
    hidden, own, streams = 2048, 256, 4
    attention = 2 * hidden * (8 + 2) * 256 + 2 * 256 + 4 * hidden
    laurel = 2 * 64 * hidden + hidden
    altup = streams**2 + streams**3 + streams * hidden + 2 * hidden
    given = 2 * own * hidden + hidden
    each = attention + 3 * hidden * inner + laurel + altup + given
    beside = (262_144 + hidden) * layers * own + own + 2 * (streams - 1) * hidden * hidden
    assert PARAMETERS[name] == layers * each + beside + 262_400 * hidden + hidden


def test_every_public_model_and_card_is_there():
    assert PARAMETERS.keys() == jaxkv.models.known.KNOWN_MODELS.keys()
    sizes = {card: device_memory(card.lower()).free_bytes for card in CARDS}
    named = ("T4", 16), ("L4", 24), ("A100-80", 80), ("H100", 80), ("H200", 141), ("v6e", 32)
    for card, gigabytes in (*named, ("v5e", 16)):
        assert sizes[card] == gigabytes * 10**9
