"""The physical pages of one group of layers: who holds each, and which is reused next."""

from collections import OrderedDict

from jaxkv.paging.prefix_index import PrefixIndex
from jaxkv.paging.prompt import Content


class PagePool:
    """Reference counts, and two kinds of free pages. Each operation is O(1).

    A page that no request holds is *blank*, or *cached* while its content can still be found.
    Blank ones are taken first, then the cached one that was let go longest ago.
    """

    def __init__(self, num_pages: int, index: PrefixIndex):
        self.num_pages = num_pages
        self.index = index
        self.references = [0] * num_pages
        self.num_evictions = 0
        self.most_held = 0
        self._blank = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages that no request holds, blank or cached."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free pages whose content can still be found."""
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_free

    @property
    def num_shared(self) -> int:
        """Pages that are held more than once."""
        return sum(count > 1 for count in self.references)

    def take(self) -> int:
        """A free page, its old content forgotten, held once.

        Raises:
          IndexError: there is none.
        """
        if self._blank:
            page = self._blank.pop()
        elif self._cached:
            page, _ = self._cached.popitem(last=False)
            self.index.remove(page)
            self.num_evictions += 1
        else:
            raise IndexError("no free page")
        self.references[page] = 1
        self.most_held = max(self.most_held, self.num_held)
        return page

    def hold(self, page: int) -> None:
        """Hold a page once more; a cached one is free no longer."""
        if not self.references[page]:
            del self._cached[page]
        self.references[page] += 1
        self.most_held = max(self.most_held, self.num_held)

    def drop(self, page: int) -> None:
        """Hold a page once less; the last to let go makes it free.

        Raises:
          ValueError: no request holds it.
        """
        if not self.references[page]:
            raise ValueError(f"page {page} is free already")
        self.references[page] -= 1
        if self.references[page]:
            return
        if page in self.index.contents:
            self._cached[page] = None
        else:
            self._blank.append(page)

    def store(self, page: int, content: Content) -> int:
        """Make the content of a held page findable, and say which page to hold for it from now on.

        That is another page if one holds the same already; this one is dropped then.
        """
        twin = self.index.find(content)
        if twin is None:
            self.index.add(page, content)
        elif twin != page:
            self.hold(twin)
            self.drop(page)
            return twin
        return page

    def forget(self, page: int) -> None:
        """Make what a page holds unfindable."""
        self.index.remove(page)
        if page in self._cached:
            del self._cached[page]
            self._blank.append(page)

    def forget_cached(self) -> None:
        """Make every cached page blank."""
        for page in list(self._cached):
            self.index.remove(page)
            self._blank.append(page)
        self._cached.clear()

    def problems(self, holders: list[int]) -> list[str]:
        """What is wrong, given how many sequences hold each page."""
        blank, cached, contents = set(self._blank), set(self._cached), set(self.index.contents)
        free = {page for page in range(self.num_pages) if not self.references[page]}
        held = set(range(self.num_pages)) - free
        checks = {
            "reference counts are not the number of holders": self.references == holders,
            "a page is listed as free twice": len(self._blank) == len(blank),
            "a page is blank and cached": not blank & cached,
            "free pages are not those without references": blank | cached == free,
            "a blank page can still be found": not blank & contents,
            "a cached page cannot be found": cached == contents - held,
        }
        return [text for text, sound in checks.items() if not sound] + self.index.problems()
