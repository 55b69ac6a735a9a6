"""The parts that every decoder here is made of.

A module's path and its parameters' names are those of the Hugging Face checkpoint, so that a
tensor's name says where it goes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxkv.attention import attend
from jaxkv.attention.masks import visible
from jaxkv.cache.ancestors import Ancestors
from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.kv_cache import Layer, NumTokens
from jaxkv.cache.verbs import append, next_positions
from jaxkv.devices import by_platform
from jaxkv.native import cannot_multiply, products

_PARTS = 32  # of a row, where they are summed apart
INIT_STD = 0.02  # of GPT-2; weights whose outputs add up over layers are given a smaller one


def matmul(
    x: Float[Array, "*batch tokens features"],
    weight: Float[Array, "_ _"],
    *,
    axis: int = 0,
    dtype: Any = None,
) -> Float[Array, "*batch tokens out"]:
    """Contract the features with one axis of a weight, summing in float32.

    Args:
      axis: 0 for a weight ``[features, out]``, 1 for a table ``[out, features]``.
      dtype: of the result; that of ``x`` if None.
    """
    return matmuls(x, [weight], axis=axis, dtype=dtype)[0]


def matmuls(
    x: Float[Array, "*batch tokens features"],
    weights: Sequence[Float[Array, "_ _"]],
    *,
    axis: int = 0,
    dtype: Any = None,
) -> list[Float[Array, "*batch tokens out"]]:
    """`matmul` with each of several weights: in decode on a CPU, one call instead of as many."""
    return _matmuls(x, tuple(weights), axis=axis, dtype=jnp.dtype(dtype or x.dtype))


# Traced once for all layers of a model, in the form of each platform.
@functools.partial(jax.jit, static_argnames=("axis", "dtype"))
def _matmuls(x: Array, weights: tuple[Array, ...], axis: int, dtype: jnp.dtype) -> list[Array]:
    def on_cpu(x: Array, weights: tuple[Array, ...]) -> list[Array]:
        if cannot_multiply(x, weights) is None:
            return [result.astype(dtype) for result in products(x, weights, axis)]
        return [_on_cpu_by_xla(x, weight, axis).astype(dtype) for weight in weights]

    def on_gpu(x: Array, weights: tuple[Array, ...]) -> list[Array]:
        # Of a single row XLA writes the products with small weights out before it sums them, and of
        # two it reads weights no faster than of eight, as many as a tensor core takes.
        return [_of_rows(8, x, weight, axis, dtype) for weight in weights]

    def on_tpu(x: Array, weights: tuple[Array, ...]) -> list[Array]:
        return [_by_xla(x, weight, axis, dtype) for weight in weights]

    return by_platform({"cpu": on_cpu, "gpu": on_gpu, "tpu": on_tpu}, x, weights)


def _on_cpu_by_xla(x: Array, weight: Array, axis: int) -> Array:
    # For a single row of bfloat16 XLA's CPU backend converts the whole weight to float32, in
    # every call; for two it has a kernel that reads bfloat16 (measured: 5x faster, no copy).
    least = 2 if x.dtype == jnp.bfloat16 else 1
    return _of_rows(least, x, weight, axis, jnp.float32)


def _of_rows(least: int, x: Array, weight: Array, axis: int, dtype: Any) -> Array:
    """The product, of no fewer rows than this: beside others if there are fewer."""
    rows = math.prod(x.shape[:-1])
    if not 0 < rows < least:
        return _by_xla(x, weight, axis, dtype)
    padded = jnp.pad(x.reshape(rows, -1), ((0, least - rows), (0, 0)))
    return _by_xla(padded, weight, axis, dtype)[:rows].reshape(*x.shape[:-1], -1)


def _by_xla(x: Array, weight: Array, axis: int, dtype: Any) -> Array:
    contracted = (((x.ndim - 1,), (axis,)), ((), ()))
    return lax.dot_general(x, weight, contracted, preferred_element_type=dtype)


class Linear(nnx.Module):
    """``x @ weight + bias`` with ``weight [in, out]``, the transpose of what PyTorch keeps."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        bias: bool = False,
        std: float = INIT_STD,
    ):
        normal = jax.nn.initializers.normal(std)
        self.weight = nnx.Param(normal(rngs.params(), (in_features, out_features), dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, dtype)) if bias else None

    def __call__(
        self, x: Float[Array, "*shape in_features"]
    ) -> Float[Array, "*shape out_features"]:
        return linears(x, self)[0]


def linears(
    x: Float[Array, "*shape in_features"], *layers: Linear
) -> list[Float[Array, "*shape out_features"]]:
    """What each of several layers makes of the same input."""
    results = matmuls(x, [layer.weight[...] for layer in layers])
    return [
        result if layer.bias is None else result + layer.bias[...]
        for result, layer in zip(results, layers, strict=True)
    ]


class Embedding(nnx.Module):
    """A table of vectors, ``weight [size, features]``."""

    def __init__(self, size: int, features: int, *, rngs: nnx.Rngs, dtype: Any):
        normal = jax.nn.initializers.normal(INIT_STD)
        self.weight = nnx.Param(normal(rngs.params(), (size, features), dtype))

    def __call__(self, ids: Int[Array, "*shape"]) -> Float[Array, "*shape features"]:
        """The vectors of ids; NaN for an id that the table does not have."""
        return jnp.take(self.weight[...], ids, axis=0, mode="fill")


@functools.partial(jax.jit, static_argnames="eps")
def unit(x: Float[Array, "*shape features"], eps: float) -> Float[Array, "*shape features"]:
    """Vectors whose numbers have a mean square of one; float32."""
    wide = x.astype(jnp.float32)

    def at_once(squares: Array) -> Array:
        return jnp.mean(squares, axis=-1, keepdims=True)

    def in_parts(squares: Array) -> Array:
        parts = jnp.split(at_once(squares.reshape(_PARTS, -1)), _PARTS)
        return functools.reduce(jnp.add, parts).reshape(*x.shape[:-1], 1) / _PARTS

    # Of a whole row by itself XLA makes a kernel of one block of threads; parts of it are summed by
    # the kernel that makes the row.
    single = x.size == x.shape[-1] and x.size % _PARTS == 0
    on_gpu = in_parts if single else at_once
    squares = wide * wide
    mean = by_platform({"cpu": at_once, "gpu": on_gpu, "tpu": at_once}, squares)
    return wide * lax.rsqrt(mean + eps)


class RMSNorm(nnx.Module):
    """Zhang and Sennrich, "Root mean square layer normalization" (2019); in float32.

    With ``plus_one`` vectors are multiplied by one plus the weight, and rounded after (Gemma).
    """

    def __init__(self, features: int, *, eps: float, dtype: Any, plus_one: bool = False):
        self.weight = nnx.Param((jnp.zeros if plus_one else jnp.ones)(features, dtype))
        self.eps, self.plus_one = eps, plus_one

    def __call__(self, x: Float[Array, "*shape features"]) -> Float[Array, "*shape features"]:
        normed = unit(x, self.eps)
        if self.plus_one:
            return (normed * (1 + self.weight[...].astype(jnp.float32))).astype(x.dtype)
        return self.weight[...] * normed.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Ba et al., "Layer normalization" (2016); in float32."""

    def __init__(self, features: int, *, eps: float, dtype: Any, bias: bool = True):
        self.weight = nnx.Param(jnp.ones(features, dtype))
        self.bias = nnx.Param(jnp.zeros(features, dtype)) if bias else None
        self.eps = eps

    def __call__(self, x: Float[Array, "*shape features"]) -> Float[Array, "*shape features"]:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        scale = lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        normed = centred * scale * self.weight[...].astype(jnp.float32)
        if self.bias is not None:
            normed += self.bias[...].astype(jnp.float32)
        return normed.astype(x.dtype)


# Names of kinds -> norms.
NORMS: dict[str, Callable[..., nnx.Module]] = {
    "rms": RMSNorm,
    "rms plus one": functools.partial(RMSNorm, plus_one=True),
    "layer": LayerNorm,
    "layer without bias": functools.partial(LayerNorm, bias=False),
}


class Step(NamedTuple):
    """What a call says of its tokens.

    Attributes:
      num_tokens: how many are real, of each sequence; all if None.
      ancestors: which come before which, where they form a tree, as in `jaxkv.attend`.
    """

    num_tokens: NumTokens | None = None
    ancestors: Ancestors | None = None


class Passed(dict[Layer, tuple[Array, Array]]):
    """Stands in for a cache in a text without one, where layers read what others would keep.

    By the number of a layer, its keys and values.
    """


def attend_causal(
    cache: AnyCache | Passed | None,
    queries: Float[Array, "*batch tokens heads head_dim"],
    keys: Float[Array, "*batch tokens kv_heads head_dim"] | None,
    values: Float[Array, "*batch tokens kv_heads value_dim"] | None,
    *,
    layer: Layer,
    step: Step,
    scale: float,
    source: int | None = None,
    window: int | None = None,
    aligned: bool = False,
    **options: Any,
) -> tuple[Float[Array, "*batch tokens heads value_dim"], AnyCache | Passed | None]:
    """Append to the cache and attend over it; without one, attend over the tokens given.

    Args:
      keys: None for a layer that reads those of another.
      values: None for a cache that has them in its keys, and where there are no keys.
      source: the layer whose keys and values it reads, if not its own.
      window, aligned: the newest tokens that a query sees, or of them, those of its own chunk.
      **options: ``softcap`` and ``sink_logits``, as in `jaxkv.attend`.

    Raises:
      ValueError: the layer sees chunks of the text, and its cache does not keep them.
    """
    if isinstance(cache, Passed):
        if keys is not None and values is not None:
            cache[layer] = keys, values
        keys, values = cache[layer if source is None else source]
    if cache is None or isinstance(cache, Passed):
        assert keys is not None
        assert values is not None
        options |= {"window": window, "aligned": aligned}
        return _attend_uncached(queries, keys, values, scale, **options), cache
    if aligned and window is not None:  # what a query sees is said by the cache alone
        _check_chunks(cache, layer, window)
    else:
        options["window"] = window
    num_tokens = step.num_tokens
    if keys is not None:
        cache = append(cache, keys, values, layer=layer, num_tokens=num_tokens, queries=queries)
    options |= {"ancestors": step.ancestors, "scale": scale}
    return attend(cache, queries, layer=layer, num_tokens=num_tokens, **options), cache


def _check_chunks(cache: AnyCache, layer: Layer, size: int) -> None:
    addressing = cache.groups[cache.config.locate(layer)[0]].config.addressing
    if not addressing.aligned or addressing.window != size:
        raise ValueError(
            f"layer {layer} attends within chunks of {size} tokens, and its cache has "
            f"{addressing}. Expected jaxkv.Chunked({size}) or jaxkv.Paged(window={size}, "
            "aligned=True): create the cache from the model's own cache_config."
        )


def _attend_uncached(
    queries: Array,
    keys: Array,
    values: Array,
    scale: float,
    *,
    window: int | None = None,
    aligned: bool = False,
    softcap: float | None = None,
    sink_logits: Float[Array, " heads"] | None = None,
) -> Array:
    """All tokens at once; scores and softmax in float32, gradients through both products."""
    *batch, tokens, kv_heads, head_dim = keys.shape
    grouped = queries.reshape(*batch, tokens, kv_heads, -1, head_dim)
    wide = {"preferred_element_type": jnp.float32}
    scores = jnp.einsum("...qkgd,...skd->...kgqs", grouped, keys, **wide) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    positions = jnp.arange(tokens, dtype=jnp.int32)
    seen = visible(positions, positions, window, aligned=aligned)
    scores = jnp.where(seen, scores, -jnp.inf)
    if sink_logits is not None:  # as a token before all others, whose value is zero
        sink_logits = sink_logits.astype(jnp.float32).reshape(kv_heads, -1, 1, 1)
        column = jnp.broadcast_to(sink_logits, (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([column, scores], axis=-1), axis=-1)[..., 1:]
    else:
        weights = jax.nn.softmax(scores, axis=-1)
    mixed = jnp.einsum("...kgqs,...skd->...qkgd", weights.astype(values.dtype), values, **wide)
    return mixed.reshape(*queries.shape[:-1], -1).astype(queries.dtype)


def check_tokens(
    tokens: Int[Array, "*batch tokens"],
    cache: AnyCache | None,
    max_positions: int | None = None,
    *,
    step: Step = Step(),
) -> None:
    """Refuse what a model cannot read.

    Raises:
      TypeError: tokens that are not integers.
      ValueError: a shape that does not fit the cache, more positions than the model has, or a tree
        without a cache.
    """
    if cache is None and step.ancestors is not None:
        raise ValueError("ancestors= are of tokens that go into a cache, and there is none.")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens must be an integer array, got {tokens.dtype}.")
    batch = tokens.shape[:-1] if cache is None else cache.config.batch_shape
    if tokens.ndim == 0 or tokens.shape[:-1] != batch:
        axes = [*map(str, batch), "tokens"]
        raise ValueError(f"tokens must be [{', '.join(axes)}], got {list(tokens.shape)}.")
    longest = tokens.shape[-1] if cache is None else cache.config.max_context_length
    if max_positions is not None and longest > max_positions:
        raise ValueError(
            f"this model has {max_positions} learned positions, and the context is {longest} "
            f"tokens: give at most {max_positions}, as max_context_length if there is a cache."
        )


def positions_of(
    tokens: Int[Array, "*batch tokens"], cache: AnyCache | None, step: Step
) -> Int[Array, "*batch tokens"]:
    """Where tokens stand in their texts: after the cache, or from 0 on."""
    if cache is None:
        return jnp.arange(tokens.shape[-1], dtype=jnp.int32)
    return next_positions(cache, tokens.shape[-1], ancestors=step.ancestors)


# Names that configs give them -> functions.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "tanh": jnp.tanh,
}
