"""How many tokens each layer, sequence and head may keep: plain numbers, known beforehand."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxkv.cache.kv_cache import KVCache
from jaxkv.cache.shards import books_of, check_sequences_whole
from jaxkv.compression.scoring import LayerScores, for_all_slots, positions_of_slots
from jaxkv.devices import is_concrete

# One number, one per layer, or one per layer, sequence and head; a float is a share of tokens.
Keep = int | float | Sequence[int] | Sequence[float] | np.ndarray


def is_by_head(keep: Keep) -> bool:
    """Whether heads keep different numbers of tokens."""
    return np.ndim(keep) > 1


def limits_of(cache: KVCache, keep: Keep) -> np.ndarray:
    """Tokens that each head may keep, ``int32[layers, *batch, kv_heads]``.

    Raises:
      ValueError: numbers of tokens, layers or heads that do not fit the cache.
      TypeError: a share of lengths that are traced.
    """
    config = cache.config
    layers, batch, kv_heads = config.num_layers, config.batch_shape, config.num_kv_heads
    if is_by_head(keep):
        limits = np.asarray(keep)
        if limits.shape not in ((layers, kv_heads), (layers, *batch, kv_heads)):
            raise ValueError(
                f"keep for each head must be [layers, kv_heads] = {[layers, kv_heads]}"
                f"{' or [layers, batch, kv_heads]' * len(batch)}, got {list(limits.shape)}."
            )
        for count in limits.ravel():
            _check_count(cache, count)
        limits = limits.reshape(layers, *limits.shape[1:-1] or (1,) * len(batch), kv_heads)
    else:
        budgets = list(keep) if isinstance(keep, Sequence | np.ndarray) else [keep] * layers
        limits = np.stack([_of_sequences(cache, budget) for budget in budgets])
        limits = limits.reshape(layers, *batch, 1)
    return np.ascontiguousarray(np.broadcast_to(limits, (layers, *batch, kv_heads)), np.int32)


def adaptive(
    cache: KVCache,
    scores: LayerScores,
    keep: int,
    *,
    least: float = 0.2,
    across_layers: bool = False,
) -> Int[np.ndarray, "layers *batch kv_heads"]:
    """Budgets for `jaxkv.compress` that give heads with many high scores more tokens.

    Feng et al., "Ada-KV: optimizing KV cache eviction by adaptive budget allocation for efficient
    LLM inference" (2024), section 3.3: the heads of a layer share ``kv_heads * keep`` tokens, which
    go to the highest scores wherever they are. Kim et al., "KVzip" (2025), section 4.1, share one
    budget among the heads of all layers. They depend on the content, so a step is compiled anew for
    each new longest run.

    Args:
      cache: that was scored.
      scores: as `jaxkv.compress` takes them, comparable between the heads that share, as attention
        weights are.
      keep: tokens per head, on average.
      least: share of ``keep`` that every head has, and at least one token; give it room for the
        ``sinks`` and ``recent`` tokens of `jaxkv.compress`.
      across_layers: whether the heads of all layers share, and not those of each.
    """
    check_sequences_whole(cache, "adaptive")
    positions = np.asarray(positions_of_slots(cache))
    given, lowest = np.asarray(for_all_slots(cache, scores)), float(np.finfo(np.float32).min)
    ranked = np.nan_to_num(given, nan=lowest, posinf=np.inf, neginf=lowest)
    ranked = np.where(positions >= 0, ranked, -np.inf)
    if not across_layers:
        return _shared(ranked, keep, least)
    by_sequence = np.moveaxis(ranked, 0, -3)  # [*batch, layers, kv_heads, slots]
    *batch, layers, kv_heads, slots = by_sequence.shape
    counts = _shared(by_sequence.reshape(*batch, layers * kv_heads, slots), keep, least)
    return np.moveaxis(counts.reshape(*batch, layers, kv_heads), -2, 0)


def _shared(
    ranked: Float[np.ndarray, "*pools heads slots"], keep: int, least: float
) -> Int[np.ndarray, "*pools heads"]:
    """How many of the highest scores of each pool are of each head."""
    *pools, heads, _ = ranked.shape
    best_first = -np.sort(-ranked, axis=-1)
    best_first[..., : max(1, int(least * keep))] = np.inf
    # Equal scores, such as infinite ones, are taken from each head in turn.
    in_turn = np.swapaxes(best_first, -1, -2).reshape(*pools, -1)
    chosen = np.argsort(-in_turn, axis=-1, kind="stable")[..., : heads * keep] % heads
    return (chosen[..., None] == np.arange(heads)).sum(axis=-2).astype(np.int32)


def host_lengths(cache: KVCache, why: str) -> np.ndarray:
    """The length of each sequence.

    Raises:
      TypeError: they are traced, and ``why`` needs them.
    """
    if not is_concrete(cache.lengths):
        raise TypeError(
            f"inside jit the lengths are not known, so {why}: give numbers of tokens, or compress "
            "outside jit."
        )
    return books_of(cache)[0].reshape(-1)


def pyramid(num_layers: int, mean: int, *, least: int) -> tuple[int, ...]:
    """Budgets that fall from the first layer to the last in equal steps, of a given mean.

    Cai et al., "PyramidKV: dynamic KV cache compression based on pyramidal information
    funneling" (2024), section 4.2: low layers spread their attention, high ones focus it.

    Args:
      num_layers: how many.
      mean: tokens per layer, on average; the memory is that of `mean` in all.
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


def share_of(share: float | np.floating, lengths: np.ndarray | int) -> np.ndarray:
    """A share of sequences of these lengths in tokens, at least one."""
    return np.maximum(np.ceil(share * lengths), 1).astype(np.int32)


def _of_sequences(cache: KVCache, budget: int | float) -> np.ndarray:
    sequences = cache.config.batch_size or 1
    if isinstance(budget, float | np.floating):
        if not 0 < budget <= 1:
            raise ValueError(f"keep as a share of tokens must be in (0, 1], got {budget}.")
        return share_of(budget, host_lengths(cache, "keep cannot be a share of them"))
    return np.full(sequences, _check_count(cache, budget), np.int32)


def _check_count(cache: KVCache, budget: Any) -> int:
    count = operator.index(budget)
    if not 1 <= count <= cache.index.extent:
        raise ValueError(
            f"keep must be from 1 to the {cache.index.extent} slots of a sequence, got {count}."
        )
    return count
