"""Several streams of which layers read one: alternating updates (Baykal et al., 2023).

Around a layer the other streams are guessed from all, and corrected by what the layer made of the
one that it read. Streams stand on the first axis.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxkv.models.config import DecoderConfig
from jaxkv.models.layers import ACTIVATIONS, Embedding, Linear, RMSNorm

Hidden = Float[Array, "*batch tokens hidden"]
AllStreams = Float[Array, "streams *batch tokens hidden"]
LayerInput = Float[Array, "*batch tokens layer_size"]

_LEAST = 1e-5  # mean square of a vector that is brought to the size of another


class Streams(nnx.Module):
    """Where streams begin and end, and each token's inputs to the layers (Gemma 3n)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any):
        hidden, streams = config.hidden_size, config.streams
        assert streams is not None
        shared = {"rngs": rngs, "dtype": dtype}
        inputs = config.num_layers * streams.layer_size
        self.embed_tokens_per_layer = Embedding(streams.layer_vocab_size, inputs, **shared)
        self.per_layer_model_projection = Linear(hidden, inputs, **shared)
        self.per_layer_projection_norm = RMSNorm(
            streams.layer_size, eps=config.rms_norm_eps, dtype=dtype
        )
        self.altup_projections, self.altup_unembed_projections = (
            nnx.data([Linear(hidden, hidden, **shared) for _ in range(1, streams.count)])
            for _ in range(2)
        )
        self.num_layers, self.layer_size = config.num_layers, streams.layer_size

    def begin(self, x: Hidden) -> AllStreams:
        """All streams, of a text's embeddings."""
        others = [_as_large_as(x, project(x)) for project in self.altup_projections]
        return jnp.stack([x, *others])

    def end(self, x: AllStreams) -> Hidden:
        """Their mean."""
        pairs = zip(self.altup_unembed_projections, x[1:], strict=True)
        others = [_as_large_as(x[0], project(each)) for project, each in pairs]
        return jnp.mean(jnp.stack([x[0], *others]), axis=0)

    def inputs(self, tokens: Int[Array, "*batch tokens"], x: Hidden) -> list[LayerInput]:
        """What each layer is given of each token, beside the streams."""
        shape = (*tokens.shape, self.num_layers, self.layer_size)
        own = self.embed_tokens_per_layer(tokens).reshape(shape) * self.layer_size**0.5
        made = self.per_layer_model_projection(x) * x.shape[-1] ** -0.5
        inputs = (self.per_layer_projection_norm(made.reshape(shape)) + own) * 0.5**0.5
        return [inputs[..., layer, :] for layer in range(self.num_layers)]


class AltUp(nnx.Module):
    """What happens to the streams around one layer."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any):
        hidden, streams = config.hidden_size, config.streams
        assert streams is not None
        shared, count = {"rngs": rngs, "dtype": dtype}, streams.count
        norm = {"eps": config.rms_norm_eps, "dtype": dtype}
        self.correct_output_scale = nnx.Param(jnp.zeros(hidden, dtype))
        self.correction_coefs = Linear(count, count, **shared)
        self.prediction_coefs = Linear(count, count**2, **shared)
        self.modality_router = Linear(hidden, count, **shared)
        self.router_norm = RMSNorm(hidden, **norm)
        self.per_layer_input_gate = Linear(hidden, streams.layer_size, **shared)
        self.per_layer_projection = Linear(streams.layer_size, hidden, **shared)
        self.post_per_layer_input_norm = RMSNorm(hidden, **norm)
        self.activation, self.streams = config.activation, streams

    def predict(self, x: AllStreams) -> AllStreams:
        """The streams as they are guessed to be after the layer, which reads the active one."""
        mixing = self.prediction_coefs(self._routed(x[self.streams.active]))
        mixing = mixing.reshape(*mixing.shape[:-1], len(x), len(x))
        return x + jnp.einsum("...kj,j...h->k...h", mixing, x)

    def correct(self, predicted: AllStreams, made: Hidden, given: LayerInput) -> AllStreams:
        """The streams after the layer.

        Args:
          made: what it made of the active one.
          given: each token's own input to this layer.
        """
        active = self.streams.active
        weights = jnp.moveaxis(self.correction_coefs(self._routed(made)) + 1, -1, 0)[..., None]
        corrected = predicted + weights * (made - predicted[active])
        first = corrected[active]
        if self.streams.scales_output:
            first *= self.correct_output_scale[...]
        gated = ACTIVATIONS[self.activation](self.per_layer_input_gate(first)) * given
        added = self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return jnp.concatenate([corrected[:1], corrected[1:] + added])

    def _routed(self, x: Hidden) -> Float[Array, "*batch tokens streams"]:
        routed = self.modality_router(self.router_norm(x) * (1 / x.shape[-1]))
        return jnp.tanh(routed.astype(jnp.float32)).astype(x.dtype)


class Laurel(nnx.Module):
    """A product of low rank beside attention (LAuReL, Menghani et al., 2024)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any):
        hidden, streams = config.hidden_size, config.streams
        assert streams is not None
        shared = {"rngs": rngs, "dtype": dtype}
        self.linear_left = Linear(hidden, streams.laurel_rank, **shared)
        self.linear_right = Linear(streams.laurel_rank, hidden, **shared)
        self.post_laurel_norm = RMSNorm(hidden, eps=config.rms_norm_eps, dtype=dtype)

    def __call__(self, x: Hidden) -> Hidden:
        return x + self.post_laurel_norm(self.linear_right(self.linear_left(x)))


def _as_large_as(x: Hidden, other: Hidden) -> Hidden:
    """The other one, as long as the first."""
    target = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True))
    squares = jnp.mean(other * other, axis=-1, keepdims=True)
    return other * target / jnp.sqrt(jnp.maximum(squares, _LEAST))
