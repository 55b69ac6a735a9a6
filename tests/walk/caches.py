"""The kinds of cache that are walked: codec, addressing, placement and residual tokens."""

import contextlib
import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import jaxkv
from tests.oracle import poisoned

CONTEXT, LAYERS, KV_HEADS, HEADS = 20, 2, 2, 4
SHAPE = {
    "num_layers": LAYERS,
    "max_context_length": CONTEXT,
    "num_kv_heads": KV_HEADS,
    "head_dim": 16,
}
MOST_ROWS = 2  # of any batch
MOST_TOKENS = 4  # of a step

ROPE = jaxkv.Rope.of(100.0, rotary_dim=16)
CODECS = {
    "float32": jaxkv.Dense("float32"),
    "int8": jaxkv.Int8(),
    "bfloat16": jaxkv.Dense("bfloat16"),
    "rotated4": jaxkv.Rotated(4),
    "float8": jaxkv.Float8(),
    "int8-centred": jaxkv.Centred(jaxkv.Int8(), ROPE),
    "float16": jaxkv.Dense("float16"),
    "rotated2-centred": jaxkv.Centred(jaxkv.Rotated(2), ROPE),
    "bfloat16/int8": jaxkv.KeysValues(jaxkv.Dense("bfloat16"), jaxkv.Int8()),
    "rotated3/int8": jaxkv.KeysValues(jaxkv.Rotated(3), jaxkv.Int8()),
}
FINER = {  # beside each of them
    "float32": jaxkv.Dense("bfloat16"),  # so that the copies differ
    "rotated2-centred": jaxkv.Centred(jaxkv.Int8()),
    "rotated3/int8": jaxkv.Rotated(4),
}

_KEPT = {"tokens": 4, "new": 5, "num_layers": LAYERS, "num_kv_heads": KV_HEADS}
ADDRESSINGS = {
    "contiguous": jaxkv.Contiguous(),
    "ring": jaxkv.Ring(4, chunk=5),
    "ring, sinks": jaxkv.Ring(3, sinks=2, chunk=4),
    "pages": jaxkv.Paged(3),
    "pages, window": jaxkv.Paged(3, window=4),
    "pool": jaxkv.Paged(4, num_pages=2 * MOST_ROWS * 5),
    "pool, window": jaxkv.Paged(2, num_pages=2 * MOST_ROWS * 10, window=5),
    "kept": jaxkv.Kept(**_KEPT),
    "kept in pages": jaxkv.Kept(**_KEPT, within=jaxkv.Paged(2)),
}
PLACEMENTS = {
    "device": None,
    "host": jaxkv.HostMemory(resident=3, block=4),
    "host, chosen": jaxkv.HostMemory(resident=3, block=4, blocks_per_query=9),  # all of them
}
RESIDUALS = {"": 0, "newest": 3}
KEEPS = (3, (4, 2), ((4, 1), (2, 3)))  # tokens: of all, of each layer, of each layer and head


def config_of(codec, addressing, placement="device", residual="", batch_size=None):
    """Of names in these tables; "hybrid" is a ring in one layer and pages in the other."""
    newest = None
    if tokens := RESIDUALS[residual]:
        newest = jaxkv.Newest(tokens, FINER.get(codec, jaxkv.Dense("float32")))
    fields = {"codec": CODECS[codec], "placement": PLACEMENTS[placement], "newest": newest}
    config = jaxkv.KVCacheConfig(**SHAPE, batch_size=batch_size, **fields)
    if addressing != "hybrid":
        return config.replace(addressing=ADDRESSINGS[addressing])
    full = config.replace(num_layers=1)
    groups = (full.replace(addressing=ADDRESSINGS[name]) for name in ("ring", "pages"))
    return jaxkv.HybridConfig(groups, group_of_layer=(0, 1))


class Kind(NamedTuple):
    """What is walked through: a config, and what it may become, each of which is compiled.

    Attributes:
      keep: how many tokens `compress` keeps.
      offloads: whether the cache moves to host memory and back.
    """

    config: jaxkv.KVCacheConfig | jaxkv.HybridConfig
    keep: int | tuple
    offloads: bool


def kinds():
    """Every addressing with every placement; the other axes take turns."""
    found = {}
    for addressing, placement in itertools.product((*ADDRESSINGS, "hybrid"), PLACEMENTS):
        number = len(found)
        names = (
            list(CODECS)[number % len(CODECS)],
            addressing,
            placement,
            list(RESIDUALS)[number % 2 ^ number // len(CODECS) % 2],
        )
        with contextlib.suppress(jaxkv.ConfigError):  # those that do not go together
            config = config_of(*names, batch_size=MOST_ROWS if number % 3 else None)
            kind = Kind(config, KEEPS[number % len(KEEPS)], offloads=number % 4 == 0)
            found[" ".join(filter(None, names))] = kind
    chunked = jaxkv.KVCacheConfig(
        **SHAPE, batch_size=MOST_ROWS, codec=CODECS["int8"], addressing=jaxkv.Chunked(4, chunk=5)
    )
    found["int8 chunked"] = Kind(chunked, KEEPS[0], offloads=False)
    return found


def empty(config, rng):
    """A cache full of garbage; pages of a pool are assigned, in any order."""
    cache = jaxkv.create(config)
    cache = cache.with_groups([poisoned(group) for group in cache.groups])
    if not is_pool(cache):
        return cache
    pages = free_pages(cache, rng, cache.index.table.shape)
    return cache.with_pages(pages, jnp.zeros_like(cache.lengths))


def is_pool(cache):
    """Whether a cache has pages that are assigned."""
    return getattr(cache.groups[0].index, "shared", False)


def free_pages(cache, rng, shape):
    """So many pages of a pool that no sequence of the cache has."""
    num_pages = cache.config.addressing.num_pages
    free = np.setdiff1d(np.arange(num_pages), np.asarray(cache.index.table))
    pages = rng.permutation(free)[: int(np.prod(shape))]
    return jnp.asarray(pages.reshape(shape), jnp.int32)


def table_of(cache):
    """The page table with an axis of sequences."""
    table = np.asarray(cache.index.table)
    return table.reshape(-1, table.shape[-1])


# Addressings that a file can be loaded with instead.
CONVERTED = {
    ADDRESSINGS["contiguous"]: ADDRESSINGS["pages"],
    ADDRESSINGS["pages"]: ADDRESSINGS["contiguous"],
}
