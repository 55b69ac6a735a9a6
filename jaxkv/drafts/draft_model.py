"""Guesses of a smaller model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxkv.cache.create import create
from jaxkv.cache.hybrid import AnyCache, AnyConfig
from jaxkv.cache.verbs import padded_after, truncate
from jaxkv.drafts.draft import Guesses, Lengths, Tokens
from jaxkv.errors import ConfigError


@functools.partial(jax.tree_util.register_dataclass, data_fields=["model"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True, eq=False)
class DraftModel:
    """A model of the same vocabulary that guesses its most likely tokens (Leviathan et al., 2023).

    It has a cache of its own, and catches up with whatever the sequences have become: tokens that
    were taken back, and rows that were given to others, it finds by looking.

    Args:
      model: any ``model(tokens, cache) -> (logits, cache)``, as for `generate`; a pytree (an nnx
        module), or its arrays are copied into the program.
      config: of its cache, with as many rows and at least the context of the cache beside it. If
        None, what the model's own ``cache_config`` says.

    Raises:
      ConfigError: when it is used, a cache of other rows, of less context or with a window.

    >>> import jax, jaxkv
    >>> def count_up(tokens, cache):  # a "model" that answers token + 1
    ...     return jax.nn.one_hot(tokens + 1, 16), jaxkv.advance(cache, tokens.shape[-1])
    >>> config = jaxkv.KVCacheConfig(1, 16, 1, 4, batch_size=1)
    >>> draft = jaxkv.drafts.DraftModel(count_up, config)
    >>> jaxkv.generate(count_up, [[3]], max_new_tokens=9, config=config, draft=draft).tokens
    [[4, 5, 6, 7, 8, 9, 10, 11, 12]]
    """

    model: Any
    config: AnyConfig | None = None

    def state(self, batch_size: int, max_context_length: int) -> tuple[AnyCache, Tokens]:
        """An empty cache, and the tokens that are in it."""
        config = self.config
        if config is None:
            config = self.model.cache_config(
                max_context_length=max_context_length, batch_size=batch_size
            )
        windows = [group.addressing.window for group in config.groups]
        if (
            config.batch_size != batch_size
            or config.max_context_length < max_context_length
            or any(windows)
        ):
            raise ConfigError(
                f"DraftModel: its cache must have {batch_size} rows, at least "
                f"{max_context_length} tokens of context and no window, for it goes back at will; "
                f"got {config.batch_size} rows, {config.max_context_length} tokens and windows "
                f"{windows}."
            )
        return create(config), jax.device_put(np.zeros((batch_size, max_context_length), np.int32))

    def propose_from(
        self, state: tuple[AnyCache, Tokens], tokens: Tokens, lengths: Lengths, k: int
    ) -> tuple[Guesses, tuple[AnyCache, Tokens]]:
        """See `StatefulDraft`."""
        cache, taken = state
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        # The last token is taken anew, for its logits.
        held = jnp.clip(lengths - 1, 0, cache.lengths)[:, None]
        differs = (taken != tokens) & (places < held)
        cache = truncate(
            cache, jnp.where(differs.any(1), differs.argmax(1).astype(jnp.int32), held[:, 0])
        )

        def is_behind(carry: Any) -> Array:
            return (carry[0].lengths < lengths).any()

        def catch_up(carry: Any) -> Any:
            cache, guess = carry
            start = cache.lengths[:, None]
            some = start + jnp.arange(k + 1, dtype=jnp.int32)[None]
            count = jnp.clip(lengths - cache.lengths, 0, k + 1)
            some = jnp.take_along_axis(tokens, some, axis=1, mode="clip")
            found, cache = self._guess(some, cache, count)
            return cache, jnp.where(count > 0, found, guess)

        def go_on(carry: Any, _: None) -> Any:
            cache, last = carry
            guess, cache = self._guess(last[:, None], cache, jnp.ones_like(lengths))
            return (cache, guess), guess

        first = jnp.zeros_like(lengths)
        cache, first = lax.while_loop(is_behind, catch_up, (cache, first))
        (cache, _), others = lax.scan(go_on, (cache, first), length=k - 1)
        guesses = jnp.concatenate([first[:, None], others.T], axis=1)
        at = lengths[:, None] + jnp.arange(k, dtype=jnp.int32)[None]
        rows = jnp.arange(len(lengths), dtype=jnp.int32)[:, None]
        return guesses, (cache, tokens.at[rows, at].set(guesses, mode="drop"))

    def _guess(self, tokens: Array, cache: AnyCache, count: Lengths) -> tuple[Array, AnyCache]:
        """The most likely token after the first ``count`` of these, which are in the cache then."""
        logits, cache = self.model(tokens, padded_after(cache, count))
        last = jnp.maximum(count - 1, 0)[:, None, None]
        logits = jnp.take_along_axis(logits, last, axis=1)[:, 0]
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), padded_after(cache, None)
