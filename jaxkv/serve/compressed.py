"""A prompt's cache made smaller before its answer begins, by a policy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jaxkv.cache.axes import Spread
from jaxkv.cache.hybrid import AnyCache
from jaxkv.compression.budgets import Keep
from jaxkv.compression.compress import compress
from jaxkv.policies import Policy, named_policy


class Compression:
    """Which tokens of prompts stay, and their newest queries as they go by.

    Args:
      policy: which tokens, by value or by name.
      keep: how many, as for `jaxkv.compress`.

    Attributes:
      window: the newest queries that the policy looks at; None for all.
    """

    def __init__(self, policy: Policy | str, keep: Keep):
        self._policy, self._keep = named_policy(policy), keep
        self.window: int | None = getattr(self._policy, "window", None)
        self._queries: Any = None

    @classmethod
    def of(
        cls, policy: Policy | str | None, keep: Keep | None, spread: Spread | None
    ) -> "Compression":
        """What a user asked `generate` for.

        Raises:
          ValueError: one without the other, a name or a number that there is not, a cache over a
            mesh.
        """
        if policy is None or keep is None:
            raise one_without_the_other("generate", policy, keep)
        if spread is not None:
            raise ValueError(
                "generate takes no policy over a mesh. Leave mesh= and axes= out, or policy= and "
                "keep=; jaxkv.compress takes a cache that is spread in a loop of your own."
            )
        counts = np.asarray(keep)
        if not ((counts > 0) & ((counts <= 1) | (counts.dtype.kind != "f"))).all():
            raise ValueError(
                f"generate: keep must be from 1 to the tokens of a prompt, or a share of them in "
                f"(0, 1], got {keep}."
            )
        return cls(policy, keep)

    def see(self, queries: Any, num_tokens: np.ndarray, *, num_chunks: int) -> None:
        """Take a chunk's queries, without the padding, and let go of those that are too old.

        Args:
          queries: as `jaxkv.observed` gives them: ``[layers, batch, chunk, heads, head_dim]``, or
            a list of layers; None if they were not observed.
          num_tokens: of each sequence's chunk that are real.
          num_chunks: of all prompts.
        """
        if queries is None:
            return
        if self._queries is None:
            self._queries = jax.tree.map(lambda new: self._none(new, num_chunks), queries)
        real = jnp.asarray(num_tokens)
        join = functools.partial(_joined, num_tokens=real)
        self._queries = jax.tree.map(join, self._queries, queries)

    def _none(self, queries: Array, num_chunks: int) -> Array:
        """Zeros, in place of what is before the first token."""
        *leading, chunk, heads, head_dim = queries.shape
        tokens = num_chunks * chunk if self.window is None else self.window
        return jnp.zeros((*leading, tokens, heads, head_dim), queries.dtype)

    def apply(self, cache: AnyCache, *, new: int) -> AnyCache:
        """The smaller cache, with room for so many new tokens and with buffers of its own."""
        small = compress(cache, self._policy, keep=self._keep, new=new, queries=self._queries)
        shared = set(map(id, jax.tree.leaves(cache)))  # rings, or what jit hands through
        return jax.tree.map(lambda leaf: jnp.copy(leaf) if id(leaf) in shared else leaf, small)


def one_without_the_other(who: str, policy: object, keep: object) -> ValueError:
    """The error of a policy without ``keep``, or the other way round."""
    return ValueError(
        f"{who}: a policy says which tokens stay, and keep how many. Give both, such as "
        f"policy='snapkv', keep=0.5; got policy={policy!r}, keep={keep!r}."
    )


@jax.jit
def _joined(old: Array, new: Array, num_tokens: Int[Array, " batch"]) -> Array:
    count, batch = old.shape[-3], old.ndim - 4

    def one(old: Array, new: Array, real: Array) -> Array:  # [..., tokens, heads, head_dim]
        both = jnp.concatenate([old, jnp.roll(new, real, axis=-3)], axis=-3)
        return lax.dynamic_slice_in_dim(both, real, count, axis=-3)

    return jax.vmap(one, in_axes=(batch, batch, 0), out_axes=batch)(old, new, num_tokens)
