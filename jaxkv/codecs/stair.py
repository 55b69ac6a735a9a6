"""Keys with more bits where queries look, and values rotated by a Hadamard matrix."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32, UInt8

from jaxkv.codecs import hadamard
from jaxkv.codecs.centres import (
    centres_of,
    in_a_row,
    is_nearer_to_second,
    sums_over,
    where_all,
)
from jaxkv.codecs.codec import (
    Codec,
    LeafSpec,
    LeafSpecs,
    Leaves,
    Positions,
    State,
    Steps,
    Tokens,
    Vectors,
    leaf_specs,
    state_specs,
)
from jaxkv.codecs.least import number_of_least
from jaxkv.codecs.offsets import Offsets, chosen
from jaxkv.codecs.packing import pack, packed_bytes, unpack
from jaxkv.codecs.rope import Rope, to_12_bits
from jaxkv.codecs.rotated import Rotated
from jaxkv.codecs.signs import signs_of, with_signs, without_signs

# Widths of codes less the codec's bits, and of how many eighths of the numbers.
_STEPS = ((2, 1), (1, 2), (0, 2), (-1, 3))
# The positive levels of the quantizer with the least squared error for a normal distribution (Max,
# 1960; Lloyd, 1982) among those of whole numbers of 8 bits, and what one is in deviations: with 5
# and 6 bits that takes .3 and 1.3 % more of it, and no more with fewer.
_LEVELS = {
    1: (43,),
    2: (15, 50),
    3: (10, 31, 55, 88),
    4: (5, 15, 25, 36, 48, 62, 79, 104),
    5: (2, 7, 12, 17, 22, 27, 32, 38, 44, 50, 57, 65, 74, 85, 99, 120),
    6: (
        *(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31),
        *(33, 35, 38, 41, 44, 47, 50, 53, 57, 61, 65, 70, 76, 83, 92, 106),
    ),
}
_UNITS = {1: 19 / 1024, 2: 31 / 1024, 3: 25 / 1024, 4: 27 / 1024, 5: 7 / 256, 6: 9 / 256}
# A scale is 2 ** ((code - 64) / 8); code 0 stands for no scale and 127 for a vector with NaNs.
_OCTAVE, _ONE, _NOT_FINITE = 8, 64, 127
_FRACTIONS = np.round(2.0 ** (np.arange(_OCTAVE) / _OCTAVE) * 2048) / 2048  # 12 bits
_VERSION = 2  # of these levels
# Scales that are tried, in eighths of an octave around what fits a normal distribution.
_TRIED = np.arange(-5, 13)
# Where a number's level is looked up: numbers up to 6 deviations, in parts of 1 / 64.
_CELLS, _PER_DEVIATION = 384, 64
# Of the mean of all pairs' variances, in one pair's, so that a few tokens make no wild ones.
_TOKENS_OF_ALL = 1.0
_WEIGHT_BITS = 20  # of the largest term, so that a sum of 512 whole ones is exact


@dataclasses.dataclass(frozen=True)
class Stair(Codec):
    """Keys in codes of ``bits`` + 2, + 1, + 0 and - 1; values as `Rotated` has them.

    Keys and values are stored less one of two centres, as by `Centred`. What is left of a key is
    put in the order in which pairs of its numbers, which the rope rotates together, matter to
    attention: by the energy that queries have there times the pair's own variance. Each number is
    divided by its pair's deviation. The first eighth of the numbers takes ``bits + 2`` each, the
    next two eighths ``bits + 1``, two more ``bits``, and the rest ``bits - 1``, under one scale in
    seven bits: the one of eighteen that leaves attention's scores the least squared error. (Bits by
    the variance of a channel are those of transform coding: Huang and Schultheiss, 1963.)

    A vector of 64 numbers takes ``bits + 1/4`` bits a number. Centres, order, deviations and
    weights, about 21 bytes a number of a head, are state: of the first `append`, whose queries a
    model of `jaxkv.models` gives, or of `jaxkv.calibrate`. Without queries all pairs count as
    having the same energy. What is said of `Centred` holds for them too.

    Stored: leaf ``key_codes``, uint8, the four runs one after the other, each laid out as
    `packing.pack` says; ``key_scales``, uint8; and the values' ``value_codes`` and
    ``value_scales``. The top bit of a scale says which centre.

    Args:
      bits: 4, 3 or 2.
      rope: as for `Centred`.

      version: of the numbers that codes stand for, 2. Files name it; 1 is refused.

    Raises:
      ValueError: another number of bits, or another version.

    >>> import jaxkv
    >>> codec = jaxkv.Stair(bits=4, rope=jaxkv.Rope.of(500_000, rotary_dim=64))
    >>> config = jaxkv.KVCacheConfig(30, 8192, num_kv_heads=3, head_dim=64, codec=codec)
    >>> config.bytes_per_token == 30 * 3 * ((33 + 1) + (32 + 2))
    True
    """

    bits: int = 4
    rope: Rope | None = None
    # Of what codes stand for. Files that do not say it were written by jaxkv 0.10 or before.
    version: int = dataclasses.field(default=_VERSION, repr=False, metadata={"unsaid": 1})

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise ValueError(f"Stair codec: bits must be 4, 3 or 2, got {self.bits!r}.")
        if self.version != _VERSION:
            raise ValueError(
                f"Stair codec: version must be {_VERSION}, got {self.version!r}. Codes stand for "
                "other numbers since jaxkv 0.11, so what jaxkv 0.10 or before wrote with this "
                "codec is not read: read it with that version, or write the cache anew."
            )

    @property
    def name(self) -> str:
        return f"stair{self.bits}"

    def under(self, rope: Rope | None) -> "Stair":
        """The same for a model with this rope, if none was named."""
        return self if self.rope else dataclasses.replace(self, rope=rope)

    @property
    def sides(self) -> tuple[Codec, Codec]:
        return self, self._values

    @property
    def asks_queries(self) -> bool:
        return True

    @property
    def learns_over_devices(self) -> bool:
        return True

    def leaves(self, head_dim: int) -> LeafSpecs:
        size = sum(packed_bytes(count, width) for width, count in self._runs(head_dim))
        values = leaf_specs(self._values, head_dim)
        return {
            "key_codes": LeafSpec((size,), "uint8", sides=1),
            "key_scales": LeafSpec((), "uint8", sides=1),
            **{f"value_{name}": spec._replace(sides=1) for name, spec in values.items()},
        }

    def state(self, head_dim: int) -> LeafSpecs:
        pairs = (_num_pairs(head_dim),)
        return {
            "means": LeafSpec((head_dim,), "float32"),
            "sinks": LeafSpec((head_dim,), "float32"),
            "order": LeafSpec(pairs, "uint8", sides=1),
            "per_deviation": LeafSpec(pairs, "float32", sides=1),
            "weights": LeafSpec(pairs, "float32", sides=1),
        }

    def encode(self, vectors: Vectors) -> Leaves:
        """Under constants that were never set."""
        shape = vectors.shape[1:]
        positions = jnp.zeros(shape[:-2], jnp.int32)
        return self.encode_tokens(vectors, self._unset(shape[-2], shape[-1]), positions)

    def decode(self, leaves: Leaves, head_dim: int, dtype: jnp.dtype) -> Vectors:
        return self._decoded(leaves, head_dim, dtype, rotated=False)

    def decode_rotated(self, leaves: Leaves, head_dim: int, dtype: jnp.dtype) -> Vectors:
        return self._decoded(leaves, head_dim, dtype, rotated=True)

    def rotate(self, queries: Vectors) -> Vectors:
        return queries

    def unrotate(self, outputs: Vectors) -> Vectors:
        return hadamard.unrotate(outputs)

    def rotate_values(self, values: Vectors) -> Vectors:
        return hadamard.rotate(values)

    def update_state(
        self,
        state: State,
        vectors: Tokens,
        positions: Positions,
        lengths: Int[Array, "*batch"],
        *,
        queries: Float[Array, "*batch tokens heads head_dim"] | None = None,
        axis: str | None = None,
    ) -> State:
        """The constants of these tokens if the cache is empty and they were never set."""
        empty = jnp.all(lengths == 0)
        # They are the same on all devices, which must agree on what they send each other.
        unset = ~_is_set(state) & (empty if axis is None else True)
        return _set_once(self, unset, state, vectors, positions, queries, empty, axis)

    # A jit of its own: outside one, a loop is compiled anew on each call.
    @functools.partial(jax.jit, static_argnames="self")
    def encode_tokens(self, vectors: Tokens, state: State, positions: Positions) -> Leaves:
        wide = vectors.astype(jnp.float32)
        each = [wide - own for own in self.centres(state).each_at(positions[..., None])]
        scaled = [self._sorted(keys, state) for keys, _ in each]
        weights = self._weights(state, wide.shape[-1])
        root = to_12_bits(jnp.sqrt(weights))
        second = is_nearer_to_second(*(numbers * root for numbers in scaled))
        codes, scales = self._nearest(chosen([*scaled], second), weights)
        values_second = is_nearer_to_second(each[0][1], each[1][1])
        values = self._values.encode(chosen([each[0][1], each[1][1]], values_second))
        values["scales"] = with_signs(values["scales"], values_second)
        scales |= second.astype(jnp.uint8) << 7
        leaves = {"key_codes": codes[None], "key_scales": scales[None]}
        return leaves | {f"value_{name}": leaf[None] for name, leaf in values.items()}

    def decode_tokens(
        self,
        leaves: Leaves,
        head_dim: int,
        dtype: jnp.dtype,
        state: State,
        positions: Int[Array, "*batch tokens #kv_heads"],
        *,
        rotated: bool = False,
    ) -> Tokens:
        keys = self._unsorted(self._key_numbers(leaves, head_dim), state)
        key_second = leaves["key_scales"][0] >> 7 == 1
        value_second = signs_of(leaves["value_scales"])[0]
        offsets = self.centres(state)
        keys += chosen([both[0] for both in offsets.each_at(positions)], key_second)
        values = self._value_numbers(leaves, head_dim, rotated=rotated)
        rotate = self.rotate_values if rotated else lambda centre: centre
        values += chosen([rotate(both[1]) for both in offsets.centres], value_second)
        return jnp.stack([keys, values]).astype(dtype)

    def steps(self, head_dim: int) -> Steps:
        runs = tuple(self._runs(head_dim))
        return Steps(runs, tuple(_both_signs(width) for width, _ in runs), _scales_of_bytes())

    def stepped(
        self, queries: Float[Array, "batch kv_heads tokens group head_dim"], state: State
    ) -> Float[Array, "batch kv_heads tokens group head_dim"]:
        head_dim = queries.shape[-1]
        places = self._places(state, head_dim)[:, None, None]
        found = jnp.take_along_axis(queries, jnp.broadcast_to(places, queries.shape), axis=-1)
        units = np.concatenate(
            [np.full(count, _UNITS[width], np.float32) for width, count in self._runs(head_dim)]
        )
        return found * units / self._per_deviation(state, head_dim)[:, None, None]

    @property
    def _values(self) -> Rotated:
        return Rotated(self.bits)

    def centres(self, state: State) -> Offsets:
        return Offsets(state["means"], self.rope, state["sinks"])

    def _unset(self, kv_heads: int, head_dim: int) -> State:
        specs = state_specs(self, head_dim).items()
        return {
            name: jnp.zeros((sides, kv_heads, *shape), dtype)
            for name, (shape, dtype, sides) in specs
        }

    def _decoded(
        self, leaves: Leaves, head_dim: int, dtype: jnp.dtype, *, rotated: bool
    ) -> Vectors:
        shape = leaves["key_scales"].shape[1:]
        state, positions = self._unset(shape[-1], head_dim), jnp.zeros((*shape[:-1], 1), jnp.int32)
        return self.decode_tokens(leaves, head_dim, dtype, state, positions, rotated=rotated)

    def _runs(self, head_dim: int) -> list[tuple[int, int]]:
        """The widths of codes, and the numbers that have them: in pairs, but for one left over."""
        borders, eighths = [0], 0
        for _, share in _STEPS:
            eighths += share
            borders.append(head_dim if eighths == 8 else head_dim * eighths // 16 * 2)
        counts = (after - before for before, after in itertools.pairwise(borders))
        runs = [(self.bits + more, count) for (more, _), count in zip(_STEPS, counts, strict=True)]
        return [(width, count) for width, count in runs if count]

    # Numbers in the order of pairs, mates side by side, and each over its pair's deviation.

    def _places(self, state: State, head_dim: int) -> Int[Array, "kv_heads head_dim"]:
        """Which number of a key stands at each place."""
        pairs = jnp.asarray(_pairs(self.rope, head_dim))
        order = state["order"][0].astype(jnp.int32)
        order = jnp.where(_is_set(state), order, jnp.arange(order.shape[-1], dtype=jnp.int32))
        return pairs[order].reshape(len(order), -1)[:, :head_dim]

    def _per_deviation(self, state: State, head_dim: int) -> Float[Array, "kv_heads head_dim"]:
        """Of the number at each place."""
        each = jnp.where(_is_set(state), state["per_deviation"][0], 1)
        return jnp.repeat(each, 2, axis=-1)[:, :head_dim]

    def _weights(self, state: State, head_dim: int) -> Float[Array, "kv_heads head_dim"]:
        each = jnp.where(_is_set(state), state["weights"][0], 1)
        return jnp.repeat(each, 2, axis=-1)[:, :head_dim]

    def _sorted(self, keys: Array, state: State) -> Float[Array, "*shape kv_heads head_dim"]:
        places = jnp.broadcast_to(self._places(state, keys.shape[-1]), keys.shape)
        return jnp.take_along_axis(keys, places, axis=-1) * self._per_deviation(
            state, keys.shape[-1]
        )

    def _unsorted(self, numbers: Array, state: State) -> Float[Array, "*shape kv_heads head_dim"]:
        head_dim = numbers.shape[-1]
        back = jnp.argsort(self._places(state, head_dim), axis=-1)
        keys = numbers / self._per_deviation(state, head_dim)
        return jnp.take_along_axis(keys, jnp.broadcast_to(back, keys.shape), axis=-1)

    # Numbers to codes and back.

    def _nearest(
        self, numbers: Float[Array, "*shape head_dim"], weights: Float[Array, "#heads head_dim"]
    ) -> tuple[UInt8[Array, "*shape bytes"], UInt8[Array, "*shape"]]:
        """Codes, and the code of the scale that leaves the least weighted squared error.

        All that is summed is whole, and all else is done number by number: so the result is the
        same to the bit in every program.
        """
        finite = jnp.isfinite(numbers).all(axis=-1, keepdims=True)
        numbers = jnp.where(finite, numbers, 0)
        head_dim = numbers.shape[-1]
        sizes = jnp.minimum(jnp.abs(numbers), np.float32(2.0**20))
        squares = sizes * sizes * weights
        most = jnp.max(squares, axis=-1, keepdims=True)
        unit = _power_of_two(_WEIGHT_BITS - _exponent(most))
        energy = _total(squares * unit)
        shares = _total(weights * np.float32(2.0**12))
        mean = energy.astype(jnp.float32) / shares.astype(jnp.float32)
        middle = _eighths_of_root(mean * (np.float32(2.0**12) / unit))
        first, tables, levels = map(jnp.asarray, _tables(tuple(self._runs(head_dim))))

        def level_numbers(code: Array) -> Int32[Array, "*shape head_dim"]:
            fraction, power = _scale(_ONE * 2 - code)  # one over the scale, to 12 bits
            cells = sizes * fraction * power * np.float32(_PER_DEVIATION)
            cells = jnp.minimum(cells, _CELLS - 1).astype(jnp.int32)
            return tables.at[first + cells].get(mode="promise_in_bounds")

        def code_of(number: Array | int) -> Int32[Array, "*shape 1"]:
            return jnp.clip(middle + number + int(_TRIED[0]), 1, _NOT_FINITE - 1)

        def error(number: Array | int) -> Int32[Array, "*shape 1"]:
            code = code_of(number)
            level = levels.at[level_numbers(code)].get(mode="promise_in_bounds")
            fraction, power = _scale(code)
            left = sizes - level * (fraction * power)  # 12 bits times 12: exact
            left = jnp.minimum(left * left * weights, most)
            return _total(left * unit)

        worst = jnp.full_like(energy, np.iinfo(np.int32).max)
        code = code_of(number_of_least(error, len(_TRIED), worst=worst))
        positive = level_numbers(code)
        packed = self._packed(positive, numbers < 0)
        code = jnp.where(most == 0, 0, code)
        code = jnp.where(finite, code, _NOT_FINITE)
        return packed, code[..., 0].astype(jnp.uint8)

    def _packed(self, levels: Array, negative: Bool[Array, "*shape head_dim"]) -> Array:
        runs, start, base = [], 0, 0
        for width, count in self._runs(levels.shape[-1]):
            half = 1 << width - 1
            own = levels[..., start : start + count] - base
            codes = jnp.where(negative[..., start : start + count], half - 1 - own, half + own)
            runs.append(pack(codes.astype(jnp.uint8), width))
            start, base = start + count, base + half
        return jnp.concatenate(runs, axis=-1)

    def _key_numbers(self, leaves: Leaves, head_dim: int) -> Float[Array, "*shape head_dim"]:
        packed, scales = leaves["key_codes"][0], leaves["key_scales"][0]
        runs, start = [], 0
        for width, count in self._runs(head_dim):
            size = packed_bytes(count, width)
            codes = unpack(packed[..., start : start + size], width, count).astype(jnp.int32)
            runs.append(jnp.asarray(_levels(width)).at[codes].get(mode="promise_in_bounds"))
            start += size
        code = (scales & 127).astype(jnp.int32)[..., None]
        fraction, power = _scale(code)
        scale = jnp.where(code == 0, 0, fraction * power)
        scale = jnp.where(code == _NOT_FINITE, jnp.nan, scale)
        return jnp.concatenate(runs, axis=-1) * scale

    def _value_numbers(self, leaves: Leaves, head_dim: int, *, rotated: bool) -> Array:
        own = {
            "codes": leaves["value_codes"][0],
            "scales": without_signs(leaves["value_scales"])[0],
        }
        decode = self._values.decode_rotated if rotated else self._values.decode
        return decode(own, head_dim, jnp.dtype("float32"))


# A jit of its own: outside one, a cond is compiled anew on each call.
@functools.partial(jax.jit, static_argnames=("codec", "axis"))
def _set_once(
    codec: Stair,
    unset: Array,
    state: State,
    vectors: Tokens,
    positions: Positions,
    queries: Array | None,
    empty: Array,
    axis: str | None,
) -> State:
    def fresh() -> State:
        found = _constants(codec, vectors, positions, queries, axis)
        return found if axis is None else where_all(empty, axis, found, state)

    return lax.cond(unset, fresh, lambda: dict(state))


def _constants(
    codec: Stair,
    vectors: Tokens,
    positions: Positions,
    queries: Array | None,
    axis: str | None,
) -> State:
    both, head_dim = in_a_row(vectors, positions, codec.rope), vectors.shape[-1]
    real = (positions >= 0).reshape(-1)
    mean, first = centres_of(both, positions.reshape(-1), axis)
    left = jnp.stack([both[0] - centre[0] for centre in (mean, first)])
    squares = _of_pairs(codec.rope, jnp.where(jnp.isfinite(left), left * left, 0))
    lengths = squares.sum(axis=-1, keepdims=True)
    squares = jnp.where(lengths[1] < lengths[0], squares[1], squares[0])
    later = (positions > 0).reshape(-1)  # of the first tokens nothing is left
    squares = jnp.where(later[:, None, None], squares, 0)
    sums = jnp.sum(squares, axis=0), jnp.sum(later, dtype=jnp.float32)
    total, count = sums_over(axis, sums)
    shared = jnp.mean(total, axis=-1, keepdims=True) / jnp.maximum(count, 1)
    variance = (total + _TOKENS_OF_ALL * shared) / (count + _TOKENS_OF_ALL)
    variance = jnp.where(shared > 0, variance, 1)
    energy = jnp.ones_like(variance)
    if queries is not None:
        wide = queries.astype(jnp.float32).reshape(len(real), variance.shape[0], -1, head_dim)
        wide = jnp.where(jnp.isfinite(wide) & real[:, None, None, None], wide, 0)
        energy = sums_over(axis, jnp.mean(_of_pairs(codec.rope, wide * wide), axis=(0, 2)))
    product = energy * variance
    if head_dim % 2:
        product = product.at[:, -1].set(0)  # a number without a mate stays the last
    order = jnp.argsort(-product, axis=-1)
    ordered = jnp.take_along_axis(product, order, axis=-1)
    most = jnp.where(ordered[:, :1] > 0, ordered[:, :1], 1)
    per_deviation = 1 / jnp.sqrt(jnp.take_along_axis(variance, order, axis=-1))
    return {
        "means": mean,
        "sinks": first,
        "order": order.astype(jnp.uint8)[None],
        "per_deviation": to_12_bits(per_deviation)[None],
        "weights": to_12_bits(jnp.maximum(ordered / most, np.float32(2.0**-12)))[None],
    }


def _is_set(state: State) -> Bool[Array, ""]:
    return jnp.any(state["weights"] != 0)


def _num_pairs(head_dim: int) -> int:
    return (head_dim + 1) // 2


def _pairs(rope: Rope | None, head_dim: int) -> Int[np.ndarray, "pairs 2"]:
    """The numbers of each pair, neighbours if they are not rotated. The last may be past all."""
    rotated = rope.rotary_dim if rope else 0
    numbers = np.arange(rotated, dtype=np.int32)
    pairs = numbers.reshape(-1, 2) if rope and rope.interleaved else numbers.reshape(2, -1).T
    rest = np.arange(rotated, 2 * _num_pairs(head_dim), dtype=np.int32).reshape(-1, 2)
    return np.concatenate([pairs, rest])


def _of_pairs(rope: Rope | None, squares: Float[Array, "*shape head_dim"]) -> Array:
    """The mean of each pair's."""
    head_dim = squares.shape[-1]
    even = jnp.pad(squares, [(0, 0)] * (squares.ndim - 1) + [(0, head_dim % 2)])
    return even[..., _pairs(rope, head_dim)].mean(axis=-1)


@functools.cache
def _tables(
    runs: tuple[tuple[int, int], ...],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each number where its table begins; cells to levels' numbers; and these levels."""
    first: list[int] = []
    cells: list[np.ndarray] = []
    levels: list[float] = []
    middles = (np.arange(_CELLS) + 0.5) / _PER_DEVIATION
    for number, (width, count) in enumerate(runs):
        own = np.asarray(_LEVELS[width], np.float32) * np.float32(_UNITS[width])
        first += [number * _CELLS] * count
        cells.append(len(levels) + np.searchsorted((own[1:] + own[:-1]) / 2, middles))
        levels += own.tolist()
    return (
        np.asarray(first, np.int32),
        np.concatenate(cells).astype(np.int32),
        np.asarray(levels, np.float32),
    )


def _both_signs(width: int) -> tuple[int, ...]:
    """What codes of so many bits stand for, in units of their own."""
    positive = _LEVELS[width]
    return (*(-level for level in reversed(positive)), *positive)


def _levels(width: int) -> Float[np.ndarray, " codes"]:
    """What codes of so many bits stand for."""
    return np.asarray(_both_signs(width), np.float32) * np.float32(_UNITS[width])


def _scales_of_bytes() -> Float[np.ndarray, " bytes"]:
    """Of the leaf of scales; negative where the top bit names the second centre."""
    code = np.arange(1 << 7)
    scales = _FRACTIONS[code % _OCTAVE] * 2.0 ** (code // _OCTAVE - _ONE // _OCTAVE)
    scales[0], scales[_NOT_FINITE] = 0, np.nan
    return np.concatenate([scales, np.copysign(scales, -1)]).astype(np.float32)


def _scale(code: Int32[Array, "*shape"]) -> tuple[Array, Array]:
    """``2 ** ((code - 64) / 8)``, a number of 12 bits and a power of two."""
    octaves = (code >> 3) - _ONE // _OCTAVE
    fractions = jnp.asarray(_FRACTIONS, jnp.float32)
    return fractions.at[code & _OCTAVE - 1].get(mode="promise_in_bounds"), _power_of_two(octaves)


def _eighths_of_root(square: Float[Array, "*shape 1"]) -> Int32[Array, "*shape 1"]:
    """The code of the scale next below the root of a number."""
    bits = lax.bitcast_convert_type(square, jnp.int32)
    quarters = jnp.asarray(2.0 ** (np.arange(1, 4) / 4), jnp.float32)
    mantissa = lax.bitcast_convert_type(bits & 0x7FFFFF | 127 << 23, jnp.float32)
    above = jnp.sum(mantissa >= quarters, axis=-1, keepdims=True, dtype=jnp.int32)
    return _ONE + 4 * _exponent(square) + above


def _exponent(numbers: Float[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Of a number that is not negative, within what the arithmetic of scales can take."""
    exponent = (lax.bitcast_convert_type(numbers, jnp.int32) >> 23) - 127
    return jnp.clip(exponent, -60, 60)


def _power_of_two(exponent: Int32[Array, "*shape"]) -> Float[Array, "*shape"]:
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _total(numbers: Float[Array, "*shape count"]) -> Int32[Array, "*shape 1"]:
    """The sum of whole numbers, the same in any order."""
    whole = jnp.round(numbers).astype(jnp.int32)
    return jnp.sum(whole, axis=-1, keepdims=True, dtype=jnp.int32)
