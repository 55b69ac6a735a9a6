"""Attention to an encoder's tokens: not causal, and of the length that was written."""

from typing import Any, Literal, overload

from jaxtyping import Array, Float, Int

from jaxkv.attention.attend import attend_all
from jaxkv.cache.checks import check_alive
from jaxkv.cache.hybrid import AnyCache, locate_cross
from jaxkv.cache.shards import where_it_is


@overload
def attend_cross(
    cache: AnyCache,
    queries: Float[Array, "*batch tokens heads head_dim"],
    *,
    layer: int,
    num_seen: Int[Array, "*batch tokens"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, " heads"] | None = None,
    implementation: str | None = None,
    partial: Literal[False] = False,
) -> Float[Array, "*batch tokens heads head_dim"]: ...
@overload
def attend_cross(
    cache: AnyCache,
    queries: Float[Array, "*batch tokens heads head_dim"],
    *,
    layer: int,
    num_seen: Int[Array, "*batch tokens"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, " heads"] | None = None,
    implementation: str | None = None,
    partial: Literal[True],
) -> tuple[Float[Array, "*batch tokens heads head_dim"], Float[Array, "*batch tokens heads"]]: ...
def attend_cross(
    cache: AnyCache,
    queries: Float[Array, "*batch tokens heads head_dim"],
    *,
    layer: int,
    num_seen: Int[Array, "*batch tokens"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, " heads"] | None = None,
    implementation: str | None = None,
    partial: bool = False,
) -> Any:
    """Cross-attention: each query of a sequence sees all encoder tokens that were written for it.

    Args:
      queries: of any tokens of the text, as in `attend`. They move nothing and are not stored.
      layer: a plain int that counts over all layers of the model.
      num_seen: how many of the first encoder tokens each query sees, ``int32[*batch, tokens]``. All
        if None; 0 for a token of the text that comes before its image.
      scale, softcap, sink_logits, implementation, partial: as in `attend`.

    Returns:
      As `attend`: zeros for a query that sees nothing, such as all of a sequence for which nothing
      was written.

    Raises:
      IndexError, TypeError, ValueError: a bad layer, dtype, shape or option; a layer without
        cross-attention.

    >>> import jax.numpy as jnp, jaxkv
    >>> text = jaxkv.KVCacheConfig(1, 8, num_kv_heads=1, head_dim=4)
    >>> image = text.replace(max_context_length=6)
    >>> config = jaxkv.HybridConfig((text,), (0,), cross=(image,), cross_of_layer=(0,))
    >>> cache = jaxkv.create(config)
    >>> vectors = jnp.arange(3.0)[:, None, None] * jnp.ones((3, 1, 4))
    >>> cache = jaxkv.write_cross(cache, vectors, vectors, layer=0)
    >>> seen = jnp.array([0, 1, 3])
    >>> jaxkv.attend_cross(cache, jnp.zeros((3, 1, 4)), layer=0, num_seen=seen)[:, 0, 0].tolist()
    [0.0, 0.0, 1.0]
    """
    check_alive(cache)
    number, position = locate_cross(cache.config, layer)
    return where_it_is(
        attend_all,
        cache.cross[number],
        queries,
        layer=position,
        num_seen=num_seen,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        implementation=implementation,
        partial=partial,
    )
