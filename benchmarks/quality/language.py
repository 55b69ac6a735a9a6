"""The embedded language model through each store, on text that it was not trained on."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jaxkv
from benchmarks import corpus
from benchmarks.quality.stores import CHUNK, EXACT, Store, logits_through, one_by_one
from benchmarks.quality.text import interval
from benchmarks.report import Row, Table, target
from jaxkv.models import load

_LENGTH = 512
_FREE = 64  # tokens that are generated after half a window; whole groups of KIVI


def run(quick: bool) -> Iterator[Table]:
    """One row a store."""
    model, _ = load()
    every = len(corpus.held_out()) // (2 if quick else 12)
    windows = corpus.held_out()[::every, :_LENGTH].astype(np.int32)
    exact = _logits(model, EXACT, windows)
    free = None if quick else _continued(model, EXACT, windows)
    stores = one_by_one(quick, "language model")
    rows = [_row(model, name, store, windows, exact, free) for name, store in stores]
    yield Table(
        "Quality: the embedded language model, cached",
        rows,
        [
            f"{len(windows)} held-out windows of {_LENGTH} bytes, each a sequence of its own: half "
            f"a prompt, half teacher-forced in chunks of {CHUNK} and counted (one token at a time "
            "where the newest 16 are kept by a finer codec too: 4 bits, or float32 beside int8). "
            "KL from the float32 cache in nats, with half the width of the 95 % interval over "
            f"windows. Free: of {_FREE} tokens generated greedily, those before the first that "
            "differs.",
            *_targets({row["store"]: row for row in rows}),
        ],
    )


def _row(
    model, name: str, store: Store, windows: np.ndarray, exact: Array, free: np.ndarray | None
) -> Row:
    logits = exact if store is EXACT else _logits(model, store, windows)
    told, known = (jax.nn.log_softmax(each[:, :-1]) for each in (logits, exact))
    divergence = np.asarray(jnp.sum(jnp.exp(known) * (known - told), axis=-1).mean(axis=-1))
    agree = (told.argmax(axis=-1) == known.argmax(axis=-1)).mean()
    following = jnp.asarray(windows[:, _LENGTH // 2 + 1 :])
    bits = -jnp.take_along_axis(told, following[..., None], axis=-1).mean() / np.log(2)
    row: Row = {
        "store": name,
        "bits": store.bits_per_number(model.config.head_dim, _LENGTH),
        "KL": float(divergence.mean()),
        "+-": interval(divergence),
        "top-1 %": 100 * float(agree),
        "bits a byte": f"{float(bits):.4f}",
    }
    if free is not None:
        same = _continued(model, store, windows) == free
        row["free"] = float(np.cumprod(same, axis=1).sum(axis=1).mean())
    return row


def _logits(model, store: Store, windows: np.ndarray) -> Array:
    one = jax.jit(lambda model, tokens: logits_through(model, store, tokens))
    return jnp.stack([one(model, window) for window in windows])


def _continued(model, store: Store, windows: np.ndarray) -> np.ndarray:
    """Greedy tokens after half of each window, one at a time."""
    prompt = _LENGTH // 2
    config = store.cache_config(model, prompt + _FREE)

    def one(model, tokens):
        logits, cache = model(tokens, jaxkv.create(config))
        cache = store.next(cache, prompt)

        def step(state, _):
            token, cache = state
            logits, cache = model(token[None], cache)
            cache = store.next(cache, 1)
            following = logits[-1].argmax().astype(jnp.int32)
            return (following, cache), token

        first = logits[-1].argmax().astype(jnp.int32)
        return jax.lax.scan(step, (first, cache), length=_FREE)[1]

    run = jax.jit(one)
    return np.stack([run(model, window[:prompt]) for window in windows])


def _targets(rows: dict[str, Row]) -> list[str]:
    goals = []
    for name in ("int8", "int8-centred, newest 16"):
        if name in rows:
            over = rows[name]["KL"] / 1e-5
            goals.append(target(f"KL of {name} over 1e-5", over, 1, at_most=True))
    for bits in (4, 2):
        plain, centred = f"rotated{bits}", f"rotated{bits}-centred"
        if plain in rows:
            gain = rows[plain]["KL"] / rows[centred]["KL"]
            goals.append(target(f"KL of {plain} over centred", gain, 1.5 if bits == 4 else 1))
    name = "rotated2-centred, newest 16"
    if "KIVI-2 (emulated)" in rows and name in rows:
        kivi, ours = rows["KIVI-2 (emulated)"], rows[name]
        goals.append(target(f"KL of KIVI-2 over {name}", kivi["KL"] / ours["KL"], 1))
        goals.append(target("its bits over ours", kivi["bits"] / ours["bits"], 1 / 0.7))
    return goals
