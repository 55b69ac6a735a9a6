"""Streaming: decode from host memory beside decode from the device, and a million tokens."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

import jaxkv
from benchmarks.measure import interleaved
from benchmarks.report import Row, Table, target

_LAYERS, _KV_HEADS, _HEADS, _HEAD_DIM = 4, 2, 8, 64
_BLOCK, _RESIDENT = 1024, 8192
_CONTEXTS = (32_768, 131_072)
_MILLION = 1 << 20
_DEVICE_BUDGET = 64 << 20  # bytes of device memory for a context of a million tokens
_SLOWEST = 1.5  # times the resident cache, where host and device memory are one


def _step(
    cache: jaxkv.KVCache, hidden: jax.Array, implementation: str | None
) -> tuple[jaxkv.KVCache, jax.Array]:
    """A token through all layers; the cache ends as long as it was."""
    length = cache.lengths
    for layer in range(_LAYERS):
        keys, values = jnp.split(hidden[..., : 2 * _KV_HEADS, :], 2, axis=-2)
        cache = jaxkv.append(cache, keys, values, layer=layer)
        hidden = hidden + jaxkv.attend(cache, hidden, layer=layer, implementation=implementation)
    return jaxkv.truncate(jaxkv.advance(cache, 1), length), hidden


class _Decode:
    """A compiled step that keeps its own cache."""

    def __init__(self, context: int, place: jaxkv.HostMemory | None, implementation: str | None):
        config = jaxkv.KVCacheConfig(
            _LAYERS, context + 64, _KV_HEADS, _HEAD_DIM,
            codec=jaxkv.Dense("float32"), placement=place,
        )  # fmt: skip
        self.cache = jaxkv.advance(jaxkv.create(config), context)
        self.hidden = jnp.ones((1, _HEADS, _HEAD_DIM), jnp.float32)
        step = jax.jit(functools.partial(_step, implementation=implementation), donate_argnums=0)
        self.compiled = step.lower(self.cache, self.hidden).compile()
        memory = self.compiled.memory_analysis()
        self.device_bytes = config.device_bytes + memory.temp_size_in_bytes
        self.temp_bytes = memory.temp_size_in_bytes
        self.block_bytes = _BLOCK * config.bytes_per_token // _LAYERS
        resident = 0 if place is None else _RESIDENT
        blocks = None if place is None else place.blocks_per_query
        older = context - resident if blocks is None else blocks * _BLOCK
        self.streamed_bytes = older * config.bytes_per_token

    def __call__(self) -> jax.Array:
        self.cache, output = self.compiled(self.cache, self.hidden)
        return output


def run(quick: bool) -> Iterator[Table]:
    """Two lengths, all blocks; then a million tokens, all blocks and the ones that matter."""
    every = jaxkv.HostMemory(resident=_RESIDENT, block=_BLOCK)
    rows, seconds, ratios = [], {}, {}
    for context in _CONTEXTS:
        steps = {
            "device, blockwise": _Decode(context, None, "blockwise"),
            "host, streamed": _Decode(context, every, "streamed"),
            "device, as attend chooses": _Decode(context, None, None),
            "host, as attend chooses": _Decode(context, every, None),
        }
        timings = interleaved(steps, repeats=5 if quick else 15)
        for name, step in steps.items():
            seconds[name, context] = timings[name].seconds
            of_device = (
                "device, blockwise" if "chooses" not in name else "device, as attend chooses"
            )
            ratio = timings[name].seconds / timings[of_device].seconds
            ratios[name, context] = ratio
            rows.append(_row(name, context, step, timings[name].seconds) | {"x device": ratio})
    chosen = jaxkv.HostMemory(resident=_RESIDENT, block=_BLOCK, blocks_per_query=16)
    million = {"1M, host, streamed": every, "1M, host, 16 blocks": chosen}
    for name, place in million.items():
        step = _Decode(_MILLION, place, "streamed")
        timing = interleaved({name: step}, repeats=3, warm_up=1)[name]
        rows.append(_row(name, _MILLION, step, timing.seconds))
        seconds[name, _MILLION] = timing.seconds
        largest = step.device_bytes
        del step
    streamed, (short, long) = "host, streamed", _CONTEXTS
    per_byte = {
        context: seconds[streamed, context] / (context - _RESIDENT) for context in _CONTEXTS
    }
    temp = max(row["temp / block"] for row in rows if "host" in row["cache"])
    notes = [
        f"{_LAYERS} layers x {_KV_HEADS} KV heads x {_HEAD_DIM}, float32, {_HEADS} query heads, "
        f"one sequence; {_RESIDENT:,} tokens resident, blocks of {_BLOCK:,}. Medians, in turns. On "
        "a CPU the two memories are one, and attend reads host memory in place.",
        "The streamed loop, where it is not needed (on a CPU) but can be named: "
        f"{max(ratios[streamed, context] for context in _CONTEXTS):.2f}x the device's blockwise.",
        target("host over device, as attend chooses", max(
            ratios["host, as attend chooses", context] for context in _CONTEXTS
        ), _SLOWEST, at_most=True),
        target(f"time a streamed token, {long:,} over {short:,}",
               per_byte[long] / per_byte[short], 1.25, at_most=True),
        target("scratch memory of a step, in blocks of one layer", temp, 5, at_most=True),
        f"target: 1M tokens within {_DEVICE_BUDGET / 1e6:.0f} MB of device memory, bounds "
        f"included: {largest / 1e6:.1f} MB, {'met' if largest <= _DEVICE_BUDGET else 'NOT MET'}",
    ]  # fmt: skip
    yield Table("Streaming: decode of one token by where the cache lives", rows, notes)


def _row(name: str, context: int, step: _Decode, seconds: float) -> Row:
    return {
        "cache": name,
        "context": context,
        "ms a token": seconds * 1e3,
        "GB/s": step.streamed_bytes / seconds / 1e9,
        "x device": None,
        "device MB": step.device_bytes / 1e6,
        "temp / block": step.temp_bytes / step.block_bytes,
    }
