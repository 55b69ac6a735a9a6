"""What codecs lose on a released model, SmolLM2-135M-Instruct, beside peers emulated in float32.

Every query reads what the codec stores, of its own token too. KIVI keeps its newest tokens in 16
bits (`benchmarks.quality.kivi`).
"""

import functools
import gzip
import subprocess
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import jaxkv
from benchmarks.corpus import HELD_OUT
from benchmarks.quality.emulated import PerGroup, PerTensorFloat8, TurboQuant
from benchmarks.quality.kivi import GROUP
from benchmarks.quality.stores import Store, kivi
from benchmarks.report import Row, Table, target
from jaxkv.codecs import state_bytes
from jaxkv.models import load
from jaxkv.show.progress import progress_bar
from tests.real.checkpoint import smollm2

_TEXT = "6925b6d:ARCHITECTURE.md"
_CALIBRATED = 128  # tokens, the first, which give a codec its constants
_EXACT = "float32"

STORES: dict[str, Store] = {
    _EXACT: Store(jaxkv.Dense("float32")),
    "bfloat16": Store(jaxkv.Dense("bfloat16")),
    "int8-centred": Store(jaxkv.Centred(jaxkv.Int8())),
    "int8": Store(jaxkv.Int8()),
    "q8_0 (emulated)": Store(PerGroup(8)),
    "fp8 per token and head": Store(jaxkv.Float8()),
    "fp8 per tensor (emulated)": Store(PerTensorFloat8()),
    "KIVI-4 (emulated)": kivi(bits=4),
    "q4_0 (emulated)": Store(PerGroup(4)),
    "stair4": Store(jaxkv.Stair(4)),
    "rotated4-centred": Store(jaxkv.Centred(jaxkv.Rotated(4))),
    "rotated4": Store(jaxkv.Rotated(4)),
    "TurboQuant-4 (emulated)": Store(TurboQuant(4)),
    "KIVI-3 (emulated)": kivi(bits=3),
    "stair3": Store(jaxkv.Stair(3)),
    "rotated3-centred": Store(jaxkv.Centred(jaxkv.Rotated(3))),
    "TurboQuant-3 (emulated)": Store(TurboQuant(3)),
    "KIVI-2 (emulated)": kivi(bits=2),
    "stair2": Store(jaxkv.Stair(2)),
    "rotated2-centred": Store(jaxkv.Centred(jaxkv.Rotated(2))),
    "TurboQuant-2 (emulated)": Store(TurboQuant(2)),
}
# One method at several widths each, the narrowest first.
_PEERS = {
    "KIVI": [f"KIVI-{bits} (emulated)" for bits in (2, 3, 4)],
    "TurboQuant": [f"TurboQuant-{bits} (emulated)" for bits in (2, 3, 4)],
    "q4_0 and q8_0": ["q4_0 (emulated)", "q8_0 (emulated)"],
    "fp8 per token and head": ["fp8 per token and head"],
    "fp8 per tensor": ["fp8 per tensor (emulated)"],
}
# With constants as `generate` sets them by itself, and not from the text.
_DRAWN = {f"{name}, drawn constants": STORES[name] for name in ("int8-centred", "stair4", "stair3")}
STORES |= _DRAWN
_FEW = (_EXACT, "int8-centred", "int8", "stair4", "rotated4")
# Name -> KL at most, on the first text.
_GOALS = {"int8-centred": 0.00015, "stair4": 0.0090, "stair3": 0.042, "stair2": 0.22}
_ON_OTHER_TEXTS, _OF_PEERS = 1.3, 2.5  # times that, at most; times ours, at least, at equal bits


def run(quick: bool) -> Iterator[Table]:
    """A table a text."""
    model, tokenizer = load(smollm2())
    held_out = gzip.decompress(HELD_OUT.read_bytes()).decode("utf-8", "replace")
    texts = {
        f"the first 12,000 characters of {_TEXT}": (_architecture(), 2048),
        "the standard library's source": (held_out, 1024),
    }
    for name, (text, count) in texts.items():
        tokens = np.asarray(tokenizer.encode(text).ids[: 512 if quick else count], np.int32)
        rows = list(_rows(model, tokens, _FEW if quick else tuple(STORES)))
        factor = 1 if name.endswith(_TEXT) else _ON_OTHER_TEXTS
        goals = [] if quick else [*_within_limits(rows, factor), *_beside_peers(rows)]
        yield Table(f"Quality: SmolLM2-135M-Instruct, {name}", rows, [_note(len(tokens)), *goals])


def _within_limits(rows: list[Row], factor: float) -> Iterator[str]:
    found = {row["store"]: row["KL"] for row in rows}
    for store, most in _GOALS.items():
        yield target(f"KL of {store} over {most}", found[store] / most, factor, at_most=True)


def _beside_peers(rows: list[Row]) -> Iterator[str]:
    """Each of ours beside the best peer at as many bits, all constants of ours counted."""
    found = {row["store"]: row for row in rows}
    for store in _GOALS:
        own = found[store]
        bits = own["bits"] + own["+ constants"]
        at_equal_bits = {
            name: _kl_at(bits, [found[peer] for peer in peers]) for name, peers in _PEERS.items()
        }
        best = min(at_equal_bits, key=lambda name: at_equal_bits[name])
        what = f"KL of {best} at {bits:.2f} bits over {store}'s"
        yield target(what, at_equal_bits[best] / own["KL"], _OF_PEERS)


def _kl_at(bits: float, rows: list[Row]) -> float:
    """On the line of logarithms through two widths of a method; past the widest, its own."""
    if bits >= rows[-1]["bits"]:
        return rows[-1]["KL"]
    if len(rows) == 1:
        return float("inf")  # it has none so narrow
    above = next(number for number, row in enumerate(rows) if row["bits"] > bits)
    low, high = rows[max(above, 1) - 1], rows[max(above, 1)]
    share = (bits - low["bits"]) / (high["bits"] - low["bits"])
    return float(np.exp(np.log(low["KL"]) * (1 - share) + np.log(high["KL"]) * share))


def _note(count: int) -> str:
    return (
        f"{count:,} tokens; KL from the float32 cache in nats, the mean over tokens, with its "
        "standard error over tokens, which are not independent; nats a token more than the exact "
        f"cache's on the text; bits a number with scales, windows and, after the plus, constants, "
        f"which come from the first {_CALIBRATED} tokens."
    )


def _architecture() -> str:
    command = ["git", "show", _TEXT]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout[:12_000]


def _rows(model, tokens: np.ndarray, names: tuple[str, ...]) -> Iterator[Row]:
    exact = _logits(model, STORES[_EXACT], tokens)
    config, following = model.config, tokens[1:]
    with progress_bar("SmolLM2", len(names)) as advance_bar:
        for name in names:
            store, is_drawn = STORES[name], name in _DRAWN
            logits = exact if name == _EXACT else _logits(model, store, tokens, is_drawn=is_drawn)
            divergence, agree, more = _compared(exact, logits, following)
            state = 8 * state_bytes(store.codec, config.head_dim)
            yield {
                "store": name,
                "bits": store.bits_per_number(config.head_dim, len(tokens)),
                "+ constants": state / (2 * config.head_dim * len(tokens)),
                "KL": float(divergence.mean()),
                "s.e.": float(divergence.std() / len(divergence) ** 0.5),
                "top-1 %": 100 * float(agree.mean()),
                "nats more": f"{float(more.mean()):+.4f}",
            }
            advance_bar(1)


@jax.jit
def _compared(exact: Array, logits: Array, following: Array) -> tuple[Array, Array, Array]:
    """Of each token: KL, whether the likeliest is the same, and nats more of the next one."""

    def one(exact: Array, logits: Array, token: Array) -> tuple[Array, Array, Array]:
        known, told = jax.nn.log_softmax(exact), jax.nn.log_softmax(logits)
        divergence = jnp.sum(jnp.exp(known) * (known - told))
        return divergence, known.argmax() == told.argmax(), known[token] - told[token]

    return lax.map(lambda each: one(*each), (exact[:-1], logits[:-1], following))


def _logits(model, store: Store, tokens: np.ndarray, *, is_drawn: bool = False) -> Array:
    """Of all tokens; the first ones give the codec its constants, unless these are drawn."""
    chunk = GROUP if store.after else _CALIBRATED
    config, constants = store.cache_config(model, len(tokens)), None
    if is_drawn:
        (constants,) = jaxkv.calibrate(model, codec=store.codec)
    chunks = jnp.asarray(tokens).reshape(-1, chunk)
    return _run(model, chunks, constants, config=config, after=store.after)


@functools.partial(jax.jit, static_argnames=("config", "after"))
def _run(
    model,
    chunks: Array,
    constants: dict[str, Array] | None,
    *,
    config: jaxkv.KVCacheConfig,
    after: Callable | None,
) -> Array:
    def one(cache, chunk):
        logits, cache = model(chunk, cache)
        return after(cache, len(chunk)) if after else cache, logits

    cache = jaxkv.create(config)
    if constants is not None:
        cache = cache.with_codec_state(constants)
    _, logits = lax.scan(one, cache, chunks)
    return logits.reshape(-1, logits.shape[-1])
