"""Continuous batching: many requests over one paged pool of keys and values."""

from jaxkv.serve.engine import Engine
from jaxkv.serve.figures import Figures
from jaxkv.serve.request import Request

__all__ = ["Engine", "Figures", "Request"]
