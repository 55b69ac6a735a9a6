"""On a GPU or TPU: is what jaxkv promises true there? Memory, in place, right answers, speed."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxkv
from benchmarks.caches import filled
from benchmarks.measure import interleaved
from benchmarks.report import Row, Table
from jaxkv.attention import IMPLEMENTATIONS
from jaxkv.decode import TOKENS_PER_DISPATCH
from jaxkv.memory import device_memory
from jaxkv.models import Decoder, DecoderConfig, load
from jaxkv.text import format_bytes

_LLAMA_3_8B = {"num_layers": 32, "num_kv_heads": 8, "head_dim": 128}
_QUERY_HEADS = 32


def run(quick: bool) -> Iterator[Table]:
    """A table a promise."""
    if jax.default_backend() == "cpu":
        yield Table("Accelerator: this machine has none", [])
        return
    yield _memory()
    yield _append()
    yield _agreement()
    yield _copy_and_attention(quick)
    yield _generate()


def _memory() -> Table:
    """Bytes in use by the device's own count, inside and after a session, against the plan."""
    rows: list[Row] = []
    for context in (1 << 11, 1 << 15):
        config = jaxkv.KVCacheConfig(max_context_length=context, **_LLAMA_3_8B)
        before = device_memory().in_use_bytes
        with jaxkv.session(config):
            held = device_memory().in_use_bytes - before
        rows.append(
            {
                "cache": config.describe(),
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


def _agreement() -> Table:
    """Each implementation against float64 on the host, on fresh random data."""
    rows = []
    generator = np.random.default_rng()
    for codec in ("float32", "bfloat16", "int8"):
        codec_value = jaxkv.codecs.CODECS[codec]
        config = jaxkv.KVCacheConfig(2, 3000, 8, 128, batch_size=2, codec=codec_value)
        keys, values = generator.standard_normal((2, 2, 2500, 8, 128), np.float32)
        queries = generator.standard_normal((2, 1, 32, 128), np.float32)
        cache = jaxkv.append(jaxkv.create(config), keys, values, layer=1)
        cache = jaxkv.advance(cache, jnp.asarray([2499, 1200]))
        stored = [np.asarray(part, np.float64) for part in jaxkv.layer(cache, 1)]
        expected = _attention_on_host(queries, *stored, (2500, 1201))
        for name, implementation in IMPLEMENTATIONS.items():
            if reason := implementation.cannot_serve(cache, 1):
                rows.append({"implementation": name, "codec": codec, "relative error": reason})
                continue
            attend = jax.jit(lambda c, q, n=name: jaxkv.attend(c, q, layer=1, implementation=n))
            error = np.linalg.norm(attend(cache, queries) - expected) / np.linalg.norm(expected)
            rows.append({"implementation": name, "codec": codec, "relative error": error})
    return Table("Agreement: decode attention against float64", rows)


def _attention_on_host(queries, keys, values, lengths) -> np.ndarray:
    outputs = np.empty(queries.shape)
    for row, length in enumerate(lengths):
        for head in range(queries.shape[2]):
            key, value = (part[row, :length, head // 4] for part in (keys, values))
            scores = key @ queries[row, 0, head] * queries.shape[-1] ** -0.5
            weights = np.exp(scores - scores.max())
            outputs[row, 0, head] = weights @ value / weights.sum()
    return outputs


def _copy_and_attention(quick: bool) -> Table:
    """Decode attention over the layers of a cache, beside a copy of the cache in the same run."""
    rows = []
    for batch, context in ((1, 4096), (8, 4096)) if quick else ((1, 4096), (1, 32768), (8, 16384)):
        for codec in ("bfloat16", "int8"):
            codec_value = jaxkv.codecs.CODECS[codec]
            layers = max(2, min(32, (4 << 30) // (batch * context * 4096)))
            config = jaxkv.KVCacheConfig(
                layers, context, 8, 128, batch_size=batch, codec=codec_value
            )
            cache = filled(config, context - 1)
            queries = jax.random.normal(jax.random.key(0), (batch, 1, 32, 128), jnp.bfloat16)
            competitors = {"copy": lambda cache=cache: jax.tree.map(_copy, cache.storage)}
            for name in ("reference", "blockwise"):
                competitors[name] = lambda n=name, c=cache, q=queries: _all_layers(c, q, n)
            times = interleaved(competitors, repeats=7)
            for name, timing in times.items():
                moved = config.size_bytes * (2 if name == "copy" else 1)
                rows.append(
                    {
                        "cache": f"{batch} x {context}, {layers} layers, {codec}",
                        "what": name,
                        "us a layer": timing.seconds / layers * 1e6,
                        "GB/s": moved / timing.seconds / 1e9,
                    }
                )
    return Table("Decode attention: all layers, bytes of the cache over time", rows)


_copy = jax.jit(lambda leaf: leaf.at[0, 0, 0].set(leaf[1, 0, 0]))


def _layers(cache, queries, implementation):
    for layer in range(cache.config.num_layers):
        output = jaxkv.attend(cache, queries, layer=layer, implementation=implementation)
        queries = (queries + output).astype(queries.dtype)
    return queries


_all_layers = jax.jit(_layers, static_argnums=2)


def _generate() -> Table:
    model, tokenizer = load()
    prompt = tokenizer.encode("class Stack:\n    def push(self, item):\n").ids
    small = jaxkv.generate(model, [prompt] * 4, max_new_tokens=256)
    shape = {"vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336}
    large = Decoder(
        DecoderConfig(**shape, num_layers=8, num_heads=32, num_kv_heads=8, head_dim=128),
        rngs=nnx.Rngs(0),
        dtype=jnp.bfloat16,
    )
    eight = jaxkv.generate(large, [list(range(1, 1000))], max_new_tokens=128)
    rows = [
        {
            "model": name,
            "decode tokens/s": result.timings.decode_tokens_per_second,
            "prefill tokens/s": result.timings.prefill_tokens_per_second,
            "compile s": result.timings.compile_seconds,
        }
        for name, result in (("embedded, 4 prompts", small), ("8 layers of Llama-3-8B", eight))
    ]
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(large)))
    note = (
        f"{TOKENS_PER_DISPATCH} tokens a dispatch; the 8 layers hold {format_bytes(weights)} of "
        f"weights. The embedded model went on: {tokenizer.decode(small.tokens[0])[:60]!r}"
    )
    return Table("Generate", rows, [note])
