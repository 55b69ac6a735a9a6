"""What the tokens of a step see where they form a tree, see ``ancestors`` of `jaxkv.attend`."""

from typing import NamedTuple, Self

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxkv.cache.ancestors import Ancestors, depths_of, with_itself


class Tree(NamedTuple):
    """The queries' tokens: where they are stored, and where each stands in its own text.

    Attributes:
      start: the position that the first of them is stored at, and all positions before are before
        it in every text.
      depths: of each token; in its text it stands at ``start`` and so many more.
      sees: which of these tokens each query's text has, its own included.
    """

    start: Int[Array, " batch"]
    depths: Int[Array, "batch all_tokens"]
    sees: Bool[Array, "batch tokens all_tokens"]

    @classmethod
    def of(cls, ancestors: Ancestors, lengths: Int[Array, " batch"]) -> Self:
        """Of tokens that come after sequences of these lengths."""
        ancestors = jnp.broadcast_to(ancestors, (len(lengths), *ancestors.shape[-2:]))
        return cls(lengths, depths_of(ancestors), with_itself(ancestors))

    def in_text(
        self, positions: Int[Array, "batch #kv_heads slots"]
    ) -> Int[Array, "batch #kv_heads slots"]:
        """The position in its own text of what is stored at each of these; -1 stays."""
        number, inside = self._numbers(positions)
        depths = jnp.take_along_axis(self.depths[:, None], number, axis=-1)
        return jnp.where(inside, self.start[:, None, None] + depths, positions)

    def visible(
        self, positions: Int[Array, "batch #kv_heads slots"]
    ) -> Bool[Array, "batch #kv_heads tokens slots"]:
        """Whether each query's text has what is stored at these: all but other branches."""
        number, inside = self._numbers(positions)
        seen = jnp.take_along_axis(self.sees[:, None], number[:, :, None], axis=-1)
        return seen | ~inside[:, :, None]

    def _numbers(self, positions: Array) -> tuple[Array, Array]:
        """Which token of the step is stored at each position, and whether one is."""
        number = positions - self.start[:, None, None]
        return jnp.clip(number, 0, self.depths.shape[1] - 1), number >= 0
