"""Attention within chunks of the text: a ring whose queries see no token of an earlier chunk."""

import dataclasses

from jaxkv.addressing.addressing import Plain
from jaxkv.addressing.ring import Ring, RingIndex
from jaxkv.counts import check_fields


@dataclasses.dataclass(frozen=True)
class Chunked(Plain):
    """A query sees the tokens of its own chunk: positions from a multiple of ``size`` to its own.

    Chunked attention as in Llama 4 (Meta, 2025), three layers of four. A sequence takes the slots
    of a `Ring` whose window is ``size``.

    Args:
      size: positions in a chunk of the text.
      chunk: tokens that one `append` may bring, and that `truncate` can take back.

    Raises:
      ValueError: a number that is not one of tokens.

    >>> import jaxkv
    >>> jaxkv.Chunked(size=8192).num_slots(max_context_length=1_000_000, batch_size=None)
    8320
    """

    size: int
    chunk: int = 128

    def __post_init__(self) -> None:
        check_fields(self, "size", "chunk")

    @property
    def name(self) -> str:
        return "chunked"

    @property
    def window(self) -> int:  # type: ignore[override]
        return self.size

    @property
    def aligned(self) -> bool:  # type: ignore[override]
        return True

    @property
    def _ring(self) -> Ring:
        return Ring(self.size, chunk=self.chunk)

    def num_slots(self, max_context_length: int, batch_size: int | None) -> int:
        return self._ring.num_slots(max_context_length, batch_size)

    def index_bytes(self, max_context_length: int, batch_size: int | None) -> int:
        return self._ring.index_bytes(max_context_length, batch_size)

    def init(self, max_context_length: int, batch_size: int | None) -> RingIndex:
        ring = self._ring.init(max_context_length, batch_size)
        return dataclasses.replace(ring, aligned=True)
