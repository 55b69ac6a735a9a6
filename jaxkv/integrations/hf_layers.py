"""What a cache of transformers holds: the tokens of each layer, or a refusal by name.

Classes are known by their names: transformers is optional, and which of them it has depends on
its version. What is not known here may keep something beside keys and values.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

# (keys, values) of each layer.
Pairs = list[tuple[np.ndarray, np.ndarray]]

_CACHES = ("Cache", "DynamicCache", "StaticCache", "QuantizedCache")
# And whatever is derived from QuantizedLayer.
_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "StaticSlidingWindowLayer")


def tokens_of(hf_cache: Any) -> Pairs:
    """Keys and values of the tokens alone, ``[batch, kv_heads, tokens, head_dim]`` per layer."""
    if isinstance(hf_cache, Sequence | Iterator | np.ndarray):
        return [_checked_pair(number, pair) for number, pair in enumerate(hf_cache)]
    name = type(hf_cache).__name__
    if name == "EncoderDecoderCache":
        raise TypeError(
            "from_hf: an EncoderDecoderCache is two caches. Give its self_attention_cache; what "
            "its cross_attention_cache holds of the encoder is not appended to."
        )
    if name not in _CACHES:
        raise TypeError(
            "from_hf: takes a DynamicCache, StaticCache or QuantizedCache, or pairs (keys, "
            f"values) per layer, got a {name}, which may keep other state than keys and values. "
            "If the model goes on without that state, give [(keys, values), ...] of its layers."
        )
    return [_tokens_of_layer(number, layer) for number, layer in enumerate(hf_cache.layers)]


def _checked_pair(number: int, pair: Any) -> tuple[np.ndarray, np.ndarray]:
    if len(pair) != 2:
        raise ValueError(
            f"from_hf: layer {number} must be a pair (keys, values), got {len(pair)} entries. Give "
            "the transformers cache itself, not what iterating over it yields."
        )
    keys, values = pair
    return as_numpy(keys), as_numpy(values)


def _tokens_of_layer(number: int, layer: Any) -> tuple[np.ndarray, np.ndarray]:
    name = type(layer).__name__
    quantized = "QuantizedLayer" in [base.__name__ for base in type(layer).__mro__]
    where = f"from_hf: layer {number}, a {name},"
    if name not in _LAYERS and not quantized:
        raise TypeError(
            f"{where} may keep other state than the keys and values of tokens. Only caches whose "
            "layers are all of plain attention can go on here."
        )
    if not layer.is_initialized or (layer.keys.ndim != 4 and not quantized):
        raise ValueError(
            f"{where} is empty: give the cache after transformers has run the model over it."
        )
    keys, values = map(as_numpy, _dequantized(layer) if quantized else (layer.keys, layer.values))
    counted = int(layer.get_seq_length())
    held = keys.shape[-2]
    if name == "StaticLayer":
        held = _last_written(keys, values)
    elif name == "StaticSlidingWindowLayer":
        held = min(held, counted)
    if held != counted:
        raise ValueError(
            f"{where} counts {counted} tokens and holds {held}. All of them are needed here: a "
            "transformers.DynamicCache() made without a config keeps them."
        )
    return keys[..., :held, :], values[..., :held, :]


def _last_written(keys: np.ndarray, values: np.ndarray) -> int:
    """Slots up to the last one that is not all zeros: nothing else tells which were written."""
    written = (keys != 0).any((0, 1, 3)) | (values != 0).any((0, 1, 3))
    return int(written.nonzero()[0].max(initial=-1)) + 1


def _dequantized(layer: Any) -> list[Any]:
    """Its quantized tokens, and after them those that wait to be."""
    import torch

    sides = (layer._quantized_keys, layer.keys), (layer._quantized_values, layer.values)
    return [
        torch.cat([layer._dequantize(old), new], -2) if new.numel() else layer._dequantize(old)
        for old, new in sides
    ]


def as_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor, or what numpy takes, as an array of the same dtype."""
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu().contiguous()
    if str(tensor.dtype) == "torch.bfloat16":
        import torch

        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()
