"""C++ for what XLA's CPU backend does slowly, compiled on the machine that runs it."""

from jaxkv.native.library import unavailable
from jaxkv.native.products import cannot_multiply, products

__all__ = ["cannot_multiply", "products", "unavailable"]
