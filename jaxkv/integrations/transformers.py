"""Caches of Hugging Face transformers, both ways: ``[batch, heads, tokens, head_dim]`` a layer."""

from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from jaxkv.addressing import Addressing, Contiguous
from jaxkv.cache.checks import check_stateless
from jaxkv.cache.config import KVCacheConfig
from jaxkv.cache.groups import in_its_group
from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.kv_cache import KVCache
from jaxkv.cache.shards import check_whole
from jaxkv.cache.verbs import advance, append, check
from jaxkv.cache.verbs import layer as vectors_of
from jaxkv.codecs import Codec, Dense
from jaxkv.integrations.hf_layers import Pairs, as_numpy, tokens_of
from jaxkv.memory.allocate import allocate


def to_hf(cache: AnyCache) -> Pairs:
    """The keys and values of each layer, decoded, as transformers keeps them.

    Args:
      cache: whose sequences are all of one length, and hold all their tokens.

    Returns:
      ``(keys, values)`` per layer that keeps its own, numpy
      ``[batch, kv_heads, tokens, head_dim]`` in the codec's dtype (float32 if it is a quantized
      one); a batch of 1 for a single sequence.

    Raises:
      ValueError: ragged lengths, tokens that a ring or compression has dropped, latents, or
        cross-attention.

    >>> import jaxkv
    >>> config = jaxkv.KVCacheConfig(2, 8, num_kv_heads=1, head_dim=4)
    >>> ((keys, values), _) = to_hf(jaxkv.advance(jaxkv.create(config), 3))
    >>> keys.shape
    (1, 1, 3, 4)
    """
    check_stateless(cache, "to_hf", "jaxkv.state and jaxkv.layer give what each layer keeps.")
    if cache.cross:
        raise ValueError(
            "to_hf: transformers keeps what cross-attention reads in a cache of its own, and this "
            "gives one of the text. jaxkv.layer and jaxkv.cross_layer give the vectors of each."
        )
    check_whole(cache, "to_hf")
    check(cache)
    lengths = np.asarray(cache.lengths).reshape(-1)
    if (lengths != lengths[0]).any():
        raise ValueError(
            f"to_hf: transformers keeps sequences of one length, got {lengths.tolist()}. Take "
            "those of each length with jaxkv.select, or truncate to the shortest."
        )
    config = cache.config
    if any(group.values_in_keys for group in config.groups):
        raise ValueError(
            "to_hf: transformers keeps the parts of a latent apart, in an order of its own, and "
            "this cache has values_in_keys. jaxkv.layer gives its vectors."
        )
    own = sorted(layer for group in range(len(config.groups)) for layer in config.layers_of(group))
    return [_in_order(cache, layer=number) for number in own]


@in_its_group
def _in_order(cache: KVCache, *, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """One layer's tokens from the first to the newest, whatever slots they are in."""
    index = cache.index
    batch, tokens = cache.config.batch_size or 1, int(cache.lengths.reshape(-1)[0])
    positions = np.asarray(index.key_positions(layer, index.lengths, 0, index.extent))
    positions = positions.reshape(batch, -1, index.extent)  # of all heads at once, or of each
    held = (positions >= 0).sum(-1)
    if (held < tokens).any():
        raise ValueError(
            f"to_hf: the {cache.config.addressing.name} cache keeps {held.min()} of its "
            f"{tokens} tokens; transformers needs all."
        )
    slots = np.argsort(positions)[..., index.extent - tokens :, None]

    def ordered(vectors: Any) -> np.ndarray:
        by_slot = np.asarray(vectors).reshape(batch, index.extent, *vectors.shape[-2:])
        return np.take_along_axis(by_slot.swapaxes(1, 2), slots, 2)

    keys, values = vectors_of(cache, layer)
    return ordered(keys), ordered(values)


def to_dynamic_cache(cache: AnyCache) -> Any:
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
    attention_mask: Any = None,
    codec: Codec | None = None,
    addressing: Addressing = Contiguous(),
    single: bool = False,
    device: Any = None,
) -> KVCache:
    """A cache with the tokens of one that transformers filled.

    The rope must be that of the model that goes on here; that of `jaxkv.models` is. Positions must
    count the real tokens alone, as in ``generate``: whoever calls a transformers model with a
    batch padded on the left passes ``position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0)``.

    Args:
      hf_cache: a ``DynamicCache``, ``StaticCache`` or ``QuantizedCache``, or pairs (keys, values)
        per layer, torch or numpy, ``[batch, kv_heads, tokens, head_dim]``, of tokens alone.
      max_context_length: tokens that one sequence may hold.
      attention_mask: which of the cache's tokens are real, ``[batch, tokens]``, for a batch that
        was padded on either side; all of them if None. Padding is left out.
      codec: how vectors are stored; `Dense` of their dtype if None.
      addressing: which slot holds which token.
      single: one sequence without a batch axis, from a batch of 1.
      device: where the cache lives, a `jax.Device`.

    Raises:
      TypeError: a cache or a layer that keeps something other than the keys and values of tokens.
      ValueError: layers that are empty or have dropped tokens, shapes that differ from layer to
        layer, more than one sequence for a single, or a mask of another shape or with padding
        between tokens.
      CacheFullError: more tokens than ``max_context_length``.

    >>> import numpy as np
    >>> pair = np.ones((2, 2, 3, 4), np.float32), np.ones((2, 2, 3, 4), np.float32)
    >>> from_hf([pair, pair], max_context_length=8, attention_mask=[[1, 1, 1], [0, 1, 1]])
    KVCache(2 layers, 2 KV heads x 4, float32, contiguous, 2 sequences, [3, 2] of 8 tokens, 2.0 kB)
    """
    pairs = tokens_of(hf_cache)
    shapes = sorted({part.shape for pair in pairs for part in pair})
    if len(shapes) != 1 or len(shapes[0]) != 4 or (single and shapes[0][0] != 1):
        wanted = "[1" if single else "[batch"
        raise ValueError(
            f"from_hf: keys and values must be {wanted}, kv_heads, tokens, head_dim], the same in "
            f"all layers, got {[list(shape) for shape in shapes]}."
        )
    batch, kv_heads, tokens, head_dim = shapes[0]
    first, lengths = _real_tokens(attention_mask, batch, tokens)
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
    for start in range(0, int(lengths.max()), at_once):
        size = min(at_once, tokens - start)
        columns = first[:, None] + np.arange(start, start + size)
        columns = np.minimum(columns, tokens - 1)[:, :, None, None]  # past a sequence: padding
        real = np.clip(lengths - start, 0, size).astype(np.int32)
        num_tokens = real[0] if single else real
        for number, pair in enumerate(pairs):
            parts = (np.take_along_axis(np.swapaxes(part, 1, 2), columns, 1) for part in pair)
            keys, values = (jnp.asarray(part[0] if single else part) for part in parts)
            cache = append(cache, keys, values, layer=number, num_tokens=num_tokens)
        cache = advance(cache, num_tokens)
    return cache


def _real_tokens(mask: Any, batch: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The column of each sequence's first real token, and how many there are."""
    if mask is None:
        return np.zeros(batch, int), np.full(batch, tokens)
    real = as_numpy(mask).astype(bool)
    if real.shape != (batch, tokens):
        raise ValueError(
            f"from_hf: attention_mask must be [batch, tokens] = {[batch, tokens]}, a column for "
            f"each token in the cache, got {list(real.shape)}. The last token that generate "
            "returns is not in its cache yet."
        )
    first, lengths = real.argmax(1), real.sum(1)
    columns = np.arange(tokens)
    in_one_run = (columns >= first[:, None]) & (columns < (first + lengths)[:, None])
    if (real != in_one_run).any():
        row = int((real != in_one_run).any(1).argmax())
        raise ValueError(
            f"from_hf: sequence {row} of attention_mask has padding between its tokens, "
            f"{real[row].astype(int).tolist()}, and what their positions are is not known. Pad "
            "on the left to generate with transformers."
        )
    return first, lengths
