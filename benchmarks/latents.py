"""Attention over latents (DeepSeek's MLA), beside the keys and values that they stand for.

A latent is read once and used by every head, so a processor's products end the growth, not its
memory: both limits are measured beside it.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks.attention import chosen
from benchmarks.caches import filled
from benchmarks.measure import ReadLimit, interleaved
from benchmarks.report import Row, Table, target

_LAYERS, _CONTEXT = 4, 8192
_RANK, _ROPE, _PLAIN, _VALUE = 512, 64, 128, 128  # numbers, in DeepSeek V2, V2-Lite and V3
_CALLS = 4
_PRODUCTS = "a matrix product"
_SHARE_OF_LIMIT = 0.6


def run(quick: bool) -> Iterator[Table]:
    """One table per number of heads."""
    limit = ReadLimit()
    for heads, whose in ((16, "V2-Lite"), (128, "V3")):
        yield _table(heads, f"{heads} heads, as DeepSeek {whose}", limit, 3 if quick else 9)


def _table(heads: int, title: str, limit: ReadLimit, repeats: int) -> Table:
    shape = {"num_layers": _LAYERS, "max_context_length": _CONTEXT}
    latents = shape | {"num_kv_heads": 1, "head_dim": _RANK + _ROPE, "value_dim": _RANK}
    whole = shape | {"num_kv_heads": heads, "head_dim": _PLAIN + _ROPE, "value_dim": _VALUE}
    steps = {
        f"latents, {codec}": _Step(
            jaxkv.KVCacheConfig(**latents, values_in_keys=True, codec=jaxkv.codecs.CODECS[codec]),
            heads,
        )
        for codec in ("float32", "bfloat16", "int8")
    }
    if heads <= 16:  # with 128 it would take 2.7 GB
        codec = jaxkv.Dense("float32")
        steps["keys and values, float32"] = _Step(jaxkv.KVCacheConfig(**whole, codec=codec), heads)
    products = _Products()
    competitors: dict[str, Callable] = {ReadLimit.NAME: limit, _PRODUCTS: products, **steps}
    seconds = {
        name: timing.seconds
        for name, timing in interleaved(
            competitors, repeats=repeats, calls=_CALLS, lead_in=_CALLS
        ).items()
    }
    read = ReadLimit.size_bytes / seconds[ReadLimit.NAME]
    flops = products.flops / seconds[_PRODUCTS]
    rows: list[Row] = []
    for name, step in steps.items():
        least = max(step.config.size_bytes / read, step.flops / flops)
        rows.append(
            {
                "cache": name,
                "read by": step.implementation,
                "MB": step.config.size_bytes / 1e6,
                "ms": seconds[name] * 1e3,
                "GB/s": step.config.size_bytes / seconds[name] / 1e9,
                "% of reading": 100 * step.config.size_bytes / read / seconds[name],
                "% of products": 100 * step.flops / flops / seconds[name],
                "% of both": 100 * least / seconds[name],
            }
        )
    notes = [
        f"{_LAYERS} layers, {_CONTEXT:,} tokens, one query of all heads. Limits, of this run: a "
        f"sum reads {read / 1e9:.1f} GB/s, {_PRODUCTS} in float32 does {flops / 1e9:.0f} GFLOP/s.",
        target("share of the limit, float32", rows[0]["% of both"] / 100, _SHARE_OF_LIMIT),
    ]
    if len(rows) > 3:
        notes.append(f"Latents over keys and values: {rows[3]['ms'] / rows[0]['ms']:.1f}x.")
    return Table(f"Attention over latents: {title}", rows, notes)


class _Step:
    """One query of all heads through all layers."""

    def __init__(self, config: jaxkv.KVCacheConfig, heads: int):
        self.config = config
        self.cache = filled(config, _CONTEXT)
        self.implementation = chosen(self.cache)
        dtype = config.codec.dtype or "float32"
        shape = (1, heads, config.head_dim)
        queries = np.random.default_rng(0).standard_normal(shape, np.float32)
        self.queries = jnp.asarray(queries, dtype)
        self.flops = 2 * _LAYERS * _CONTEXT * heads * (config.head_dim + config.pair.value_dim)
        self.attend = jax.jit(_all_layers)

    def __call__(self) -> jax.Array:
        return self.attend(self.cache, self.queries)


def _all_layers(cache: jaxkv.KVCache, queries: jax.Array) -> jax.Array:
    total = jnp.zeros((), queries.dtype)
    for layer in range(cache.config.num_layers):  # each waits for the one before
        total = jaxkv.attend(cache, queries + total * 0, layer=layer).mean(dtype=queries.dtype)
    return total


class _Products:
    """Of matrices that the processor's caches hold, and large enough for its best rate."""

    flops = 2 * 1024**3

    def __init__(self):
        self.matrix = jnp.ones((1024, 1024), jnp.float32)
        self.multiply = jax.jit(jnp.matmul)

    def __call__(self) -> jax.Array:
        return self.multiply(self.matrix, self.matrix)
