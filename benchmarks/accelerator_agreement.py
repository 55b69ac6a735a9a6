"""Decode attention on an accelerator: right against float64, whatever lies in unused slots."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks.report import Table
from jaxkv.attention import IMPLEMENTATIONS

_KV_HEADS, _HEADS, _HEAD_DIM = 8, 32, 128  # of Llama-3-8B


def agreement() -> Table:
    """Each implementation against float64 on the host, on fresh random data in a dirty cache."""
    rows, pages = [], jaxkv.Paged(page_size=16, num_pages=500)
    for codec, addressing, options in (
        ("float32", jaxkv.Contiguous(), {}),
        ("bfloat16", jaxkv.Contiguous(), {}),
        ("bfloat16", jaxkv.Contiguous(), {"window": 700, "softcap": 4.0}),
        ("bfloat16", pages, {}),
        ("int8", jaxkv.Contiguous(), {}),
        ("int8", pages, {"window": 700}),
        ("rotated4", jaxkv.Contiguous(), {}),
        ("rotated4", pages, {"window": 700, "softcap": 4.0}),
        ("rotated2", jaxkv.Contiguous(), {}),
        ("rotated4-centred", jaxkv.Contiguous(), {}),
    ):
        generator = np.random.default_rng()
        cache, lengths = _dirty_cache(codec, addressing, generator), (2500, 1201)
        queries = generator.standard_normal((2, 1, _HEADS, _HEAD_DIM), np.float32)
        stored = [np.asarray(part, np.float64) for part in jaxkv.layer(cache, 1)]
        expected = _on_host(queries, *stored, lengths, **options)
        for name, implementation in IMPLEMENTATIONS.items():
            if implementation.cannot_serve(cache, 1):
                continue
            run = functools.partial(jaxkv.attend, layer=1, implementation=name, **options)
            error = np.linalg.norm(jax.jit(run)(cache, queries) - expected)
            rows.append(
                {
                    "codec": codec,
                    "addressing": addressing.name,
                    "options": ", ".join(options) or "none",
                    "implementation": name,
                    "relative error": error / np.linalg.norm(expected),
                }
            )
    return Table("Agreement: decode attention against float64", rows)


def _dirty_cache(codec: str, addressing: Any, generator: np.random.Generator) -> jaxkv.KVCache:
    """Two ragged sequences, their last tokens appended, with NaN wherever nothing was written."""
    config = jaxkv.KVCacheConfig(
        2, 3000, _KV_HEADS, _HEAD_DIM, batch_size=2, codec=jaxkv.codecs.CODECS[codec],
        addressing=addressing,
    )  # fmt: skip
    cache = shuffled(jaxkv.create(config), generator)
    dirty = {
        name: jnp.full_like(leaf, 127 if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.nan)
        for name, leaf in cache.storage.items()
    }
    shape = (2, 2, 2500, _KV_HEADS, _HEAD_DIM)
    keys, values = generator.standard_normal(shape, np.float32)
    cache = dataclasses.replace(cache, storage=dirty)
    cache = jaxkv.append(cache, keys, values, layer=1, num_tokens=jnp.asarray([2500, 1201]))
    return jaxkv.advance(cache, jnp.asarray([2499, 1200]))


def shuffled(cache: jaxkv.KVCache, generator: np.random.Generator) -> jaxkv.KVCache:
    """With every page of a shared pool somewhere, if there are pages."""
    table = getattr(cache.index, "table", None)
    if table is None:
        return cache
    pages = generator.permutation(cache.config.num_slots // cache.index.page_size)[: table.size]
    table = jnp.asarray(pages.reshape(table.shape), jnp.int32)
    return dataclasses.replace(cache, index=cache.index.with_table(table))


def _on_host(queries, keys, values, lengths, window=None, softcap=None) -> np.ndarray:
    outputs = np.empty(queries.shape)
    for row, length in enumerate(lengths):
        first = 0 if window is None else length - window
        for head in range(_HEADS):
            group = head * _KV_HEADS // _HEADS
            key, value = (part[row, first:length, group] for part in (keys, values))
            scores = key @ queries[row, 0, head] * _HEAD_DIM**-0.5
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            outputs[row, 0, head] = weights @ value / weights.sum()
    return outputs
