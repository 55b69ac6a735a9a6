"""Save and restore: a prompt from its file beside prefilling it, a save beside a plain write."""

import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxkv
from benchmarks.decode import MODEL
from benchmarks.measure import interleaved
from benchmarks.report import Table, target
from jaxkv.models import Decoder

_PROMPT = 4096
_ROOM = 512
_CHUNK = 512  # tokens a prefill step: more is no faster here
_CODECS = {"float32": jaxkv.Dense("float32"), "int8": jaxkv.Int8()}
_GOAL = 10.0


@functools.partial(jax.jit, donate_argnames="cache")
def _step(
    model: Decoder, tokens: jax.Array, cache: jaxkv.KVCache
) -> tuple[jax.Array, jaxkv.KVCache]:
    logits, cache = model(tokens, cache)
    return logits[..., -1, :], cache


def run(quick: bool) -> Iterator[Table]:
    """One row a codec."""
    model = Decoder(MODEL, rngs=nnx.Rngs(0))
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        rows = [_row(model, name, Path(folder), 3 if quick else 7) for name in _CODECS]
    worst = min(row["prefill / restore"] for row in rows)
    notes = [
        f"{MODEL.num_layers} layers, width {MODEL.hidden_size}, {MODEL.num_kv_heads} KV heads of "
        f"{MODEL.head_dim}; a prompt of {_PROMPT:,} tokens, prefilled {_CHUNK} at a time, compiled "
        "beforehand. Restore: the file checked (sha256), loaded and ready; the file is in the "
        "page cache. Write: the same bytes by numpy, and fsync. Medians, in turns.",
        "The token that follows has the same logits, bit for bit: checked.",
        target("a restore is faster than a prefill", worst, _GOAL),
    ]
    yield Table(f"Restoring a prompt of {_PROMPT:,} tokens", rows, notes)


def _row(model: Decoder, name: str, folder: Path, repeats: int) -> dict:
    path, plain = folder / name, folder / "plain"
    config = model.cache_config(max_context_length=_PROMPT + _ROOM, codec=_CODECS[name])
    prompt = jax.random.randint(jax.random.key(0), (_PROMPT,), 0, MODEL.vocab_size, jnp.int32)

    def prefill() -> jaxkv.KVCache:
        cache = jaxkv.create(config)
        for start in range(0, _PROMPT, _CHUNK):
            _, cache = _step(model, prompt[start : start + _CHUNK], cache)
        return cache

    cache = prefill()
    jaxkv.save(cache, path, tokens=prompt, model=model)
    _check_next_token(model, cache, jaxkv.load(path, tokens=prompt, model=model))
    cache = prefill()  # the check has donated the first
    contents = np.fromfile(path, np.uint8)

    def write() -> None:
        with plain.open("wb") as file:
            contents.tofile(file)
            os.fsync(file.fileno())

    competitors = {
        "prefill": prefill,
        "restore": lambda: jaxkv.load(path),
        "save": lambda: jaxkv.save(cache, path),
        "write": write,
    }
    timings = interleaved(competitors, repeats=repeats, warm_up=1, most_seconds=120)
    seconds = {name: timing.seconds for name, timing in timings.items()}
    return {
        "codec": name,
        "MB": contents.nbytes / 1e6,
        "prefill s": seconds["prefill"],
        "restore s": seconds["restore"],
        "spread %": 100 * timings["restore"].spread,
        "prefill / restore": seconds["prefill"] / seconds["restore"],
        "restore GB/s": contents.nbytes / seconds["restore"] / 1e9,
        "save s": seconds["save"],
        "save / write": seconds["save"] / seconds["write"],
    }


def _check_next_token(model: Decoder, cache: jaxkv.KVCache, loaded: jaxkv.KVCache) -> None:
    token = jnp.zeros(1, jnp.int32)
    expected, logits = (np.asarray(_step(model, token, each)[0]) for each in (cache, loaded))
    if expected.tobytes() != logits.tobytes():
        raise RuntimeError("the restored cache does not go on as the original")
