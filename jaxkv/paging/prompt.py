"""A prompt, and the names of its pages: a chain of sha256 digests."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_TOKEN_BYTES = 4


class Content(NamedTuple):
    """What a page holds.

    Attributes:
      parent: digest of the page before it, or of the root.
      tokens: int32 token ids as bytes; fewer than a page of them if it is partly filled.
      digest: its name; None for a page that is partly filled, which nothing can continue.
    """

    parent: bytes
    tokens: bytes
    digest: bytes | None


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids, with the digest of each full page that another prompt may share.

    A digest covers the page's tokens and the digest before it, and the first covers the salt and
    the fingerprint, so equal digests mean equal tokens from the start, computed by the same
    model for the same tenant.

    Attributes:
      tokens: int32, read-only.
      root: digest that the first page continues.
      digests: of each full page among all tokens but the last. The last is not shared: its
        logits are wanted, so it is always computed.
      page_size: tokens per page.
      reuse: False to compute every token, even those that are in the pool.
      fresh: of its newest shareable tokens, how many are computed even if they are in the pool.
    """

    tokens: np.ndarray
    root: bytes
    digests: tuple[bytes, ...]
    page_size: int
    reuse: bool = True
    fresh: int = 0

    @classmethod
    def of(
        cls,
        tokens: Sequence[int] | np.ndarray,
        *,
        page_size: int,
        salt: bytes | str = b"",
        fingerprint: bytes = b"",
        reuse: bool = True,
    ) -> "Prompt":
        """Name the pages of a prompt.

        Args:
          tokens: int32 ids, at least one.
          page_size: tokens per page.
          salt: who may share; prompts with different salts never do.
          fingerprint: of the model and the codec that make the keys and values.
          reuse: see the class.

        Raises:
          ValueError: an empty prompt, or what are no int32 ids.

        >>> import jaxkv.paging
        >>> prompt = jaxkv.paging.Prompt.of(range(9), page_size=4)
        >>> len(prompt), len(prompt.digests)
        (9, 2)
        """
        ids = np.asarray(tokens)
        if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            got = "an empty one" if ids.size == 0 else f"{ids.dtype} of shape {ids.shape}"
            raise ValueError(f"a prompt must be a list of at least one token id, got {got}.")
        limits = np.iinfo(np.int32)
        if ids.min() < limits.min or ids.max() > limits.max:
            raise ValueError(f"token ids must be int32, got {ids.min()} to {ids.max()}.")
        ids = ids.astype("<i4")  # a copy, little-endian: a digest is the same on every machine
        ids.flags.writeable = False
        salt = salt.encode() if isinstance(salt, str) else salt
        root = _sha256(_field(b"fingerprint", fingerprint), _field(b"salt", salt))
        return cls(ids, root, _chain(ids, page_size, root), page_size, reuse)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_shareable(self) -> int:
        """All tokens but the last."""
        return len(self.tokens) - 1

    @property
    def num_findable(self) -> int:
        """Tokens from the start that need not be computed where they are in the pool."""
        return max(0, self.num_shareable - self.fresh)

    def num_common(self, other: "Prompt") -> int:
        """Shareable tokens that two prompts have in common at their start; 0 if salts differ."""
        length = min(self.num_shareable, other.num_shareable)
        if self.root != other.root:
            return 0
        return num_common(self.tokens[:length].tobytes(), other.tokens[:length].tobytes())

    def content(self, number: int) -> Content:
        """What a page of this prompt holds; the last one may be partly filled, or hold nothing."""
        start, full = number * self.page_size, number < len(self.digests)
        tokens = self.tokens[start : min(start + self.page_size, self.num_shareable)]
        parent = self.digests[number - 1] if number else self.root
        return Content(parent, tokens.tobytes(), self.digests[number] if full else None)

    def name(self, length: int) -> tuple[bytes, bytes]:
        """What the first ``length`` shareable tokens are called: their last digest, and the rest.

        >>> import jaxkv.paging
        >>> prompt = jaxkv.paging.Prompt.of(range(9), page_size=4)
        >>> prompt.name(4) == (prompt.digests[0], b"")
        True
        """
        full = length // self.page_size
        parent = self.digests[full - 1] if full else self.root
        return parent, self.tokens[full * self.page_size : length].tobytes()


def page_digest(parent: bytes, tokens: bytes) -> bytes:
    """The name of a full page: of its tokens, and of all tokens before it."""
    return _sha256(_field(b"parent", parent), _field(b"tokens", tokens))


def num_tokens(tokens: bytes) -> int:
    """How many tokens these bytes are."""
    return len(tokens) // _TOKEN_BYTES


def num_common(one: bytes, other: bytes) -> int:
    """How many tokens two runs of token bytes have in common at their start."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return num_tokens(one[:length])
    equal = np.frombuffer(one[:length], "<i4") == np.frombuffer(other[:length], "<i4")
    return int(equal.argmin())


def _chain(ids: np.ndarray, page_size: int, root: bytes) -> tuple[bytes, ...]:
    data, size = ids[:-1].tobytes(), page_size * _TOKEN_BYTES
    digests, parent = [], root
    for start in range(0, len(data) - size + 1, size):
        parent = page_digest(parent, data[start : start + size])
        digests.append(parent)
    return tuple(digests)


def _field(tag: bytes, data: bytes) -> bytes:
    """With its tag and its length in front, so that no two lists of fields are the same bytes."""
    return b"%d:%b%d:%b" % (len(tag), tag, len(data), data)


def _sha256(*fields: bytes) -> bytes:
    return hashlib.sha256(b"".join(fields)).digest()
