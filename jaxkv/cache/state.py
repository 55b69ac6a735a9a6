"""State per sequence: arrays of one shape however long the text is, beside keys and values.

What recurrent layers and convolutions carry from token to token. Unlike keys and values it is
written over by each step, so it goes back to no earlier token, only to none at all.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxkv.cache.axes import Spread, check_divides
from jaxkv.cache.kv_cache import OUT_OF_RANGE, Counted
from jaxkv.counts import as_count
from jaxkv.errors import ConfigError
from jaxkv.show.text import format_bytes

# Bytes beside the arrays of a sequence: its length, and the token that its state stands at.
_INDEX_BYTES = 8


class StateArray(NamedTuple):
    """An array that a layer keeps of each sequence: its name, shape and dtype, by name."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class StateConfig:
    """Layers that keep a state of each sequence, all of one kind. Frozen and validated when made.

    Args:
      layers: their numbers in the model. One that attends too is also in a group.
      arrays: what each keeps, `StateArray` or ``(name, shape, dtype)``.
      batch_size: as in `KVCacheConfig`.
      by_head: names of the arrays whose first axis is of heads, which a mesh can split. The others
        are on all devices that share heads.

    Raises:
      ConfigError: no layers, no arrays, or one that cannot be.

    >>> delta = StateConfig((0, 1, 2), [("conv", (3, 8192), "bfloat16"), ("sum", (32, 128, 128),
    ...     "float32")])
    >>> delta.size_bytes
    6438912
    """

    layers: tuple[int, ...]
    arrays: tuple[StateArray, ...]
    batch_size: int | None = None
    by_head: tuple[str, ...] = ()

    per_token: ClassVar[bool] = False
    in_host_memory: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(map(int, self.layers)))
        object.__setattr__(self, "by_head", tuple(self.by_head))
        arrays = tuple(
            StateArray(name, tuple(shape), jnp.dtype(dtype).name)
            for name, shape, dtype in self.arrays
        )
        object.__setattr__(self, "arrays", arrays)
        names = [array.name for array in arrays]
        sizes = [size for array in arrays for size in array.shape]
        if not arrays or len(set(names)) < len(names) or None in map(as_count, sizes):
            raise ConfigError(
                "StateConfig: arrays must be at least one, each of its own name, with sizes of at "
                f"least 1, got {[tuple(array) for array in arrays]}."
            )
        if not set(self.by_head) <= {array.name for array in arrays if array.shape}:
            raise ConfigError(
                f"StateConfig: by_head must name arrays that have axes, got {list(self.by_head)} "
                f"of {[tuple(array) for array in arrays]}."
            )
        if not self.layers or tuple(sorted({*self.layers})) != self.layers or self.layers[0] < 0:
            raise ConfigError(
                "StateConfig: layers must be numbers of layers, each once and in order, got "
                f"{list(self.layers)}."
            )

    def replace(self, **fields: Any) -> Self:
        """The same config with other values in some fields, validated anew."""
        return dataclasses.replace(self, **fields)

    def part(self, batch: int, heads: int, axis: str | None) -> Self:
        """What each of so many devices has that share the sequences, and the heads along an axis.

        Raises:
          ConfigError: heads that the axis does not divide.
        """

        def own(array: StateArray) -> StateArray:
            if array.name not in self.by_head:
                return array
            first, *rest = array.shape
            check_divides(f"the heads of {array.name!r}", first, heads, axis)
            return array._replace(shape=(first // heads, *rest))

        arrays = tuple(map(own, self.arrays))
        return self.replace(arrays=arrays, batch_size=self.batch_size and self.batch_size // batch)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return () if self.batch_size is None else (self.batch_size,)

    @property
    def bytes_per_sequence(self) -> int:
        """Exact bytes of one sequence's arrays, of all layers together."""
        return self.num_layers * sum(array.size_bytes for array in self.arrays)

    @property
    def size_bytes(self) -> int:
        """Exact bytes of the arrays of all sequences."""
        return self.bytes_per_sequence * (self.batch_size or 1)

    @property
    def index_bytes(self) -> int:
        """Exact bytes of what stands beside them."""
        return _INDEX_BYTES * (self.batch_size or 1)

    def to_dict(self) -> dict[str, Any]:
        """Its fields as plain values."""
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """One line for messages: ``10 layers of state, 98.3 kB per sequence``."""
        per_sequence = format_bytes(self.bytes_per_sequence)
        return f"{self.num_layers} layers of state, {per_sequence} per sequence"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["lengths", "at"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class StateIndex:
    """How long sequences are, and the number of tokens that their state has seen."""

    lengths: Int[Array, "*batch"]
    at: Int[Array, "*batch"]

    chunk = None
    per_head = False
    pages = None
    share = None

    @property
    def room(self) -> int:
        """A state has room for any text."""
        return OUT_OF_RANGE

    @property
    def capacity(self) -> int:
        return OUT_OF_RANGE

    @property
    def intact(self) -> Bool[Array, "*batch"]:
        return self.at == self.lengths

    def with_lengths(self, lengths: Int[Array, "*batch"]) -> Self:
        """A state goes on with new tokens, and stays where it is when some are taken back."""
        new = jnp.maximum(lengths - self.lengths, 0)
        at = jnp.where(lengths == 0, 0, self.at + new)
        return dataclasses.replace(self, lengths=lengths, at=at)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["storage", "index", "real_tokens"],
    meta_fields=["config", "spread", "part_of"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class StateCache(Counted):
    """State of each sequence, in the layers of one `StateConfig`. Part of a `HybridCache`.

    Attributes:
      storage: for each name an array ``[*batch, *shape]`` per layer; not one of all layers, of
        which XLA would make a copy to read one and write it. What a sequence of no tokens has there
        means nothing: its state is zeros.
      index: how many tokens each sequence has.
      config: the static description.
      real_tokens, spread, part_of: as in `KVCache`.
    """

    storage: dict[str, tuple[Array, ...]]
    index: StateIndex
    config: StateConfig
    real_tokens: Int[Array, "*batch"] | None = None
    spread: Spread | None = None
    part_of: Spread | None = None

    # What verbs ask of a cache: it has no pages, and no tokens of which some are the newest.
    pages = None
    newest = None

    @classmethod
    def create(cls, config: StateConfig, device: Any) -> Self:
        """That of texts that have not begun."""
        storage = {
            name: tuple(
                jnp.zeros((*config.batch_shape, *shape), dtype, device=device)
                for _ in config.layers
            )
            for name, shape, dtype in config.arrays
        }
        lengths, at = (jnp.zeros(config.batch_shape, jnp.int32, device=device) for _ in range(2))
        return cls(storage, StateIndex(lengths, at), config)

    @property
    def groups(self) -> tuple[Self]:
        """Itself, as a `KVCache` is one group."""
        return (self,)

    @property
    def size_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.storage))

    @property
    def how_lost(self) -> str:
        """Why a rollback was refused, and what to do."""
        return (
            "its layers with a state have gone on, and a state goes back to no tokens at all or to "
            "a copy: keep one with jaxkv.copy_state, and bring it back with jaxkv.restore_state."
        )

    def with_lengths(self, lengths: Int[Array, "*batch"]) -> Self:
        return dataclasses.replace(self, index=self.index.with_lengths(lengths))

    def standing_at(self, lengths: Int[Array, "*batch"]) -> Self:
        """The same arrays as the state of sequences of these lengths: for who keeps the books."""
        return dataclasses.replace(self, index=StateIndex(lengths, lengths))

    def with_rows(
        self, rows: Int[Array, " rows"], others: "StateCache", of: Int[Array, " rows"]
    ) -> Self:
        """With the arrays of other sequences in these rows; one of -1 is skipped.

        Args:
          rows: each named once.
          others: a batch of the same arrays.
          of: which of them.
        """
        to = jnp.where(rows < 0, self.config.batch_size or 1, rows)

        def written(leaf: Array, other: Array) -> Array:
            return leaf.at[to].set(other[jnp.maximum(of, 0)], mode="drop")

        return dataclasses.replace(
            self, storage=jax.tree.map(written, self.storage, others.storage)
        )

    def of_rows(self, rows: Int[Array, " rows"]) -> Self:
        """A batch of these sequences, which go on independently."""
        unbatched = self.config.batch_size is None

        def chosen(leaf: Array) -> Array:
            return (leaf[None] if unbatched else leaf)[rows]

        index = StateIndex(*(each.reshape(-1)[rows] for each in (self.lengths, self.index.at)))
        storage = jax.tree.map(chosen, self.storage)
        config = self.config.replace(batch_size=rows.size)
        return dataclasses.replace(self, storage=storage, index=index, config=config)

    def read(self, position: int) -> dict[str, Array]:
        """The arrays of one of its layers, zeros for a text that has not begun."""
        fresh = self.lengths == 0
        found = {}
        for name, shape, _ in self.config.arrays:
            array = self.storage[name][position]
            empty = fresh.reshape(*fresh.shape, *(1 for _ in shape))
            found[name] = jnp.where(empty, jnp.zeros((), array.dtype), array)
        return found

    def written(self, position: int, new: dict[str, Array]) -> Self:
        """With these arrays in one of its layers; not where all of a step's tokens are padding."""
        storage = {}
        for name, of_layers in self.storage.items():
            old = of_layers[position]
            own = new[name].astype(old.dtype)
            if self.real_tokens is not None:
                moves = jnp.broadcast_to(self.real_tokens > 0, self.lengths.shape)
                moves = moves.reshape(*moves.shape, *(1 for _ in old.shape[moves.ndim :]))
                own = jnp.where(moves, own, old)
            storage[name] = (*of_layers[:position], own, *of_layers[position + 1 :])
        return dataclasses.replace(self, storage=storage)

    def __repr__(self) -> str:
        return f"StateCache({self.config.describe()})"

    def _repr_html_(self) -> str:
        return f"<div>{self!r}</div>"
