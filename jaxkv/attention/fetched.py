"""What `attend` fetches from host memory: for who wants to see what was left out."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkv.attention.blocks import chosen_blocks, first_on_device
from jaxkv.attention.call import request_of
from jaxkv.attention.streamed import cannot_serve
from jaxkv.cache.kv_cache import KVCache, Layer, NumTokens
from jaxkv.cache.shards import check_whole
from jaxkv.cache.verbs import real_of
from jaxkv.placement import HostMemory
from jaxkv.programs import promotes_ranks


@promotes_ranks
def fetched_blocks(
    cache: KVCache,
    queries: Float[Array, "*batch tokens heads head_dim"],
    *,
    layer: Layer,
    num_tokens: NumTokens | None = None,
) -> Int[Array, "*batch blocks"]:
    """The blocks that `attend` brings from host memory for these queries, one after the other.

    To be called where `attend` is: after `append`, before `advance`, in or outside jit. Block b
    holds positions ``b * block`` and up. What is neither here nor among the resident tokens
    was not looked at.

    Args:
      queries, layer, num_tokens: as in `attend`.

    Returns:
      Block numbers, -1 for none; as many as ``blocks_per_query``, or as there are at most.

    Raises:
      ValueError: the cache is not in host memory, or neither contiguous nor paged.

    >>> import jax.numpy as jnp, jaxkv
    >>> place = jaxkv.HostMemory(resident=4, block=2, blocks_per_query=1)
    >>> cache = jaxkv.create(jaxkv.KVCacheConfig(1, 16, 1, 1, placement=place))
    >>> keys = jnp.array([1.0, 1, 1, 5, 1, 1, 1, 1, 1, 1]).reshape(10, 1, 1)
    >>> cache = jaxkv.append(cache, keys, keys, layer=0)
    >>> fetched_blocks(cache, jnp.ones((10, 1, 1)), layer=0).tolist()
    [1]
    """
    check_whole(cache, "fetched_blocks")
    if reason := cannot_serve(cache, queries.shape[-3]):
        raise ValueError(f"fetched_blocks: {reason}.")
    if not cache.index.by_position:
        raise ValueError(
            f"fetched_blocks: blocks of this {cache.config.addressing.name} cache are not of "
            "positions; all that a query may see are fetched."
        )
    placement = cache.config.placement or HostMemory()
    real = real_of(cache, queries.shape[-3], num_tokens)
    request = request_of(cache, queries, layer, real)
    end = first_on_device(request)
    count = -(-end // placement.block) if queries.shape[-3] else 0 * end
    numbers = chosen_blocks(request, end)
    if numbers is None:
        numbers = jnp.arange(placement.num_blocks(cache.index.capacity), dtype=jnp.int32)[None]
    iterations = jnp.arange(numbers.shape[1], dtype=jnp.int32)
    fetched = jnp.where(iterations < count[:, None], numbers, -1)
    return fetched.reshape(*cache.config.batch_shape, -1)
