"""What the quality suite compares: ways to keep a cache, by name."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax.numpy as jnp
from jax import Array, lax

import jaxkv
from benchmarks.quality.emulated import Emulated
from benchmarks.quality.kivi import kivi_bits, kivi_flushed
from benchmarks.quality.quantized_cache import (
    WINDOW,
    hqq_flushed,
    quantized_cache_bits,
    quanto_flushed,
)
from jaxkv.codecs import bytes_per_token
from jaxkv.show.progress import progress_bar

CHUNK = 32  # tokens that a model is given at once after a prompt; a group of KIVI


@dataclasses.dataclass(frozen=True)
class Store:
    """A codec, and what is done to a cache after each chunk of tokens.

    Attributes:
      after: from ``(cache, chunk)`` to a cache, where ``chunk`` tokens were just added; an eviction
        policy, or an emulation of a method that needs more than a codec.
      waits_for: how many tokens it waits for.
      bits: a number of a key or value, if not what the codec takes, for ``(head_dim, tokens)``.
      newest: the newest tokens by another codec as well; then a model is given one token at a time
        after its prompt, as in decode.
      control: it must be visibly worse, or the measurement shows nothing.
    """

    codec: jaxkv.Codec
    after: Callable[[jaxkv.KVCache, int], jaxkv.KVCache] | None = None
    bits: Callable[[int, int], float] | None = None
    control: bool = False
    newest: jaxkv.Newest | None = None
    waits_for: int = CHUNK

    def bits_per_number(self, head_dim: int, tokens: int) -> float:
        """Scales included; means of a `Centred` codec, which no token adds to, are not."""
        if self.bits:
            return self.bits(head_dim, tokens)
        if isinstance(self.codec, Emulated):
            return self.codec.bits
        bits = 8 * bytes_per_token(self.codec, head_dim) / (2 * head_dim)
        if self.newest is None:
            return bits
        finer = 8 * bytes_per_token(self.newest.codec, head_dim) / (2 * head_dim)
        return bits + self.newest.tokens / tokens * finer

    @property
    def chunk(self) -> int:
        """Tokens that a model is given at once after its prompt."""
        return 1 if self.newest else CHUNK

    def cache_config(self, model, max_context_length: int) -> jaxkv.KVCacheConfig:
        return model.cache_config(
            max_context_length=max_context_length, codec=self.codec, newest=self.newest
        )

    def next(self, cache: jaxkv.KVCache, chunk: int) -> jaxkv.KVCache:
        return self.after(cache, chunk) if self.after else cache


def _random_keys(cache: jaxkv.KVCache, chunk: int) -> jaxkv.KVCache:
    """Keys of other tokens in the place of each: what is left is worth nothing."""
    data = cache.storage["data"]
    shuffled = jnp.roll(data[:, 0], 37, axis=1)
    return dataclasses.replace(cache, storage={"data": data.at[:, 0].set(shuffled)})


def kivi(bits: int) -> Store:
    """KIVI with a residual of 32 tokens."""
    return Store(
        jaxkv.Dense("float32"),
        functools.partial(kivi_flushed, bits=bits),
        functools.partial(kivi_bits, bits=bits),
    )


def quantized_cache(backend: str, *, bits: int) -> Store:
    """The QuantizedCache of transformers, with HQQ or quanto."""
    flushed = {"hqq": hqq_flushed, "quanto": quanto_flushed}[backend]
    return Store(
        jaxkv.Dense("float32"),
        functools.partial(flushed, bits=bits),
        functools.partial(quantized_cache_bits, bits=bits),
        waits_for=WINDOW,
    )


def _newest(codec: jaxkv.Codec, finer: jaxkv.Codec) -> Store:
    return Store(jaxkv.Centred(codec), newest=jaxkv.Newest(16, jaxkv.Centred(finer)))


_EXACT = "float32"
STORES: dict[str, Store] = {
    _EXACT: Store(jaxkv.Dense("float32")),
    "bfloat16": Store(jaxkv.Dense("bfloat16")),
    "float8": Store(jaxkv.Float8()),
    "int8": Store(jaxkv.Int8()),
    "int8-centred": Store(jaxkv.Centred(jaxkv.Int8())),
    "int8-centred, newest 16": _newest(jaxkv.Int8(), jaxkv.Dense("float32")),
    "rotated4": Store(jaxkv.Rotated(4)),
    "rotated4-centred": Store(jaxkv.Centred(jaxkv.Rotated(4))),
    "rotated3": Store(jaxkv.Rotated(3)),
    "rotated3-centred": Store(jaxkv.Centred(jaxkv.Rotated(3))),
    "rotated3-centred, newest 16": _newest(jaxkv.Rotated(3), jaxkv.Rotated(4)),
    "rotated4/rotated2-centred": Store(
        jaxkv.Centred(jaxkv.KeysValues(jaxkv.Rotated(4), jaxkv.Rotated(2)))
    ),
    "rotated2": Store(jaxkv.Rotated(2)),
    "rotated2-centred": Store(jaxkv.Centred(jaxkv.Rotated(2))),
    "rotated2-centred, newest 16": _newest(jaxkv.Rotated(2), jaxkv.Rotated(4)),
    "KIVI-2 (emulated)": kivi(bits=2),
    "1 bit (control)": Store(jaxkv.Rotated(1), control=True),
    "other keys (control)": Store(jaxkv.Dense("float32"), _random_keys, control=True),
}
EXACT = STORES[_EXACT]
# For the short form, in tests.
FEW = (
    *("float32", "int8", "rotated2-centred", "rotated2-centred, newest 16"),
    *("KIVI-2 (emulated)", "1 bit (control)"),
)


def chosen(quick: bool) -> dict[str, Store]:
    return {name: store for name, store in STORES.items() if not quick or name in FEW}


def one_by_one(quick: bool, description: str) -> Iterator[tuple[str, Store]]:
    """The same in turn, with a progress bar."""
    stores = chosen(quick)
    with progress_bar(description, len(stores)) as advance_bar:
        for name, store in stores.items():
            yield name, store
            advance_bar(1)


def logits_through(model, store: Store, tokens: Array) -> Array:
    """Of the second half of one sequence, ``[tokens / 2, vocabulary]``.

    The first half is its prompt; then come chunks that see all before them, and themselves, as
    the store keeps them.
    """

    def one_chunk(cache, chunk):
        logits, cache = model(chunk, cache)
        return store.next(cache, store.chunk), logits

    prompt, rest = jnp.split(tokens, 2)
    _, cache = model(prompt, jaxkv.create(store.cache_config(model, len(tokens))))
    cache = store.next(cache, len(prompt))
    _, logits = lax.scan(one_chunk, cache, rest.reshape(-1, store.chunk))
    return logits.reshape(len(rest), -1)
