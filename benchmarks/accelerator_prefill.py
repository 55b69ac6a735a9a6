"""Prefill attention on an accelerator: many tokens at the end of a context, beside torch."""

import functools
import importlib.util
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks.accelerator_attention import timed
from benchmarks.caches import compile_fill, filled
from benchmarks.report import Row, Table, target
from jaxkv.attention import IMPLEMENTATIONS

_LAYERS, _KV_HEADS, _HEADS, _HEAD_DIM = 2, 8, 32, 128  # of Llama-3-8B
_KINDS = ("bfloat16", "bfloat16, pages of 64", "int8", "rotated4")
SIZES = ((512, 8192), (2048, 2048), (2048, 32768), (8192, 8192), (32768, 32768))
_LONG = 32768  # from this context on torch's time is the mark, below twice that


def prefill() -> Table:
    """A layer's attention of the last tokens, in the form that `attend` picks."""
    programs: list[Callable[[], Any]] = []
    fills: set[Any] = set()
    started = time.perf_counter()
    for (tokens, context), kind in ((size, kind) for size in SIZES for kind in _KINDS):
        config = _config(context, kind)
        cache = jax.eval_shape(functools.partial(jaxkv.create, config))
        queries = jax.ShapeDtypeStruct((1, tokens, _HEADS, _HEAD_DIM), jnp.bfloat16)
        fills.add((config, context))
        programs.append(_layers.lower(cache, queries).compile)
        programs.append(_error.lower(cache, queries, queries).compile)
    programs += [functools.partial(compile_fill, *fill) for fill in fills]
    with ThreadPoolExecutor() as pool:  # compiling takes longer than running
        list(pool.map(lambda program: program(), programs))
    rows: list[Row] = []
    notes = [f"Compiling {len(programs)} programs took {time.perf_counter() - started:.0f} s."]
    for tokens, context in SIZES:
        rows += (found := _of_size(tokens, context))
        notes += _targets(tokens, context, {row["what"]: row["ms a layer"] for row in found})
    return Table("Prefill attention, tokens x context, bfloat16 queries", rows, notes)


def _of_size(tokens: int, context: int) -> list[Row]:
    queries = jax.random.normal(jax.random.key(1), (1, tokens, _HEADS, _HEAD_DIM), jnp.bfloat16)
    caches = {kind: filled(_config(context, kind), context) for kind in _KINDS}
    caches = {kind: cache.with_lengths(cache.lengths - tokens) for kind, cache in caches.items()}
    calls: dict[str, Callable[[], Any]] = {
        kind: functools.partial(_layers, cache, queries) for kind, cache in caches.items()
    }
    # Operations that a causal mask asks for: two products of two a number.
    pairs = tokens * context - tokens * (tokens - 1) / 2
    rows: list[Row] = []
    # All in turns, since a GPU that was busy before is slower.
    for what, taken in timed(calls | _peers(caches["bfloat16"], queries)).items():
        row = {
            "tokens x context": f"{tokens:,} x {context:,}",
            "what": what,
            "ms a layer": taken / _LAYERS * 1e3,
            "TFLOP/s": 4 * _HEADS * _HEAD_DIM * pairs * _LAYERS / taken / 1e12,
        }
        cache = caches.get(what)
        output = None if cache is None else calls[what]()[-1]
        row["error"] = None if cache is None else float(_error(cache, queries, output))
        rows.append(row)
        print(" ", *row.values(), file=sys.stderr, flush=True)
    return rows


def _config(context: int, kind: str) -> jaxkv.KVCacheConfig:
    codec, _, pages = kind.partition(", ")
    addressing = jaxkv.Paged(64, context // 64) if pages else jaxkv.Contiguous()
    return jaxkv.KVCacheConfig(
        _LAYERS, context, _KV_HEADS, _HEAD_DIM,
        batch_size=1, codec=jaxkv.codecs.CODECS[codec], addressing=addressing,
    )  # fmt: skip


@jax.jit
def _layers(cache: jaxkv.KVCache, queries: jax.Array) -> list[jax.Array]:
    return [jaxkv.attend(cache, queries, layer=layer) for layer in range(_LAYERS)]


def _peers(cache: jaxkv.KVCache, queries: jax.Array) -> dict[str, Callable[[], Any]]:
    (leaf,) = cache.storage.values()
    layers = leaf.reshape(_LAYERS, 2, 1, -1, _KV_HEADS, _HEAD_DIM)
    tokens, context = queries.shape[1], layers.shape[3]
    peers: dict[str, Callable[[], Any]] = {}
    if tokens == context and not IMPLEMENTATIONS["cudnn"].cannot_serve(cache, tokens):
        attention = functools.partial(
            jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
        )
        of_jax = jax.jit(lambda queries, layers: [attention(queries, *layer) for layer in layers])
        apart = [tuple(layer) for layer in layers]
        peers["jax.nn, cudnn"] = functools.partial(of_jax, queries, apart)
    if importlib.util.find_spec("torch") and jax.default_backend() == "gpu":
        peers["torch SDPA"] = _of_torch(layers, queries)
    return peers


def _of_torch(layers: jax.Array, queries: jax.Array) -> Callable[[], Any]:
    import torch
    from torch.nn.attention.bias import causal_lower_right
    from torch.nn.functional import scaled_dot_product_attention

    held = torch.from_dlpack(layers).transpose(3, 4)
    asked = torch.from_dlpack(queries).transpose(1, 2)
    mask = causal_lower_right(asked.shape[2], held.shape[4])

    def run():
        with torch.no_grad():
            for keys, values in held:
                result = scaled_dot_product_attention(
                    asked, keys, values, attn_mask=mask, enable_gqa=True
                )
        return result

    return run


@jax.jit
def _error(cache: jaxkv.KVCache, queries: jax.Array, output: jax.Array) -> jax.Array:
    """Of the last layer's output, relative, for some of the tokens: against float32."""
    tokens = queries.shape[1]
    rows = np.unique(np.linspace(0, tokens - 1, 5).astype(np.int32))
    keys, values = (side[0].astype(jnp.float32) for side in jaxkv.layer(cache, _LAYERS - 1))
    grouped = queries[0, rows].astype(jnp.float32).reshape(len(rows), _KV_HEADS, -1, _HEAD_DIM)
    scores = jnp.einsum("tkgd,skd->tkgs", grouped, keys, precision="highest") * _HEAD_DIM**-0.5
    seen = jnp.arange(len(keys)) <= (cache.lengths[0] + rows)[:, None, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    expected = jnp.einsum("tkgs,skd->tkgd", weights, values, precision="highest")
    error = jnp.linalg.norm(output[0, rows].astype(jnp.float32).reshape(expected.shape) - expected)
    return error / jnp.linalg.norm(expected)


def _targets(tokens: int, context: int, times: dict[str, float]) -> list[str]:
    size, own = f"{tokens:,} x {context:,}", times["bfloat16"]
    notes = []
    if "torch SDPA" in times:
        goal = 1.1 if (tokens, context) == (8192, 8192) or context >= _LONG else 2.0
        what = f"{size}, of torch's time"
        notes.append(target(what, own / times["torch SDPA"], goal, at_most=True))
    for kind in _KINDS[1:]:
        what = f"{size}, {kind}, of bfloat16's time"
        notes.append(target(what, times[kind] / own, 1.3, at_most=True))
    return notes
