"""Continuous batching: many requests over one paged pool of keys and values."""

from jaxkv.engine.engine import Engine
from jaxkv.engine.figures import Figures
from jaxkv.engine.request import Request

__all__ = ["Engine", "Figures", "Request"]
