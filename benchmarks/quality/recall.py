"""Recall of pairs from a context, on the model that `benchmarks.recall` trains, and on its twin."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxkv
from benchmarks import recall as task
from benchmarks.quality.kivi import GROUP
from benchmarks.quality.stores import EXACT, Store, one_by_one
from benchmarks.quality.text import interval
from benchmarks.report import Row, Table
from jaxkv.models import Decoder

_SEQUENCES = 32  # a seed
_BIAS = 12.0


def run(quick: bool) -> Iterator[Table]:
    """A table a model. Trains it when it was never trained here (minutes; needs optax)."""
    if quick:
        return
    model = task.recall_model()
    for name, twin in (("recall", model), ("recall, keys with a mean", biased(model))):
        batches = [
            task.questions(np.random.default_rng(1000 + seed), _SEQUENCES) for seed in range(3)
        ]
        exact = [_logits(twin, EXACT, batch.tokens) for batch in batches]
        stores = one_by_one(quick, "recall")
        rows = [_row(twin, which, store, batches, exact) for which, store in stores]
        notes = [
            f"3 seeds of {_SEQUENCES} contexts, each a sequence of its own, {task.PAIRS} "
            "questions each, asked of the stored context. KL from the float32 cache at the "
            "answers; intervals of 95 % over seeds."
        ]
        yield Table(f"Quality: {name}", rows, notes)


def biased(model: Decoder) -> Decoder:
    """A twin whose keys have a large mean, and that answers as the model does.

    The mean is in the two slowest pairs of each key, which turn by less than a tenth of a radian
    over these contexts: what it adds to a query's logits is nearly the same for all tokens, and
    softmax takes that out.
    """
    config = model.config
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    twin = Decoder(type(config)(**fields | {"attention_bias": True}), rngs=nnx.Rngs(0))
    weights = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    state = nnx.to_flat_state(nnx.state(twin, nnx.Param))
    pairs = config.head_dim // 2
    bias = np.zeros((config.num_kv_heads, config.head_dim), np.float32)
    bias[:, [pairs - 1, 2 * pairs - 1]] = _BIAS
    filled = []
    for path, param in state:
        if path in weights:
            param = param.replace(weights[path].get_value())
        elif "k_proj" in path:
            param = param.replace(jnp.asarray(bias.reshape(-1)))
        else:
            param = param.replace(jnp.zeros_like(param.get_value()))
        filled.append((path, param))
    nnx.update(twin, nnx.from_flat_state(filled))
    return twin


def _logits(model: Decoder, store: Store, tokens: np.ndarray) -> jax.Array:
    slots = -(-task.LENGTH // GROUP) * GROUP
    config = store.cache_config(model, slots)

    def one(model, tokens):
        _, cache = model(tokens[: task.CONTEXT], jaxkv.create(config))
        cache = store.next(cache, task.CONTEXT)
        return model(tokens[task.CONTEXT :], cache)[0]

    run = jax.jit(one)
    return jnp.stack([run(model, row) for row in tokens])


def _row(model, name: str, store: Store, batches: list[task.Batch], exact: list) -> Row:
    right, divergences = [], []
    for batch, known in zip(batches, exact, strict=True):
        logits = known if store is EXACT else _logits(model, store, batch.tokens)
        targets = batch.targets[:, task.CONTEXT :]
        asked = targets >= 0
        told, known = jax.nn.log_softmax(logits), jax.nn.log_softmax(known)
        right.append(float((np.asarray(told.argmax(axis=-1)) == targets)[asked].mean()))
        divergence = np.asarray(jnp.sum(jnp.exp(known) * (known - told), axis=-1))
        divergences.append(float(divergence[asked].mean()))
    return {
        "store": name,
        "bits": store.bits_per_number(model.config.head_dim, task.CONTEXT),
        "accuracy": f"{np.mean(right):.3f}",
        "+-": interval(np.array(right)),
        "KL": float(np.mean(divergences)),
        "KL +-": interval(np.array(divergences)),
    }
