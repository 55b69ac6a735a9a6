"""Attention alone: one query through all layers of a cache, each layer fed by the one before."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks.caches import filled, layer_vectors
from benchmarks.measure import ReadLimit, Timing, interleaved
from benchmarks.report import Row, Table, missing, target
from jaxkv.attention import IMPLEMENTATIONS

_AS_CALLED = "torch SDPA, as users call it"
_GROUPED = "torch SDPA, groups as queries"
# Of the picked implementation over torch's as users call it, by dtype.
_GOALS = {"float32": (1.3, 2.5), "bfloat16": (5.0, 10.0)}
_SHARE_OF_LIMIT = 0.6  # in float32
_MOST_TEMP_PERCENT = 0.1
_PAGE, _PAGED = 16, ", paged"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A cache larger than the processor's private caches, and the queries that read it."""

    layers: int
    context: int
    kv_heads: int
    group: int
    head_dim: int

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, {self.context:,} tokens, {self.kv_heads} KV heads of "
            f"{self.head_dim}, {self.group} queries each"
        )

    def config(self, dtype: str, **fields) -> jaxkv.KVCacheConfig:
        codec = jaxkv.Int8() if dtype == "int8" else jaxkv.Dense(dtype)
        return jaxkv.KVCacheConfig(
            self.layers, self.context, self.kv_heads, self.head_dim, codec=codec, **fields
        )


# Of a decode loop, in which threads are awake and the processor is at work already: as many calls
# again lead in to each sample, or it would be charged for what the competitor before it read.
_CALLS = 8
_SHAPES = (Shape(8, 4096, 8, 4, 64), Shape(12, 16384, 2, 4, 64))


def run(quick: bool) -> Iterator[Table]:
    """One table a shape and dtype."""
    repeats, limit = 5 if quick else 15, ReadLimit()
    how = [
        f"Medians of samples of {_CALLS} calls after {_CALLS} that are not timed, all in turns; * "
        "is what attend itself takes. "
        "Layout [layers, 2, context, KV heads, head_dim] for all; each layer writes its token, "
        f"then reads, and feeds the next. Limit: a sum of {limit.size_bytes >> 20} MiB, "
        "which a cache that stays in the processor's shared one may pass. "
        f"Paged: pages of {_PAGE} in random order. "
        "Temp: scratch memory of the compiled program over the cache."
    ]
    for shape in _SHAPES[:1] if quick else _SHAPES:
        seconds = {}
        for dtype in ("float32", "bfloat16", "float16", "int8"):
            rows, absent = _measure(shape, dtype, limit, repeats)
            picked = next(row for row in rows if row["implementation"].endswith("*"))
            seconds[dtype] = picked["ms"] / 1e3
            goals = _goals(dtype, picked, rows, seconds)
            notes = [f"{name}: {reason}." for name, reason in absent.items()]
            yield Table(f"Attention alone: {shape}, {dtype}, one query", rows, how + notes + goals)
            how = []


def _goals(dtype: str, picked: Row, rows: list[Row], seconds: dict[str, float]) -> list[str]:
    goals = []
    if dtype in _GOALS and picked["x as called"]:
        goals = [target("over torch as called", picked["x as called"], x) for x in _GOALS[dtype]]
    if dtype == "float32":
        goals.append(target("share of the limit", picked["% of limit"] / 100, _SHARE_OF_LIMIT))
    if dtype == "int8":
        faster = seconds["float32"] / seconds["int8"]
        goals.append(target("tokens a second over float32's", faster, 1.0))
    met = "met" if picked["temp %"] < _MOST_TEMP_PERCENT else "NOT MET"
    temp = f"{picked['temp %']:.2g} %, {met}"
    goals.append(f"target: temp under {_MOST_TEMP_PERCENT} % of the cache: {temp}")
    paged = next(row["ms"] for row in rows if row["implementation"].endswith(_PAGED))
    return [*goals, target("paged over contiguous", paged / picked["ms"], 1.1, at_most=True)]


def _measure(
    shape: Shape, dtype: str, limit: ReadLimit, repeats: int
) -> tuple[list[Row], dict[str, str]]:
    """One row a competitor that can run, and why each other one cannot."""
    config, computed = shape.config(dtype), "float32" if dtype == "int8" else dtype
    cache = filled(config, shape.context - 1)
    queries = np.random.default_rng(0).standard_normal(
        (1, shape.kv_heads * shape.group, shape.head_dim), np.float32
    )
    competitors: dict[str, Callable] = {ReadLimit.NAME: limit}
    absent: dict[str, str] = {}
    if dtype == "int8":
        absent = {"torch SDPA": "it reads no int8"}
    elif reason := missing("torch"):
        absent = {"torch SDPA": reason}
    else:
        competitors |= _torch_competitors(shape, dtype, cache, queries)
    holder = [cache]  # one cache for all: each call donates it and puts it back
    for name in IMPLEMENTATIONS:
        if reason := IMPLEMENTATIONS[name].cannot_serve(cache, 1):
            absent[f"jaxkv {name}"] = reason
        else:
            competitors[f"jaxkv {name}"] = _JaxkvStep(holder, queries, computed, name)
    picked = chosen(cache)
    paged = filled(config.replace(addressing=jaxkv.Paged(_PAGE)), shape.context - 1)
    competitors[picked + _PAGED] = _JaxkvStep([paged], queries, computed, picked.split()[1])
    _check_agreement(competitors, computed)
    timings = interleaved(competitors, repeats=repeats, calls=_CALLS, lead_in=_CALLS)
    return _rows(config, competitors, timings, picked), absent


def _rows(
    config: jaxkv.KVCacheConfig,
    competitors: dict[str, Callable],
    timings: dict[str, Timing],
    picked: str,
) -> list[Row]:
    limit = ReadLimit.size_bytes / timings[ReadLimit.NAME].seconds
    rows: list[Row] = []
    for name, timing in timings.items():
        is_limit, step = name == ReadLimit.NAME, competitors[name]
        speed = limit if is_limit else config.size_bytes / timing.seconds
        row = {
            "implementation": f"{name} *" if name == picked else name,
            "ms": None if is_limit else timing.seconds * 1e3,
            "spread %": 100 * timing.spread,
            "repeats": timing.repeats,
            "GB/s": speed / 1e9,
            "% of limit": 100 * speed / limit,
            "temp %": step.temp_percent if isinstance(step, _JaxkvStep) else None,
        }
        for column, peer in (("x as called", _AS_CALLED), ("x grouped", _GROUPED)):
            compared = peer in timings and not is_limit
            row[column] = timings[peer].seconds / timing.seconds if compared else None
        rows.append(row)
    return rows


def chosen(cache: jaxkv.KVCache) -> str:
    """The implementation that `attend` uses, in this table's words."""
    lines = jaxkv.explain(cache, tokens=1).splitlines()
    return "jaxkv " + next(line.split(":")[0] for line in lines if line.endswith(": used"))


class _JaxkvStep:
    """All layers with one implementation; the cache is donated and comes back."""

    def __init__(self, holder: list[jaxkv.KVCache], queries: np.ndarray, dtype: str, name: str):
        self.holder = holder
        self.queries = jnp.asarray(queries, dtype)
        step = jax.jit(functools.partial(_all_layers, implementation=name), donate_argnums=0)
        self.step = step.lower(holder[0], self.queries).compile()
        temp = self.step.memory_analysis().temp_size_in_bytes
        self.temp_percent = 100 * temp / holder[0].size_bytes

    def __call__(self) -> jax.Array:
        self.holder[0], mixed = self.step(self.holder[0], self.queries)
        return mixed


def _all_layers(cache: jaxkv.KVCache, queries: jax.Array, *, implementation: str):
    mixed, kv_heads = queries, cache.config.num_kv_heads
    for layer in range(cache.config.num_layers):
        new = mixed[:, :kv_heads]
        cache = jaxkv.append(cache, new, new, layer=layer)
        mixed = queries + jaxkv.attend(cache, mixed, layer=layer, implementation=implementation)
    return cache, mixed


def _torch_competitors(
    shape: Shape, dtype: str, cache: jaxkv.KVCache, queries: np.ndarray
) -> dict[str, Callable]:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    attention = torch.nn.functional.scaled_dot_product_attention
    kind = getattr(torch, dtype)
    buffer = torch.empty(
        (shape.layers, 2, shape.context, shape.kv_heads, shape.head_dim), dtype=kind
    )
    for layer in range(shape.layers):
        buffer[layer] = torch.from_numpy(layer_vectors(cache, layer))
    first = torch.from_numpy(queries).to(kind)

    def all_layers(attend: Callable) -> "torch.Tensor":
        with torch.no_grad():
            mixed = first
            for both in buffer:
                both[:, -1] = mixed[0, : shape.kv_heads]
                keys, values = both.transpose(1, 2)[:, None]  # [1, kv_heads, context, head_dim]
                mixed = first + attend(mixed[0], keys, values).reshape(first.shape)
            return mixed

    def as_called(rows, keys, values):
        return attention(rows[None, :, None], keys, values, enable_gqa=True)

    def grouped(rows, keys, values):
        return attention(rows.view(1, shape.kv_heads, shape.group, -1), keys, values)

    return {
        _AS_CALLED: functools.partial(all_layers, as_called),
        _GROUPED: functools.partial(all_layers, grouped),
    }


def _check_agreement(competitors: dict[str, Callable], dtype: str) -> None:
    """A fast wrong answer is no answer."""
    answers = {}
    for name, call in competitors.items():
        if name != ReadLimit.NAME:
            answer = call()
            answer = answer if isinstance(answer, jax.Array) else answer.float().numpy()
            answers[name] = np.asarray(answer, np.float32)
    (first, expected), *others = answers.items()
    tolerance = 1e-4 if dtype == "float32" else 0.05
    for name, answer in others:
        if not np.allclose(answer, expected, atol=tolerance):
            worst = np.abs(answer - expected).max()
            raise RuntimeError(f"{name} and {first} disagree by {worst} in {dtype}: no comparison.")
