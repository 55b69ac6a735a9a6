"""Eviction: what policies still recall of a context when a share of its tokens is kept.

On the model of `benchmarks.recall`, which is trained first where it was not yet (needs optax).
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks.recall import CONTEXT, LENGTH, PAIRS, QUESTION, START, questions, recall_model
from benchmarks.report import Table
from jaxkv.codecs import CODECS
from jaxkv.compression import score
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
_CODECS = ("float32", "bfloat16", "int8", "rotated4", "rotated4-centred", "rotated2-centred")


def run(quick: bool) -> list[Table]:
    """Recall by policy and share, and of KVzip beside codecs."""
    model = recall_model()
    seeds, size = (1, 16) if quick else (3, 64)
    batches = [questions(np.random.default_rng(100 + seed), size) for seed in range(seeds)]
    tokens = jnp.concatenate([jnp.asarray(batch.tokens) for batch in batches])
    return [_policies(model, tokens), _composition(model, tokens)]


def _policies(model, tokens) -> Table:
    frequencies = tuple(model.config.rope.frequencies(LENGTH).tolist())
    policies = {
        "oracle": Oracle(),
        "KVzip": None,
        "KeyDiff": KeyDiff(),
        "H2O": HeavyHitters(),
        "random": Random(),
        "SnapKV": QueryWindow(window=8),
        "TOVA": QueryWindow(window=1, pool=1, per_head=False),
        "Expected Attention": ExpectedAttention(frequencies, future=LENGTH - CONTEXT, sinks=_SINKS),
        "StreamingLLM": SinksAndRecent(_SINKS),
    }
    rows = []
    agnostic, aware = _Agnostic(model, tokens), _Aware(model, tokens)
    for name, policy in policies.items():
        row: dict = {"policy": name}
        for mode, setting in (("agnostic", agnostic), ("aware", aware)):
            scores = setting.scores(policy)
            for share in SHARES:
                row[f"{mode} {share:.0%}"] = setting.recall(scores, share)
        rows.append(row)
    full = agnostic.recall(None, 1.0)
    notes = [
        f"{tokens.shape[0] * PAIRS} questions on contexts of {CONTEXT} tokens, float32; nothing "
        f"dropped: {full:.3f}. The first token always stays.",
        "agnostic: the context is compressed before any question is known; then all are asked. "
        "aware: it is compressed once a question was read, and that one is asked.",
    ]
    return Table("Recall after eviction", rows, notes)


def _composition(model, tokens) -> Table:
    rows = []
    for name in _CODECS:
        setting = _Agnostic(model, tokens, CODECS[name])
        scores = setting.scores(None)
        rows.append(
            {
                "codec": name,
                "all tokens": setting.recall(None, 1.0),
                "KVzip 50%": setting.recall(scores, 0.5),
                "bytes of the whole in float32": _size_share(setting, scores),
            }
        )
    return Table("KVzip at half the tokens, beside codecs", rows)


def _size_share(setting: "_Agnostic", scores: jax.Array) -> float:
    """Bytes of the tokens kept, positions too, as a share of the whole context's in float32."""
    kept = setting.kept(scores, 0.5)
    index = kept.index
    of_kept = kept.size_bytes * (index.extent - index.new) / index.extent
    whole = setting.cache.config.replace(codec=jaxkv.Dense("float32"))
    of_context = whole.size_bytes * CONTEXT / whole.max_context_length
    return (of_kept + index.positions.nbytes) / of_context


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

    def recall(self, scores: jax.Array | None, share: float) -> float:
        logits, _, _ = _observed(self.model, self.later, self.kept(scores, share))
        answers = logits[:, _ASKED - CONTEXT].argmax(axis=-1)
        return float((answers == self.tokens[:, _ASKED + 1]).mean())

    def kept(self, scores: jax.Array | None, share: float) -> jaxkv.KVCache:
        if scores is None:
            return self.cache
        new = LENGTH - CONTEXT
        return jaxkv.compress(self.cache, scores, keep=share, sinks=_SINKS, new=new)


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

    def recall(self, scores: jax.Array | None, share: float) -> float:
        logits, _, _ = _observed(self.model, self.later, self.kept(scores, share))
        return float((logits[:, -1].argmax(axis=-1) == self.tokens[:, -1]).mean())

    def kept(self, scores: jax.Array, share: float) -> jaxkv.KVCache:
        keep = math.ceil(share * CONTEXT) + 2  # the question itself is taken back again
        small = jaxkv.compress(
            self.with_question, scores, keep=keep, sinks=_SINKS, recent=2, new=LENGTH - CONTEXT
        )
        return jaxkv.truncate(small, CONTEXT)


@jax.jit
def _observed(model, tokens, cache):
    return jaxkv.observed(model)(tokens, cache)
