"""Host bookkeeping of a paged cache, without a device: page allocator and prefix index."""

from jaxkv.paging.allocator import PageAllocator
from jaxkv.paging.audit import Usage
from jaxkv.paging.group import Group
from jaxkv.paging.prefix_index import Event
from jaxkv.paging.prompt import Content, Prompt
from jaxkv.paging.restore import restore
from jaxkv.paging.sequence import Admission, Copy

__all__ = [
    "Admission",
    "Content",
    "Copy",
    "Event",
    "Group",
    "PageAllocator",
    "Prompt",
    "Usage",
    "restore",
]
