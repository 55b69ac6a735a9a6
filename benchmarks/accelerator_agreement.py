"""Attention on an accelerator: right against float64, whatever lies in unused slots."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks.report import Row, Table
from jaxkv.attention import IMPLEMENTATIONS

_KV_HEADS, _HEADS = 8, 32  # of Llama-3-8B
_LENGTHS, _CHUNK = (2500, 1201), 500
_PAGES = jaxkv.Paged(page_size=16, num_pages=500)
_RING = jaxkv.Ring(window=1024, sinks=4, chunk=_CHUNK)
_SINKS = np.linspace(-2, 4, _HEADS, dtype=np.float32)
_CASES: tuple[tuple[str, Any, dict[str, Any]], ...] = (
    ("float32", jaxkv.Contiguous(), {}),
    ("bfloat16", jaxkv.Contiguous(), {}),
    ("bfloat16", jaxkv.Contiguous(), {"window": 700, "softcap": 4.0}),
    ("bfloat16", _PAGES, {}),
    ("bfloat16", _RING, {"sink_logits": _SINKS}),
    ("bfloat16", _RING, {"window": 700}),
    ("int8", jaxkv.Contiguous(), {}),
    ("int8", _PAGES, {"window": 700}),
    ("int8", _RING, {}),
    ("rotated4", jaxkv.Contiguous(), {}),
    ("rotated4", _PAGES, {"window": 700, "softcap": 4.0}),
    ("rotated4", _RING, {}),
    ("rotated2", jaxkv.Contiguous(), {}),
    ("rotated4-centred", jaxkv.Contiguous(), {}),
    ("int8-centred", _PAGES, {"window": 700}),
    ("float16", jaxkv.Contiguous(), {}),
    ("bfloat16", _PAGES, {"softcap": 4.0, "head_dim": 256}),
    ("rotated4", jaxkv.Contiguous(), {"head_dim": 256}),
    ("int8", jaxkv.Contiguous(), {"kv_heads": 1}),
    ("int8", _PAGES, {"kv_heads": 4}),
    ("int8-centred", jaxkv.Contiguous(), {"kv_heads": 3, "head_dim": 64}),
    ("rotated4", jaxkv.Contiguous(), {"kv_heads": 2}),
)
_TOKENS = (1, 6, 300)  # decode, a few, a chunk


def agreement() -> Table:
    """Each implementation against float64 on the host, on fresh random data in a dirty cache."""
    cases = [_Case(tokens, *case) for tokens in _TOKENS for case in _CASES]
    with ThreadPoolExecutor() as pool:  # compiling takes longer than all else
        asked = list(pool.map(_ask, cases))
        calls = [(data, name) for data in asked for name in _implementations(data)]
        programs = list(pool.map(lambda call: _compiled(*call), calls))
        expected = {id(data): pool.submit(_on_host, data) for data in asked}
    rows: list[Row] = []
    # One after the other: a program that calls cuDNN cannot be loaded while another thread works.
    for (data, name), program in zip(calls, programs, strict=True):
        case, right = data.case, expected[id(data)].result()
        error = program(data.cache, data.queries)[:, _some(case.tokens)] - right
        rows.append(
            {
                "tokens": case.tokens,
                "codec": case.codec,
                "addressing": case.addressing.name,
                "options": ", ".join(case.options) or "none",
                "implementation": name,
                "relative error": float(np.linalg.norm(error) / np.linalg.norm(right)),
            }
        )
    return Table("Agreement: attention against float64", rows)


class _Case(NamedTuple):
    tokens: int
    codec: str
    addressing: Any
    options: dict[str, Any]

    @property
    def head_dim(self) -> int:
        return self.options.get("head_dim", 128)

    @property
    def kv_heads(self) -> int:
        return self.options.get("kv_heads", _KV_HEADS)

    @property
    def heads(self) -> int:
        return _HEADS // _KV_HEADS * self.kv_heads

    @property
    def of_attend(self) -> dict[str, Any]:
        of_shape = ("head_dim", "kv_heads")
        return {name: value for name, value in self.options.items() if name not in of_shape}


class _Asked(NamedTuple):
    case: _Case
    cache: jaxkv.KVCache
    queries: np.ndarray


def _ask(case: _Case) -> _Asked:
    generator = np.random.default_rng()
    cache = _dirty_cache(case, generator)
    shape = (2, case.tokens, case.heads, case.head_dim)
    return _Asked(case, cache, generator.standard_normal(shape, np.float32))


def _implementations(data: _Asked) -> list[str]:
    """Kernels that can serve; and XLA's forms, which take long to compile, of plain caches."""
    of_xla = ("reference", "blockwise") if data.case.codec == "float32" else ()
    served = [
        name
        for name, implementation in IMPLEMENTATIONS.items()
        if not implementation.cannot_serve(data.cache, data.case.tokens)
        and (implementation.caps or "softcap" not in data.case.options)
        and (name in of_xla or name not in ("reference", "blockwise"))
    ]
    return served or ["blockwise"]


def _compiled(data: _Asked, name: str) -> Callable[..., jax.Array]:
    run = functools.partial(jaxkv.attend, layer=1, implementation=name, **data.case.of_attend)
    return jax.jit(run).lower(data.cache, data.queries).compile()


def _dirty_cache(case: _Case, generator: np.random.Generator) -> jaxkv.KVCache:
    """Two ragged sequences, their last tokens appended, with NaN wherever nothing was written."""
    config = jaxkv.KVCacheConfig(
        2, 3000, case.kv_heads, case.head_dim, batch_size=2, codec=jaxkv.codecs.CODECS[case.codec],
        addressing=case.addressing,
    )  # fmt: skip
    cache = shuffled(jaxkv.create(config), generator)
    dirty = {
        name: jnp.full_like(leaf, 127 if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.nan)
        for name, leaf in cache.storage.items()
    }
    cache, append = dataclasses.replace(cache, storage=dirty), jax.jit(_append)
    for start in range(0, max(_LENGTHS), _CHUNK):  # a ring takes no more at once
        keys, values = generator.standard_normal(
            (2, 2, _CHUNK, case.kv_heads, case.head_dim), np.float32
        )
        cache = append(cache, keys, values, jnp.clip(jnp.asarray(_LENGTHS) - start, 0, _CHUNK))
    return cache.with_lengths(jnp.asarray(_LENGTHS) - case.tokens)


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


def _on_host(data: _Asked) -> np.ndarray:
    cache, queries = data.cache, data.queries
    heads, kv_heads = data.case.heads, data.case.kv_heads
    window, softcap, sink_logits = (
        data.case.options.get(key) for key in ("window", "softcap", "sink_logits")
    )
    keys, values = (np.asarray(part, np.float64) for part in jaxkv.layer(cache, 1))
    lengths, index = jnp.asarray(_LENGTHS), cache.index
    held = np.asarray(index.key_positions(1, lengths, 0, index.extent))
    held = np.broadcast_to(held.reshape(2, -1, index.extent), (2, kv_heads, index.extent))
    tokens, group = queries.shape[1], heads // kv_heads
    outputs = np.empty((2, len(_some(tokens)), heads, data.case.head_dim))
    for row, (place, token), head in itertools.product(
        range(2), enumerate(_some(tokens)), range(kv_heads)
    ):
        length, own = _LENGTHS[row] - tokens + token + 1, slice(head * group, (head + 1) * group)
        positions = held[row, head]
        seen = (positions >= 0) & (positions < length)
        if window is not None:
            seen &= positions >= length - window
        if index.window is not None:
            seen &= (positions >= length - index.window) | (positions < index.sinks)
        key, value = (part[row, seen, head] for part in (keys, values))
        scores = queries[row, token, own] @ key.T * data.case.head_dim**-0.5
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        highest = scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores - highest)
        beside = 0 if sink_logits is None else np.exp(np.float64(sink_logits[own, None]) - highest)
        outputs[row, place, own] = weights @ value / (weights.sum(-1, keepdims=True) + beside)
    return outputs


def _some(tokens: int) -> list[int]:
    """Those that are looked at."""
    return sorted({0, tokens // 2, tokens - 1})
