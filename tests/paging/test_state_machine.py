"""Allocator and prefix index against a dictionary: any sequence of calls, any mix of prompts.

The model knows, of each live request, its tokens and nothing else. After every call the books
are proved, and each request finds exactly its tokens in its pages.
"""

import dataclasses

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jaxkv.errors import CacheFullError, PoolFullError, UnknownRequestError
from jaxkv.paging import Group, PageAllocator
from tests.paging.device import Device

# Examples of up to 50 calls: some 3,000 calls by default, 100,000 with
# --hypothesis-profile=nightly.
NIGHTLY = hypothesis.settings().max_examples > 100
EXAMPLES = hypothesis.settings().max_examples if NIGHTLY else 60

# Few tokens and long common starts, so that prompts meet.
STARTS = [(), (1, 1, 2, 1, 2, 2, 1, 1, 2, 1), (1, 1, 2, 1, 2, 2, 1, 1, 1, 2, 2), (2,) * 13]
SALTS = ["", "tenant"]


class Pool(RuleBasedStateMachine):
    @initialize(
        windows=st.sampled_from([(None,), (None,), (5,), (None, 5), (9, None, 3)]),
        page_size=st.sampled_from([1, 2, 4]),
        chunk=st.sampled_from([1, 2, 4, 6]),
        num_pages=st.integers(6, 24),
        reserve=st.integers(0, 2),
    )
    def start(self, windows, page_size, chunk, num_pages, reserve):
        self.events = {}
        self.pages = PageAllocator(
            [Group(num_pages, window) for window in windows],
            page_size=page_size,
            chunk=chunk,
            reserve=reserve,
            on_event=self.hear,
        )
        self.device = Device(self.pages)
        self.live = {}  # request -> [prompt, tokens computed, salt]
        self.count = 0

    def hear(self, event):
        if event.kind == "stored":
            self.events[event.group, event.page] = event.content
        else:
            assert self.events.pop((event.group, event.page)) == event.content

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.live)))

    def unchanged_by(self, call, *arguments):
        """Call what may be refused; if it is, nothing has changed. None then."""
        before = self.snapshot()
        try:
            return call(*arguments)
        except (PoolFullError, CacheFullError, UnknownRequestError, ValueError):
            assert self.snapshot() == before
            return None

    def snapshot(self):
        tables = [[self.pages.table(r, g).tolist() for g in self.groups] for r in self.live]
        return tables, self.pages.usage(), dict(self.events), sorted(self.pages.sequences)

    @property
    def groups(self):
        return range(len(self.pages.groups))

    @rule(
        start=st.sampled_from(STARTS),
        keep=st.integers(0, 13),
        rest=st.lists(st.integers(1, 2), max_size=8),
        salt=st.sampled_from(SALTS),
        reuse=st.sampled_from([True, True, True, False]),
        fresh=st.sampled_from([0, 0, 0, 3]),
    )
    def admit(self, start, keep, rest, salt, reuse, fresh):
        tokens = (*start[:keep], *rest) or (1,)
        prompt = self.pages.prompt(tokens, salt=salt, reuse=reuse)
        prompt = dataclasses.replace(prompt, fresh=fresh)
        request, self.count = self.count, self.count + 1
        expected = self.pages.find(prompt)
        admission = self.unchanged_by(self.pages.admit, request, prompt)
        if admission is None:
            needed = -(-len(tokens) // self.pages.page_size)
            pools = [group.pool for group in self.pages.groups]
            windows = any(group.window for group in self.pages.groups)
            assert windows or any(pool.num_free - needed < self.pages.reserve for pool in pools)
            return
        hit = admission.num_cached
        assert hit <= expected
        assert hit == len(tokens) - 1 or hit % self.pages.chunk == 0
        assert hit <= max(0, len(tokens) - 1 - fresh)
        self.device.make(admission.copies)
        self.live[request] = [tokens, tokens[:hit], salt]

    @rule(
        start=st.sampled_from(STARTS),
        rest=st.lists(st.integers(1, 2), min_size=1, max_size=8),
        share=st.floats(0, 1),
        salt=st.sampled_from(SALTS),
        reuse=st.sampled_from([True, True, False]),
    )
    def restore(self, start, rest, share, salt, reuse):
        """Tokens from elsewhere: a saved prompt, or what a preempted request had."""
        answer = (2, 1) * 4
        prompt = (*start, *rest)
        tokens = (prompt + answer)[: int(share * (len(prompt) + len(answer)))]
        named = self.pages.prompt(prompt, salt=salt, reuse=reuse)
        request, self.count = self.count, self.count + 1
        self.unchanged_by(self.pages.restore, request, named, len(tokens))
        if request not in self.pages.sequences:
            return
        self.pages.check()
        self.device.write(request, 0, tokens, salt)
        self.pages.advance(request, len(tokens))
        self.live[request] = [prompt, tokens, salt]

    @rule(data=st.data(), next_token=st.integers(1, 2), count=st.integers(1, 7))
    def compute(self, data, next_token, count):
        """A prefill chunk while the prompt lasts, then answers."""
        if not self.live:
            return
        request = self.pick(data)
        prompt, tokens, salt = self.live[request]
        left = len(prompt) - 1 - len(tokens)
        if left > 0:
            chunk = self.pages.chunk
            count = min(left, chunk - len(tokens) % chunk)
        more = (*tokens, *prompt[len(tokens) :], *[next_token] * count)[: len(tokens) + count]
        full = self.unchanged_by(self.pages.extend, request, len(more))
        self.device.poison_blank()
        room = min(len(self.pages.table(request, g)) for g in self.groups) * self.pages.page_size
        if room < len(more):
            assert full is None
            return
        self.device.write(request, len(tokens), more, salt)
        self.pages.advance(request, len(more))
        self.live[request][1] = more

    @rule(data=st.data())
    def fork(self, data):
        if not self.live:
            return
        parent, child = self.pick(data), self.count
        self.count += 1
        copies = self.unchanged_by(self.pages.fork, parent, child)
        if copies is not None:
            self.device.make(copies)
            self.live[child] = list(self.live[parent])

    @rule(data=st.data(), length=st.integers(-1, 20))
    def truncate(self, data, length):
        """Other tokens may come then, so the prompt is what is left."""
        if not self.live:
            return
        request = self.pick(data)
        prompt, tokens, salt = self.live[request]
        copies = self.unchanged_by(self.pages.truncate, request, length)
        if copies is not None and length < len(tokens):
            self.device.make(copies)
            self.live[request] = [prompt[:length], tokens[:length], salt]

    @rule(data=st.data(), again=st.booleans())
    def release(self, data, again):
        if not self.live:
            return
        request = self.pick(data)
        self.pages.release(request)
        del self.live[request]
        if again:
            with pytest.raises(UnknownRequestError, match="released already"):
                self.pages.release(request)

    @rule(data=st.data())
    def withdraw(self, data):
        if self.live:
            self.pages.withdraw(self.pick(data))

    @rule()
    def forget(self):
        self.unchanged_by(self.pages.forget)

    @invariant()
    def is_sound(self):
        if not hasattr(self, "pages"):
            return
        self.pages.check()
        self.device.poison_blank()
        for request, (_, tokens, salt) in self.live.items():
            self.device.assert_readable(request, tokens, salt)
        held = {
            (group, page): pool.pool.index.contents[page]
            for group, pool in enumerate(self.pages.groups)
            for page in pool.pool.index.contents
        }
        assert held == self.events
        if not self.live:
            assert self.pages.usage().held_pages == 0


TestPool = Pool.TestCase
TestPool.settings = hypothesis.settings(
    max_examples=EXAMPLES, stateful_step_count=50, deadline=None, derandomize=not NIGHTLY
)
