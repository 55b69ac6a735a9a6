"""Chosen tokens, others in each layer and head, and slots for new ones: a compressed cache."""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxkv.addressing.addressing import Index, Layer, PageTable, PlainIndex, PlainPerHead
from jaxkv.addressing.contiguous import Contiguous
from jaxkv.addressing.paged import Paged
from jaxkv.counts import check_fields


@dataclasses.dataclass(frozen=True)
class Kept(PlainPerHead):
    """Each KV head holds ``tokens`` tokens of its own choice, and ``new`` that came since.

    Made by `jaxkv.compress`, or given to a config for a cache that evicts from its first token
    on (`jaxkv.evicting`). A sequence takes ``new + tokens`` logical slots, the new tokens' first.
    A kept key stays at the rope position that it has, so the next position is not the number of
    tokens held.

    Args:
      tokens: kept a layer, sequence and head.
      new: tokens that fit beside them, until `jaxkv.evict` chooses again.
      num_layers, num_kv_heads: of the config; there is a position for each of their tokens.
      sums: numbers per token and head that a policy with state keeps, by name (its ``state``);
        True for those of `jaxkv.policies.HeavyHitters`.
      within: where the logical slots are, `Contiguous` or `Paged`; pages of a shared pool are
        assigned by `jaxkv.compress`.

    Raises:
      ValueError: a number that is not one of tokens, layers or heads.

    >>> import jaxkv
    >>> kept = Kept(tokens=1000, new=24, num_layers=32, num_kv_heads=8)
    >>> config = jaxkv.KVCacheConfig(32, 1_000_000, num_kv_heads=8, head_dim=128, addressing=kept)
    >>> config.num_slots, config.index_bytes
    (1024, 1024008)
    """

    tokens: int
    new: int
    num_layers: int
    num_kv_heads: int
    sums: bool | tuple[str, ...] = False
    within: Contiguous | Paged = Contiguous()

    def __post_init__(self) -> None:
        check_fields(self, "tokens", "new", "num_layers", "num_kv_heads")
        within = self.within
        if self.sums in (("sums",), ()):  # one policy, one name, one config
            object.__setattr__(self, "sums", bool(self.sums))
        named = isinstance(self.sums, tuple) and all(isinstance(name, str) for name in self.sums)
        sums = named or isinstance(self.sums, bool)
        allowed = isinstance(within, Contiguous | Paged) and within.window is None
        if not sums or not allowed:
            raise ValueError(
                f"Kept: sums must be True, False or names and within Contiguous() or Paged() "
                f"without a window, got {self.sums!r} and {within!r}."
            )

    @property
    def name(self) -> str:
        return "kept"

    @property
    def num_pages(self) -> int | None:  # type: ignore[override]
        return self.within.num_pages

    def with_heads(self, num_kv_heads: int) -> Self:
        return dataclasses.replace(self, num_kv_heads=num_kv_heads)

    def shared_by(self, devices: int) -> Self:
        return dataclasses.replace(self, within=self.within.shared_by(devices))

    @property
    def state(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the numbers that a policy keeps per token and head."""
        return self.sums if isinstance(self.sums, tuple) else ("sums",) * self.sums

    @property
    def slots_per_sequence(self) -> int:
        return self.new + self.tokens

    def num_slots(self, max_context_length: int, batch_size: int | None) -> int:
        return self.within.num_slots(self.slots_per_sequence, batch_size)

    def index_bytes(self, max_context_length: int, batch_size: int | None) -> int:
        batch = batch_size or 1
        held = batch * self.num_layers * self.num_kv_heads * self.tokens
        in_slots = held + batch * self.num_layers * self.num_kv_heads * self.new
        state = 4 * (len(self.state) * in_slots + batch) if self.state else 0
        slots = self.within.index_bytes(self.slots_per_sequence, batch_size)
        return 4 * batch + 4 * held + slots + state

    def init(self, max_context_length: int, batch_size: int | None) -> "KeptEvenlyIndex":
        batch = () if batch_size is None else (batch_size,)
        shape = (self.num_layers, *batch, self.num_kv_heads)
        lengths = jnp.zeros(batch, jnp.int32)
        state = None
        if self.state:
            slots = (*shape, self.slots_per_sequence)
            tokens = {name: jnp.zeros(slots, jnp.float32) for name in self.state}
            state = PolicyState(tokens, jnp.zeros_like(lengths))
        return KeptEvenlyIndex(
            lengths,
            jnp.full((*shape, self.tokens), -1, jnp.int32),
            self.within.init(self.slots_per_sequence, batch_size),
            max_context_length,
            self.new,
            state,
        )


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tokens", "since"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class PolicyState:
    """What a policy remembers of the tokens, from all queries from position ``since`` on.

    Attributes:
      tokens: numbers of each logical slot's token, by name; only the policy knows what they mean.
      since: of each sequence.
    """

    tokens: dict[str, Float[Array, "layers *batch kv_heads slots"]]
    since: Int[Array, "*batch"]

    def map(self, function: Callable[..., Array], *others: dict[str, Array]) -> Self:
        """With ``function`` of each array, and of those of the others that have its name."""
        return dataclasses.replace(self, tokens=jax.tree.map(function, self.tokens, *others))


@dataclasses.dataclass(frozen=True)
class KeptIndex(PlainIndex, abc.ABC):
    """What the indices of compressed caches share: heads hold tokens of their own choice.

    Attributes:
      lengths: the next position of each sequence.
      positions: positions of the kept tokens, in any order; -1 for none.
      within: the addressing of new tokens, at least; its lengths count them.
      capacity, new: static, see `Index` and `Kept`.
      state: what a policy remembers of the tokens, where one does.
    """

    lengths: Int[Array, "*batch"]
    positions: Int[Array, "layers ..."]
    within: Index
    capacity: int
    new: int

    per_head = True
    state: ClassVar[PolicyState | None] = None

    @property
    @abc.abstractmethod
    def extent(self) -> int:
        """Logical slots of one sequence: those of new tokens, then those of kept ones."""

    @abc.abstractmethod
    def kept_positions(
        self, layer: Layer, places: Int[Array, " size"]
    ) -> Int[Array, "*batch kv_heads size"]:
        """Positions of each head's kept tokens at these places among them; -1 for none."""

    @abc.abstractmethod
    def read(self, leaf: Array, layer: Layer, start: Int[Array, ""] | int, size: int) -> Array:
        """See `Index.read`."""

    @abc.abstractmethod
    def select(self, rows: Int[Array, " rows"]) -> tuple[Self, Int[Array, " ctx"] | None]:
        """See `Index.select`."""

    @abc.abstractmethod
    def head_slots(
        self, layer: Layer, logical: Int[Array, "*batch kv_heads slots"]
    ) -> Int[Array, "*batch kv_heads slots"]:
        """Where vectors are when the ctx and KV head axes are one; -1 for no such slot."""

    @abc.abstractmethod
    def with_kept(self, layer: Layer, positions: Int[Array, "*batch kv_heads kept"]) -> Self:
        """The same index with other kept tokens in a layer."""

    @abc.abstractmethod
    def with_runs(self, counts: Int[Array, "layers *batch kv_heads"]) -> Self:
        """The same index, where each head may keep so many tokens."""

    @property
    @abc.abstractmethod
    def run_lengths(self) -> Int[Array, "layers *batch kv_heads"] | None:
        """Tokens that each head may keep, where they differ and stay; None elsewhere."""

    @abc.abstractmethod
    def limits(self, layer: Layer) -> Int[Array, "*batch kv_heads"]:
        """Tokens that each head may keep."""

    @property
    def first_new(self) -> Int[Array, "*batch"]:
        """The position of the first token after the last choice; kept ones are before it."""
        return self.lengths - self.within.lengths

    @property
    def room(self) -> Int[Array, "*batch"]:
        new = jnp.minimum(self.within.room, self.new)  # fewer where pages are missing
        return jnp.minimum(self.first_new + new, self.capacity)

    def with_lengths(self, lengths: Int[Array, "*batch"]) -> Self:
        # Rolled back beyond the last choice, kept tokens from there on are gone for good: the
        # first new token is then the next one.
        since = jnp.maximum(lengths - self.first_new, 0)
        return dataclasses.replace(self, lengths=lengths, within=self.within.with_lengths(since))

    def slots(self, positions: Int[Array, "*batch tokens"]) -> Int[Array, "*batch tokens"]:
        place = positions - self.first_new[..., None]
        exists = (positions >= 0) & (positions < self.capacity) & (place >= 0) & (place < self.new)
        return self.within.slots(jnp.where(exists, place, -1))

    def key_positions(
        self, layer: Layer, lengths: Int[Array, "*batch"], start: Int[Array, ""] | int, size: int
    ) -> Int[Array, "*batch kv_heads size"]:
        slots = start + jnp.arange(size, dtype=jnp.int32)
        first = self.first_new[..., None, None]
        end = jnp.minimum(lengths, self.room)[..., None, None]
        kept = self.kept_positions(layer, slots - self.new)
        kept = jnp.where(kept < first, kept, -1)
        new = jnp.where(first + slots < end, first + slots, -1)
        return jnp.where(slots < self.new, new, kept)

    def with_state(self, state: PolicyState | None) -> Self:
        """The same index with another state of a policy, of an addressing that has any."""
        return self if state is None else dataclasses.replace(self, state=state)  # type: ignore[call-arg]

    def with_new_slots_free(self, full: Bool[Array, "*batch"]) -> Self:
        """After a choice: in these sequences every token held is a kept one."""
        since = jnp.where(full, 0, self.within.lengths)
        return dataclasses.replace(self, within=self.within.with_lengths(since))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["lengths", "positions", "within", "state"],
    meta_fields=["capacity", "new"],
)
@dataclasses.dataclass(frozen=True)
class KeptEvenlyIndex(KeptIndex):
    """As many kept tokens in each head: positions are ``[layers, *batch, kv_heads, tokens]``."""

    state: PolicyState | None = None  # type: ignore[misc]

    @property
    def run(self) -> int | None:
        return self.within.run

    @property
    def pages(self) -> PageTable | None:
        return self.within.pages

    @property
    def extent(self) -> int:
        return self.new + self.positions.shape[-1]

    def kept_positions(
        self, layer: Layer, places: Int[Array, " size"]
    ) -> Int[Array, "*batch kv_heads size"]:
        return jnp.take(self.positions[layer], places, axis=-1, mode="clip")

    def read(self, leaf: Array, layer: Layer, start: Int[Array, ""] | int, size: int) -> Array:
        return self.within.read(leaf, layer, start, size)

    def head_slots(
        self, layer: Layer, logical: Int[Array, "*batch kv_heads slots"]
    ) -> Int[Array, "*batch kv_heads slots"]:
        kv_heads = logical.shape[-2]
        slots = self.within.slots(logical.reshape(*logical.shape[:-2], -1)).reshape(logical.shape)
        heads = jnp.arange(kv_heads, dtype=jnp.int32)[:, None]
        return jnp.where(slots < 0, -1, slots * kv_heads + heads)

    def with_kept(self, layer: Layer, positions: Int[Array, "*batch kv_heads tokens"]) -> Self:
        return dataclasses.replace(self, positions=self.positions.at[layer].set(positions))

    def with_runs(self, counts: Int[Array, "layers *batch kv_heads"]) -> Self:
        return self  # all heads have the same places

    @property
    def run_lengths(self) -> None:
        return None

    def limits(self, layer: Layer) -> Int[Array, "*batch kv_heads"]:
        return jnp.full(self.positions.shape[1:-1], self.positions.shape[-1], jnp.int32)

    def select(self, rows: Int[Array, " rows"]) -> tuple[Self, Int[Array, " ctx"] | None]:
        def of_rows(array: Array, axis: int) -> Array:
            batched = array if self.lengths.ndim else jnp.expand_dims(array, axis)
            return jnp.take(batched, rows, axis=axis)

        within, slots = self.within.select(rows)
        state = self.state
        if state is not None:
            state = state.map(lambda array: of_rows(array, 1))
            state = dataclasses.replace(state, since=of_rows(state.since, 0))
        selected = dataclasses.replace(
            self,
            lengths=of_rows(self.lengths, 0),
            positions=of_rows(self.positions, 1),
            within=within,
            state=state,
        )
        return selected, slots
