"""What tells one model from another: its config, its rope and its weights."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt32

# What is compared, in words that an error can show.
Fingerprint = dict[str, str]


def fingerprint(model: Any) -> Fingerprint:
    """What a saved cache says of the model that wrote it.

    Args:
      model: a pytree of arrays, such as a model of `jaxkv.models`: its ``config``'s fields and a
        checksum of all weights. Or, for a model that is a function, a name of your own choice;
        or facts by name, all text.

    Returns:
      Facts by name. Two fingerprints are of one model when they are equal.

    Raises:
      TypeError: a function, which has no weights to look at.

    >>> fingerprint("my-model, step 1000")
    {'name': 'my-model, step 1000'}
    """
    if isinstance(model, str):
        return {"name": model}
    if isinstance(model, Mapping) and all(isinstance(fact, str) for fact in model.values()):
        return dict(model)
    paths, _ = jax.tree_util.tree_flatten_with_path(model)
    weights = [(jax.tree_util.keystr(path), leaf) for path, leaf in paths if _is_weight(leaf)]
    if not weights:
        raise TypeError(
            f"model must be a pytree of arrays, a name, or facts by name, got {model!r}. "
            "Name a model that is a function, as in model='my-model, step 1000'."
        )
    config = getattr(model, "config", None)
    fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    facts = {field.name: repr(getattr(config, field.name)) for field in fields}
    return {"class": type(model).__name__, **facts, "weights": _checksum(weights)}


def differences(saved: Fingerprint, given: Fingerprint) -> list[str]:
    """What tells two fingerprints apart, in words."""
    return [
        f"{name} is {saved.get(name, 'absent')} in the file and {given.get(name, 'absent')} here"
        for name in sorted(saved.keys() | given.keys())
        if saved.get(name) != given.get(name)
    ]


def _is_weight(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _checksum(weights: list[tuple[str, Array]]) -> str:
    """A hash of names, shapes, dtypes and bits. Weights are summed on their device."""
    sums = jax.device_get([_weighted_sums(jnp.asarray(leaf)) for _, leaf in weights])
    facts = [
        (name, leaf.dtype.name, tuple(leaf.shape), pair.tolist())
        for (name, leaf), pair in zip(weights, sums, strict=True)
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


@jax.jit
def _weighted_sums(leaf: Array) -> UInt32[Array, "2"]:
    """Two sums of the bits modulo 2**32, the weights odd: no change of one number is missed."""
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    width = min(8 * leaf.dtype.itemsize, 32)
    bits = lax.bitcast_convert_type(leaf, f"uint{width}").ravel().astype(jnp.uint32)
    weight = 2 * lax.iota(jnp.uint32, bits.size) + 1
    mixed = (weight ^ (weight >> 13)) * jnp.uint32(0x9E3779B1) | jnp.uint32(1)
    return jnp.stack([jnp.sum(bits * weight), jnp.sum(bits * mixed)])
