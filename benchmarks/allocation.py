"""How long `jaxkv.create` takes, beside the machine's own filling of as much memory."""

import functools
import mmap
from collections.abc import Iterator

import numpy as np

import jaxkv
from benchmarks.measure import interleaved
from benchmarks.report import Row, Table
from jaxkv.memory.machine import tightest_bound
from jaxkv.show.text import format_bytes

# Name, layers, KV heads, head_dim, context; bfloat16.
_CACHES = (
    ("Qwen2.5-0.5B, 2K", 24, 2, 64, 2048),
    ("Llama-3-8B, 2K", 32, 8, 128, 2048),
    ("Llama-3-8B, 8K", 32, 8, 128, 8192),
    ("Llama-3-8B, 32K", 32, 8, 128, 32768),
)
# Of the free memory that one cache may take: two buffers of its size are held at a time.
_SHARE_OF_MEMORY = 1 / 8


def run(quick: bool) -> Iterator[Table]:
    """One row a size, as far as memory allows."""
    repeats = 5 if quick else 11
    most = tightest_bound().free_bytes * _SHARE_OF_MEMORY
    rows, skipped = [], []
    for name, layers, kv_heads, head_dim, context in _CACHES[:2] if quick else _CACHES:
        config = jaxkv.KVCacheConfig(layers, context, kv_heads, head_dim)
        if config.size_bytes > most:
            skipped.append(f"{name} ({format_bytes(config.size_bytes)})")
        else:
            rows.append(_row(name, config, repeats))
    notes = [
        f"Median of {repeats}; spread between the quartiles. Fresh: memory that the process did "
        "not have, which the system maps page by page; touched: filled again. One thread fills."
    ]
    if skipped:
        notes.append(f"Left out, more than 1/8 of the free memory: {', '.join(skipped)}.")
    yield Table("Allocation: an empty bfloat16 cache", rows, notes)


def _row(name: str, config: jaxkv.KVCacheConfig, repeats: int) -> Row:
    touched = np.full(config.size_bytes, 1, np.uint8)
    timings = interleaved(
        {
            "create": functools.partial(jaxkv.create, config),
            "fresh": lambda: _fill_fresh(config.size_bytes),
            "touched": lambda: touched.fill(1),
        },
        repeats=repeats,
    )
    create = timings["create"]
    return {
        "cache": name,
        "size": format_bytes(config.size_bytes),
        "create ms": create.seconds * 1e3,
        "spread %": 100 * create.spread,
        "memset fresh ms": timings["fresh"].seconds * 1e3,
        "memset touched ms": timings["touched"].seconds * 1e3,
        "x memset fresh": create.seconds / timings["fresh"].seconds,
        "create GB/s": config.size_bytes / create.seconds / 1e9,
    }


def _fill_fresh(size: int) -> np.ndarray:
    """Memory straight from the system: an allocator may hand out what it was given back."""
    pages = np.frombuffer(mmap.mmap(-1, size), np.uint8)
    pages.fill(1)
    return pages
