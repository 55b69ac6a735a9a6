"""Caches of Hugging Face transformers, both ways: ``[batch, heads, tokens, head_dim]`` a layer."""

from collections.abc import Iterable
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from jaxkv.addressing import Addressing, Contiguous
from jaxkv.cache import advance, append, check, layer
from jaxkv.codecs import Codec, Dense
from jaxkv.config import KVCacheConfig
from jaxkv.kv_cache import KVCache
from jaxkv.memory.allocate import allocate

# (keys, values) of each layer.
Pairs = list[tuple[np.ndarray, np.ndarray]]


def to_hf(cache: KVCache) -> Pairs:
    """The keys and values of each layer, decoded, as transformers keeps them.

    Args:
      cache: whose sequences are all of one length, and hold all their tokens.

    Returns:
      ``(keys, values)`` a layer, numpy ``[batch, kv_heads, tokens, head_dim]`` in the codec's
      dtype (float32 if it is a quantized one); a batch of 1 for a single sequence.

    Raises:
      ValueError: ragged lengths, or a ring that has dropped tokens.

    >>> import jaxkv
    >>> config = jaxkv.KVCacheConfig(2, 8, num_kv_heads=1, head_dim=4)
    >>> ((keys, values), _) = to_hf(jaxkv.advance(jaxkv.create(config), 3))
    >>> keys.shape
    (1, 1, 3, 4)
    """
    check(cache)
    lengths = np.asarray(cache.lengths).reshape(-1)
    if (lengths != lengths[0]).any():
        raise ValueError(
            f"to_hf: transformers keeps sequences of one length, got {lengths.tolist()}. Take "
            "those of each length with jaxkv.select, or truncate to the shortest."
        )
    index = cache.index
    positions = np.asarray(index.key_positions(0, index.lengths, 0, index.extent))
    order = np.argsort(positions.reshape(-1, index.extent)[0])
    held = order[index.extent - np.count_nonzero(positions.reshape(-1, index.extent)[0] >= 0) :]
    if len(held) < lengths[0]:
        raise ValueError(
            f"to_hf: the {cache.config.addressing.name} cache keeps {len(held)} of its "
            f"{lengths[0]} tokens; transformers needs all."
        )

    def turned(vectors: Any) -> np.ndarray:
        batched = np.asarray(vectors).reshape(len(lengths), index.extent, *vectors.shape[-2:])
        return np.ascontiguousarray(np.swapaxes(batched[:, held], 1, 2))

    layers = (layer(cache, number) for number in range(cache.config.num_layers))
    return [(turned(keys), turned(values)) for keys, values in layers]


def to_dynamic_cache(cache: KVCache) -> Any:
    """`to_hf` as a ``transformers.DynamicCache`` of torch tensors, to go on with there.

    Raises:
      ImportError: without torch and transformers.
      ValueError: as `to_hf`.
    """
    import torch
    from transformers import DynamicCache

    def tensor(array: np.ndarray) -> Any:
        if array.dtype == jnp.bfloat16:  # numpy has none that torch takes
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    hf_cache = DynamicCache()
    for number, (keys, values) in enumerate(to_hf(cache)):
        hf_cache.update(tensor(keys), tensor(values), number)
    return hf_cache


def from_hf(
    hf_cache: Any,
    *,
    max_context_length: int,
    codec: Codec | None = None,
    addressing: Addressing = Contiguous(),
    single: bool = False,
    device: Any = None,
) -> KVCache:
    """A cache with the tokens of one that transformers filled.

    The rope must be that of the model that goes on here; that of `jaxkv.models` is.

    Args:
      hf_cache: a ``DynamicCache`` (anything with ``layers`` that have ``keys`` and ``values``), or
        pairs of them a layer, torch or numpy, ``[batch, kv_heads, tokens, head_dim]``.
      max_context_length: tokens that one sequence may hold.
      codec: how vectors are stored; `Dense` of their dtype if None.
      addressing: which slot holds which token.
      single: one sequence without a batch axis, from a batch of 1.
      device: where the cache lives, a `jax.Device`.

    Raises:
      ValueError: shapes that differ from layer to layer, or more than one sequence for a single.
      CacheFullError: more tokens than ``max_context_length``.

    >>> import numpy as np
    >>> pair = np.ones((1, 2, 3, 4), np.float32), np.ones((1, 2, 3, 4), np.float32)
    >>> from_hf([pair, pair], max_context_length=8)
    KVCache(2 layers, 2 KV heads x 4, float32, contiguous, 1 sequence, [3] of 8 tokens, 1.0 kB)
    """
    pairs = [tuple(_as_numpy(part) for part in pair) for pair in _pairs_of(hf_cache)]
    shapes = sorted({part.shape for pair in pairs for part in pair})
    if len(shapes) != 1 or len(shapes[0]) != 4 or (single and shapes[0][0] != 1):
        wanted = "[1" if single else "[batch"
        raise ValueError(
            f"from_hf: keys and values must be {wanted}, kv_heads, tokens, head_dim], the same in "
            f"all layers, got {[list(shape) for shape in shapes]}."
        )
    batch, kv_heads, tokens, head_dim = shapes[0]
    config = KVCacheConfig(
        num_layers=len(pairs),
        max_context_length=max_context_length,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        batch_size=None if single else batch,
        codec=Dense(pairs[0][0].dtype.name) if codec is None else codec,
        addressing=addressing,
    )
    cache = cast(KVCache, allocate(config, device=device))
    at_once = cache.index.chunk or max(tokens, 1)
    for start in range(0, tokens, at_once):
        for number, pair in enumerate(pairs):
            parts = (np.swapaxes(part[:, :, start : start + at_once], 1, 2) for part in pair)
            keys, values = (jnp.asarray(part[0] if single else part) for part in parts)
            cache = append(cache, keys, values, layer=number)
        cache = advance(cache, min(at_once, tokens - start))
    return cache


def _pairs_of(hf_cache: Any) -> Iterable[tuple[Any, Any]]:
    if hasattr(hf_cache, "layers"):
        return [(layer.keys, layer.values) for layer in hf_cache.layers]
    return hf_cache


def _as_numpy(tensor: Any) -> np.ndarray:
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu().contiguous()
    if str(tensor.dtype) == "torch.bfloat16":
        import torch

        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()
