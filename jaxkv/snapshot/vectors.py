"""What a file has of one codec leaf of one sequence, in one array or dealt out over several."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Vectors ``[layers, sides, tokens, kv_heads, ...]``; only those are read that are asked for.

    Attributes:
      arrays: by the first KV head that each has, and its number among those that share tokens.
      context: how many arrays share tokens: token i is in that whose number is i modulo them.
      heads: those that are asked for.
    """

    arrays: dict[tuple[int, int], np.ndarray]
    context: int
    heads: range

    def of_heads(self, heads: range) -> "Vectors":
        """The same, of which these heads are asked for."""
        return dataclasses.replace(self, heads=heads)

    def with_copies(self, copies: int) -> "Vectors":
        """The same with each head so often, one after the other."""
        arrays = {
            (first * copies, number): np.repeat(array, copies, axis=3)
            for (first, number), array in self.arrays.items()
        }
        heads = range(self.heads.start * copies, self.heads.stop * copies)
        return dataclasses.replace(self, arrays=arrays, heads=heads)

    def of_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Those of some tokens, by their numbers in the file."""
        layers, sides, _, _, *vector = next(iter(self.arrays.values())).shape
        shape = (layers, sides, len(tokens), len(self.heads), *vector)
        found = np.empty(shape, next(iter(self.arrays.values())).dtype)
        for (first, number), array in self.arrays.items():
            begin = max(self.heads.start, first)
            end = min(self.heads.stop, first + array.shape[3])
            if begin < end:
                to = slice(begin - self.heads.start, end - self.heads.start)
                (own,) = np.nonzero(tokens % self.context == number)
                vectors = array[:, :, :, begin - first : end - first]
                found[:, :, own, to] = vectors[:, :, tokens[own] // self.context]
        return found
