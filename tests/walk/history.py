"""The tokens that a cache was given, as plain lists, and what attention over them must give.

It knows nothing of slots, pages, blocks and memory. Of a codec it knows what each vector becomes.
"""

import copy
import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import jaxkv
from tests.oracle import attention, jit

# The largest error of a codec, as a share of the lengths of a vector and of its centre.
ROUNDING = {
    "float32": 1e-6,
    "float16": 1e-3,
    "bfloat16": 1 / 256,
    "float8": 0.07,
    "int8": 0.03,
    "rotated4": 0.2,
    "rotated3": 0.4,
    "rotated2": 0.75,
}


class Token(NamedTuple):
    """One token in one layer, float64 ``[kv_heads, head_dim]``, as the codecs give it back."""

    key: np.ndarray
    value: np.ndarray
    fine_key: np.ndarray
    fine_value: np.ndarray


@dataclasses.dataclass
class Row:
    """One sequence in one layer.

    Attributes:
      tokens: all of them, whether they are still held or not.
      written: the most tokens that it had since it was last empty.
      fine_from: tokens before this position have no finer copy.
      kept: of tokens before ``chosen_from``, the positions that each head holds; None for all.
      lost_before: tokens before this position are lost to all queries.
      limits: how many tokens each head may choose; None where it holds all.
      new: tokens that fit beside those; None for any number.
    """

    tokens: list[Token] = dataclasses.field(default_factory=list)
    written: int = 0
    fine_from: int = 0
    chosen_from: int = 0
    kept: list[set[int]] | None = None
    lost_before: int = 0
    limits: np.ndarray | None = None
    new: int | None = None

    def copy(self):
        return dataclasses.replace(self, tokens=list(self.tokens))

    def held(self, head):
        """The positions of the tokens that a head holds."""
        positions = set(range(len(self.tokens)))
        if self.kept is None:
            return positions
        return {p for p in positions if p >= self.chosen_from or p in self.kept[head]}

    def truncate(self, length, num_fine, room):
        """``room`` tokens were written at most; more of them were dropped."""
        lost = max(self.fine_from, min(len(self.tokens), room) - num_fine)
        self.fine_from = min(lost, length, len(self.tokens))
        del self.tokens[length:]
        self.chosen_from = min(self.chosen_from, len(self.tokens))
        self.lost_before = min(self.lost_before, len(self.tokens))
        self.written = self.written if self.tokens else 0

    def choose(self, kept, score, sinks, recent):
        """Take over what each head chose to keep, if it was right to."""
        newest = max(max(self.held(head), default=-1) for head in range(len(kept)))
        for head, positions in enumerate(kept):
            ranks = {
                p: (p < sinks or p > newest - recent, score(self.tokens[p], p)[head])
                for p in self.held(head)
            }
            assert_best(ranks, positions, self.limits[head])
        self.kept, self.chosen_from = kept, len(self.tokens)


class History:
    """Of a cache: ``rows[layer][sequence]``."""

    def __init__(self, config):
        layers = range(config.num_layers)
        self.configs = [config.groups[config.locate(layer)[0]] for layer in layers]
        self.rows = [[Row() for _ in range(config.batch_size or 1)] for _ in layers]
        for layer, config in enumerate(self.configs):
            if isinstance(config.addressing, jaxkv.Kept):
                self.limit(layer, config.addressing, config.addressing.tokens)

    def copy(self):
        other = copy.copy(self)
        other.select(range(len(self.rows[0])))
        return other

    def limit(self, layer, addressing, limits):
        """Of a layer, whose heads hold no more than so many tokens, ``[*rows, *kv_heads]``."""
        heads = self.configs[layer].num_kv_heads
        limits = np.broadcast_to(limits, (len(self.rows[layer]), heads))
        for row, limit in zip(self.rows[layer], limits, strict=True):
            row.limits, row.new = limit, addressing.new

    @property
    def lengths(self):
        return [len(row.tokens) for row in self.rows[0]]

    @property
    def fine_from(self):
        """Of each sequence, where its finer copies begin."""
        tokens = num_fine(self.configs[0])
        return [max(row.fine_from, len(row.tokens) - tokens, 0) for row in self.rows[0]]

    @property
    def rooms(self):
        """The tokens that each sequence may have in all, as things stand."""
        room = np.full(len(self.rows[0]), self.configs[0].max_context_length)
        for rows in self.rows:
            ends = [np.inf if row.new is None else row.chosen_from + row.new for row in rows]
            room = np.minimum(room, ends)
        return room.astype(int)

    def add(self, cache, layer, keys, values, counts):
        """The first ``counts`` tokens of each sequence, which the cache was given already."""
        part, number = part_of(cache, layer)
        vectors = np.stack([keys, values])
        vectors = vectors.reshape(2, len(counts), *vectors.shape[-3:])
        starts = np.array([len(row.tokens) for row in self.rows[layer]], np.int32)
        coarse = given_back(part, number, vectors, starts)
        fine = coarse if part.newest is None else given_back(part.newest, number, vectors, starts)
        for sequence, (row, count) in enumerate(zip(self.rows[layer], counts, strict=True)):
            pairs = (pair[:, sequence, :count].swapaxes(0, 1) for pair in (coarse, fine))
            row.tokens += [Token(*one, *other) for one, other in zip(*pairs, strict=True)]
            row.written = max(row.written, len(row.tokens))

    def attend(self, layer, queries, counts, **options):
        """What the newest ``counts`` tokens of each sequence see; zeros for padding."""
        outputs = np.zeros((len(counts), *queries.shape[-3:]))
        queries_of = queries.reshape(outputs.shape)
        for sequence, (row, count) in enumerate(zip(self.rows[layer], counts, strict=True)):
            for number in range(count):
                position = len(row.tokens) - count + number
                output = self._attend(layer, row, queries_of[sequence, number], position, **options)
                outputs[sequence, number] = output
        return outputs.reshape(queries.shape)

    def _attend(self, layer, row, query, position, window=None, sink_logits=None, **options):
        config, output = self.configs[layer], np.zeros(query.shape)
        group, near = len(query) // config.num_kv_heads, self._near(config, row, position)
        seen = {p for p in visible(config, position) if window is None or p > position - window}
        for head in range(config.num_kv_heads):
            one, heads = slice(head, head + 1), slice(head * group, (head + 1) * group)
            tokens = [
                tuple(vector[one] for vector in row.tokens[p][2 * (p in near) :][:2])
                for p in sorted(seen & (near | row.held(head)))
            ]
            own = options if sink_logits is None else options | {"sink_logits": sink_logits[heads]}
            output[heads] = attention(query[heads], tokens, **own)
        return output

    def _near(self, config, row, position):
        """The tokens that a query reads by the finer codec, whatever was chosen."""
        tokens = num_fine(config)
        first = max(row.fine_from, len(row.tokens) - tokens, position - tokens + 1)
        return set(range(first, position + 1))

    def truncate(self, lengths):
        for config, rows in zip(self.configs, self.rows, strict=True):
            for row, length in zip(rows, lengths, strict=True):
                row.truncate(length, num_fine(config), config.max_context_length)

    def can_roll_back(self, row, length):
        """Surely: all that the next query would see is still there, or nothing is left to see.

        A ring takes back as many tokens as it says, since it was written furthest.
        """
        if length in (0, len(row.tokens)):
            return True
        chunks = (getattr(config.addressing, "chunk", None) for config in self.configs)
        chunk = min((chunk for chunk in chunks if chunk), default=None)
        window = getattr(self.configs[0].addressing, "window", None) or length
        lost = row.lost_before and length - (window - 1) < row.lost_before
        return not lost and (chunk is None or row.written - length <= chunk)

    def select(self, sequences):
        self.rows = [[rows[number].copy() for number in sequences] for rows in self.rows]

    def full(self, tokens):
        """Sequences that must choose before so many more tokens come."""
        return [
            any(
                row.new is not None and row.chosen_from + row.new < len(row.tokens) + tokens
                for row in rows
            )
            for rows in zip(*self.rows, strict=True)
        ]

    def choose(self, held, full, score, sinks, recent):
        """Take over what layers, sequences and heads hold now, if the full ones chose right.

        Args:
          held: sets of positions ``[sequences][heads]``, by layer.
          score: ``score(token, position)`` of all heads.
        """
        for layer, of_sequences in held.items():
            for row, kept, chose in zip(self.rows[layer], of_sequences, full, strict=True):
                if chose:
                    row.choose(kept, score, sinks, recent)
                assert kept == [row.held(head) for head in range(len(kept))]


def assert_best(ranks, kept, limit, tolerance=1e-5):
    """``kept`` are as many as may be, and of those that rank highest, but for rounding."""
    assert kept <= ranks.keys(), f"kept {sorted(kept)} of {sorted(ranks)}"
    assert len(kept) == min(limit, len(ranks)), f"kept {sorted(kept)} of {len(ranks)}, not {limit}"
    if dropped := ranks.keys() - kept:
        protected, score = max(ranks[position] for position in dropped)
        assert (protected, score - tolerance) <= min(ranks[p] for p in kept), (ranks, kept)


def visible(config, position):
    """The positions that a query may see: all, or those of its window and a ring's first."""
    window = getattr(config.addressing, "window", None)
    sinks = getattr(config.addressing, "sinks", 0)
    positions = range(position + 1)
    if config.addressing.aligned:
        return {p for p in positions if p >= position - position % window}
    return {p for p in positions if window is None or p > position - window or p < sinks}


def num_fine(config):
    """Newest tokens of a sequence that are kept by a finer codec too."""
    if config.newest is None:
        return 0
    return min(config.newest.tokens, getattr(config.addressing, "window", None) or 1 << 30)


def part_of(cache, layer):
    """The group of a cache that has a layer, and the layer's number in it."""
    group, number = cache.config.locate(layer)
    return cache.groups[group], number


def given_back(cache, layer, vectors, starts):
    """Vectors ``[2, batch, tokens, kv_heads, head_dim]`` as the codec of a cache rounds them."""
    codec, state = cache.config.codec, {n: a[layer] for n, a in cache.codec_state.items()}
    positions = starts[:, None] + np.arange(vectors.shape[2], dtype=np.int32)
    arrays = _given_back(codec, vectors, state, positions)
    decoded, centres = (np.asarray(array, np.float64) for array in arrays)
    inner = codec.codec if isinstance(codec, jaxkv.Centred) else codec
    sides = (inner.keys, inner.values) if isinstance(inner, jaxkv.KeysValues) else (inner, inner)
    for side, one in enumerate(sides):
        errors, *lengths = (
            np.linalg.norm(array[side], axis=-1) for array in (decoded - vectors, vectors, centres)
        )
        assert (errors <= ROUNDING[one.name] * sum(lengths) + 1e-6).all(), (one, errors, lengths)
    return decoded


@functools.partial(jit, static_argnames="codec")
def _given_back(codec, vectors, state, positions):
    centres, wide = jnp.zeros_like(vectors), jnp.dtype("float32")
    leaves = codec.encode_tokens(vectors, state, positions)
    if isinstance(codec, jaxkv.Centred):
        centres += codec.offsets(state).at(positions[..., None], codec.is_second(leaves))
    decoded = codec.decode_tokens(leaves, vectors.shape[-1], wide, state, positions[..., None])
    return decoded, centres
