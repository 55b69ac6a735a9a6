"""Decode attention by codec: one token through the layers of a cache that is nearly full."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

import jaxkv
from benchmarks.measure import interleaved
from benchmarks.report import Row, Table, target
from jaxkv.codecs import CODECS

_LAYERS, _KV_HEADS, _GROUP, _HEAD_DIM = 2, 8, 4, 128
_CONTEXTS = (4_096, 16_384, 65_536)
_CALLS = 4  # a sample, and as many before it, as in a loop of them
_CHUNK = 2_048  # tokens that are written at once while filling
_CODECS = (
    *("bfloat16", "float8", "int8", "rotated4", "rotated3", "rotated2"),
    *("rotated4-centred", "rotated2-centred", "rotated2-centred, newest 16"),
)


def run(quick: bool) -> Iterator[Table]:
    """A table a context length."""
    for context in _CONTEXTS[:1] if quick else _CONTEXTS:
        steps = {name: _Step(name, context) for name in _CODECS}
        timings = interleaved(
            steps, repeats=5 if quick else 15, calls=_CALLS, lead_in=_CALLS, warm_up=1
        )
        base = timings["bfloat16"].seconds
        rows: list[Row] = [
            {
                "codec": name,
                "by": steps[name].implementation,
                "MB": steps[name].size_bytes / 1e6,
                "temp KB": steps[name].temp_bytes / 1e3,
                "ms a token": timing.seconds * 1e3,
                "spread %": 100 * timing.spread,
                "x bfloat16": base / timing.seconds,
            }
            for name, timing in timings.items()
        ]
        speed = {row["codec"]: row["x bfloat16"] for row in rows}
        notes = [target("int8 over bfloat16", speed["int8"], 1.0)]
        if context == _CONTEXTS[0]:
            notes.insert(
                0,
                f"{_LAYERS} layers, {_KV_HEADS} KV heads of {_HEAD_DIM}, {_GROUP} queries each; a "
                "token is written to each layer, attended, and feeds the next. Medians of samples "
                f"of {_CALLS} calls after {_CALLS} that are not timed, in turns.",
            )
        yield Table(f"Decode attention by codec: {context:,} tokens", rows, notes)


class _Step:
    """A compiled step that keeps its own cache."""

    def __init__(self, codec: str, context: int):
        rope = jaxkv.Rope.of(500_000, _HEAD_DIM)
        chosen, newest = CODECS[codec.split(",")[0]], None
        if "newest" in codec:
            newest = jaxkv.Newest(16, jaxkv.Centred(jaxkv.Rotated(4)))
        if isinstance(chosen, jaxkv.Centred):
            chosen = chosen.under(rope)
        config = jaxkv.KVCacheConfig(
            _LAYERS, context, _KV_HEADS, _HEAD_DIM, codec=chosen, newest=newest
        )
        self.size_bytes, self.cache = config.size_bytes, jaxkv.create(config)
        for _ in range(context // _CHUNK):
            self.cache = _add_chunk(self.cache)
        self.cache = jaxkv.truncate(self.cache, context - 1)
        lines = jaxkv.explain(self.cache, heads=_KV_HEADS * _GROUP).splitlines()
        self.implementation = next(line for line in lines if line.endswith(": used")).split(":")[0]
        self.queries = jnp.ones((1, _KV_HEADS * _GROUP, _HEAD_DIM), jnp.bfloat16)
        self.step = jax.jit(_all_layers, donate_argnums=0).lower(self.cache, self.queries).compile()
        self.temp_bytes = self.step.memory_analysis().temp_size_in_bytes

    def __call__(self) -> jax.Array:
        self.cache, mixed = self.step(self.cache, self.queries)
        return mixed


@functools.partial(jax.jit, donate_argnums=0)
def _add_chunk(cache: jaxkv.KVCache) -> jaxkv.KVCache:
    shape = (2, _CHUNK, _KV_HEADS, _HEAD_DIM)
    keys, values = jax.random.normal(jax.random.key(cache.lengths), shape, jnp.bfloat16)
    for layer in range(_LAYERS):
        cache = jaxkv.append(cache, keys, values, layer=layer)
    return jaxkv.advance(cache, _CHUNK)


def _all_layers(cache: jaxkv.KVCache, queries: jax.Array) -> tuple[jaxkv.KVCache, jax.Array]:
    mixed = queries
    for layer in range(_LAYERS):
        new = mixed[:, :_KV_HEADS]
        cache = jaxkv.append(cache, new, new, layer=layer)
        mixed = queries + jaxkv.attend(cache, mixed, layer=layer)
    return cache, mixed
