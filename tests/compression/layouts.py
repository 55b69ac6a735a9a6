"""Caches for the tests, all they were given, and what attention over the tokens kept must give."""

import jax.numpy as jnp
import numpy as np

import jaxkv
from jaxkv.compression.scoring import held_positions
from tests.oracle import attention, config_of, jit, random_step, shuffled, step

LAYERS, KV_HEADS, HEADS = 2, 2, 4
LENGTHS = np.array([11, 7], np.int32)
run_step = jit(step)


class Filled:
    """A cache of ``LENGTHS`` tokens, or of the first of them, and what was written to it."""

    def __init__(
        self, codec="float32", addressing="contiguous", batch_size=None, head_dim=4, newest=0
    ):
        fields = {"num_layers": LAYERS, "max_context_length": 16, "head_dim": head_dim}
        if newest:  # which rounds where the cache's own codec does not, so that copies differ
            fields["newest"] = jaxkv.Newest(newest, jaxkv.Dense("bfloat16"))
        config = config_of(codec, addressing, batch_size=batch_size, **fields)
        lengths = LENGTHS if batch_size else LENGTHS[0]
        arrays = random_step(config, LENGTHS[0], heads=HEADS)
        self.queries = jnp.asarray(arrays[0])
        cache = shuffled(jaxkv.create(config))
        append = jit(jaxkv.append)
        for layer in range(LAYERS):
            _, keys, values = (array[layer] for array in arrays)
            cache = append(cache, keys, values, layer=layer, num_tokens=lengths)
        self.cache = jaxkv.advance(cache, lengths)
        self.history = [History(self.cache, layer) for layer in range(LAYERS)]
        self.newest, self.lost = newest, np.ravel(lengths) - newest

    def next_step(self, cache, seed):
        """One more token through a compressed cache: what it gives, and what it must."""
        queries, keys, values = random_step(self.cache.config, 1, heads=HEADS, seed=seed)
        held = [positions_of(cache, layer) for layer in range(LAYERS)]
        lengths = np.ravel(cache.lengths)
        cache, outputs = run_step(cache, queries, keys, values)
        expected = np.zeros(outputs.shape)
        for layer, history in enumerate(self.history):
            history.add(keys[layer], values[layer], lengths)
            rows = expected[layer].reshape(-1, HEADS, queries.shape[-1])
            for sequence, query in enumerate(queries[layer].reshape(rows.shape)):
                of_sequence = held[layer].reshape(len(rows), KV_HEADS, -1)[sequence]
                length = lengths[sequence]
                near = range(max(self.lost[sequence], length + 1 - self.newest), length + 1)
                near = near if self.newest else ()
                rows[sequence] = history.attend(query, sequence, of_sequence, length, near)
        return cache, np.asarray(outputs), expected

    def one_token_less(self, cache):
        """The cache after a rollback, which loses what the last token was written over."""
        self.lost = np.maximum(self.lost, np.ravel(cache.lengths) - self.newest)
        return jaxkv.truncate(cache, cache.lengths - 1)


class History:
    """Keys and values of one layer by sequence and position, as the codec rounded them."""

    def __init__(self, cache, layer):
        keys, values = (np.asarray(array, np.float64) for array in jaxkv.layer(cache, layer))
        shape = (-1, *keys.shape[-3:])
        self.pairs = [
            dict(enumerate(zip(*pair, strict=True)))
            for pair in zip(keys.reshape(shape), values.reshape(shape), strict=True)
        ]

    def add(self, keys, values, lengths):
        shape = (-1, *keys.shape[-2:])
        rows = zip(self.pairs, keys.reshape(shape), values.reshape(shape), lengths, strict=True)
        for pairs, key, value, position in rows:
            pairs[int(position)] = key, value

    def attend(self, query, sequence, held, newest, near=()):
        """Each head over the tokens that it holds and the newest; ``near`` ones in bfloat16."""
        group = len(query) // KV_HEADS
        output = np.zeros(query.shape)
        for head, positions in enumerate(held):
            seen = {*positions[positions >= 0].tolist(), int(newest)}
            pairs = [self.pairs[sequence][position] for position in seen.difference(near)]
            pairs += [in_bfloat16(self.pairs[sequence][position]) for position in near]
            of_head = [(key[head : head + 1], value[head : head + 1]) for key, value in pairs]
            heads = slice(head * group, (head + 1) * group)
            output[heads] = attention(query[heads], of_head)
        return output


def in_bfloat16(pair):
    return np.asarray(pair).astype(jnp.bfloat16).astype(np.float64)


def positions_of(cache, layer):
    """``[*batch, kv_heads, slots]``."""
    if isinstance(cache, jaxkv.HybridCache):
        group, layer = cache.config.locate(layer)
        cache = cache.groups[group]
    return np.asarray(held_positions(cache, layer))
