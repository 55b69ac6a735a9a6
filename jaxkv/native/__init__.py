"""C++ for what XLA's CPU backend does slowly, compiled on the machine that runs it."""

from jaxkv.native.library import prefer_large_pages, register_if_built, unavailable
from jaxkv.native.products import cannot_multiply, products

register_if_built()

__all__ = ["cannot_multiply", "prefer_large_pages", "products", "unavailable"]
