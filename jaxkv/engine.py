"""Deprecated: the engine is in `jaxkv.serve`."""

import warnings

from jaxkv.serve import Engine, Figures, Request

__all__ = ["Engine", "Figures", "Request"]

warnings.warn("jaxkv.engine is now jaxkv.serve.", DeprecationWarning, stacklevel=2)
