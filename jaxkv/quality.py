"""What a codec does to keys and values: the error of a live cache, and of samples without one."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxkv.cache.config import KVCacheConfig
from jaxkv.cache.create import create
from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.verbs import advance, append, layer
from jaxkv.codecs import Codec, Rope
from jaxkv.programs import moves_data

_ROPE_BASE = 500_000.0


class Measured(NamedTuple):
    """What a codec did to a released model, SmolLM2-135M-Instruct, on 2,048 tokens of a text.

    Attributes:
      divergence: KL from the exact cache, in nats per token.
      same: tokens whose likeliest next one is the exact cache's, as a share.
    """

    divergence: float
    same: float


# By `python -m benchmarks codecs-real`; README and `jaxkv plan --quality` show these.
MEASURED: Mapping[str, Measured] = {
    "bfloat16": Measured(0.00004, 0.995),
    "int8-centred": Measured(0.00011, 0.992),
    "int8": Measured(0.00073, 0.976),
    "float8": Measured(0.0062, 0.936),
    "stair4": Measured(0.0084, 0.936),
    "rotated4-centred": Measured(0.013, 0.924),
    "stair3": Measured(0.038, 0.875),
    "rotated4": Measured(0.041, 0.857),
    "rotated2-centred": Measured(0.32, 0.650),
}
# The rule: the first of these that fits. No other codec loses less in as few bytes.
BY_PREFERENCE = ("bfloat16", "int8-centred", "stair4", "stair3")


class VectorError(NamedTuple):
    """Relative errors: the length of all differences over that of all vectors.

    Attributes:
      keys, values: 0 for stored exactly, 1 for as bad as zeros.
    """

    keys: float
    values: float


@moves_data
def measure_error(cache: AnyCache, reference: AnyCache) -> tuple[VectorError, ...]:
    """How far each layer's keys and values are from those of another cache, to choose a codec by.

    Fill two caches with the same prompt, one of them exact, and compare:

    >>> import jax, jaxkv
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 100, 2, 64))
    >>> exact, small = (
    ...     jaxkv.advance(jaxkv.append(jaxkv.create(config), keys, values, layer=0), 100)
    ...     for codec in (jaxkv.Dense("float32"), jaxkv.Rotated(bits=4))
    ...     for config in [jaxkv.KVCacheConfig(1, 128, 2, 64, codec=codec)]
    ... )
    >>> [round(error.keys, 2) for error in measure_error(small, exact)]
    [0.08]

    Args:
      cache: whose errors are asked for.
      reference: of the same layers, heads, addressing and lengths, such as one of
        ``Dense("float32")``.

    Returns:
      The errors of each layer, over the tokens that both hold.

    Raises:
      ValueError: caches that do not hold the same tokens of the same layers.
    """
    ours, theirs = cache.config.num_layers, reference.config.num_layers
    if ours != theirs or not np.array_equal(cache.lengths, reference.lengths):
        raise ValueError(
            "measure_error compares two caches that were given the same tokens: got "
            f"{ours} and {theirs} layers, {np.asarray(cache.lengths).tolist()} and "
            f"{np.asarray(reference.lengths).tolist()} tokens."
        )
    return tuple(_layer_error(cache, reference, number) for number in range(ours))


@moves_data
def sample_error(codec: Codec, head_dim: int, *, outliers: bool, seed: int = 0) -> VectorError:
    """The error of a codec on 512 made-up tokens, for a plan before there is a model.

    Args:
      codec: a `Centred` one is told the rope that the keys are under.
      head_dim: numbers in a vector.
      outliers: as trained models have them, see `sample_vectors`; if not, Gaussian.
      seed: of the random numbers.

    >>> import jaxkv
    >>> round(sample_error(jaxkv.Int8(), 128, outliers=False).keys, 4)
    0.0065
    """
    keys, values, rope = sample_vectors(512, head_dim, outliers=outliers, seed=seed)
    config = KVCacheConfig(1, 512, 1, head_dim, codec=codec.under(rope))
    cache = append(create(config), jnp.asarray(keys), jnp.asarray(values), layer=0)
    stored = layer(advance(cache, 512), 0)
    return VectorError(*map(_relative, stored, (keys, values)))


def sample_vectors(
    tokens: int, head_dim: int, *, outliers: bool, seed: int = 0
) -> tuple[Float[np.ndarray, "tokens 1 head_dim"], Float[np.ndarray, "tokens 1 head_dim"], Rope]:
    """Keys under a rope, values, and the rope.

    Outliers are those of published models: channels of unlike size, a mean, and four pairs of low
    frequency with a mean of twenty deviations; values with channels and tokens of unlike size.
    """
    rng = np.random.default_rng(seed)
    rope = Rope.of(_ROPE_BASE, head_dim // 2 * 2)
    pairs, shape = head_dim // 2, (tokens, head_dim)
    if not outliers or pairs < 8:
        keys, values = rng.standard_normal((2, *shape))
    else:
        deviations = np.exp(0.5 * rng.standard_normal(head_dim))
        means = 0.3 * deviations * rng.standard_normal(head_dim)
        for pair in rng.choice(np.arange(pairs // 2, pairs), 4, replace=False):
            means[[pair, pair + pairs]] = rng.choice([-1, 1], 2) * np.array([20, 10])
            deviations[[pair, pair + pairs]] *= 1.5
        means[rng.integers(0, pairs // 2)] = 10
        stretch = 1 + 0.1 * rng.standard_t(4, (tokens, 1))
        keys = means + deviations * rng.standard_normal(shape) * stretch
        values = rng.standard_normal(shape) * np.exp(0.3 * rng.standard_normal(head_dim))
        values *= np.exp(0.4 * rng.standard_normal((tokens, 1)))
    angles = np.arange(tokens)[:, None] * np.asarray(rope.frequencies)
    first, second, rest = np.split(keys, [pairs, 2 * pairs], axis=1)
    cos, sin = np.cos(angles), np.sin(angles)
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    keys, values = np.concatenate(rotated, axis=1).astype(np.float32), values.astype(np.float32)
    return keys[:, None], values[:, None], rope


def _layer_error(cache: AnyCache, reference: AnyCache, number: int) -> VectorError:
    held = _held(reference, number)
    return VectorError(
        *(
            _relative(np.asarray(ours)[held], np.asarray(exact)[held])
            for ours, exact in zip(layer(cache, number), layer(reference, number), strict=True)
        )
    )


def _held(cache: AnyCache, number: int) -> np.ndarray:
    """Which slots of a layer hold a token, shaped to pick vectors by."""
    group, number = cache.config.locate(number)
    index = cache.groups[group].index
    held = np.asarray(index.key_positions(number, index.lengths, 0, index.extent)) >= 0
    return held if held.ndim == index.lengths.ndim + 1 else np.swapaxes(held, -1, -2)


def _relative(stored: np.ndarray | Array, exact: np.ndarray) -> float:
    wide = np.asarray(exact, np.float64)
    return float(np.linalg.norm(np.asarray(stored, np.float64) - wide) / np.linalg.norm(wide))
