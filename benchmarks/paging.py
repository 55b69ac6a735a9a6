"""The books of a paged pool, without a device: look-ups, waste, forks."""

import time
from collections.abc import Iterator

import numpy as np

import jaxkv
from benchmarks.measure import interleaved
from benchmarks.report import Row, Table, target
from jaxkv.paging import PageAllocator

_PAGE = 16


def run(quick: bool) -> Iterator[Table]:
    """All in pure Python, on one core."""
    yield _lookups()
    yield _waste(1000 if quick else 4000)
    yield _forks()


def _lookups() -> Table:
    """A prompt that is there: naming its pages, and finding them."""
    length = 32_768
    pages = PageAllocator(length // _PAGE + 64, page_size=_PAGE)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 100_000, length).astype(np.int32)
    pages.admit("first", pages.prompt(tokens))
    pages.advance("first", length)
    named = pages.prompt(tokens)
    timings = interleaved(
        {
            "name its pages (sha256) and find them": lambda: pages.find(pages.prompt(tokens)),
            "find them, named before": lambda: pages.find(named),
        },
        repeats=9,
    )
    rows: list[Row] = [
        {
            "look-up": name,
            "Mtokens/s": length / timing.seconds / 1e6,
            "spread %": 100 * timing.spread,
        }
        for name, timing in timings.items()
    ]
    slowest = min(row["Mtokens/s"] for row in rows)
    notes = [f"A prompt of {length:,} tokens, all of it in the pool, pages of {_PAGE}, one core."]
    return Table("Prefix look-up", rows, [*notes, target("of 1M tokens/s", slowest, 1.0)])


def _waste(count: int) -> Table:
    """The books of a busy engine without its model: chats, documents, long answers."""
    rng = np.random.default_rng(0)
    num_rows, steps = 64, 8
    kinds = {"chat": (200, 250), "document": (1500, 150), "long answer": (100, 900)}
    waiting = []
    for number in range(count):
        prompt, answer = kinds[list(kinds)[number % 3]]
        lengths = np.maximum(1, rng.lognormal(np.log((prompt, answer)), 0.6)).astype(int)
        waiting.append((number, *lengths))
    pages = PageAllocator(3000, page_size=_PAGE, chunk=128, reserve=num_rows)
    running: dict[int, list[int]] = {}
    wasted = held = most = 0
    started = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < num_rows:
            number, prompt, answer = waiting[-1]
            try:
                pages.admit(number, pages.prompt(rng.integers(0, 100_000, prompt)))
            except jaxkv.PoolFullError:
                break
            pages.advance(number, prompt)
            running[number] = [prompt, prompt + answer]
            waiting.pop()
        for number, (length, end) in list(running.items()):
            after = min(length + steps, end)
            try:
                pages.extend(number, after)
            except jaxkv.PoolFullError:
                pages.release(number)
                del running[number]
                waiting.append((number, length, end - length))
                continue
            pages.advance(number, after)
            running[number][0] = after
        usage = pages.usage()
        wasted += usage.wasted_slots
        held += usage.held_pages * _PAGE
        most = max(most, usage.held_pages)
        for number, (length, end) in list(running.items()):
            if length == end:
                pages.release(number)
                del running[number]
    seconds = time.perf_counter() - started
    pages.check()
    assert pages.usage().held_pages == 0
    waste = wasted / held
    row: Row = {
        "requests": count,
        "waste %": 100 * waste,
        "pages held at most": most,
        "of": 3000,
        "us of books a request": 1e6 * seconds / count,
    }
    notes = [
        f"Prompts + answers of {', '.join(f'{k} {v[0]}+{v[1]}' for k, v in kinds.items())} "
        f"tokens (medians, lognormal, sigma 0.6), {num_rows} rows, {steps} tokens a round, one "
        f"pool of 3,000 pages of {_PAGE}. Waste: held slots without a token, over all rounds.",
        target("waste, of 4 %", 100 * waste / 4, 1.0, at_most=True),
    ]
    return Table("Waste of a pool", [row], notes)


def _forks() -> Table:
    """Sixteen samples of one prompt, 100 tokens each."""
    prompt, tail, count = 2048, 100, 16
    pages = PageAllocator(1000, page_size=_PAGE)
    pages.admit(0, pages.prompt(np.arange(prompt)))
    pages.advance(0, prompt)
    one = pages.usage().held_pages
    for child in range(1, count):
        pages.fork(0, child)
    for number in range(count):
        pages.extend(number, prompt + tail)
        pages.advance(number, prompt + tail)
    pages.check()
    held, tails = pages.usage().held_pages, count * -(-tail // _PAGE)
    row: Row = {
        "forks": count,
        "pages of one": one,
        "pages of their tails": tails,
        "pages held": held,
        "without sharing": count * -(-(prompt + tail) // _PAGE),
    }
    notes = [f"A prompt of {prompt:,} tokens, {tail} more in each fork, pages of {_PAGE}."]
    reached = (held - tails) / one
    return Table("Forks", [row], [*notes, target("one, without tails", reached, 1.1, at_most=True)])
