"""The addressing contract: which slot of the ctx axis holds which position of which sequence.

An addressing is two values. The static one stands in the config and sizes the buffer; the
index is a small pytree inside the cache. Every mask derives from the positions that the
index reports, so a new addressing needs no change in attention. Kernels, host memory and files
ask both what they can do (`Index.run`, `Index.pages`, ...), never which they are.
"""

import abc
from typing import Protocol, Self, runtime_checkable

from jaxtyping import Array, Bool, Int

# A static layer number, or a traced one inside a scan over layers.
Layer = int | Int[Array, ""]

# Of a field that an addressing did not have at first: files name it where it is not the default.
LATER = {"later": True}


class Traits(Protocol):
    """What an addressing and its index both say of it."""

    @property
    def chunk(self) -> int | None:
        """Tokens that one append may bring, or more of them to an index; None for any number."""

    @property
    def window(self) -> int | None:
        """Newest tokens that a query sees, itself included; None for all."""

    @property
    def aligned(self) -> bool:
        """Whether a query sees, of its window, the tokens from a multiple of its size on alone."""

    @property
    def sinks(self) -> int:
        """First tokens that a query sees whatever the window is."""

    @property
    def by_position(self) -> bool:
        """Whether logical slot p holds position p."""

    @property
    def per_head(self) -> bool:
        """Whether each KV head holds tokens of its own choice, as in a `KeptIndex`."""


@runtime_checkable
class Index(Traits, Protocol):
    """The arrays beside the buffer that say what its slots hold.

    Methods see one sequence (``*batch`` is empty) or a batch, as the config says. A
    *logical* slot counts within its sequence, from 0; ``extent`` is their number.
    """

    @property
    def lengths(self) -> Int[Array, "*batch"]:
        """Tokens in each sequence so far: the position of the next one."""

    @property
    def capacity(self) -> int:
        """Tokens that one sequence may ever be given."""

    @property
    def extent(self) -> int:
        """Logical slots of one sequence, which attention goes through."""

    @property
    def run(self) -> int | None:
        """Logical slots that stand in a row in the buffer, from each multiple of it on.

        A page, or all that a sequence owns: then those of sequence b begin at ctx slot b * run.
        None for slots that stand anywhere.
        """

    @property
    def pages(self) -> "PageTable | None":
        """What says where logical slots are, a page of ``run`` slots at a time; None for none."""

    @property
    def ring(self) -> "RingSlots | None":
        """What says how new tokens take the slots of old ones; None where they never do."""

    @property
    def share(self) -> "Share | None":
        """What says which positions are this device's; None where it holds all of a sequence."""

    @property
    def room(self) -> Int[Array, "*batch"] | int:
        """Tokens that each sequence can hold as things stand."""

    @property
    def intact(self) -> Bool[Array, "*batch"] | bool:
        """False for a sequence that lost tokens which its next query would see."""

    def with_lengths(self, lengths: Int[Array, "*batch"]) -> Self:
        """The same index with other lengths: longer after an append, shorter after a rollback."""

    def slots(self, positions: Int[Array, "*batch tokens"]) -> Int[Array, "*batch tokens"]:
        """The ctx slot that a position is written to; -1 where it has none."""

    def key_positions(
        self, layer: Layer, lengths: Int[Array, "*batch"], start: Int[Array, ""] | int, size: int
    ) -> Int[Array, "*batch size"] | Int[Array, "*batch kv_heads size"]:
        """The position that each of ``size`` logical slots holds; -1 where it is empty.

        ``lengths`` are those after the tokens being processed, which are written already. With
        an axis of KV heads where each head keeps tokens of its own.
        """

    def read(self, leaf: Array, layer: Layer, start: Int[Array, ""] | int, size: int) -> Array:
        """``size`` logical slots of one layer of a buffer: ``[2, *batch, size, kv_heads, ...]``."""

    def select(self, rows: Int[Array, " rows"]) -> tuple[Self, Int[Array, " ctx"] | None]:
        """The index of a batch of these sequences, and the ctx slots whose content it takes along.

        None where the new sequences go on in the slots that the old ones have.
        """


class PageTable(Index, Protocol):
    """An index whose logical slots stand in pages of a pool, in any order."""

    @property
    def table(self) -> Int[Array, "*batch pages"]:
        """The page of the pool for each page of a sequence; -1 for none."""

    @property
    def page_size(self) -> int:
        """Slots of a page."""

    @property
    def shared(self) -> bool:
        """Whether pages come from an allocator, and may stand in several rows."""

    def with_table(self, table: Int[Array, "*batch pages"]) -> Self:
        """The same lengths with other pages."""

    def places(self, logical: Int[Array, "#*batch slots"]) -> Int[Array, "*batch slots"]:
        """The ctx slots of logical ones; any for those of a page that is not there."""


class RingSlots(Index, Protocol):
    """An index whose positions go round: p is in slot ``sinks + (p - sinks) % ring_slots``.

    That of a sink, before ``sinks``, is in slot p.
    """

    @property
    def window(self) -> int:
        """See `Index`."""

    @property
    def ring_slots(self) -> int:
        """Slots that positions go round, beside those of the sinks."""

    def logical_slots(self, positions: Int[Array, "*batch tokens"]) -> Int[Array, "*batch tokens"]:
        """The logical slot of each position."""

    def first_position(self, lengths: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        """Tokens from this position on are held; ``lengths`` are those after the newest."""

    def holding_from(self, first: Int[Array, "*batch"], lengths: Int[Array, "*batch"]) -> Self:
        """Of sequences of these lengths, whose tokens from ``first`` on are held."""


def first_visible(
    positions: Int[Array, "*shape"], window: int, aligned: bool
) -> Int[Array, "*shape"]:
    """The first position that queries at these see, of a window that may be `Traits.aligned`."""
    return positions - (positions % window if aligned else window - 1)


class Share(Index, Protocol):
    """An index of one device's share of sequences that are dealt out over a mesh axis."""

    @property
    def rank(self) -> Int[Array, ""]:
        """This device's number along the mesh axis."""

    @property
    def axis(self) -> str:
        """Name of the mesh axis."""

    @property
    def size(self) -> int:
        """Devices along it."""

    @property
    def inner(self) -> Index:
        """Where this device's tokens are, by their order on it."""

    def own(self, lengths: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """How many of the positions below these are this device's."""


class _Defaults:
    """What an addressing and its index are where they do not say otherwise."""

    chunk: int | None = None
    window: int | None = None
    aligned: bool = False
    sinks: int = 0
    by_position: bool = False
    per_head: bool = False


class Plain(_Defaults):
    """An addressing without a window, pages, or anything else: inherit, and say what differs."""

    page_size: int | None = None
    num_pages: int | None = None
    state: tuple[str, ...] = ()

    def reason_against(self, num_layers: int, num_kv_heads: int) -> str | None:
        return None

    def with_heads(self, num_kv_heads: int) -> Self:
        return self

    def shared_by(self, devices: int) -> Self:
        return self


class PlainPerHead(Plain, abc.ABC):
    """One whose heads keep tokens of their own, for so many layers and heads: inherit, as above."""

    num_layers: int
    num_kv_heads: int
    per_head = True

    def reason_against(self, num_layers: int, num_kv_heads: int) -> str | None:
        if (num_layers, num_kv_heads) == (self.num_layers, self.num_kv_heads):
            return None
        return (
            f"num_layers and num_kv_heads must be those of {self}, got {num_layers} and "
            f"{num_kv_heads}"
        )


class PlainIndex(_Defaults):
    """An index of slots anywhere, which are never written over: inherit, and say what differs."""

    @property
    def intact(self) -> Bool[Array, "*batch"] | bool:
        return True

    @property
    def run(self) -> int | None:
        return None

    @property
    def pages(self) -> PageTable | None:
        return None

    @property
    def ring(self) -> RingSlots | None:
        return None

    @property
    def share(self) -> Share | None:
        return None


@runtime_checkable
class Addressing(Traits, Protocol):
    """What `KVCacheConfig.addressing` must offer; see `Contiguous` for the smallest one.

    `jaxkv.addressing.Plain` gives what most of them have in common.

    >>> import jaxkv
    >>> ring = jaxkv.Ring(window=512, sinks=4, chunk=128)
    >>> isinstance(ring, jaxkv.Addressing), ring.name
    (True, 'ring')
    """

    @property
    def name(self) -> str:
        """What messages and tables call it."""

    @property
    def page_size(self) -> int | None:
        """Slots of a page; None where there are no pages."""

    @property
    def num_pages(self) -> int | None:
        """Pages of a pool that sequences share; None where each owns its slots."""

    @property
    def state(self) -> tuple[str, ...]:
        """Names of the numbers that a policy keeps per token and head."""

    def reason_against(self, num_layers: int, num_kv_heads: int) -> str | None:
        """Why it cannot be that of so many layers and heads, or None."""

    def with_heads(self, num_kv_heads: int) -> Self:
        """The same for a cache of so many KV heads, as one device of several has."""

    def shared_by(self, devices: int) -> Self:
        """What each of several devices has that share the sequences, or their tokens, evenly."""

    def num_slots(self, max_context_length: int, batch_size: int | None) -> int:
        """The size of the buffer's ctx axis."""

    def index_bytes(self, max_context_length: int, batch_size: int | None) -> int:
        """Exact bytes of the index's arrays."""

    def init(self, max_context_length: int, batch_size: int | None) -> Index:
        """The index of an empty cache."""
