"""Decode attention on an accelerator: right against float64, whatever lies in unused slots."""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks.report import Row, Table
from jaxkv.attention import IMPLEMENTATIONS

_KV_HEADS, _HEADS, _HEAD_DIM = 8, 32, 128  # of Llama-3-8B
_LENGTHS, _CHUNK = (2500, 1201), 500
_PAGES = jaxkv.Paged(page_size=16, num_pages=500)
_RING = jaxkv.Ring(window=1024, sinks=4, chunk=_CHUNK)
_SINKS = np.linspace(-2, 4, _HEADS, dtype=np.float32)
_CASES: tuple[tuple[str, Any, dict[str, Any]], ...] = (
    ("float32", jaxkv.Contiguous(), {}),
    ("bfloat16", jaxkv.Contiguous(), {}),
    ("bfloat16", jaxkv.Contiguous(), {"window": 700, "softcap": 4.0}),
    ("bfloat16", _PAGES, {}),
    ("bfloat16", _RING, {"sinks": _SINKS}),
    ("bfloat16", _RING, {"window": 700}),
    ("int8", jaxkv.Contiguous(), {}),
    ("int8", _PAGES, {"window": 700}),
    ("int8", _RING, {}),
    ("rotated4", jaxkv.Contiguous(), {}),
    ("rotated4", _PAGES, {"window": 700, "softcap": 4.0}),
    ("rotated4", _RING, {}),
    ("rotated2", jaxkv.Contiguous(), {}),
    ("rotated4-centred", jaxkv.Contiguous(), {}),
)


def agreement() -> Table:
    """Each implementation against float64 on the host, on fresh random data in a dirty cache."""
    with ThreadPoolExecutor() as pool:  # compiling takes longer than all else
        tables = pool.map(lambda case: _agreement_of(*case), _CASES)
        rows = [row for table in tables for row in table]
    return Table("Agreement: decode attention against float64", rows)


def _agreement_of(codec: str, addressing: Any, options: dict[str, Any]) -> list[Row]:
    generator = np.random.default_rng()
    cache = _dirty_cache(codec, addressing, generator)
    queries = generator.standard_normal((2, 1, _HEADS, _HEAD_DIM), np.float32)
    expected = _on_host(cache, queries, **options)
    rows: list[Row] = []
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
    return rows


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
    cache, append = dataclasses.replace(cache, storage=dirty), jax.jit(_append)
    for start in range(0, max(_LENGTHS), _CHUNK):  # a ring takes no more at once
        keys, values = generator.standard_normal((2, 2, _CHUNK, _KV_HEADS, _HEAD_DIM), np.float32)
        cache = append(cache, keys, values, jnp.clip(jnp.asarray(_LENGTHS) - start, 0, _CHUNK))
    return cache.with_lengths(jnp.asarray(_LENGTHS) - 1)


def _append(cache: jaxkv.KVCache, keys: Any, values: Any, num_tokens: Any) -> jaxkv.KVCache:
    cache = jaxkv.append(cache, keys, values, layer=1, num_tokens=num_tokens)
    return jaxkv.advance(cache, num_tokens)


def shuffled(cache: jaxkv.KVCache, generator: np.random.Generator) -> jaxkv.KVCache:
    """With every page of a shared pool somewhere, if there are pages."""
    table = getattr(cache.index, "table", None)
    if table is None:
        return cache
    pages = generator.permutation(cache.config.num_slots // cache.index.page_size)[: table.size]
    table = jnp.asarray(pages.reshape(table.shape), jnp.int32)
    return dataclasses.replace(cache, index=cache.index.with_table(table))


def _on_host(cache, queries, window=None, softcap=None, sinks=None) -> np.ndarray:
    keys, values = (np.asarray(part, np.float64) for part in jaxkv.layer(cache, 1))
    lengths, index = jnp.asarray(_LENGTHS), cache.index
    held = np.asarray(index.key_positions(1, lengths, 0, index.extent))
    held = np.broadcast_to(held.reshape(2, -1, index.extent), (2, _KV_HEADS, index.extent))
    outputs = np.empty(queries.shape)
    for row, head in np.ndindex(2, _HEADS):
        group, length = head * _KV_HEADS // _HEADS, _LENGTHS[row]
        positions = held[row, group]
        seen = (positions >= 0) & (positions < length)
        if window is not None:
            seen &= positions >= length - window
        if index.window is not None:
            seen &= (positions >= length - index.window) | (positions < index.sinks)
        key, value = (part[row, seen, group] for part in (keys, values))
        scores = key @ queries[row, 0, head] * _HEAD_DIM**-0.5
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        beside = 0 if sinks is None else np.exp(float(sinks[head]) - scores.max())
        outputs[row, 0, head] = weights @ value / (weights.sum() + beside)
    return outputs
