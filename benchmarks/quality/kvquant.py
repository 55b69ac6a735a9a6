"""KVQuant with 1 % of outliers (Hooper et al., 2024), emulated.

Keys are rounded before their rope, each channel over a range that was calibrated on another text;
values over the range of a token, all heads together. Both go to the nearest of a layer's few
levels, which k-means found on the calibration text, without the paper's Fisher weights. What is
outside its range is kept as it is: keys beyond their channel's percentiles .5 and 99.5, and the
largest and the smallest half a percent of a token's values. The first token is kept too. No Q-Norm.

What is counted is what is stored: codes, 32 bits an outlier (its value and where it is), at the 1 %
that was asked for, and a scale and a zero of 16 bits for a token's values. As in
`benchmarking/kvquant/simquant_module_quantizer.py` of SqueezeAILab/KVQuant.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jaxkv
from benchmarks.quality.emulated import Emulated
from jaxkv.codecs import LeafSpec, LeafSpecs, Rope, State

_OUTLIERS = 0.01
_BINS, _ROUNDS = 4096, 100  # of k-means, over a histogram


@dataclasses.dataclass(frozen=True)
class KVQuant(Emulated):
    """What it would decode to, in float32; `calibrated` gives its state.

    Attributes:
      kv_heads: of the model; the values of all of them share a range.
    """

    code_bits: int
    kv_heads: int
    head_dim: int = 64
    rope: Rope | None = None

    @property
    def name(self) -> str:
        return f"KVQuant-{self.code_bits}, 1 %"

    @property
    def bits(self) -> float:
        numbers = self.kv_heads * self.head_dim
        keys = 32 * _OUTLIERS
        values = (32 * 2 * _each_end(numbers) + 32) / numbers
        return self.code_bits + (keys + values) / 2

    def under(self, rope: Rope | None) -> "KVQuant":
        return self if self.rope else dataclasses.replace(self, rope=rope)

    def state(self, head_dim: int) -> LeafSpecs:
        """Of a channel of keys its range; of a layer's keys and of its values the levels."""
        ends = LeafSpec((head_dim,), "float32", sides=1)
        return {"low": ends, "high": ends, "levels": LeafSpec((1 << self.code_bits,), "float32")}

    def encode(self, vectors: Array) -> dict[str, Array]:
        return {"data": vectors.astype(jnp.float32)}

    def encode_tokens(self, vectors: Array, state: State, positions: Array) -> dict[str, Array]:
        both = vectors.astype(jnp.float32)
        of_keys, of_values = state["levels"][:, 0]
        keys = self.rope.unturned(both[0], positions[..., None])
        keys = _rounded(keys, state["low"][0], state["high"][0], of_keys)
        keys = _turned(self.rope, keys, positions[..., None])
        values = both[1].reshape(*both.shape[1:-2], -1)
        values = _rounded(values, *_token_range(values), of_values).reshape(both.shape[1:])
        first = (positions == 0)[..., None, None]
        return self.encode(jnp.where(first, both, jnp.stack([keys, values])))


def exact_vectors(model, tokens: np.ndarray) -> Array:
    """Of a text to calibrate on: ``[layers, 2, tokens, kv_heads, head_dim]``, keys under rope."""
    config = model.cache_config(max_context_length=len(tokens), codec=jaxkv.Dense("float32"))
    return jax.jit(lambda model, tokens: model(tokens, jaxkv.create(config))[1].storage["data"])(
        model, jnp.asarray(tokens)
    )


def calibrated(vectors: Array, codec: KVQuant) -> State:
    """The state of all layers, from `exact_vectors`."""
    positions = jnp.arange(1, vectors.shape[2])[:, None]
    layers = [_of_layer(codec, *sides, positions) for sides in vectors[:, :, 1:]]
    return {name: jnp.stack([layer[name] for layer in layers]) for name in layers[0]}


def _of_layer(codec: KVQuant, keys: Array, values: Array, positions: Array) -> State:
    """All but the first token's, which is kept as it is."""
    keys = np.asarray(codec.rope.unturned(keys, positions))
    low, high = np.quantile(keys, [_OUTLIERS / 2, 1 - _OUTLIERS / 2], axis=0)
    values = np.asarray(values).reshape(len(values), -1)
    found = [
        _levels(_unit(numbers, *ends), codec.code_bits)
        for numbers, ends in ((keys, (low, high)), (values, map(np.asarray, _token_range(values))))
    ]
    levels = np.broadcast_to(np.stack(found)[:, None], (2, codec.kv_heads, 1 << codec.code_bits))
    ends = {"low": low[None], "high": high[None], "levels": levels}
    return {name: jnp.asarray(array, jnp.float32) for name, array in ends.items()}


def _each_end(numbers: int) -> int:
    """Outliers of a token at each end."""
    return max(1, round(numbers * _OUTLIERS / 2))


def _token_range(values: Array) -> tuple[Array, Array]:
    """The ends of each token's values but its outliers."""
    ordered, count = jnp.sort(jnp.asarray(values), axis=-1), _each_end(values.shape[-1])
    return ordered[..., count, None], ordered[..., -1 - count, None]


def _unit(numbers, low, high):
    """-1 at the low end, and 1 at the high one."""
    return (numbers - (low + high) / 2) / ((high - low) / 2)


def _rounded(numbers: Array, low: Array, high: Array, levels: Array) -> Array:
    unit = _unit(numbers, low, high)
    nearest = levels[jnp.searchsorted((levels[1:] + levels[:-1]) / 2, unit)]
    inside = nearest * (high - low) / 2 + (low + high) / 2
    return jnp.where(jnp.abs(unit) > 1, numbers, inside)


def _turned(rope: Rope, keys: Array, positions: Array) -> Array:
    cos, sin = rope.cos_sin(positions)
    first, second, rest = rope.pairs(keys)
    return rope.joined(first * cos - second * sin, second * cos + first * sin, rest)


def _levels(unit: np.ndarray, bits: int) -> np.ndarray:
    """k-means of the numbers from -1 to 1, from quantiles on."""
    inside = unit[np.abs(unit) <= 1]
    counts, edges = np.histogram(inside, _BINS, (-1, 1))
    middles = (edges[1:] + edges[:-1]) / 2
    levels = np.quantile(inside, (np.arange(1 << bits) + 0.5) / (1 << bits))
    for _ in range(_ROUNDS):
        cells = np.searchsorted((levels[1:] + levels[:-1]) / 2, middles)
        weight = np.bincount(cells, counts, len(levels))
        total = np.bincount(cells, counts * middles, len(levels))
        levels = np.where(weight > 0, total / np.maximum(weight, 1), levels)
    return levels.astype(np.float32)
