"""jaxkv in Flax nnx: a hook for attention modules, a drop-in one, and caches in modules.

Importing this registers the caches with nnx as data, so that a module may hold one as a plain
attribute.
"""

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(
        "jaxkv.integrations.nnx needs Flax, which is not installed: pip install 'flax>=0.12.8'"
    ) from error

if not hasattr(nnx, "List"):
    import flax

    raise ImportError(
        f"jaxkv.integrations.nnx needs flax 0.12.8 or later, and this is flax {flax.__version__}: "
        "pip install -U flax. jaxkv.models, and the functions of jaxkv, go with this one."
    )

from jaxkv.cache.hybrid import HybridCache
from jaxkv.cache.kv_cache import KVCache
from jaxkv.integrations.nnx.adapter import AsModel
from jaxkv.integrations.nnx.drop_in import MultiHeadAttention
from jaxkv.integrations.nnx.hook import CachedAttention
from jaxkv.integrations.nnx.models import add_caches, map_caches

__all__ = ["AsModel", "CachedAttention", "MultiHeadAttention", "add_caches", "map_caches"]

nnx.register_data_type(KVCache)
nnx.register_data_type(HybridCache)
