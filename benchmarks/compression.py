"""Eviction: what policies still recall of a context when a share of its tokens is kept.

On the models of `benchmarks.recall`, which are trained first where they were not yet (needs optax).
Models that answer every question differ in what they lose with a token, far more than samples of
questions do: so there are several, and intervals are over models.

KVzip shares one budget among the heads of all layers, as its paper does (section 4.1), and has a
row without. All others keep as many tokens in each head.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

import jaxkv
from benchmarks.recall import (
    CONFIG,
    CONTEXT,
    LENGTH,
    MODELS,
    PAIRS,
    QUESTION,
    START,
    questions,
    recall_model,
)
from benchmarks.report import Row, Table
from jaxkv.cache.hybrid import AnyCache
from jaxkv.codecs import CODECS
from jaxkv.compression import adaptive, score
from jaxkv.policies import (
    ExpectedAttention,
    HeavyHitters,
    KeyDiff,
    Oracle,
    QueryWindow,
    Random,
    SinksAndRecent,
)

SHARES = (0.5, 0.25, 0.1)
_ASKED = CONTEXT + QUESTION * np.arange(PAIRS) + 1  # where the answer is next
_SINKS = 1
_MOST_LOST = 0.005  # of recall, at 4 bits
_FREQUENCIES = tuple(CONFIG.rope.frequencies(LENGTH).tolist())
_EQUAL_HEADS = "KVzip, equal heads"
_POLICIES = {
    "oracle": Oracle(),
    "KVzip": None,
    _EQUAL_HEADS: None,
    "KeyDiff": KeyDiff(),
    "H2O": HeavyHitters(),
    "random": Random(),
    "SnapKV": QueryWindow(window=8),
    "TOVA": QueryWindow(window=1, pool=1, per_head=False),
    "TOVA, by head": QueryWindow(window=1, pool=1),
    "Expected Attention": ExpectedAttention(_FREQUENCIES, future=LENGTH - CONTEXT, sinks=_SINKS),
    "StreamingLLM": SinksAndRecent(_SINKS),
}
_CODECS = ("float32", "bfloat16", "int8", "rotated4", "rotated4-centred", "rotated2-centred")


def run(quick: bool) -> Iterator[Table]:
    """Recall by policy and share, and of KVzip beside codecs."""
    models = [recall_model(seed) for seed in range(1 if quick else MODELS)]
    yield from _policies(models, 16 if quick else 64)
    yield _composition(models, 16 if quick else 144)


def _contexts(model: int, count: int) -> jax.Array:
    """Of each model its own, which no training has seen."""
    return jnp.asarray(questions(np.random.default_rng(100 + model), count).tokens)


def _policies(models: list, count: int) -> Iterator[Table]:
    modes = {
        "unknown": (_Agnostic, "The context is compressed before any question is known."),
        "known": (_Aware, "It is compressed once a question was read, and that one is asked."),
    }
    for known, (setting_of, note) in modes.items():
        settings = [setting_of(model, _contexts(i, count)) for i, model in enumerate(models)]
        rows = []
        for name, policy in _POLICIES.items():
            scores = [setting.scores(policy) for setting in settings]
            row: Row = {"policy": name}
            for share in SHARES:
                right = [
                    setting.right(of_model, share, pooled=name == "KVzip").mean()
                    for setting, of_model in zip(settings, scores, strict=True)
                ]
                row[f"{share:.0%}"], row[f"+- {share:.0%}"] = _mean(right)
            rows.append(row)
        notes = [
            f"{note} {len(models)} models, {count * PAIRS} questions each on contexts of {CONTEXT} "
            "tokens, float32; the first token always stays. +-: the 95 % interval of the mean over "
            "models (Student's t)."
        ]
        if known == "unknown":
            full = np.mean([setting.right(None, 1.0).mean() for setting in settings])
            notes.append(
                f"Nothing dropped: {full:.3f}. Models that were never trained here are trained "
                "first: some 100 seconds of one core each."
            )
        yield Table(f"Recall after eviction, question {known}", rows, notes)


def _composition(models: list, count: int) -> Table:
    """All codecs read the same contexts, so that losses are of pairs."""
    contexts = [_contexts(1000 + i, count) for i in range(len(models))]
    rows, alone = [], np.zeros(0)
    for name in _CODECS:
        whole, half = [], []
        for model, tokens in zip(models, contexts, strict=True):
            setting = _Agnostic(model, tokens, CODECS[name])
            scores = setting.scores(None)
            whole.append(setting.right(None, 1.0))
            half.append(setting.right(scores, 0.5, pooled=True))
        right = np.concatenate(half)
        alone = alone if rows else right  # the first codec is float32
        loss, interval = _mean(alone - right)
        rows.append(
            {
                "codec": name,
                "all tokens": float(np.mean(whole)),
                "KVzip 50%": float(right.mean()),
                "loss": loss,
                "+-": interval,
                "bytes of the whole in float32": _size_share(setting, scores),
            }
        )
    note = (
        f"{len(models)} models, {len(alone) * PAIRS} questions. Loss: beside eviction alone, with "
        "the 95 % interval of its mean over contexts."
    )
    targets = [
        f"target: {row['codec']} loses at most {_MOST_LOST}: {row['loss']:.4f}, "
        f"{'met' if row['loss'] <= _MOST_LOST else 'NOT MET'}"
        for row in rows
        if str(row["codec"]).startswith("rotated4")
    ]
    return Table("KVzip at half the tokens, beside codecs", rows, [note, *targets])


def _mean(samples) -> tuple[float, float | None]:
    """The mean, and half the width of its 95 % interval if there is more than one sample."""
    count = len(samples)
    if count == 1:
        return float(samples[0]), None
    width = scipy.stats.t.ppf(0.975, count - 1) * np.std(samples, ddof=1) / count**0.5
    return float(np.mean(samples)), float(width)


def _size_share(setting: "_Agnostic", scores: jax.Array) -> float:
    """Bytes of the tokens kept, positions too, as a share of the whole context's in float32."""
    kept, config = setting.kept(scores, 0.5, pooled=True), setting.cache.config
    groups = kept.groups if isinstance(kept, jaxkv.HybridCache) else (kept,)
    held = sum(group.size_bytes + group.index.positions.nbytes for group in groups)
    new = config.replace(max_context_length=LENGTH - CONTEXT)
    whole = config.replace(max_context_length=CONTEXT, codec=jaxkv.Dense("float32"))
    return (held - new.size_bytes) / whole.size_bytes


class _Agnostic:
    """Contexts in a cache; all of their questions are asked after."""

    def __init__(self, model, tokens, codec=None):
        self.model, self.tokens = model, tokens
        # Room for KVzip to read the context once more, after a start token.
        room = 2 * CONTEXT + 1
        config = model.cache_config(max_context_length=room, batch_size=len(tokens), codec=codec)
        context, self.later = tokens[:, :CONTEXT], tokens[:, CONTEXT:]
        _, self.cache, self.queries = _observed(model, context, jaxkv.create(config))

    def scores(self, policy: Callable | None) -> jax.Array:
        if policy is None:
            context = self.tokens[:, :CONTEXT]
            return jaxkv.reconstruction_scores(
                self.model, context, self.cache, prompt=[START], chunk=CONTEXT, sinks=_SINKS
            )
        queries = self.queries
        if isinstance(policy, Oracle):
            _, _, queries = _observed(self.model, self.later, self.cache)
        return score(self.cache, policy, queries)

    def right(self, scores: jax.Array | None, share: float, *, pooled: bool = False) -> np.ndarray:
        """The share of each context's questions that are answered."""
        logits, _, _ = _observed(self.model, self.later, self.kept(scores, share, pooled))
        answers = logits[:, _ASKED - CONTEXT].argmax(axis=-1)
        return np.asarray((answers == self.tokens[:, _ASKED + 1]).mean(axis=1))

    def kept(self, scores: jax.Array | None, share: float, pooled: bool) -> AnyCache:
        if scores is None:
            return self.cache
        keep = math.ceil(share * CONTEXT)
        return jaxkv.compress(
            self.cache,
            scores,
            keep=_pooled(self.cache, scores, keep) if pooled else keep,
            sinks=_SINKS,
            new=LENGTH - CONTEXT,
        )


class _Aware(_Agnostic):
    """Each question by itself, read once before its context is compressed, and again after."""

    def __init__(self, model, tokens):
        starts = CONTEXT + QUESTION * np.arange(PAIRS)
        one_question = np.stack([starts, starts + 1, starts + 2], axis=1)  # [pairs, QUESTION]
        asked = np.asarray(tokens)[:, one_question].reshape(-1, QUESTION)
        contexts = np.repeat(np.asarray(tokens)[:, :CONTEXT], PAIRS, axis=0)
        super().__init__(model, jnp.asarray(np.concatenate([contexts, asked], axis=1)))
        self.later = self.tokens[:, CONTEXT : CONTEXT + 2]
        _, self.with_question, last = _observed(model, self.later, self.cache)
        self.queries = jnp.concatenate([self.queries, last], axis=2)

    def scores(self, policy: Callable | None) -> jax.Array:
        if policy is None:
            return super().scores(None)
        if isinstance(policy, QueryWindow):
            policy = dataclasses.replace(policy, window=min(policy.window, 2))
        newest = self.queries[:, :, -2:] if isinstance(policy, Oracle) else self.queries
        return score(self.with_question, policy, newest)

    def right(self, scores: jax.Array | None, share: float, *, pooled: bool = False) -> np.ndarray:
        logits, _, _ = _observed(self.model, self.later, self.kept(scores, share, pooled))
        return np.asarray(logits[:, -1].argmax(axis=-1) == self.tokens[:, -1], np.float32)

    def kept(self, scores: jax.Array, share: float, pooled: bool) -> AnyCache:
        keep = math.ceil(share * CONTEXT)
        # The question itself stays beside what is kept, and is taken back again.
        small = jaxkv.compress(
            self.with_question,
            scores,
            keep=2 + (_pooled(self.cache, scores, keep) if pooled else keep),
            sinks=_SINKS,
            recent=2,
            new=LENGTH - CONTEXT,
        )
        return jaxkv.truncate(small, CONTEXT)


def _pooled(cache: jaxkv.KVCache, scores: jax.Array, keep: int) -> np.ndarray:
    return adaptive(cache, scores, keep, least=0, across_layers=True)


@jax.jit
def _observed(model, tokens, cache):
    return jaxkv.observed(model)(tokens, cache)
