"""The one mask rule. Causal, ragged, padded, windowed and evicted caches all derive from it."""

from jaxtyping import Array, Bool, Int


def visible(
    query_positions: Int[Array, "*batch tokens"],
    key_positions: Int[Array, "*batch slots"],
    window: int | None = None,
    sinks: int = 0,
) -> Bool[Array, "*batch tokens slots"]:
    """Which slots each query may read.

    A slot is visible when it holds a token (position >= 0) that is not in the query's future
    and, with a window, among the ``window`` newest that include the query itself or the
    ``sinks`` first of the sequence. A padding query (position -1) sees nothing.
    """
    queries, keys = query_positions[..., :, None], key_positions[..., None, :]
    seen = (keys >= 0) & (keys <= queries)
    return seen if window is None else seen & ((keys > queries - window) | (keys < sinks))
