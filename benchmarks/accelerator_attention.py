"""Decode attention on an accelerator: how near to the memory's rate."""

import functools
import importlib
import importlib.util
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks.accelerator_agreement import shuffled
from benchmarks.caches import compile_fill, filled
from benchmarks.report import Row, Table, target
from jaxkv.attention import IMPLEMENTATIONS

_KV_HEADS, _HEADS, _HEAD_DIM = 8, 32, 128  # of Llama-3-8B
# The layers that are gone through: many times what a GPU's L2 holds.
_CACHE_BYTES, _MOST_LAYERS = 4 << 30, 16
_SAMPLE_SECONDS, _SAMPLES = 0.02, 5
_RING_CHUNK = 128
CONTEXTS = ((8, 16384), (8, 32768))
MORE_CONTEXTS = ((1, 4096), (1, 32768), (8, 4096), (64, 4096))
_KINDS = ("bfloat16", "bfloat16, pages of 64", "bfloat16, ring", "int8", "rotated4")
_WITH_EVERY_FORM = ((8, 16384),)  # XLA's own forms take long to run, flex attention to compile


def sweep(batch: int, context: int) -> Table:
    """Time a layer over the layers of a large cache, beside a copy and a sum of it, and torch."""
    rates, rows = {}, []
    for kind in _KINDS:
        cache, queries = _long_cache(batch, context, kind)
        layers, held = cache.config.num_layers, cache.config.size_bytes
        competitors = _competitors(cache, queries, kind, (batch, context) in _WITH_EVERY_FORM)
        for name, seconds in timed(competitors).items():
            moved = 2 * held if name.startswith("copy") else held
            rates[f"{kind}: {name}"] = batch * context * layers / seconds
            row = {
                "cache": f"{layers} layers, {kind}",
                "what": name,
                "us a layer": seconds / layers * 1e6,
                "GB/s": moved / seconds / 1e9,
            }
            rows.append(row)
            print(f"  {batch} x {context}:", *row.values(), file=sys.stderr, flush=True)
        del cache, queries, competitors
    title = f"Decode attention, {batch} x {context}: all layers, bytes of the cache over time"
    return Table(title, rows, _targets(rates, batch, context))


def large_heads() -> Table:
    """Gemma 2's: 16 query heads over 8 KV heads of 256, with a softcap, 8 x 16,384."""
    batch, context, layers = 8, 16384, 4
    runs = jaxkv.KVCacheConfig(layers, context, 8, 256, batch_size=batch)
    pages = runs.replace(addressing=jaxkv.Paged(64, batch * context // 64))
    queries = jax.random.normal(jax.random.key(0), (batch, 1, 16, 256), jnp.bfloat16)
    rows: list[Row] = []
    for kind, config in (("contiguous", runs), ("pages of 64", pages)):
        cache = filled(runs, context - 1)
        index = config.addressing.init(context, batch).with_lengths(cache.lengths)
        cache = shuffled(jaxkv.KVCache(cache.storage, index, config), np.random.default_rng(0))
        names = [
            n for n in ("mosaic", "reference") if not IMPLEMENTATIONS[n].cannot_serve(cache, 1)
        ]
        calls: dict[str, Callable[[], Any]] = {
            name: functools.partial(_all_layers, cache, queries, name, 50.0) for name in names
        }
        if config is runs:
            (leaf,) = cache.storage.values()
            calls["copy"] = lambda leaf=leaf: _copy(leaf)
        for name, seconds in timed(calls).items():
            moved = config.size_bytes * (2 if name == "copy" else 1)
            row = {"cache": kind, "what": name, "us a layer": seconds / layers * 1e6}
            rows.append(row | {"GB/s": moved / seconds / 1e9})
            print(" ", *rows[-1].values(), file=sys.stderr, flush=True)
        del cache, calls
    rates = {(row["cache"], row["what"]): row["GB/s"] for row in rows}
    copied = rates["contiguous", "copy"]
    notes = [
        target(f"{kind}: bytes a second, of a copy's", rates[kind, "mosaic"] / copied, 0.8)
        for kind in ("contiguous", "pages of 64")
        if (kind, "mosaic") in rates
    ]
    return Table("Decode attention, heads of 256, softcap", rows, notes)


def compile_ahead(contexts: Sequence[tuple[int, int]]) -> Table:
    """All programs of all sweeps at once, on all cores: compiling takes longer than running."""
    programs: list[Callable[[], Any]] = []
    fills: set[Any] = set()
    for (batch, context), kind in itertools.product(contexts, _KINDS):
        config, runs = _configs(batch, context, kind)
        cache = jax.eval_shape(functools.partial(jaxkv.create, config))
        queries = jax.ShapeDtypeStruct((batch, 1, _HEADS, _HEAD_DIM), jnp.bfloat16)
        fills.add((runs, context - 1))
        for name in _names(cache, kind, (batch, context) in _WITH_EVERY_FORM):
            programs.append(functools.partial(_compile, cache, queries, name))
    programs += [functools.partial(compile_fill, *fill) for fill in fills]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda program: program(), programs))
    return Table("Compiled", [{"programs": len(programs)}])


def _compile(cache: jaxkv.KVCache, queries: Any, implementation: str) -> None:
    try:
        _all_layers.lower(cache, queries, implementation).compile()
    except Exception as error:  # it is told again where the time is missing
        print(f"  {implementation}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)


def _configs(batch: int, context: int, kind: str) -> tuple[Any, Any]:
    """Of the cache, and of the one that is filled in its place: runs are faster to fill."""
    codec, _, addressing = kind.partition(", ")
    # As many layers of codes as of bfloat16, so that the same launches are counted.
    bytes_a_layer = 4 * batch * context * _KV_HEADS * _HEAD_DIM
    layers = max(2, min(_MOST_LAYERS, _CACHE_BYTES // bytes_a_layer))
    runs = jaxkv.KVCacheConfig(
        layers, context, _KV_HEADS, _HEAD_DIM,
        batch_size=batch, codec=jaxkv.codecs.CODECS[codec],
    )  # fmt: skip
    if addressing == "ring":  # of as many slots, and a few of them hidden
        ring = jaxkv.Ring(window=context - _RING_CHUNK + 1, chunk=_RING_CHUNK)
        return runs.replace(addressing=ring, max_context_length=4 * context), runs
    if addressing:
        return runs.replace(addressing=jaxkv.Paged(64, batch * context // 64)), runs
    return runs, runs


def _long_cache(batch: int, context: int, kind: str) -> tuple[jaxkv.KVCache, jax.Array]:
    config, runs = _configs(batch, context, kind)
    cache = filled(runs, context - 1)
    if config != runs:  # runs read as what they are not: pages in any order, a ring that has turned
        index = config.addressing.init(config.max_context_length, batch)
        turned = context // 2 if isinstance(config.addressing, jaxkv.Ring) else 0
        cache = jaxkv.KVCache(cache.storage, index.with_lengths(cache.lengths + turned), config)
        cache = shuffled(cache, np.random.default_rng(0))
    return cache, jax.random.normal(jax.random.key(0), (batch, 1, _HEADS, _HEAD_DIM), jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _all_layers(
    cache: jaxkv.KVCache, queries: jax.Array, implementation: str, softcap: float | None = None
) -> jax.Array:
    for layer in range(cache.config.num_layers):
        output = jaxkv.attend(
            cache, queries, layer=layer, implementation=implementation, softcap=softcap
        )
        queries = (queries + output).astype(queries.dtype)  # as in a model, one after the other
    return queries


_copy = jax.jit(lambda leaf: leaf.at[0, 0, 0].set(leaf[1, 0, 0]))
_sum = jax.jit(lambda leaf: jnp.sum(jax.lax.bitcast_convert_type(leaf, jnp.uint16)))


def _competitors(cache, queries, kind: str, every_form: bool) -> dict[str, Callable[[], Any]]:
    """Name -> one pass over all layers."""
    calls: dict[str, Callable[[], Any]] = {
        name: functools.partial(_all_layers, cache, queries, name)
        for name in _names(cache, kind, every_form)
    }
    if kind == "bfloat16":
        (leaf,) = cache.storage.values()
        calls |= {"copy": lambda: _copy(leaf), "read: XLA's sum": lambda: _sum(leaf)}
        if jax.default_backend() == "gpu" and importlib.util.find_spec("torch"):
            calls |= _of_torch(leaf, cache.config, every_form)
    return calls


def _names(cache: jaxkv.KVCache, kind: str, every_form: bool) -> list[str]:
    """Implementations that are timed."""
    names = [
        name for name in ("mosaic", "cudnn") if not IMPLEMENTATIONS[name].cannot_serve(cache, 1)
    ]
    names = names if every_form else names[:1]
    if every_form or not names:
        names += ["reference", "blockwise"] if kind == "bfloat16" else ["reference"]
    return names


def _of_torch(leaf, config, every_form: bool) -> dict[str, Callable[[], Any]]:
    """Attention of torch over the same memory: the fused one, and flex attention compiled."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    held = torch.from_dlpack(leaf)
    shape = (config.num_layers, 2, config.batch_size, -1, _KV_HEADS, _HEAD_DIM)
    layers = held.view(shape).transpose(3, 4)
    shape = (config.batch_size, _HEADS, 1, _HEAD_DIM)
    queries = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    copied = torch.empty_like(held)

    def over_layers(attention):
        with torch.no_grad():
            for keys, values in layers:
                result = attention(queries, keys, values, enable_gqa=True)
        return result

    calls = {
        "copy: torch": lambda: copied.copy_(held),
        "torch SDPA": lambda: over_layers(scaled_dot_product_attention),
    }
    if every_form:
        compiled = torch.compile(flex_attention, dynamic=False)
        calls["torch flex attention"] = lambda: over_layers(compiled)
    return calls


def timed(competitors: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of a pass, in turns; as many in a row as a sample of some length takes."""
    passes, samples = {}, {name: [] for name in competitors}
    for name, call in list(competitors.items()):
        try:
            _wait(call())
        except TimeoutError:
            raise
        except Exception as error:  # of a peer that cannot
            print(f"  {name} cannot: {type(error).__name__}: {str(error)[:300]}", flush=True)
            del competitors[name], samples[name]
            continue
        once = min(_seconds(call, 1) for _ in range(2))
        passes[name] = max(1, math.ceil(_SAMPLE_SECONDS / once))
    for _ in range(_SAMPLES):
        for name, call in competitors.items():
            samples[name].append(_seconds(call, passes[name]))
    return {name: statistics.median(times) for name, times in samples.items()}


def _seconds(call: Callable[[], Any], passes: int) -> float:
    started = time.perf_counter()
    for _ in range(passes):
        result = call()
    _wait(result)
    return (time.perf_counter() - started) / passes


def _wait(result: Any) -> None:
    of_jax = isinstance(result, jax.Array)
    result.block_until_ready() if of_jax else importlib.import_module("torch").cuda.synchronize()


def _targets(rates: dict[str, float], batch: int, context: int) -> list[str]:
    """What issue and note ask of this size, as shares of this run's own limits."""
    names = [f"{kind}: mosaic" for kind in _KINDS]
    if not set(names) <= set(rates):
        return []
    dense, paged, ring, codes, packed = (rates[name] for name in names)
    shares = f"pages of 64: {paged / dense:.3f} of dense, ring {ring / dense:.3f}; "
    shares += "tokens/s of bfloat16's: int8"
    notes = [f"{shares} {codes / dense:.2f}x, rotated4 {packed / dense:.2f}x"]
    if (batch, context) == (8, 16384):
        copied = 2 * rates["bfloat16: copy"]
        notes.append(target("bytes a second, of a copy", dense / copied, 0.9))
        notes.append(target("pages of 64, of dense", paged / dense, 0.95))
        for kind, goal in (("bfloat16", 2.0), ("bfloat16, pages of 64", 8.0)):
            by_cudnn, by_xla = rates.get(f"{kind}: cudnn"), rates.get(f"{kind}: reference")
            if by_cudnn and by_xla:
                notes.append(target(f"{kind}: cuDNN, of XLA's rate", by_cudnn / by_xla, goal))
    if (batch, context) == (8, 32768):
        notes.append(target("int8 tokens a second, of bfloat16", codes / dense, 1.6))
        notes.append(target("rotated4 tokens a second, of int8", packed / codes, 1))
    return notes
