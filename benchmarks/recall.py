"""Small models that recall: trained here, in minutes, so that dropping a token has a price.

A context of filler hides pairs of a key and a value; after it come questions, a key each, and the
answer is its value. Attention has to find the pair, so a cache that lost it answers wrong. Half of
the training batches repeat a random segment, from which attention learns to copy at all.

A model answers nothing for hundreds of steps and then, within a few dozen, everything: that comes
sooner, and at a quarter of the price a step, in contexts a quarter as long, so these come first.
Models that recall alike differ in what they lose with a token, so several are trained.

`python -m benchmarks.recall` trains them (needs optax) and keeps the weights in the user's cache
folder, where `recall_model` finds them: some 100 seconds of one core a model.
"""

import functools
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
MODELS = 8
_STEPS_PER_DISPATCH = 20
_WARM_UP = 50  # steps


class Stage(NamedTuple):
    """Training on contexts of one length.

    Attributes:
      steps: at most.
      rates: the learning rate of the first and of the last step; half a cosine between.
      enough: recall, averaged over the newest batches, at which it ends; None for after all steps.
    """

    context: int
    pairs: int
    steps: int
    rates: tuple[float, float]
    enough: float | None


_STAGES = (
    Stage(CONTEXT // 4, PAIRS // 2, 2000, (3e-3, 3e-3), enough=0.9),
    Stage(CONTEXT, PAIRS, 300, (2e-3, 1e-4), enough=None),
)


class Batch(NamedTuple):
    """Token ids ``[batch, tokens]``, and what should come after each; -1 where anything may."""

    tokens: np.ndarray
    targets: np.ndarray


def questions(
    rng: np.random.Generator, size: int, context: int = CONTEXT, pairs: int = PAIRS
) -> Batch:
    """Contexts with pairs in them, each pair asked for once, in another order."""

    def draw(count: int, among: int) -> np.ndarray:
        """Different numbers in each row."""
        return np.argsort(rng.random((size, among)), axis=1)[:, :count]

    tokens = np.zeros((size, context + QUESTION * pairs), np.int32)
    tokens[:, :context] = FIRST + KEYS + VALUES + rng.integers(0, FILLER, (size, context))
    tokens[:, 0] = START
    keys = FIRST + draw(pairs, KEYS)
    values = FIRST + KEYS + rng.integers(0, VALUES, (size, pairs))
    rows, places = np.arange(size)[:, None], 1 + 3 * draw(pairs, (context - 2) // 3)
    for offset, what in enumerate((PAIR, keys, values)):
        tokens[rows, places + offset] = what
    order = draw(pairs, pairs)
    asked = context + QUESTION * np.arange(pairs)
    answers = values[rows, order]
    for offset, what in enumerate((ASK, keys[rows, order], answers)):
        tokens[:, asked + offset] = what
    targets = np.full_like(tokens, -1)
    targets[:, asked + 1] = answers
    return Batch(tokens, targets)


def repetitions(rng: np.random.Generator, size: int, length: int = LENGTH) -> Batch:
    """A random segment again and again; all but its first showing can be known."""
    period = rng.integers(length // 10, length // 2, (size, 1))
    segment = FIRST + rng.integers(0, CONFIG.vocab_size - FIRST, (size, length))
    at = np.arange(length) % period
    tokens = np.take_along_axis(segment, at, axis=1).astype(np.int32)
    targets = np.full_like(tokens, -1)
    targets[:, :-1] = np.where(np.arange(length - 1) >= period, tokens[:, 1:], -1)
    return Batch(tokens, targets)


def train(seed: int = 0, batch_size: int = 32, report=print) -> Decoder:
    """A model that answers more than 99 % of the questions, if all is well.

    Raises:
      RuntimeError: a stage did not get where the next one can begin.
    """
    import optax

    graph, parameters = nnx.split(Decoder(CONFIG, rngs=nnx.Rngs(seed)))
    parameters = jax.tree.map_with_path(_wide, parameters)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.98),
        optax.add_decayed_weights(0.01),
    )

    def one_step(state, job):
        parameters, optimizer_state = state
        batch, rate = job
        loss = functools.partial(_loss, graph)
        (_, recall), gradient = jax.value_and_grad(loss, has_aux=True)(parameters, batch)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, parameters)
        updates = jax.tree.map(lambda update: -rate * update, updates)
        return (optax.apply_updates(parameters, updates), optimizer_state), recall

    many_steps = jax.jit(lambda state, jobs: jax.lax.scan(one_step, state, jobs))
    state = parameters, optimizer.init(parameters)
    rng, started, taken = np.random.default_rng(seed), time.monotonic(), 0
    for stage in _STAGES:
        recall = 0.0
        for step in range(0, stage.steps, _STEPS_PER_DISPATCH):
            batches = [_mixed(rng, batch_size, stage) for _ in range(_STEPS_PER_DISPATCH)]
            batches = jax.tree.map(lambda *rows: np.stack(rows), *batches)
            state, recalls = many_steps(state, (batches, _rates(stage, step, taken)))
            recall, taken = float(recalls[-10:].mean()), taken + _STEPS_PER_DISPATCH
            if taken % 100 == 0:
                elapsed = time.monotonic() - started
                report(f"seed {seed}, step {taken}: recall {recall:.3f}, {elapsed:.0f} s")
            if stage.enough is not None and recall >= stage.enough:
                break
        if recall < (stage.enough or 0.98):
            raise RuntimeError(
                f"train: after {taken} steps the model of seed {seed} recalls {recall:.3f} in "
                f"contexts of {stage.context} tokens. Take another seed."
            )
    return nnx.merge(graph, state[0])


def recall_model(seed: int = 0, folder: pathlib.Path | None = None) -> Decoder:
    """A trained model: from the folder if it is there, else trained and put there."""
    folder = (folder or _cache_folder()) / f"seed-{seed}"
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        save(train(seed), folder)
    return load(folder)[0]


def _loss(graph, parameters, batch: Batch):
    """The mean over what can be known, and the share of questions answered, as training sees it."""
    import optax

    logits, _ = nnx.merge(graph, parameters)(batch.tokens)
    known = batch.targets >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch.targets, 0))
    right = known & (logits.argmax(axis=-1) == batch.targets)
    half = len(batch.tokens) // 2  # questions come first
    recall = right[:half].sum() / known[:half].sum()
    return jnp.where(known, losses, 0).sum() / known.sum(), recall


def _mixed(rng: np.random.Generator, size: int, stage: Stage) -> Batch:
    asked = questions(rng, size // 2, stage.context, stage.pairs)
    repeated = repetitions(rng, size - size // 2, asked.tokens.shape[1])
    return Batch(*(np.concatenate(parts) for parts in zip(asked, repeated, strict=True)))


def _rates(stage: Stage, step: int, taken: int) -> np.ndarray:
    """Of the next steps; the very first ones of all are smaller."""
    first, last = stage.rates
    ahead = np.arange(_STEPS_PER_DISPATCH)
    along = (step + ahead) / stage.steps
    rates = last + (first - last) * (1 + np.cos(np.pi * along)) / 2
    return (rates * np.minimum(1, (taken + 1 + ahead) / _WARM_UP)).astype(np.float32)


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
    for number in range(MODELS):
        recall_model(number)
