"""On a GPU or TPU: is what jaxkv promises true there? Right answers, memory, in place."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

import jaxkv
from benchmarks.accelerator import within
from benchmarks.accelerator_agreement import agreement
from benchmarks.accelerator_attention import MORE_CONTEXTS, sweep
from benchmarks.accelerator_decode import MORE_STATES, decode, few_tokens, generate, llama
from benchmarks.measure import interleaved
from benchmarks.report import Row, Table
from jaxkv.memory import device_memory

_LLAMA_3_8B = {"num_layers": 32, "num_kv_heads": 8, "head_dim": 128}
_QWEN_2_5 = {"num_layers": 24, "num_kv_heads": 2, "head_dim": 64}  # of 0.5B parameters


def run(quick: bool) -> Iterator[Table]:
    """A table a promise."""
    if jax.default_backend() == "cpu":
        yield Table("Accelerator: this machine has none", [])
        return
    print(f"device         {jax.devices()[0].device_kind}", flush=True)
    yield within("Agreement", 150, agreement)
    for batch, context in () if quick else MORE_CONTEXTS:
        title = f"Decode attention, {batch} x {context}"
        yield within(title, 120, functools.partial(sweep, batch, context))
    yield within("Memory", 60, _memory)
    yield within("Append", 60, _append)
    yield within("Generate", 90, generate)
    model = llama(layers=8 if quick else 32)
    yield within("Steps of several tokens", 120, lambda: few_tokens(model))
    yield within("Decode", 150, lambda: decode(model, MORE_STATES))


def _memory() -> Table:
    """Bytes in use by the device's own count, inside and after a session, against the plan."""
    rows: list[Row] = []
    for shape, context in ((_QWEN_2_5, 1 << 11), (_LLAMA_3_8B, 1 << 12), (_LLAMA_3_8B, 1 << 15)):
        config = jaxkv.KVCacheConfig(max_context_length=context, **shape)
        before = device_memory().in_use_bytes
        with jaxkv.session(config):
            held = device_memory().in_use_bytes - before
        times = interleaved({"create": lambda c=config: jaxkv.create(c).storage}, repeats=7)
        rows.append(
            {
                "cache": config.describe(),
                "create ms": times["create"].seconds * 1e3,
                "planned": config.size_bytes + config.index_bytes,
                "held": held,
                "left after": device_memory().in_use_bytes - before,
                "source": device_memory().source,
            }
        )
    return Table("Memory: the device's count of a session, in bytes", rows, [_too_large()])


def _too_large() -> str:
    huge = jaxkv.KVCacheConfig(max_context_length=1 << 24, **_LLAMA_3_8B)
    try:
        with jaxkv.session(huge):
            return "a cache larger than the device was allocated: WRONG"
    except jaxkv.CacheAllocationError as error:
        return str(error)


def _append() -> Table:
    rows = []
    for codec in ("bfloat16", "float16", "float32", "int8"):
        times, alias = {}, 0.0
        for slots in (4096, 131072):
            codec_value = jaxkv.codecs.CODECS[codec]
            config = jaxkv.KVCacheConfig(4, slots, 8, 128, codec=codec_value)
            holder = [jaxkv.create(config)]
            vectors = jnp.ones((1, 8, 128), jnp.bfloat16)

            def write(cache, vectors):
                for layer in range(4):
                    cache = jaxkv.append(cache, vectors, vectors, layer=layer)
                return jaxkv.truncate(jaxkv.advance(cache, 1), 0)

            compiled = jax.jit(write, donate_argnums=0).lower(holder[0], vectors).compile()
            alias = compiled.memory_analysis().alias_size_in_bytes / config.size_bytes

            def call(compiled=compiled, holder=holder, vectors=vectors):
                for _ in range(20):
                    holder[0] = compiled(holder[0], vectors)
                return holder[0]

            times[slots] = interleaved({"append": call}, repeats=9)["append"].seconds / 80
        short, long = times.values()
        rows.append(
            {
                "codec": codec,
                "us at 4,096": short * 1e6,
                "us at 131,072": long * 1e6,
                "ratio": long / short,
                "alias": alias,
            }
        )
    return Table("Append: one token of one layer, by context", rows)
