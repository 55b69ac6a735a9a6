"""Which page holds which tokens, for all pages whose content is still there."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

from jaxkv.paging.prompt import Content, num_common, num_tokens

# Pages that continue from the same place and are looked at for a common start, newest first.
_MOST_SIBLINGS = 16


class Event(NamedTuple):
    """A page's content became findable, or was forgotten. In order, they tell the whole index.

    Attributes:
      kind: ``"stored"`` or ``"removed"``.
      group: of the page.
      page: its number.
      content: what it holds, or held.
    """

    kind: str
    group: int
    page: int
    content: Content


class PrefixIndex:
    """Content -> page, and page -> content. No two pages have the same digest."""

    def __init__(self, group: int = 0, on_event: Callable[[Event], None] | None = None):
        self.contents: dict[int, Content] = {}
        self._pages: dict[bytes, int] = {}
        self._continuations: dict[bytes, dict[int, None]] = {}
        self._group, self._on_event = group, on_event

    def find(self, content: Content) -> int | None:
        """The full page that holds this. Its tokens are compared, not only their digest."""
        page = None if content.digest is None else self._pages.get(content.digest)
        return page if page is not None and self.contents[page] == content else None

    def find_start(self, content: Content) -> tuple[int | None, int]:
        """The page that shares the most first tokens with this, after the same parent; how many."""
        best, most = None, 0
        siblings = reversed(self._continuations.get(content.parent, {}))
        for page in itertools.islice(siblings, _MOST_SIBLINGS):
            common = num_common(self.contents[page].tokens, content.tokens)
            if common > most:
                best, most = page, common
        return best, most

    def add(self, page: int, content: Content) -> None:
        """Make a page findable by what it holds, and no longer by what it held before."""
        self.remove(page)
        if content.digest in self._pages:
            return  # two contents of one digest: the first stays
        self.contents[page] = content
        if content.digest is not None:
            self._pages[content.digest] = page
        self._continuations.setdefault(content.parent, {})[page] = None
        self._tell("stored", page, content)

    def remove(self, page: int) -> None:
        """Forget what a page holds, if it is known."""
        content = self.contents.pop(page, None)
        if content is None:
            return
        if content.digest is not None:
            del self._pages[content.digest]
        siblings = self._continuations[content.parent]
        del siblings[page]
        if not siblings:
            del self._continuations[content.parent]
        self._tell("removed", page, content)

    def add_start(self, page: int, content: Content) -> None:
        """Make the start of a page findable, unless as much is found elsewhere."""
        _, common = self.find_start(content)
        if common < num_tokens(content.tokens):
            self.add(page, content)

    def remove_after(self, page: int, length: int) -> None:
        """Forget a page that is about to be written after ``length`` tokens, if that would lie."""
        content = self.contents.get(page)
        if content is not None and num_tokens(content.tokens) > length:
            self.remove(page)

    def problems(self) -> list[str]:
        """What does not agree with itself."""
        named = {content.digest: page for page, content in self.contents.items() if content.digest}
        listed = [(parent, page) for parent, pages in self._continuations.items() for page in pages]
        expected = [(content.parent, page) for page, content in self.contents.items()]
        found = []
        if named != self._pages:
            found.append("digests do not lead to the pages that hold them")
        if sorted(listed) != sorted(expected):
            found.append("continuations are not those of the pages held")
        return found

    def _tell(self, kind: str, page: int, content: Content) -> None:
        if self._on_event is not None:
            self._on_event(Event(kind, self._group, page, content))
