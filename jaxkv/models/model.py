"""What all models here share: they know the cache that fits them."""

from typing import Any, ClassVar, Self, Unpack

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxkv.addressing import Addressing, Contiguous
from jaxkv.cache.ancestors import Ancestors
from jaxkv.cache.hybrid import AnyCache, AnyConfig
from jaxkv.cache.kv_cache import NumTokens
from jaxkv.codecs import Rope
from jaxkv.models.layers import Embedding, Linear, matmul
from jaxkv.models.layout import Layout
from jaxkv.models.rope import check_room
from jaxkv.models.shape import RING_CHUNK, Codecs, SameInAllLayers, codec_of_each_layer
from jaxkv.programs import promotes_ranks


class Model(nnx.Module):
    """A decoder: ``model(tokens, cache) -> (logits, cache)``."""

    # How its checkpoints are written: what stands before the names of all tensors but lm_head's,
    # and the modules whose weights are kept there as [out, in].
    checkpoint_prefix: ClassVar[str]
    checkpoint_transposes: ClassVar[tuple[str, ...]]
    checkpoint_embedding: ClassVar[str]  # the module that can be the head too

    checkpoint_layout: Any = Layout()  # how its tensors are named and packed there

    config: Any
    lm_head: Linear  # only where the embedding is not the head too

    @property
    def vocab_size(self) -> int:
        """Token ids that the model knows."""
        return self.config.vocab_size

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """What ends a text of the model, for `jaxkv.generate` and `jaxkv.Engine`."""
        return self.config.eos_token_ids

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of weights and activations; norms, softmax and logits are float32."""
        raise NotImplementedError

    def cache_config(
        self,
        *,
        max_context_length: int,
        batch_size: int | None = None,
        codec: Codecs | None = None,
        addressing: Addressing = Contiguous(),
        chunk: int | None = RING_CHUNK,
        **fields: Unpack[SameInAllLayers],
    ) -> AnyConfig:
        """The cache that fits this model.

        Args:
          max_context_length: tokens that one sequence may hold.
          batch_size: sequences, or None for one sequence and arrays without a batch axis.
          codec: how a vector is stored; one codec or one per layer, by value or by name; `Dense`
            of the model's dtype if None. A `Centred` one without a rope is given that of its layer.
          addressing: which slot holds which token, in layers that see all tokens.
          chunk: the most tokens that a call brings. Layers with a window keep ``window - 1 +
            chunk`` tokens. None for calls of any size: then all layers keep all tokens, in
            ``addressing``.
          **fields: other fields of `KVCacheConfig`, the same in all layers: ``placement``, for
            contexts that do not fit on the device, and ``newest``.

        Raises:
          ValueError: texts that fill it have another rope than shorter ones, see `for_context`.
        """
        config = getattr(self.config, "with_mtp_layer", self.config)
        codecs = codec_of_each_layer(codec or self.dtype.name, self.config.num_layers)
        codecs += codecs[-1:] * (config.num_layers - len(codecs))
        if ropes := getattr(config, "ropes", ()):
            check_room(ropes, max_context_length)
            known = {
                rope: rope and Rope(tuple(rope.frequencies(max_context_length).tolist()))
                for rope in ropes
            }
            codecs = tuple(
                codec.under(known[rope]) for codec, rope in zip(codecs, ropes, strict=False)
            )
        return config.shape.cache_config(
            max_context_length=max_context_length,
            batch_size=batch_size,
            codec=codecs,
            addressing=addressing,
            chunk=chunk,
            state_dtype=self.dtype.name,
            **fields,
        )

    @promotes_ranks
    def __call__(
        self,
        tokens: Int[Array, "*batch tokens"],
        cache: AnyCache | None = None,
        *,
        num_tokens: NumTokens | None = None,
        ancestors: Ancestors | None = None,
    ) -> tuple[Float[Array, "*batch tokens vocab"], AnyCache | None]:
        """Logits of the token after each of these, and the cache with them counted.

        Args:
          tokens: ids, ``[tokens]``, with a leading ``[batch]`` exactly when the cache has one.
          cache: what came before. None for the plain causal forward over these tokens alone,
            with any leading axes; it is differentiable and returns None as cache.
          num_tokens: how many of ``tokens`` are real, a sequence, for prompts padded on the
            right. All if None. Logits of padding mean nothing.
          ancestors: which of ``tokens`` come before which, where they form a tree; see
            `jaxkv.attend`. `jaxkv.keep_path` makes a branch of it the text.

        Raises:
          CacheFullError: outside jit, see `jaxkv.append`.
          ConfigError: a tree, and layers that keep a state or a cache that takes none.
          TypeError, ValueError: a bad dtype or shape, a context that the model does not know, or a
            cache for which `for_context` must say what the rope is.
        """
        hidden, cache = self.hidden(tokens, cache, num_tokens=num_tokens, ancestors=ancestors)
        return self.logits(hidden), cache

    def next_logits(
        self,
        tokens: Int[Array, "batch tokens"],
        cache: Any,
        *,
        num_tokens: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch vocab"], Any]:
        """Logits of the token after the first ``num_tokens`` of each sequence, and the cache.

        Where a sequence has none, they mean nothing.
        """
        hidden, after = self.hidden(tokens, cache, num_tokens=num_tokens)
        places = jnp.maximum(num_tokens - 1, 0)[:, None, None]
        last = jnp.take_along_axis(hidden, places, axis=1, mode="clip")
        return self.logits(last)[:, 0], after

    def hidden(
        self,
        tokens: Int[Array, "*batch tokens"],
        cache: AnyCache | None = None,
        *,
        num_tokens: NumTokens | None = None,
        ancestors: Ancestors | None = None,
    ) -> tuple[Float[Array, "*batch tokens hidden"], AnyCache | None]:
        """What `logits` are made of, after the last norm, and the cache; given as to a call."""
        raise NotImplementedError

    def logits(
        self, hidden: Float[Array, "*batch tokens hidden"]
    ) -> Float[Array, "*batch tokens vocab"]:
        """Of the token after each, from what `hidden` gives."""
        raise NotImplementedError

    def for_context(self, max_context_length: int) -> Self:
        """The model, with its weights, for texts of up to ``max_context_length`` tokens: one rope.

        Only the ropes of two kinds depend on a text's length, once that is beyond the context of
        training: ``longrope`` has two sets of frequencies, ``dynamic`` one for each length. Without
        a cache a text has those of its own length, as in transformers. In a cache all texts
        must have the same, as long as they grow: those of ``max_context_length`` tokens.

        Args:
          max_context_length: of the texts; the cache may have other room.
        """
        return self

    def _logits(
        self, x: Float[Array, "*batch tokens hidden"], embedding: Embedding
    ) -> Float[Array, "*batch tokens vocab"]:
        """Through the head, or through the embedding where the two are one."""
        if self.config.tie_word_embeddings:
            return matmul(x, embedding.weight[...], axis=1, dtype=jnp.float32)
        return matmul(x, self.lm_head.weight[...], dtype=jnp.float32)
