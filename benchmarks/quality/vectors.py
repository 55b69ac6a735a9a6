"""Error against bits on made-up vectors, beside Shannon's limit."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks.quality.kivi import rounded_keys, rounded_values
from benchmarks.quality.stores import Store, one_by_one
from benchmarks.report import Row, Table, target
from jaxkv.quality import sample_vectors

_HEAD_DIM, _QUERIES = 128, 128
# What the research that this follows measured: the most that is acceptable.
_GOALS = {
    ("int8", "Gauss keys"): 0.0066,
    ("rotated4", "Gauss keys"): 0.098,
    ("rotated4-centred", "outlier keys"): 0.031,
    ("rotated2-centred", "outlier keys"): 0.11,
}


def run(quick: bool) -> Iterator[Table]:
    """One row a store."""
    tokens, seeds = (512, range(1)) if quick else (4096, range(3))
    rows = [_row(name, store, tokens, seeds) for name, store in one_by_one(quick, "vectors")]
    rows = [row for row in rows if row]
    notes = [
        f"{tokens:,} tokens, head_dim {_HEAD_DIM}, means of {len(seeds)} seeds. Relative errors of "
        f"keys, and of attention's output for {_QUERIES} queries that each look for one token. "
        "Outliers: jaxkv.quality.sample_vectors. Limit: the least error that any code of as many "
        "bits can have on Gaussian keys, 2 ** -bits (Shannon)."
    ]
    errors = {row["store"]: row for row in rows}
    for (name, column), goal in _GOALS.items():
        if name in errors:
            notes.append(
                target(
                    f"{name}, {column} over {goal}", errors[name][column] / goal, 1, at_most=True
                )
            )
    if "rotated4" in errors:
        row = errors["rotated4"]
        over = row["Gauss keys"] / row["limit"]
        notes.append(target("rotated4 over Shannon's limit", over, 1.7, at_most=True))
    yield Table("Quality: vectors", rows, notes)


def _row(name: str, store: Store, tokens: int, seeds: range) -> Row | None:
    if (store.control and store.after) or store.newest:
        return None  # it is one of models; of vectors alone none is newest
    bits = store.bits_per_number(_HEAD_DIM, tokens)
    row: Row = {"store": name, "bits": bits, "limit": 2.0**-bits}
    for kind, outliers in (("Gauss", False), ("outlier", True)):
        errors = np.mean([_errors(store, tokens, outliers, seed) for seed in seeds], axis=0)
        row |= dict(zip((f"{kind} keys", f"{kind} out"), errors.tolist(), strict=True))
    return row


def _errors(store: Store, tokens: int, outliers: bool, seed: int) -> tuple[float, float]:
    keys, values, rope = sample_vectors(tokens, _HEAD_DIM, outliers=outliers, seed=seed)
    stored = _stored(store, keys, values, rope)
    queries = _queries(keys[:, 0].astype(np.float64), np.random.default_rng(seed + 100))
    exact = _attention(queries, keys[:, 0], values[:, 0])
    return _relative(stored[0], keys), _relative(_attention(queries, *stored[:, :, 0]), exact)


def _stored(store: Store, keys: np.ndarray, values: np.ndarray, rope: jaxkv.Rope) -> np.ndarray:
    if store.after:  # KIVI, all of it outside the window
        bits = 2
        return np.stack([rounded_keys(keys, bits), rounded_values(values, bits)])
    codec = store.codec.under(rope) if isinstance(store.codec, jaxkv.Centred) else store.codec
    cache = jaxkv.create(jaxkv.KVCacheConfig(1, len(keys), 1, _HEAD_DIM, codec=codec))
    # The means are those of the first 512 tokens.
    for start in range(0, len(keys), 512):
        part = slice(start, start + 512)
        cache = jaxkv.append(cache, jnp.asarray(keys[part]), jnp.asarray(values[part]), layer=0)
        cache = jaxkv.advance(cache, min(512, len(keys) - start))
    return np.stack(jaxkv.layer(cache, 0)).astype(np.float32)


def _queries(keys: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each lifts one token's logit well above those of the others, by what sets its key apart."""
    centred = keys - keys.mean(axis=0)
    wanted = rng.integers(64, len(keys) - 64, _QUERIES)
    covariance = centred.T @ centred / len(keys) + 1e-3 * np.eye(_HEAD_DIM)
    towards = np.linalg.solve(covariance, centred[wanted].T).T
    towards *= 11 * _HEAD_DIM**0.5 / np.sum(towards * centred[wanted], axis=1, keepdims=True)
    noise = rng.standard_normal((_QUERIES, _HEAD_DIM))
    spread = (noise @ centred.T).std(axis=1, keepdims=True) / _HEAD_DIM**0.5
    return towards + noise * 1.5 / spread


def _attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    logits = queries @ keys.astype(np.float64).T / _HEAD_DIM**0.5
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights @ values / weights.sum(axis=1, keepdims=True)


def _relative(stored: np.ndarray, exact: np.ndarray) -> float:
    wide = np.asarray(exact, np.float64)
    return float(np.linalg.norm(stored - wide) / np.linalg.norm(wide))
