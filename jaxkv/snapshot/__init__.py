"""A cache as a file: `save` and `load`, a prefix for a pool, and what a file says of itself."""

from jaxkv.snapshot.fingerprint import fingerprint
from jaxkv.snapshot.load import inspect, load
from jaxkv.snapshot.manifest import Manifest
from jaxkv.snapshot.prefix import load_prefix
from jaxkv.snapshot.save import save

__all__ = ["Manifest", "fingerprint", "inspect", "load", "load_prefix", "save"]
