"""What the cache is held to: attention by its definition, in float64, over plain lists.

The oracle knows nothing of slots, blocks and masks. A step's arrays have a leading axis of
layers: ``[layers, *batch, tokens, heads, head_dim]``.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from jaxkv.addressing import ADDRESSINGS
from jaxkv.codecs import CODECS, state_specs

# Each addressing at a size at which it shows: the ring turns, pages end in the middle of a step.
SMALL = {
    "contiguous": jaxkv.Contiguous(),
    "ring": jaxkv.Ring(window=3, sinks=1, chunk=5),
    "paged": jaxkv.Paged(page_size=4),
    "chunked": jaxkv.Chunked(size=3, chunk=5),
}
assert SMALL.keys() == ADDRESSINGS.keys(), "give a new addressing its row here"

# Codecs that differ in what runs: 2, 3 and 4 bits are one code, and tests/codecs has them all.
# These two are slow to compile.
ROTATED = {
    "rotated3/int8": jaxkv.KeysValues(jaxkv.Rotated(3), jaxkv.Int8()),
    "rotated2-centred": jaxkv.Centred(jaxkv.Rotated(2), jaxkv.Rope.of(100.0, rotary_dim=4)),
}
# Stair ones are decoded before they are read; tests/codecs/test_stair.py has them.
KINDS = {
    name: codec
    for name, codec in CODECS.items()
    if "rotated" not in name and "stair" not in name and "centred" not in name
} | ROTATED

# For what does not depend on the pair: every codec, and every addressing, at least once.
EACH_ONCE = [(codec, "contiguous") for codec in KINDS]
EACH_ONCE += [("int8", addressing) for addressing in ADDRESSINGS if addressing != "contiguous"]

# Query heads and KV heads of the three kinds of attention.
HEADS = {"MHA": (2, 2), "GQA": (4, 2), "MQA": (3, 1)}

SINKS = np.array([0.5, -1.0, 2.0, 0.0], np.float32)  # one a query head of GQA
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 0.8},
    "window": {"window": 3},
    "sinks": {"sink_logits": SINKS},
    "together": {"scale": 0.7, "softcap": 0.8, "window": 3, "sink_logits": SINKS},
}

# There are hundreds of small programs in these tests, so they are compiled in haste.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


# Programs apart, or XLA would leave out the rounding between them.
@functools.partial(jit, static_argnums=0)
def update(codec, state, vectors, positions, starts):
    return codec.update_state(state, vectors, positions, starts)


@functools.partial(jit, static_argnums=0)
def encode(codec, vectors, state=None, positions=None):
    if state is None:
        return codec.encode(vectors)
    return codec.encode_tokens(vectors, state, positions)


@functools.partial(jit, static_argnums=(0, 2, 3))
def decode(codec, leaves, head_dim, dtype, state=None, positions=None):
    if state is None:
        return codec.decode(leaves, head_dim, dtype)
    return codec.decode_tokens(leaves, head_dim, dtype, state, positions)


class Oracle:
    """The (key, value) of every token: a list for each layer and sequence."""

    def __init__(self, config):
        self.codec, self.addressing, self.config = config.codec, config.addressing, config
        self.state = [
            {
                name: np.zeros((sides, config.num_kv_heads, *shape), dtype)
                for name, (shape, dtype, sides) in state_specs(self.codec, config.head_dim).items()
            }
            for _ in range(config.num_layers)
        ]
        self.tokens = [
            [[] for _ in range(config.batch_size or 1)] for _ in range(config.num_layers)
        ]

    def step(self, queries, keys, values, num_tokens=None, **options):
        """What `step` below must return."""
        outputs = np.zeros((*queries.shape[:-1], value_dim_of(self.config)))
        for layer, sequences in enumerate(self.tokens):
            shape = (len(sequences), *queries.shape[-3:])
            stored = self._stored if self.config.pair.unlike is None else self._stored_unlike
            stored_keys, stored_values = stored(layer, keys, values, num_tokens)
            for sequence, tokens in enumerate(sequences):
                count = shape[1] if num_tokens is None else np.ravel(num_tokens)[sequence]
                for token in range(count):
                    tokens.append((stored_keys[sequence, token], stored_values[sequence, token]))
                    query = np.reshape(queries[layer], shape)[sequence, token]
                    seen = self._seen(tokens)
                    output = attention(query, seen, **options)
                    outputs[layer].reshape(*shape[:-1], -1)[sequence, token] = output
        return outputs

    def _seen(self, tokens):
        """All so far or, with a window, the newest, and a ring's first few; or a chunk's."""
        window = getattr(self.addressing, "window", None)
        if getattr(self.addressing, "aligned", False):
            return tokens[(len(tokens) - 1) // window * window :]
        if window is None:
            return tokens
        newest = max(len(tokens) - window, 0)
        sinks = getattr(self.addressing, "sinks", 0)
        return tokens[: min(sinks, newest)] + tokens[newest:]

    def truncate(self, length):
        for sequences in self.tokens:
            for tokens in sequences:
                del tokens[length:]

    def _stored(self, layer, keys, values, num_tokens):
        """The vectors as the codec rounds them, with a batch axis; codecs have their own tests."""
        vectors = np.stack([keys[layer], values[layer]])
        vectors, codec = vectors.reshape(2, -1, *vectors.shape[-3:]), self.codec
        starts = np.array([len(tokens) for tokens in self.tokens[layer]])
        numbers = np.arange(vectors.shape[2])
        counts = len(numbers) if num_tokens is None else np.asarray(num_tokens)[..., None]
        positions = np.int32(np.where(numbers < counts, starts[:, None] + numbers, -1))
        state = update(codec, self.state[layer], vectors, positions, np.int32(starts))
        self.state[layer] = state
        leaves = encode(codec, vectors, state, positions)
        wide = jnp.dtype("float32")
        decoded = decode(codec, leaves, vectors.shape[-1], wide, state, positions[..., None])
        return np.asarray(decoded, np.float64)

    def _stored_unlike(self, layer, keys, values, num_tokens):
        """The same of keys and values of two sizes, or of values in their keys."""
        key_codec, value_codec = self.codec.sides
        keys, *rest = (each[layer] for each in (keys, values) if each is not None)
        keys = _rounded(key_codec, keys)
        if self.config.values_in_keys:
            return keys, keys[..., : self.config.value_dim]
        return keys, _rounded(value_codec, *rest)


def _rounded(codec, vectors):
    vectors = vectors.reshape(-1, *vectors.shape[-3:])
    wide = jnp.dtype("float32")
    return np.asarray(decode(codec, encode(codec, vectors), vectors.shape[-1], wide), np.float64)


def value_dim_of(config):
    return config.value_dim or config.head_dim


def attention(query, tokens, *, scale=None, softcap=None, window=None, sink_logits=None):
    """One query ``[heads, head_dim]`` over all tokens so far, its own being the last."""
    seen = tokens if window is None else tokens[-window:]
    keys, values = (np.stack(vectors) for vectors in zip(*seen, strict=True))
    heads, head_dim = query.shape
    group = heads // keys.shape[1]
    output = np.zeros((heads, values.shape[-1]))
    for head in range(heads):
        logits = keys[:, head // group] @ query[head].astype(np.float64)
        logits *= head_dim**-0.5 if scale is None else scale
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        weights = np.exp(logits)
        total = weights.sum() + (0 if sink_logits is None else np.exp(sink_logits[head]))
        output[head] = weights @ values[:, head // group] / total
    return output


def layer_step(cache, layer, queries, keys, values, num_tokens=None, **options):
    """What one layer of a model does: write, then read."""
    cache = jaxkv.append(cache, keys, values, layer=layer, num_tokens=num_tokens)
    return cache, jaxkv.attend(cache, queries, layer=layer, num_tokens=num_tokens, **options)


def step(cache, queries, keys, values, num_tokens=None, *, run=layer_step, **options):
    """One step of a model: each layer in turn, and then the length moves once."""
    outputs = []
    for layer in range(cache.config.num_layers):
        arrays = queries[layer], keys[layer], None if values is None else values[layer]
        cache, output = run(cache, layer, *arrays, num_tokens, **options)
        outputs.append(output)
    advanced = jaxkv.advance(cache, keys.shape[-3] if num_tokens is None else num_tokens)
    return advanced, jnp.stack(outputs)


run_step = functools.partial(step, run=jit(layer_step))  # with a traced layer


def config_of(codec="float32", addressing="contiguous", **fields):
    """A small config of a kind that the tables name, in which a query sees every token."""
    shape = {"num_layers": 3, "max_context_length": 8, "num_kv_heads": 2, "head_dim": 4}
    kind = {"codec": (CODECS | KINDS)[codec], "addressing": SMALL[addressing]}
    config = jaxkv.KVCacheConfig(**(shape | kind | fields))
    wide = {"ring": jaxkv.Ring, "chunked": jaxkv.Chunked}
    if addressing not in wide:
        return config
    return config.replace(addressing=wide[addressing](config.max_context_length, chunk=8))


def shuffled(cache):
    """The cache with the pages of its pool in another order, where it has pages."""
    if not hasattr(cache.index, "table"):
        return cache
    table = np.random.default_rng(0).permutation(np.asarray(cache.index.table).ravel())
    index = cache.index.with_table(table.reshape(cache.index.table.shape))
    return dataclasses.replace(cache, index=index)


def filled(config, tokens, seed=0):
    """A cache and an oracle that hold the same ``tokens`` random tokens."""
    cache, oracle = jaxkv.create(config), Oracle(config)
    arrays = random_step(config, tokens, heads=2, seed=seed)
    oracle.step(*arrays)
    return run_step(cache, *arrays)[0], oracle


def random_step(config, tokens, *, heads, seed=0):
    """Queries, keys and values of a step, from a seeded normal distribution."""
    rng = np.random.default_rng(seed)
    sizes = [(heads, config.head_dim), (config.num_kv_heads, config.head_dim)]
    if not config.values_in_keys:
        sizes.append((config.num_kv_heads, value_dim_of(config)))
    shape = (config.num_layers, *config.batch_shape, tokens)
    arrays = [rng.standard_normal((*shape, *size), np.float32) for size in sizes]
    return *arrays, *[None] * (3 - len(arrays))


def poisoned(cache, poison=np.nan):
    """The cache with garbage in every slot. An integer leaf gets all bits set, NaN for bfloat16."""

    def fill(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        garbage = poison if floating else jnp.iinfo(leaf.dtype).max
        garbage = np.full(leaf.shape, garbage, leaf.dtype)
        # Where it was, which may be host memory; and no more bound to it: that is another program.
        return jax.device_put(garbage, leaf.sharding) if leaf.committed else jnp.asarray(garbage)

    def of(part):
        return dataclasses.replace(part, storage=jax.tree.map(fill, part.storage))

    resident = None if cache.resident is None else of(cache.resident)
    newest = None if cache.newest is None else poisoned(cache.newest, poison)
    return dataclasses.replace(of(cache), resident=resident, newest=newest)


def padded(array, num_tokens, padding):
    """A step's array with ``padding`` in place of the tokens that are not real."""
    if array is None:
        return None
    real = np.arange(array.shape[-3]) < np.asarray(num_tokens)[..., None]
    return np.where(real[..., None, None], array, np.float32(padding))


def assert_same_storage(actual, expected):
    """Bitwise, NaN included."""
    for name, leaf in expected.storage.items():
        assert actual.storage[name].dtype == leaf.dtype
        assert np.asarray(actual.storage[name]).tobytes() == np.asarray(leaf).tobytes(), name


def stacked(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
