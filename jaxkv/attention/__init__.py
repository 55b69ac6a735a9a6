"""Reading the cache: masks, and a file an implementation."""

from jaxkv.attention.attend import IMPLEMENTATIONS, attend, explain

__all__ = ["IMPLEMENTATIONS", "attend", "explain"]
