"""The first tokens and the newest."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxkv.policies.policy import Positions, Queries, Scores, Vectors


@dataclasses.dataclass(frozen=True)
class SinksAndRecent:
    """Keep the first ``sinks`` tokens, which draw attention whatever they say, and the newest.

    Xiao et al., "Efficient streaming language models with attention sinks" (StreamingLLM, 2023).
    Kept keys keep the rope positions that they had; the paper's numbers them anew.

    >>> import jax.numpy as jnp, jaxkv
    >>> vectors = jnp.zeros((6, 1, 4))
    >>> SinksAndRecent(sinks=1)(vectors, vectors, None, jnp.arange(6)[None]).tolist()
    [[inf, 1.0, 2.0, 3.0, 4.0, 5.0]]
    """

    sinks: int = 4
    window: ClassVar[int] = 0  # queries that it looks at

    def __call__(
        self, keys: Vectors, values: Vectors, queries: Queries | None, positions: Positions
    ) -> Scores:
        return jnp.where(positions < self.sinks, jnp.inf, positions.astype(jnp.float32))
