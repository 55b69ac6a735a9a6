"""The addressing contract: which slot of the ctx axis holds which position of which sequence.

An addressing is two values. The static one stands in the config and sizes the buffer; the
index is a small pytree inside the cache. Every mask derives from the positions that the
index reports, so a new addressing needs no change in attention.
"""

from typing import Protocol, Self, runtime_checkable

from jaxtyping import Array, Int


@runtime_checkable
class Index(Protocol):
    """The arrays beside the buffer that say what its slots hold.

    Methods see one sequence (``*batch`` is empty) or a batch, as the config says. A
    *logical* slot counts within its sequence, from 0; ``capacity`` is their number.
    """

    @property
    def lengths(self) -> Int[Array, "*batch"]:
        """Tokens in each sequence."""
        ...

    @property
    def capacity(self) -> int:
        """Tokens that one sequence can hold."""
        ...

    def with_lengths(self, lengths: Int[Array, "*batch"]) -> Self:
        """The same index with other lengths."""
        ...

    def slots(self, positions: Int[Array, "*batch tokens"]) -> Int[Array, "*batch tokens"]:
        """The ctx slot that a position is written to; -1 where it has none."""
        ...

    def key_positions(
        self, lengths: Int[Array, "*batch"], start: Int[Array, ""] | int, size: int
    ) -> Int[Array, "*batch size"]:
        """The position that each of ``size`` logical slots holds; -1 where it is empty.

        ``lengths`` are those after the tokens being processed, which are written already.
        """
        ...

    def read(
        self, leaf: Array, layer: Int[Array, ""] | int, start: Int[Array, ""] | int, size: int
    ) -> Array:
        """``size`` logical slots of one layer of a buffer: ``[2, *batch, size, kv_heads, ...]``."""
        ...


@runtime_checkable
class Addressing(Protocol):
    """What `KVCacheConfig.addressing` must offer; see `Contiguous` for the smallest one."""

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
