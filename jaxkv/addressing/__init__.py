"""Which slot holds which token: one file an addressing, one row in `ADDRESSINGS`."""

from jaxkv.addressing.addressing import Addressing, Index
from jaxkv.addressing.contiguous import Contiguous

# What the command line and the test table know, by name.
ADDRESSINGS: dict[str, Addressing] = {"contiguous": Contiguous()}

__all__ = ["ADDRESSINGS", "Addressing", "Contiguous", "Index"]
