"""Host bookkeeping of a paged cache, without a device: page allocator and prefix index."""

import warnings
from collections.abc import Hashable

from jaxkv.paging.allocator import PageAllocator, Usage
from jaxkv.paging.group import Group
from jaxkv.paging.pools import Pools
from jaxkv.paging.prefix_index import Event
from jaxkv.paging.prompt import Content, Prompt
from jaxkv.paging.sequence import Admission, Copy
from jaxkv.paging.snapshots import Snapshots

__all__ = [
    "Admission",
    "Content",
    "Copy",
    "Event",
    "Group",
    "PageAllocator",
    "Pools",
    "Prompt",
    "Snapshots",
    "Usage",
    "restore",
]


def restore(pages: PageAllocator, request: Hashable, prompt: Prompt, length: int) -> None:
    """`PageAllocator.restore`, under its old name."""
    warnings.warn(
        "jaxkv.paging.restore is deprecated: call pages.restore(request, prompt, length).",
        DeprecationWarning,
        stacklevel=2,
    )
    pages.restore(request, prompt, length)
