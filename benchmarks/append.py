"""An append costs the same at any context length: one token into short and into long caches."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax

import jaxkv
from benchmarks.measure import interleaved
from benchmarks.report import Row, Table, target
from jaxkv.codecs import CODECS

_SHORT, _LONG = 4_096, 131_072
_LAYERS, _KV_HEADS, _HEAD_DIM = 4, 2, 64
_TOKENS_PER_LOOP = 64
_ROPE = jaxkv.Rope.of(10_000, _HEAD_DIM)
# Each codec by a call of its own; plain ones in loops too, where XLA may find more to copy.
_LOOPED = ("float32", "bfloat16", "float16")
_NEWEST = "rotated2-centred, newest 16"
_MOST = 1.5  # times as long in the long cache as in the short one


def _eager(cache, keys, values):
    """One layer, as one call from Python."""
    return jaxkv.append(cache, keys, values, layer=1)


def _layer_scan(cache, keys, values):
    """All layers: the cache in the carry, the layer traced."""

    def one_layer(cache, layer):
        return jaxkv.append(cache, keys, values, layer=layer), None

    return lax.scan(one_layer, cache, jnp.arange(cache.config.num_layers))[0]


def _while_loop(cache, keys, values):
    """Many tokens, each a layer scan and an advance; then back to where it began."""
    start = cache.lengths

    def one_token(cache):
        return jaxkv.advance(_layer_scan(cache, keys, values), 1)

    grown = lax.while_loop(lambda c: c.lengths < start + _TOKENS_PER_LOOP, one_token, cache)
    return jaxkv.truncate(grown, start)


# Form -> (the function, appended tokens a call times layers, calls a sample).
_FORMS: dict[str, tuple[Callable, int, int]] = {
    "jitted, one layer": (_eager, 1, 200),
    "layer scan": (_layer_scan, _LAYERS, 100),
    "while loop over tokens": (_while_loop, _TOKENS_PER_LOOP * _LAYERS, 10),
}


def run(quick: bool) -> Iterator[Table]:
    """One row a codec and form."""
    repeats = 15 if quick else 51
    one_call = next(iter(_FORMS))
    looped = [(name, form) for name in _LOOPED for form in _FORMS]
    others = [(name, one_call) for name in (*CODECS, _NEWEST) if name not in _LOOPED]
    rows = [_row(name, form, repeats) for name, form in looped + others]
    worst = max(row["ratio"] for row in rows)
    least_alias = min(row["alias %"] for row in rows)
    most_temp = max(row["temp %"] for row in rows)
    notes = [
        f"{_LAYERS} layers x {_KV_HEADS} KV heads x {_HEAD_DIM}, cache donated and half full; us "
        f"for one token in one layer, median of {repeats}. Alias: bytes of the cache that the "
        "result shares with the argument; temp: scratch memory of the compiled program over the "
        "bytes of the cache (both for the long cache).",
        target(f"time at {_LONG:,} slots over {_SHORT:,}", worst, _MOST, at_most=True),
        f"target: alias 100 %, temp under 1 %: {least_alias:.4g} % and {most_temp:.2g} %, "
        + ("met" if least_alias > 99.99 and most_temp < 1 else "NOT MET"),
    ]
    yield Table("Append: one token, by context length", rows, notes)


def _row(name: str, form: str, repeats: int) -> Row:
    function, appends, calls = _FORMS[form]
    steps = {slots: _Step(name, slots, function) for slots in (_SHORT, _LONG)}
    timings = interleaved(
        {str(slots): step for slots, step in steps.items()}, repeats=repeats, calls=calls
    )
    short, long = timings[str(_SHORT)], timings[str(_LONG)]
    size = steps[_LONG].size_bytes
    memory = steps[_LONG].compiled.memory_analysis()
    return {
        "codec": name,
        "form": form,
        f"us at {_SHORT:,}": short.seconds / appends * 1e6,
        f"us at {_LONG:,}": long.seconds / appends * 1e6,
        "ratio": long.seconds / short.seconds,
        "spread %": 100 * max(short.spread, long.spread),
        "alias %": 100 * min(1.0, memory.alias_size_in_bytes / size),
        "temp %": 100 * memory.temp_size_in_bytes / size,
    }


class _Step:
    """A compiled append that keeps its own cache, and is called without arguments."""

    def __init__(self, name: str, slots: int, function: Callable):
        codec, newest = CODECS[name.split(",")[0]], None
        if isinstance(codec, jaxkv.Centred):
            codec = codec.under(_ROPE)
        if name == _NEWEST:
            newest = jaxkv.Newest(16, jaxkv.Centred(jaxkv.Rotated(4)))
        config = jaxkv.KVCacheConfig(
            _LAYERS, slots, _KV_HEADS, _HEAD_DIM, codec=codec, newest=newest
        )
        self.size_bytes = config.size_bytes
        self.cache = jaxkv.advance(jaxkv.create(config), slots // 2)
        dtype = codec.dtype if isinstance(codec, jaxkv.Dense) else "bfloat16"
        self.token = jnp.ones((1, _KV_HEADS, _HEAD_DIM), dtype)
        step = functools.partial(jax.jit, donate_argnums=0)(function)
        self.compiled = step.lower(self.cache, self.token, self.token).compile()

    def __call__(self) -> jaxkv.KVCache:
        self.cache = self.compiled(self.cache, self.token, self.token)
        return self.cache
