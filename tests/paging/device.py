"""A device of the mind: what each slot of each page holds, as a value that tells where it is from.

The keys and values of a token depend on all tokens before it and on who may see them, so a slot's
value is exactly that: ``(salt, tokens up to here)``. Whatever is free and unknown is poison.
"""

POISON = "poison"


class Device:
    """A pool of pages for each group, and every rule that the steps of an engine rely on."""

    def __init__(self, pages):
        self.pages = pages
        size = pages.page_size
        self.slots = [
            [[POISON] * size for _ in range(group.pool.num_pages)] for group in pages.groups
        ]

    def make(self, copies):
        """Copy pages: all sources are read before any destination is written."""
        read = [(copy, list(self.slots[copy.group][copy.source])) for copy in copies]
        for copy, page in read:
            self.slots[copy.group][copy.destination] = page

    def write(self, request, start, tokens, salt):
        """Compute the tokens from ``start`` on, of a request whose tokens so far are all given."""
        size = self.pages.page_size
        for number, group in enumerate(self.pages.groups):
            table = self.pages.table(request, number)
            for position in range(start, len(tokens)):
                page = table[position // size]
                if page < 0:  # before the window of one that was restored
                    continue
                assert group.pool.references[page] == 1, "a shared page was written"
                self.slots[number][page][position % size] = (salt, tokens[: position + 1])

    def assert_readable(self, request, tokens, salt):
        """Every token that the next query of a request may see is where the table says."""
        size = self.pages.page_size
        for number, group in enumerate(self.pages.groups):
            table = self.pages.table(request, number)
            first = 0 if group.window is None else max(0, len(tokens) + 1 - group.window)
            for position in range(first, len(tokens)):
                page = table[position // size]
                held = self.slots[number][page][position % size] if page >= 0 else "given back"
                assert held == (salt, tokens[: position + 1]), (request, number, position, held)

    def poison_blank(self):
        """As if another program had used all that nobody holds and nothing can find."""
        for group, slots in zip(self.pages.groups, self.slots, strict=True):
            for page, references in enumerate(group.pool.references):
                if not references and page not in group.pool.index.contents:
                    slots[page] = [POISON] * self.pages.page_size
