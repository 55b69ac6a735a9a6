"""Caches that hold fewer tokens: after prefill (`compress`) and while decoding (`evict`)."""

from jaxkv.compression.budgets import adaptive, pyramid
from jaxkv.compression.compress import compress
from jaxkv.compression.evict import evict, evicting
from jaxkv.compression.scoring import score

__all__ = ["adaptive", "compress", "evict", "evicting", "pyramid", "score"]
