"""How many tokens each layer, sequence and head may keep: plain numbers, known beforehand."""

import operator
from collections.abc import Sequence

import jax
import numpy as np

from jaxkv.kv_cache import KVCache

# One number, or one a layer; a float is a share of each sequence's tokens.
Keep = int | float | Sequence[int] | Sequence[float]


def limits_of(cache: KVCache, keep: Keep) -> np.ndarray:
    """Tokens that each head of each sequence may keep, ``int32[layers, sequences]``.

    Raises:
      ValueError: numbers of tokens or layers that do not fit the cache.
      TypeError: a share of lengths that are traced.
    """
    layers = cache.config.num_layers
    budgets = list(keep) if isinstance(keep, Sequence | np.ndarray) else [keep] * layers
    if len(budgets) != layers:
        raise ValueError(f"keep must be one number or {layers}, one a layer, got {len(budgets)}.")
    rows = [_of_sequences(cache, budget) for budget in budgets]
    return np.asarray(rows, np.int32)


def host_lengths(cache: KVCache, why: str) -> np.ndarray:
    """The length of each sequence.

    Raises:
      TypeError: they are traced, and ``why`` needs them.
    """
    if isinstance(cache.lengths, jax.core.Tracer):
        raise TypeError(
            f"inside jit the lengths are not known, so {why}: give numbers of tokens, or compress "
            "outside jit."
        )
    return np.asarray(cache.lengths).reshape(-1)


def pyramid(num_layers: int, mean: int, *, least: int) -> tuple[int, ...]:
    """Budgets that fall from the first layer to the last in equal steps, of a given mean.

    Cai et al., "PyramidKV: dynamic KV cache compression based on pyramidal information
    funneling" (2024), section 4.2: low layers spread their attention, high ones focus it.

    Args:
      num_layers: how many.
      mean: tokens a layer, on average; the memory is that of `mean` in all.
      least: tokens of the last layer.

    Raises:
      ValueError: ``least`` is more than the mean, or less than one.

    >>> pyramid(4, mean=100, least=40)
    (160, 120, 80, 40)
    """
    if not 1 <= least <= mean:
        raise ValueError(f"pyramid: least must be from 1 to the mean of {mean}, got {least}.")
    exact = np.linspace(2 * mean - least, least, num_layers) if num_layers > 1 else [mean]
    return tuple(round(float(budget)) for budget in exact)


def _of_sequences(cache: KVCache, budget: int | float) -> np.ndarray:
    sequences = cache.config.batch_size or 1
    if isinstance(budget, float | np.floating):
        if not 0 < budget <= 1:
            raise ValueError(f"keep as a share of tokens must be in (0, 1], got {budget}.")
        lengths = host_lengths(cache, "keep cannot be a share of them")
        return np.maximum(np.ceil(budget * lengths), 1).astype(np.int32)
    count = operator.index(budget)
    if not 1 <= count <= cache.index.extent:
        raise ValueError(
            f"keep must be from 1 to the {cache.index.extent} slots of a sequence, got {count}."
        )
    return np.full(sequences, count, np.int32)
