"""The addressing contract: which slot of the ctx axis holds which position of which sequence.

An addressing is two values. The static one stands in the config and sizes the buffer; the
index is a small pytree inside the cache. Every mask derives from the positions that the
index reports, so a new addressing needs no change in attention.
"""

from typing import Protocol, Self, runtime_checkable

from jaxtyping import Array, Bool, Int

# A static layer number, or a traced one inside a scan over layers.
Layer = int | Int[Array, ""]


@runtime_checkable
class Index(Protocol):
    """The arrays beside the buffer that say what its slots hold.

    Methods see one sequence (``*batch`` is empty) or a batch, as the config says. A
    *logical* slot counts within its sequence, from 0; ``extent`` is their number.
    """

    @property
    def lengths(self) -> Int[Array, "*batch"]:
        """Tokens in each sequence so far: the position of the next one."""
        ...

    @property
    def capacity(self) -> int:
        """Tokens that one sequence may ever be given."""
        ...

    @property
    def extent(self) -> int:
        """Logical slots of one sequence, which attention goes through."""
        ...

    @property
    def chunk(self) -> int | None:
        """Tokens that one append may bring; None for any number."""
        ...

    @property
    def window(self) -> int | None:
        """Newest tokens that a query sees, itself included; None for all."""
        ...

    @property
    def sinks(self) -> int:
        """First tokens that a query sees whatever the window is."""
        ...

    @property
    def room(self) -> Int[Array, "*batch"] | int:
        """Tokens that each sequence can hold as things stand."""
        ...

    @property
    def intact(self) -> Bool[Array, "*batch"] | bool:
        """False for a sequence that lost tokens which its next query would see."""
        ...

    def with_lengths(self, lengths: Int[Array, "*batch"]) -> Self:
        """The same index with other lengths: longer after an append, shorter after a rollback."""
        ...

    def slots(self, positions: Int[Array, "*batch tokens"]) -> Int[Array, "*batch tokens"]:
        """The ctx slot that a position is written to; -1 where it has none."""
        ...

    def key_positions(
        self, layer: Layer, lengths: Int[Array, "*batch"], start: Int[Array, ""] | int, size: int
    ) -> Int[Array, "*batch size"] | Int[Array, "*batch kv_heads size"]:
        """The position that each of ``size`` logical slots holds; -1 where it is empty.

        ``lengths`` are those after the tokens being processed, which are written already. With
        an axis of KV heads where each head keeps tokens of its own.
        """
        ...

    def read(self, leaf: Array, layer: Layer, start: Int[Array, ""] | int, size: int) -> Array:
        """``size`` logical slots of one layer of a buffer: ``[2, *batch, size, kv_heads, ...]``."""
        ...

    def select(self, rows: Int[Array, " rows"]) -> tuple[Self, Int[Array, " ctx"] | None]:
        """The index of a batch of these sequences, and the ctx slots whose content it takes along.

        None where the new sequences go on in the slots that the old ones have.
        """
        ...


@runtime_checkable
class Addressing(Protocol):
    """What `KVCacheConfig.addressing` must offer; see `Contiguous` for the smallest one.

    >>> import jaxkv
    >>> ring = jaxkv.Ring(window=512, sinks=4, chunk=128)
    >>> isinstance(ring, jaxkv.Addressing), ring.name
    (True, 'ring')
    """

    @property
    def name(self) -> str:
        """What messages and tables call it."""
        ...

    def num_slots(self, max_context_length: int, batch_size: int | None) -> int:
        """The size of the buffer's ctx axis."""
        ...

    def index_bytes(self, max_context_length: int, batch_size: int | None) -> int:
        """Exact bytes of the index's arrays."""
        ...

    def init(self, max_context_length: int, batch_size: int | None) -> Index:
        """The index of an empty cache."""
        ...
