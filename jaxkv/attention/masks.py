"""The one mask rule. Causal, ragged, padded, windowed and evicted caches all derive from it."""

from jaxtyping import Array, Bool, Int

from jaxkv.addressing import first_visible


def visible(
    query_positions: Int[Array, "*batch tokens"],
    key_positions: Int[Array, "*batch slots"],
    window: int | None = None,
    sinks: int = 0,
    aligned: bool = False,
) -> Bool[Array, "*batch tokens slots"]:
    """Which slots each query may read.

    A slot is visible when it holds a token (position >= 0) that is not in the query's future
    and, with a window, among the ``window`` newest that include the query itself or the
    ``sinks`` first of the sequence; of an ``aligned`` window, from a multiple of its size on. A
    padding query (position -1) sees nothing.
    """
    queries, keys = query_positions[..., :, None], key_positions[..., None, :]
    seen = (keys >= 0) & (keys <= queries)
    if window is None:
        return seen
    return seen & ((keys >= first_visible(queries, window, aligned)) | (keys < sinks))
