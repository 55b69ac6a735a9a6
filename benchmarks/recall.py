"""A small model that recalls: trained here, in minutes, so that dropping a token has a price.

A context of filler hides pairs of a key and a value; after it come questions, a key each, and the
answer is its value. Attention has to find the pair, so a cache that lost it answers wrong. Half of
the training batches repeat a random segment, from which attention learns to copy at all.

`python -m benchmarks.recall` trains it (needs optax) and keeps the weights in the user's cache
folder, where `recall_model` finds them.
"""

import os
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxkv.models import Decoder, DecoderConfig, RopeConfig, load, save

CONTEXT = 128  # tokens before the questions
PAIRS = 8
QUESTION = 3  # tokens: a mark, the key, its value
LENGTH = CONTEXT + QUESTION * PAIRS
START, PAIR, ASK, FIRST = 1, 2, 3, 4  # ids; keys, values and filler follow
KEYS, VALUES, FILLER = 48, 48, 64
CONFIG = DecoderConfig(
    vocab_size=FIRST + KEYS + VALUES + FILLER,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    rope=RopeConfig(head_dim=32),
)
_STEPS_PER_DISPATCH = 20


class Batch(NamedTuple):
    """Token ids ``[batch, LENGTH]``, and what should come after each; -1 where anything may."""

    tokens: np.ndarray
    targets: np.ndarray


def questions(rng: np.random.Generator, size: int) -> Batch:
    """Contexts with pairs in them, each pair asked for once, in another order."""

    def draw(count: int, among: int) -> np.ndarray:
        """Different numbers in each row."""
        return np.argsort(rng.random((size, among)), axis=1)[:, :count]

    tokens = np.zeros((size, LENGTH), np.int32)
    tokens[:, :CONTEXT] = FIRST + KEYS + VALUES + rng.integers(0, FILLER, (size, CONTEXT))
    tokens[:, 0] = START
    keys = FIRST + draw(PAIRS, KEYS)
    values = FIRST + KEYS + rng.integers(0, VALUES, (size, PAIRS))
    rows, places = np.arange(size)[:, None], 1 + 3 * draw(PAIRS, (CONTEXT - 2) // 3)
    for offset, what in enumerate((PAIR, keys, values)):
        tokens[rows, places + offset] = what
    order = draw(PAIRS, PAIRS)
    asked = CONTEXT + QUESTION * np.arange(PAIRS)
    answers = values[rows, order]
    for offset, what in enumerate((ASK, keys[rows, order], answers)):
        tokens[:, asked + offset] = what
    targets = np.full_like(tokens, -1)
    targets[:, asked + 1] = answers
    return Batch(tokens, targets)


def repetitions(rng: np.random.Generator, size: int) -> Batch:
    """A random segment again and again; all but its first showing can be known."""
    period = rng.integers(16, LENGTH // 2, (size, 1))
    segment = FIRST + rng.integers(0, CONFIG.vocab_size - FIRST, (size, LENGTH))
    at = np.arange(LENGTH) % period
    tokens = np.take_along_axis(segment, at, axis=1).astype(np.int32)
    targets = np.full_like(tokens, -1)
    targets[:, :-1] = np.where(np.arange(LENGTH - 1) >= period, tokens[:, 1:], -1)
    return Batch(tokens, targets)


def train(steps: int = 1400, batch_size: int = 32, seed: int = 0, report=print) -> Decoder:
    """A model that answers more than 99 % of the questions, if all is well."""
    import optax

    model = Decoder(CONFIG, rngs=nnx.Rngs(seed))
    graph, parameters = nnx.split(model)
    parameters = jax.tree.map_with_path(_wide, parameters)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, steps // 12, steps, 1e-4)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01)
    )

    def loss(parameters, batch):
        logits, _ = nnx.merge(graph, parameters)(batch.tokens)
        asked = batch.targets >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.maximum(batch.targets, 0)
        )
        right = asked & (logits.argmax(axis=-1) == batch.targets)
        half = batch_size // 2
        accuracy = right[:half].sum() / asked[:half].sum()
        return jnp.where(asked, losses, 0).sum() / asked.sum(), accuracy

    def one_step(state, batch):
        parameters, optimizer_state = state
        (_, accuracy), gradient = jax.value_and_grad(loss, has_aux=True)(parameters, batch)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, parameters)
        return (optax.apply_updates(parameters, updates), optimizer_state), accuracy

    many_steps = jax.jit(lambda state, batches: jax.lax.scan(one_step, state, batches))
    rng, started = np.random.default_rng(seed), time.monotonic()
    state = parameters, optimizer.init(parameters)
    for step in range(0, steps, _STEPS_PER_DISPATCH):
        batches = [
            jax.tree.map(
                lambda *parts: np.concatenate(parts),
                questions(rng, batch_size // 2),
                repetitions(rng, batch_size - batch_size // 2),
            )
            for _ in range(_STEPS_PER_DISPATCH)
        ]
        state, accuracies = many_steps(state, jax.tree.map(lambda *rows: np.stack(rows), *batches))
        if step % 100 == 0:
            elapsed = time.monotonic() - started
            report(f"step {step}: recall {float(accuracies.mean()):.3f}, {elapsed:.0f} s")
    return nnx.merge(graph, state[0])


def recall_model(folder: pathlib.Path | None = None) -> Decoder:
    """The trained model: from the folder if it is there, else trained and put there."""
    folder = folder or _cache_folder()
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        save(train(), folder)
    return load(folder)[0]


def _cache_folder() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(root) / "jaxkv" / "recall"


def _wide(path, leaf):
    """Weights that keep the variance: the published 0.02 is for wider models."""
    name = jax.tree_util.keystr(path)
    if "norm" in name:
        return leaf
    scale = 0.5 if "embed" in name else leaf.shape[0] ** -0.5
    return leaf / leaf.std() * scale * (0.5 if "o_proj" in name or "down_proj" in name else 1)


if __name__ == "__main__":
    recall_model()
