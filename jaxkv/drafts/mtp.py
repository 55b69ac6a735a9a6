"""Guesses of a model's own module of multi-token prediction."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.verbs import padded_after, truncate
from jaxkv.drafts.draft import NO_GUESS, Guesses, Lengths
from jaxkv.errors import ConfigError

Hidden = Float[Array, "batch tokens hidden"]


@runtime_checkable
class PredictsAhead(Protocol):
    """What a model has whose hidden states something of its own goes on from; a pytree.

    A position of the cache is that of a token for the model, and of the same token's hidden state
    and the token after it for `ahead`, which keeps what it needs in a layer of its own.
    """

    predicts_ahead: bool
    hidden_size: int
    dtype: Any

    def hidden(self, tokens: Array, cache: AnyCache) -> tuple[Hidden, AnyCache]:
        """The hidden state of each token, and the cache with them counted."""
        ...

    def logits(self, hidden: Hidden) -> Float[Array, "batch tokens vocab"]:
        """Of the token after each, from what `hidden` or `ahead` gives."""
        ...

    def ahead(self, hidden: Hidden, tokens: Array, cache: AnyCache) -> tuple[Hidden, AnyCache]:
        """From hidden states and the tokens after theirs to hidden states of these."""
        ...


class Newest(NamedTuple):
    """What the module said last, of a sequence of so many tokens in the cache; -1 for none."""

    hidden: Float[Array, "batch hidden"]
    lengths: Int[Array, " batch"]


@dataclasses.dataclass(frozen=True)
class MTP:
    """A model's module of multi-token prediction (DeepSeek-V3, 2024, section 2.2).

    `jaxkv.models.load(folder, mtp=True)` reads it with the model. It goes over the prompt as the
    model does, and keeps keys and values in a layer of the model's cache: pages, files and prefixes
    have them. Guesses are its most likely tokens; those after the first it makes from its own
    hidden states, for which it was not trained: few are best, such as ``num_guesses=2``.

    A model of your own needs what `jaxkv.drafts.mtp.PredictsAhead` says.

    Raises:
      ConfigError: when it is used, a model without one.

    >>> import jaxkv
    >>> from flax import nnx
    >>> from jaxkv.models import Decoder, DecoderConfig
    >>> sizes = {"num_layers": 1, "num_heads": 2}
    >>> config = DecoderConfig(32, 16, 16, **sizes, architecture="MiMoForCausalLM", mtp=True)
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> plain = jaxkv.generate(model, [[3, 1, 4]], max_new_tokens=9)
    >>> draft = jaxkv.drafts.MTP()
    >>> plain.tokens == jaxkv.generate(model, [[3, 1, 4]], max_new_tokens=9, draft=draft).tokens
    True
    """

    def check_model(self, who: str, model: Any) -> None:
        """See `HiddenStateDraft`."""
        leaf = jax.tree_util.all_leaves([model])
        if leaf or not isinstance(model, PredictsAhead) or not model.predicts_ahead:
            raise ConfigError(
                f"{who}: draft=MTP() is for a model that has a module of multi-token prediction, "
                f"got a {type(model).__name__} without. Load it with "
                "jaxkv.models.load(folder, mtp=True), or take another draft."
            )

    def begin(self, model: PredictsAhead, batch_size: int) -> Newest:
        """See `HiddenStateDraft`."""
        hidden = np.zeros((batch_size, model.hidden_size), model.dtype)
        return Newest(*jax.device_put((hidden, np.full(batch_size, -1, np.int32))))

    def filling(self, model: PredictsAhead) -> Callable[..., tuple[Hidden, AnyCache]]:
        """See `HiddenStateDraft`."""

        def fill(tokens: Array, cache: AnyCache) -> tuple[Hidden, AnyCache]:
            begin = cache.lengths
            hidden, cache = model.hidden(tokens[:, :-1], cache)
            return _followed(model, hidden, tokens[:, 1:], cache, cache.lengths - begin)

        return fill

    def follow(
        self,
        model: PredictsAhead,
        newest: Newest,
        hidden: Hidden,
        tokens: Array,
        cache: AnyCache,
        count: Lengths,
    ) -> tuple[Newest, AnyCache]:
        """See `HiddenStateDraft`."""
        found, cache = _followed(model, hidden, tokens, cache, count)
        last = jnp.take_along_axis(found, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
        any_new = count > 0
        return Newest(
            jnp.where(any_new[:, None], last, newest.hidden),
            jnp.where(any_new, cache.lengths, newest.lengths),
        ), cache

    def propose_in(
        self, model: PredictsAhead, newest: Newest, cache: AnyCache, k: int, wanted: Int[Array, ""]
    ) -> tuple[Guesses, AnyCache]:
        """See `HiddenStateDraft`. None of a sequence whose last token it did not take."""
        lengths = cache.lengths

        def guess(hidden: Array) -> Array:
            return jnp.argmax(model.logits(hidden)[:, 0], axis=-1).astype(jnp.int32)

        def go_on(number: Array, carry: Any) -> Any:
            hidden, last, guesses, cache = carry
            hidden, cache = model.ahead(hidden, last[:, None], cache)
            last = guess(hidden)
            return hidden, last, guesses.at[:, number].set(last), cache

        hidden = newest.hidden[:, None]
        first = guess(hidden)
        guesses = jnp.full((len(first), k), NO_GUESS, jnp.int32).at[:, 0].set(first)
        *_, guesses, cache = lax.fori_loop(1, wanted, go_on, (hidden, first, guesses, cache))
        known = newest.lengths == lengths
        return jnp.where(known[:, None], guesses, NO_GUESS), truncate(cache, lengths)


def _followed(
    model: PredictsAhead, hidden: Hidden, tokens: Array, cache: AnyCache, count: Lengths
) -> tuple[Hidden, AnyCache]:
    """The module of the newest ``count`` tokens of a cache that the model alone has taken."""
    cache = truncate(cache, cache.lengths - count)
    hidden, cache = model.ahead(hidden, tokens, padded_after(cache, count))
    return hidden, padded_after(cache, None)
