"""The cache: an immutable pytree. Its verbs are in `jaxkv.cache`."""

import abc
import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxkv.addressing import Index, Layer, PageTable
from jaxkv.cache.axes import Spread
from jaxkv.cache.config import KVCacheConfig
from jaxkv.codecs import Leaves, State
from jaxkv.devices import is_concrete
from jaxkv.placement import Resident, take_slots
from jaxkv.programs import one_program
from jaxkv.show.html import Bar, occupancy_html
from jaxkv.show.text import format_bytes, sequences

__all__ = ["KVCache", "Layer", "NumTokens", "books_of_index", "buffer_of"]

# Sequences that are named one by one.
_NAMED = 8

# The length of a sequence whose verb got an argument out of range inside jit. No other is as long.
OUT_OF_RANGE = 1 << 30

# Tokens processed: one number for all sequences, or one for each of a ragged batch.
NumTokens = int | Int[Array, "*batch"]


class Counted(abc.ABC):
    """What is kept of some tokens of each sequence, and an index that counts them."""

    index: Any

    @property
    def lengths(self) -> Int[Array, "*batch"]:
        """Tokens in each sequence. More than the capacity once a write was dropped."""
        return self.index.lengths

    @property
    def overflowed(self) -> Bool[Array, "*batch"]:
        """True for a sequence that was given more tokens than it can hold."""
        return self.lengths > self.index.room

    @property
    def misused(self) -> Bool[Array, "*batch"]:
        """True for a sequence whose verb got an argument out of range inside jit."""
        return self.lengths >= OUT_OF_RANGE


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["storage", "index", "codec_state", "resident", "newest", "real_tokens"],
    meta_fields=["config", "spread", "part_of", "learns"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class KVCache(Counted):
    """Keys and values of every token so far, and where they are. Made by `create`.

    Attributes:
      storage: one buffer a codec leaf, ``[layers, 2, ctx, kv_heads, ...]``; axis 1 is keys,
        values, and of size 1 for a leaf that one of them has alone, or that both are in. On a CPU
        a bfloat16 buffer has dtype uint16 (see `container_dtype`); use `layer` to get numbers.
      index: which slot holds which token; `lengths` is part of it.
      config: the static description.
      codec_state: what the codec has learned, an array ``[layers, sides, kv_heads, ...]`` per name;
        ``{"means": ...}`` of `Centred`, and empty for most codecs.
      resident: where ``config.placement`` puts the buffers into host memory, what stays on the
        device; else None.
      newest: where ``config.newest`` keeps the newest tokens by a finer codec too, the cache of
        them; else None.
      real_tokens: in a step that is padded, how many of its tokens are still to come; else None.
      spread: over which axes of a mesh, where it was created with some; else None.
      part_of: the same where this is one device's part of such a cache, inside `jax.shard_map`.
      learns: whether the codec may learn from what is appended. False where its state was given, as
        `generate` and `Engine` do: a program need not look then.

    >>> import jax, jaxkv
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(2, 64, num_kv_heads=1, head_dim=16))
    >>> cache
    KVCache(2 layers, 1 KV heads x 16, bfloat16, contiguous, 0 of 64 tokens, 8.2 kB)
    >>> len(jax.tree.leaves(cache)), cache.size_bytes == cache.config.size_bytes
    (2, True)
    """

    storage: Leaves
    index: Index
    config: KVCacheConfig
    codec_state: State = dataclasses.field(default_factory=dict)
    resident: Resident | None = None
    newest: "KVCache | None" = None
    real_tokens: Int[Array, "*batch"] | None = None
    spread: Spread | None = None
    part_of: Spread | None = None
    learns: bool = True

    @property
    def groups(self) -> tuple["KVCache"]:
        """One, as a `HybridCache` has several."""
        return (self,)

    @property
    def states(self) -> tuple[Any, ...]:
        """None, as a `HybridCache` may have some."""
        return ()

    @property
    def cross(self) -> tuple["KVCache", ...]:
        """Likewise none."""
        return ()

    def with_groups(
        self,
        groups: Sequence["KVCache"],
        states: Sequence[Any] = (),
        cross: Sequence["KVCache"] = (),
    ) -> "KVCache":
        """The cache that these groups are."""
        (own,) = groups
        return own

    @property
    def means(self) -> Array | None:
        """Deprecated: ``codec_state["means"]``, or None for a codec other than `Centred`."""
        told = "KVCache.means is deprecated: it is in KVCache.codec_state, which all codecs have."
        warnings.warn(told, DeprecationWarning, stacklevel=2)
        return self.codec_state.get("means")

    @property
    def size_bytes(self) -> int:
        """Bytes of the keys and values; equal to ``config.size_bytes``."""
        resident = None if self.resident is None else self.resident.storage
        held = self.storage, self.codec_state, resident
        newest = 0 if self.newest is None else self.newest.size_bytes
        return sum(leaf.nbytes for leaf in jax.tree.leaves(held)) + newest

    @property
    def pages(self) -> PageTable | None:
        """The page table of a cache whose pages hold tokens, all their heads; None for none."""
        return None if self.index.per_head else self.index.pages

    @property
    def how_lost(self) -> str:
        """Why a rollback was refused, and what to do."""
        cure = "Their pages were given back; reset it, and assign pages to it anew."
        if (chunk := self.index.chunk) is not None:
            cure = (
                f"It takes back {chunk} tokens at most; create it with a larger chunk to roll back "
                "further, or reset it."
            )
        name = self.config.addressing.name
        return f"the {name} cache has lost tokens that the next query would see. {cure}"

    def of_rows(self, rows: Int[Array, " rows"]) -> "KVCache":
        """A batch of these sequences, which go on independently or in the pages that they had."""
        index, slots = self.index.select(rows)
        storage = self.storage
        if slots is not None:
            storage = {name: take_slots(leaf, slots) for name, leaf in storage.items()}
        return KVCache(
            storage,
            index,
            self.config.replace(batch_size=rows.size),
            self.codec_state,
            None if self.resident is None else self.resident.select(rows),
            None if self.newest is None else self.newest.of_rows(rows),
            learns=self.learns,
        )

    def with_lengths(self, lengths: Int[Array, "*batch"]) -> "KVCache":
        """The same buffers with other lengths: for those who write verbs."""
        resident = self.resident
        if resident is not None:
            resident = resident.with_lengths(self.lengths, lengths)
        newest = None if self.newest is None else self.newest.with_lengths(lengths)
        index = self.index.with_lengths(lengths)
        return dataclasses.replace(self, index=index, resident=resident, newest=newest)

    def with_pages(
        self,
        table: Int[Array, "*batch pages"],
        lengths: Int[Array, "*batch"],
        newest_from: Int[Array, "*batch"] | None = None,
    ) -> "KVCache":
        """A paged cache with other sequences: for those who keep the books of a pool.

        Args:
          table: pages of each sequence in the order of its tokens, -1 for none.
          lengths: of each sequence, in tokens.
          newest_from: the position from which on a row was given its tokens, which are the
            `Newest` ones; none if None.

        Raises:
          TypeError: a cache that is not paged.

        >>> import jax.numpy as jnp, jaxkv
        >>> pool = jaxkv.Paged(page_size=16, num_pages=4)
        >>> cache = jaxkv.create(jaxkv.KVCacheConfig(1, 32, 1, 4, addressing=pool))
        >>> int(cache.with_pages(jnp.array([3, 1]), jnp.array(20)).lengths)
        20
        """
        if self.pages is None:
            raise TypeError(
                f"with_pages: expected a paged cache, got a {self.config.addressing.name} one. "
                "Create it with addressing=jaxkv.Paged(page_size, num_pages)."
            )
        newest = self.newest
        if newest is not None:
            assert newest.index.ring is not None
            first = lengths if newest_from is None else newest_from
            own = newest.index.ring.holding_from(first, lengths)
            newest = dataclasses.replace(newest, index=own)
        if self.spread is not None and is_concrete(table):  # as a step has it
            table = jax.device_put(table, self.pages.table.sharding)
        index = self.pages.with_table(table).with_lengths(lengths)
        return dataclasses.replace(self, index=index, newest=newest)

    def with_codec_state(self, state: State) -> "KVCache":
        """The same buffers of vectors that were encoded under this state.

        State of the `Newest` tokens' codec that was never set is this too: the tokens that it
        would have been set from were written without them.
        """
        newest, ours = self.newest, self.config.codec_state.items()
        found = {} if newest is None else newest.codec_state
        if newest is not None and found and newest.config.codec_state.items() <= ours:
            is_set = jnp.any(jnp.stack([array.any() for array in found.values()]))
            own = {name: jnp.where(is_set, found[name], state[name]) for name in found}
            newest = dataclasses.replace(newest, codec_state=own)
        return dataclasses.replace(self, codec_state=state, newest=newest)

    def __repr__(self) -> str:
        held, unknown = _lengths(self)
        if held is None:
            tokens = f"{unknown}, ?" if unknown == "donated" else "?"
        elif held.size <= _NAMED:
            tokens = str(held.tolist())
        else:
            tokens = f"{held.min()} to {held.max()}"
        config = self.config
        return (
            f"KVCache({_facts(config)}, {tokens} of {config.max_context_length} tokens, "
            f"{format_bytes(config.size_bytes)})"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: how full each sequence is."""
        held, unknown = _lengths(self)
        size = f"{format_bytes(self.config.size_bytes)} ({self.config.size_bytes:,} bytes)"
        if self.spread is not None:
            size = f"{size} over {self.spread.mesh.size} devices"
        if held is None or self.spread is not None:
            size = f"{size}, {unknown}" if held is None else size
            return occupancy_html("KVCache", _facts(self.config), [], size)
        room = books_of_index(self.index)[1].ravel()
        bars = [
            Bar(f"sequence {i}", *pair)
            for i, pair in enumerate(zip(held.ravel(), room, strict=True))
        ]
        if held.ndim == 0:
            bars = [bars[0]._replace(name="")]
        elif len(bars) > _NAMED:
            fullest, emptiest = max(bars, key=_fill), min(bars, key=_fill)
            bars = [
                Bar(f"all {sequences(len(bars))}", held.sum(), room.sum()),
                fullest._replace(name=f"the fullest, {fullest.name}"),
                emptiest._replace(name=f"the emptiest, {emptiest.name}"),
            ]
        return occupancy_html("KVCache", _facts(self.config), bars, size)

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        """What treescope shows: an object to unfold."""
        from treescope import repr_lib

        return repr_lib.render_object_constructor(
            object_type=type(self),
            attributes={"storage": self.storage, "index": self.index, "config": self.config},
            path=path,
            subtree_renderer=subtree_renderer,
        )


def buffer_of(cache: KVCache) -> Array:
    """One of a cache's buffers, which stands for all: they are made and moved together."""
    buffer: Array = jax.tree.leaves(next(iter(cache.storage.values())))[0]
    return buffer


def books_of_index(index: Index) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outside jit, the length of each sequence, its room, and whether it is intact."""
    with jax.ensure_compile_time_eval():  # a cache that a traced function names is not traced
        lengths, room, intact = jax.device_get(_books(index))
    return lengths, np.broadcast_to(room, lengths.shape), np.broadcast_to(intact, lengths.shape)


@one_program()
def _books(index: Index) -> tuple[Any, Any, Any]:
    return index.lengths, index.room, index.intact


def is_readable(array: Array | np.ndarray) -> bool:
    """Whether this process has all of an array."""
    if not isinstance(array, jax.Array):
        return True
    return bool(array.is_fully_addressable or array.is_fully_replicated)


def _fill(bar: Bar) -> float:
    return bar.used / max(bar.size, 1)


def _facts(config: KVCacheConfig) -> str:
    batch = "" if config.batch_size is None else f", {sequences(config.batch_size)}"
    return (
        f"{config.num_layers} layers, {config.num_kv_heads} KV heads x {config.pair.described}, "
        f"{config.codec_name}, {config.addressing.name}{batch}"
    )


def _lengths(cache: KVCache) -> tuple[np.ndarray | None, str]:
    """The tokens of each sequence; or None, and why they are not known."""
    lengths = cache.lengths
    if not is_concrete(lengths):
        return None, "traced"
    if not isinstance(lengths, jax.Array | np.ndarray):
        return None, "shapes alone"
    if isinstance(lengths, jax.Array) and lengths.is_deleted():
        return None, "donated"
    if not is_readable(lengths):
        return None, "partly in other processes"
    return np.asarray(jax.device_get(lengths)), ""
