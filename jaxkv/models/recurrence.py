"""What layers with a state compute: convolutions over the newest tokens, and decaying sums.

A decaying sum is of products of keys and values: ``S_t = exp(g_t) S_(t-1) + k_t v_t``, read by
queries, ``o_t = q_t S_t`` (Mamba-2). By the delta rule what the state holds for a key is replaced:
``v_t`` is ``beta_t (v_t - exp(g_t) k_t S_(t-1))`` then (gated delta nets). One token is one such
step. Several are computed by chunks of them, within which all that tokens do to each other are
products of matrices (Dao and Gu, 2024, section 6; Yang et al., 2025, section 3.3). The two round
otherwise, so last bits depend on how a text was cut into steps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

CHUNK = 64  # tokens whose products with each other are one matrix


def convolve(
    inputs: Float[Array, "*batch tokens channels"],
    kept: Float[Array, "*batch width-1 channels"],
    weight: Float[Array, "channels width"],
    bias: Float[Array, " channels"] | None,
    real: Bool[Array, "*batch tokens"],
) -> tuple[Array, Array]:
    """Each channel's newest inputs by its weights, and those to be kept for the next step.

    Args:
      kept: the inputs before these, oldest first.
      real: which tokens are no padding, which is at the end.
    """
    tokens, width = inputs.shape[-2], weight.shape[-1]
    window = jnp.concatenate([kept.astype(inputs.dtype), inputs], axis=-2)
    wide = window.astype(jnp.float32)
    total = sum(
        wide[..., place : place + tokens, :] * weight[:, place].astype(jnp.float32)
        for place in range(width)
    )
    if bias is not None:
        total += bias.astype(jnp.float32)
    newest = real.sum(axis=-1)[..., None] + jnp.arange(width - 1)
    rest = jnp.take_along_axis(window, newest[..., None], axis=-2)
    return jnp.asarray(total, inputs.dtype), rest


class Terms(NamedTuple):
    """Of each token and head, float32. Padding has no decay, and no beta or else no values.

    Attributes:
      queries, keys: ``[*batch, tokens, heads, key_dim]``.
      values: ``[*batch, tokens, heads, value_dim]``.
      decay: logarithms of what the state is multiplied by, ``[*batch, tokens, heads]``.
      beta: of the delta rule, likewise; None for plain sums.
    """

    queries: Array
    keys: Array
    values: Array
    decay: Array
    beta: Array | None = None


State = Float[Array, "*batch heads key_dim value_dim"]


def run(terms: Terms, state: State) -> tuple[Float[Array, "*batch tokens heads value_dim"], State]:
    """What queries read after each token, and the state after the last."""
    if terms.keys.shape[-3] == 1:
        alone = jax.tree.map(lambda term: jnp.squeeze(term, _axis(terms)), terms)
        output, state = _step(alone, state)
        return output[..., None, :, :], state
    return _by_chunks(terms, state)


def _axis(terms: Terms) -> int:
    """That of tokens, which follows those of the batch."""
    return terms.decay.ndim - 2


def _step(terms: Terms, state: State) -> tuple[Array, State]:
    state = state * jnp.exp(terms.decay)[..., None, None]
    values = terms.values
    if terms.beta is not None:
        held = jnp.einsum("...hk,...hkv->...hv", terms.keys, state, precision="highest")
        values = (values - held) * terms.beta[..., None]
    state = state + terms.keys[..., None] * values[..., None, :]
    return jnp.einsum("...hk,...hkv->...hv", terms.queries, state, precision="highest"), state


def _by_chunks(terms: Terms, state: State) -> tuple[Array, State]:
    axis, tokens = _axis(terms), terms.keys.shape[-3]
    size = min(CHUNK, tokens)
    missing = -tokens % size

    def in_chunks(term: Array) -> Array:
        """As ``[chunks, *batch, heads, size, ...]``."""
        padding = [(0, missing if each == axis else 0) for each in range(term.ndim)]
        padded = jnp.pad(term, padding)
        cut = padded.reshape(*term.shape[:axis], -1, size, *term.shape[axis + 1 :])
        return jnp.moveaxis(jnp.moveaxis(cut, axis, 0), axis + 1, axis + 2)

    state, outputs = lax.scan(_one_chunk, state, jax.tree.map(in_chunks, terms))
    outputs = jnp.moveaxis(jnp.moveaxis(outputs, axis + 2, axis + 1), 0, axis)
    whole = outputs.reshape(*outputs.shape[:axis], -1, *outputs.shape[axis + 2 :])
    return lax.slice_in_dim(whole, 0, tokens, axis=axis), state


def _one_chunk(state: State, terms: Terms) -> tuple[State, Array]:
    """``[*batch, heads, size, ...]`` in all terms, and in what is read."""
    queries, keys, values, decay, beta = terms
    since = jnp.cumsum(decay, axis=-1)  # the chunk's beginning
    earlier = jnp.tril(jnp.ones((decay.shape[-1],) * 2, bool))
    between = jnp.exp(jnp.where(earlier, since[..., :, None] - since[..., None, :], -jnp.inf))
    faded = jnp.exp(since)[..., None]
    if beta is not None:
        values = beta[..., None] * (values - _product(keys * faded, state))
        met = jnp.tril(beta[..., None] * _product(keys, keys.mT) * between, -1)
        unit = met + jnp.eye(met.shape[-1], dtype=met.dtype)
        values = lax.linalg.triangular_solve(
            unit, values, left_side=True, lower=True, unit_diagonal=True
        )
    output = _product(queries * faded, state)
    output += _product(_product(queries, keys.mT) * between, values)
    left = jnp.exp(since[..., -1:] - since)[..., None]
    state = state * faded[..., -1:, :] + _product((keys * left).mT, values)
    return state, output


def _product(left: Array, right: Array) -> Any:
    return jnp.matmul(left, right, precision="highest")
