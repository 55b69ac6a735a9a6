"""One call of cuDNN's flash attention, as JAX has it.

`jax.nn.dot_product_attention` rounds the logsumexp to the queries' dtype, three digits of a number
that is about ten, and has no pages. What is under it has both, and asks nothing of the host's
devices, so that a program can be compiled for any. It is not JAX's public API: what of it moves,
moves here.
"""

import inspect
from typing import Any

import jax.numpy as jnp
from jax._src.cudnn.fused_attention_stablehlo import (
    AttentionLayout,
    MaskType,
    _dot_product_attention_fwd,
    _dot_product_attention_fwd_p_wrapper,
)
from jaxtyping import Array, Float, Int

# jax 0.12 has an argument more: a function of logits, which nobody here has.
_takes_function = "score_mod" in inspect.signature(_dot_product_attention_fwd).parameters
_NO_FUNCTION: dict[str, Any] = {"score_mod": None} if _takes_function else {}


def call(
    queries: Float[Array, "batch tokens heads head_dim"],
    *,
    keys: Float[Array, "_ size kv_heads head_dim"],
    values: Float[Array, "_ size kv_heads head_dim"],
    query_counts: Int[Array, " batch"],
    key_counts: Int[Array, " batch"],
    causal: bool = False,
    window: int | None = None,
    tables: tuple[Int[Array, "batch pieces"], Int[Array, "batch pieces"]] | None = None,
) -> tuple[Float[Array, "batch tokens heads head_dim"], Float[Array, "batch heads tokens"]]:
    """Softmax attention of each row's first ``query_counts`` queries to its first keys.

    Logits are times ``head_dim ** -0.5``. What stands behind the counts still meets a weight of
    zero, but for pieces that no table names.

    Args:
      keys, values: of each row or, with tables, pieces of any row.
      causal: query i sees keys up to number i.
      window: with ``causal``, and only the newest ones of them.
      tables: the pieces of keys, and of values, that each row's slots stand in.

    Returns:
      The output, and float32 the logsumexp of each query's logits.
    """
    none = jnp.zeros(0, queries.dtype)
    key_table, value_table = (
        (none, none) if tables is None else (table[:, None, :, None] for table in tables)
    )
    return _dot_product_attention_fwd_p_wrapper.bind(
        queries,
        keys,
        values,
        none,
        query_counts,
        key_counts,
        none,
        none,
        key_table,
        value_table,
        scale=queries.shape[-1] ** -0.5,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=MaskType.PADDING_CAUSAL if causal else MaskType.PADDING,
        layout=AttentionLayout.BTNH.value,
        sliding_window_length=window,
        is_training=True,  # which returns the logsumexp
        **_NO_FUNCTION,
    )
