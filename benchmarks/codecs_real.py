"""What codecs lose on a released model, SmolLM2-135M-Instruct, beside peers emulated in float32.

Every query reads what the codec stores, of its own token too. KIVI, HQQ and quanto keep their
newest tokens as they came (`benchmarks.quality.kivi`, `benchmarks.quality.quantized_cache`).

Most of the time is the model's own: some 10 of 13 s of one core for 2,048 tokens of a store. It is
compiled once for all texts of one length (5 s; `Stair` 45), and the exact cache's log-probabilities
are computed once for all stores. `--table` and `--row` choose texts and stores, and `--known` takes
rows of earlier runs.
"""

import functools
import gzip
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import jaxkv
from benchmarks.corpus import HELD_OUT
from benchmarks.quality.emulated import PerGroup, PerTensorFloat8, TurboQuant
from benchmarks.quality.kvquant import KVQuant, calibrated, exact_vectors
from benchmarks.quality.stores import Store, kivi, quantized_cache
from benchmarks.report import Pieces, Row, Table, target
from jaxkv.codecs import state_bytes
from jaxkv.models import load, load_chat
from jaxkv.show.progress import progress_bar
from tests.real.checkpoint import smollm2

_PROSE = "6925b6d:ARCHITECTURE.md"
_FIRST = f"prose, the first 12,000 characters of {_PROSE}"
# Questions of ours, and what the model said to them, drawn at a temperature of 0.7 and top_p 0.9.
CHAT = Path(__file__).with_name("chat.json")
_CALIBRATED = 128  # tokens, the first, which give a codec its constants
_EXACT = Store(jaxkv.Dense("float32"))
_KV_HEADS = 3

STORES: dict[str, Store] = {
    "bfloat16": Store(jaxkv.Dense("bfloat16")),
    "int8-centred": Store(jaxkv.Centred(jaxkv.Int8())),
    "int8": Store(jaxkv.Int8()),
    "q8_0 (emulated)": Store(PerGroup(8)),
    "fp8 per token and head": Store(jaxkv.Float8()),
    "fp8 per tensor (emulated)": Store(PerTensorFloat8()),
    "KIVI-4 (emulated)": kivi(bits=4),
    "q4_0 (emulated)": Store(PerGroup(4)),
    "KVQuant-4, 1 % (emulated)": Store(KVQuant(4, _KV_HEADS)),
    "HQQ-4 (emulated)": quantized_cache("hqq", bits=4),
    "quanto-4 (emulated)": quantized_cache("quanto", bits=4),
    "rotated4-centred": Store(jaxkv.Centred(jaxkv.Rotated(4))),
    "rotated4": Store(jaxkv.Rotated(4)),
    "TurboQuant-4 (emulated)": Store(TurboQuant(4)),
    "KIVI-3 (emulated)": kivi(bits=3),
    "KVQuant-3, 1 % (emulated)": Store(KVQuant(3, _KV_HEADS)),
    "rotated3-centred": Store(jaxkv.Centred(jaxkv.Rotated(3))),
    "TurboQuant-3 (emulated)": Store(TurboQuant(3)),
    "KIVI-2 (emulated)": kivi(bits=2),
    "KVQuant-2, 1 % (emulated)": Store(KVQuant(2, _KV_HEADS)),
    "HQQ-2 (emulated)": quantized_cache("hqq", bits=2),
    "quanto-2 (emulated)": quantized_cache("quanto", bits=2),
    "rotated2-centred": Store(jaxkv.Centred(jaxkv.Rotated(2))),
    "TurboQuant-2 (emulated)": Store(TurboQuant(2)),
    "stair4": Store(jaxkv.Stair(4)),
    "stair3": Store(jaxkv.Stair(3)),
    "stair2": Store(jaxkv.Stair(2)),
}
# One method at several widths each, the narrowest first.
_PEERS = {
    "KIVI": [f"KIVI-{bits} (emulated)" for bits in (2, 3, 4)],
    "KVQuant": [f"KVQuant-{bits}, 1 % (emulated)" for bits in (2, 3, 4)],
    "HQQ": ["HQQ-2 (emulated)", "HQQ-4 (emulated)"],
    "quanto": ["quanto-2 (emulated)", "quanto-4 (emulated)"],
    "TurboQuant": [f"TurboQuant-{bits} (emulated)" for bits in (2, 3, 4)],
    "q4_0 and q8_0": ["q4_0 (emulated)", "q8_0 (emulated)"],
    "fp8 per token and head": ["fp8 per token and head"],
    "fp8 per tensor": ["fp8 per tensor (emulated)"],
}
# With constants as `generate` sets them by itself, and not from the text.
_DRAWN = {f"{name}, drawn constants": STORES[name] for name in ("int8-centred", "stair4", "stair3")}
STORES |= _DRAWN
_FEW = ("int8-centred", "int8", "stair4", "rotated4")
# Name -> KL at most, on the first text.
_GOALS = {"int8-centred": 0.00015, "stair4": 0.0090, "stair3": 0.042, "stair2": 0.22}
_ON_OTHER_TEXTS, _OF_PEERS = 1.3, 2.5  # times that, at most; times ours, at least, at equal bits


def run(quick: bool, pieces: Pieces) -> Iterator[Table]:
    """A table a text."""
    model, tokenizer = load(smollm2())
    for text, (tokens, rows_of) in _texts(tokenizer, quick).items():
        title = f"Quality: SmolLM2-135M-Instruct, {text}"
        if pieces.has_table(title):
            known = {row["store"]: row for row in pieces.known_rows(title)}
            names = [name for name in rows_of if pieces.has_row(name) or name in known]
            rows = list(_rows(model, tokenizer, tokens, names, known))
            notes = [_note(len(tokens))]
            if not quick:
                notes += [*_within_limits(rows, text), *_beside_peers(rows, text)]
            yield Table(title, rows, notes)


def _texts(tokenizer, quick: bool) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
    """Name -> tokens, and the stores that read them."""

    def encoded(text: str, count: int) -> np.ndarray:
        return np.asarray(tokenizer.encode(text).ids[: 512 if quick else count], np.int32)

    command = ["git", "show", _PROSE]
    prose = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = gzip.decompress(HELD_OUT.read_bytes()).decode("utf-8", "replace")
    chat = load_chat(smollm2(), tokenizer).render(json.loads(CHAT.read_text(encoding="utf-8")))
    stores = _FEW if quick else tuple(STORES)
    texts = {
        _FIRST: (encoded(prose[:12_000], 2048), stores),
        "code, the standard library's source": (encoded(code, 2048), stores),
        "chat, by the model itself": (encoded(chat, 2048), stores),
    }
    if not quick:
        texts[f"long prose, {_PROSE}"] = (encoded(prose, 8192), stores)
    return texts


def _within_limits(rows: list[Row], text: str) -> Iterator[str]:
    found = {row["store"]: row["KL"] for row in rows}
    factor = 1 if text == _FIRST else _ON_OTHER_TEXTS
    for store, most in _GOALS.items():
        if store in found:
            yield target(f"KL of {store} over {most}", found[store] / most, factor, at_most=True)


def _beside_peers(rows: list[Row], text: str) -> Iterator[str]:
    """Each of ours beside the best peer at as many bits, constants counted.

    Peers that were not measured are left out.
    """
    found = {row["store"]: row for row in rows}
    peers = {name: own for name, own in _PEERS.items() if found.keys() >= set(own)}
    for store in _GOALS if peers else ():
        if store not in found:
            continue
        own = found[store]
        bits = _all_bits(own)
        at_equal_bits = {
            name: _kl_at(bits, [found[peer] for peer in widths]) for name, widths in peers.items()
        }
        best = min(at_equal_bits, key=lambda name: at_equal_bits[name])
        what, times = (
            f"KL of {best} at {bits:.2f} bits over {store}'s",
            at_equal_bits[best] / own["KL"],
        )
        yield target(what, times, _OF_PEERS) if text == _FIRST else f"{what}: {times:.2f}x"


def _all_bits(row: Row) -> float:
    return row["bits"] + row["+ constants"]


def _kl_at(bits: float, rows: list[Row]) -> float:
    """On the line of logarithms through two widths of a method; past the widest, its own."""
    widths = [_all_bits(row) for row in rows]
    if bits >= widths[-1]:
        return rows[-1]["KL"]
    if len(rows) == 1:
        return float("inf")  # it has none so narrow
    above = next(number for number, width in enumerate(widths) if width > bits)
    low, high = rows[max(above, 1) - 1], rows[max(above, 1)]
    share = (bits - _all_bits(low)) / (_all_bits(high) - _all_bits(low))
    return float(np.exp(np.log(low["KL"]) * (1 - share) + np.log(high["KL"]) * share))


def _note(count: int) -> str:
    return (
        f"{count:,} tokens; KL from the float32 cache in nats, the mean over tokens, with its "
        "standard error over tokens, which are not independent; nats a token more than the exact "
        f"cache's on the text; bits a number with scales, windows and, after the plus, constants, "
        f"which come from the first {_CALIBRATED} tokens (KVQuant's from Python's help texts)."
    )


def _rows(
    model, tokenizer, tokens: np.ndarray, names: list[str], known: dict[str, Row]
) -> Iterator[Row]:
    exact = None
    with progress_bar("SmolLM2", len(names)) as advance_bar:
        for name in names:
            if name in known:
                yield known[name]
            else:
                exact = _exact(model, tokens) if exact is None else exact
                yield _row(model, tokenizer, tokens, name, exact)
            advance_bar(1)


def _row(model, tokenizer, tokens: np.ndarray, name: str, exact: Array) -> Row:
    store, head_dim = STORES[name], model.config.head_dim
    config = store.cache_config(model, len(tokens))
    constants = _constants(model, tokenizer, config.codec, is_drawn=name in _DRAWN)
    step = store.waits_for if store.after else _CALIBRATED
    divergence, agree, more = _compared(
        model, jnp.asarray(tokens), exact, constants, config=config, after=store.after, step=step
    )
    state = 8 * state_bytes(store.codec, head_dim)
    return {
        "store": name,
        "bits": store.bits_per_number(head_dim, len(tokens)),
        "+ constants": state / (2 * head_dim * len(tokens)),
        "KL": float(divergence.mean()),
        "s.e.": float(divergence.std() / len(divergence) ** 0.5),
        "top-1 %": 100 * float(agree.mean()),
        "nats more": f"{float(more.mean()):+.4f}",
    }


def _constants(model, tokenizer, codec: jaxkv.Codec, *, is_drawn: bool) -> dict[str, Array] | None:
    """Those that are not learnt from the first tokens."""
    if is_drawn:
        return jaxkv.calibrate(model, codec=codec)[0]
    if isinstance(codec, KVQuant):
        return calibrated(_help_vectors(model, tokenizer), codec)
    return None


@functools.cache
def _help_vectors(model, tokenizer) -> Array:
    """Of a text that is not measured."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return exact_vectors(model, np.asarray(tokenizer.encode(text).ids[:4096], np.int32))


def _exact(model, tokens: np.ndarray) -> Array:
    """Log-probabilities with the exact cache."""
    config = _EXACT.cache_config(model, len(tokens))
    return _log_probabilities(model, jnp.asarray(tokens), config=config)


@functools.partial(jax.jit, static_argnames=("config",))
def _log_probabilities(model, tokens: Array, *, config: jaxkv.KVCacheConfig) -> Array:
    def one(cache, chunk):
        logits, cache = model(chunk, cache)
        return cache, jax.nn.log_softmax(logits)

    _, known = lax.scan(one, jaxkv.create(config), tokens.reshape(-1, _CALIBRATED))
    return known.reshape(len(tokens), -1)


@functools.partial(jax.jit, static_argnames=("config", "after", "step"))
def _compared(
    model,
    tokens: Array,
    exact: Array,
    constants: dict[str, Array] | None,
    *,
    config: jaxkv.KVCacheConfig,
    after: Callable | None,
    step: int,
) -> tuple[Array, Array, Array]:
    """Of all tokens but the last: KL, whether the likeliest next one is the same, and nats more."""

    def one(cache, given):
        chunk, known, following = given
        logits, cache = model(chunk, cache)
        told = jax.nn.log_softmax(logits)
        divergence = jnp.sum(jnp.exp(known) * (known - told), axis=-1)
        agree = known.argmax(axis=-1) == told.argmax(axis=-1)
        more = jnp.take_along_axis(known - told, following[:, None], axis=-1)[:, 0]
        return after(cache, step) if after else cache, (divergence, agree, more)

    cache = jaxkv.create(config)
    if constants is not None:
        cache = cache.with_codec_state(constants)
    given = tokens, exact, jnp.roll(tokens, -1)
    chunks = [array.reshape(-1, step, *array.shape[1:]) for array in given]
    _, found = lax.scan(one, cache, chunks)
    return jax.tree.map(lambda array: array.reshape(-1)[:-1], found)
