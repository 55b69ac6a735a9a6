"""One decoder for all with rope and norms, see `jaxkv.models.families`."""

import dataclasses
from typing import Any, Self

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxkv.cache.ancestors import Ancestors
from jaxkv.cache.hybrid import AnyCache
from jaxkv.cache.kv_cache import NumTokens
from jaxkv.cache.verbs import advance, next_positions
from jaxkv.errors import ConfigError
from jaxkv.models.altup import AltUp, Laurel, LayerInput, Streams
from jaxkv.models.config import DecoderConfig
from jaxkv.models.experts import MixtureOfExperts, RoutedExperts
from jaxkv.models.latent_attention import LatentAttention
from jaxkv.models.layers import (
    INIT_STD,
    NORMS,
    Embedding,
    Linear,
    Passed,
    Step,
    attend_causal,
    check_tokens,
    linears,
    positions_of,
    unit,
)
from jaxkv.models.layout import Layout
from jaxkv.models.mlp import MLP
from jaxkv.models.model import Model
from jaxkv.models.mtp import MTPModule, names_of
from jaxkv.models.rope import check_room, rotate, rotation, unpaired
from jaxkv.models.stateful import MIXERS
from jaxkv.models.temperature import query_growth
from jaxkv.programs import promotes_ranks

Hidden = Float[Array, "*batch tokens hidden"]


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., 2023) with rope, over the cache."""

    def __init__(
        self, config: DecoderConfig, layer: int, *, rngs: nnx.Rngs, dtype: Any, out_std: float
    ):
        hidden, head_dim, family = config.hidden_size, config.head_dim, config.family
        queries, keys = config.num_heads * head_dim, config.num_kv_heads * head_dim
        qkv_bias = config.attention_bias or config.qkv_bias or family.qkv_bias
        output_bias = config.attention_bias and family.output_bias
        shared = {"rngs": rngs, "dtype": dtype}
        gates = queries if family.output_gate else 0
        self.q_proj = Linear(hidden, queries + gates, bias=qkv_bias, **shared)
        self.k_proj = Linear(hidden, keys, bias=qkv_bias, **shared)
        self.v_proj = Linear(hidden, keys, bias=qkv_bias, **shared)
        self.o_proj = Linear(queries, hidden, bias=output_bias, std=out_std, **shared)
        self.qk_norm = family.qk_norm if config.use_qk_norm else None
        sizes = {"head": (head_dim, head_dim), "all": (queries, keys)}.get(self.qk_norm or "")
        norms: list[Any] = [size and _norm(size, config, dtype) for size in sizes or (None, None)]
        self.q_norm, self.k_norm = norms
        if family.has_sinks:
            self.sinks = nnx.Param(jnp.zeros(config.num_heads, dtype))
        self.config, self.layer = config, layer

    def __call__(self, x: Hidden, rotation: Any, cache: Any, step: Step) -> tuple[Hidden, Any]:
        config = self.config
        source = config.sources[self.layer] if config.sources else self.layer
        keeps = source == self.layer  # or the checkpoint has projections that are not used
        used = (self.q_proj, self.k_proj, self.v_proj) if keeps else (self.q_proj,)
        queries, *kept = linears(x, *used)
        gate = None
        if config.family.output_gate:  # of each head beside its query
            by_head = queries.reshape(*x.shape[:-1], config.num_heads, -1)
            queries, gate = (
                part.reshape(*x.shape[:-1], -1) for part in jnp.split(by_head, 2, axis=-1)
            )
        queries = self._prepared(queries, self.q_norm, rotation)
        if not config.rope_layers[self.layer] and rotation is not None:
            queries = (queries * rotation).astype(queries.dtype)
        mixed, cache = attend_causal(
            cache,
            queries,
            *(self._kept(kept[0], kept[1], rotation) if keeps else (None, None)),
            layer=self.layer,
            source=source,
            step=step,
            scale=config.attention_scale,
            window=config.windows[self.layer],
            aligned=config.family.aligned,
            softcap=config.attention_softcap,
            sink_logits=self.sinks[...] if config.family.has_sinks else None,
        )
        mixed = mixed.reshape(*x.shape[:-1], -1)
        return self.o_proj(mixed if gate is None else mixed * nnx.sigmoid(gate)), cache

    def _kept(self, keys: Array, values: Array, rotation: Any) -> tuple[Array, Array]:
        """What the cache is given."""
        values = values.reshape(*values.shape[:-1], -1, self.config.head_dim)
        if self.config.family.value_norm:
            values = unit(values, self.config.rms_norm_eps).astype(values.dtype)
        return self._prepared(keys, self.k_norm, rotation), values

    def _prepared(self, projected: Array, norm: nnx.Module | None, rotation: Any) -> Array:
        """Queries or keys of each head, with the norm and the rope that the layer has."""
        if norm is not None and self.qk_norm == "all":
            projected = norm(projected)
        heads = projected.reshape(*projected.shape[:-1], -1, self.config.head_dim)
        if norm is not None and self.qk_norm == "head":
            heads = norm(heads)
        return self._rotated(heads, rotation) if self.config.rope_layers[self.layer] else heads

    def _rotated(self, vectors: Array, rotation: Any) -> Array:
        if self.config.family.interleaved:
            vectors = unpaired(vectors, rotation)
        rotated = rotate(vectors, rotation)
        if self.qk_norm != "rotated":
            return rotated
        return unit(rotated, self.config.rms_norm_eps).astype(rotated.dtype)


class Block(nnx.Module):
    """One layer: attention, or what mixes tokens in its place, and what follows it.

    Each is added to the stream, with a family's norms.
    """

    def __init__(self, config: DecoderConfig, layer: int, *, rngs: nnx.Rngs, dtype: Any):
        out_std = INIT_STD / (2 * config.num_layers) ** 0.5
        shared = {"rngs": rngs, "dtype": dtype, "out_std": out_std}
        for name in dict.fromkeys(config.family.norms[:4]):
            if name is not None:
                setattr(self, name, _norm(config.hidden_size, config, dtype))
        self.mixing, mixer = "self_attn", Attention if config.latent is None else LatentAttention
        if config.mixer is not None and config.mixer_layers[layer]:
            self.mixing, mixer = MIXERS[type(config.mixer)]
        setattr(self, self.mixing, mixer(config, layer, **shared))
        self.mlp = _mlp(config, layer, **shared)
        self.norms, self.is_parallel = config.family.norms, config.is_parallel
        self.multiplier = config.residual_multiplier
        wide, own = config.streams is not None, {"rngs": rngs, "dtype": dtype}
        self.laurel = Laurel(config, **own) if wide else None
        self.altup = AltUp(config, **own) if wide else None

    def __call__(
        self,
        x: Hidden,
        rotation: Any,
        cache: Any,
        step: Step,
        given: LayerInput | None = None,
    ) -> tuple[Hidden, Any]:
        """The stream, or all of them, after the layer."""
        if self.altup is None or given is None:
            return self._through(x, rotation, cache, step)
        predicted = self.altup.predict(x)
        active = predicted[self.altup.streams.active]
        made, cache = self._through(active, rotation, cache, step)
        return self.altup.correct(predicted, made, given), cache

    def _through(self, x: Hidden, rotation: Any, cache: Any, step: Step) -> tuple[Hidden, Any]:
        norms = self.norms
        given = self._normed(norms.attention_input, x)
        mixed, cache = getattr(self, self.mixing)(given, rotation, cache, step)
        mixed = self._normed(norms.attention_output, mixed) * self.multiplier
        between = x if self.is_parallel else x + mixed
        if self.laurel is not None:
            between = (between + self.laurel(given)) * 0.5**0.5
        if not (self.is_parallel and norms.mlp_input is None):
            given = self._normed(norms.mlp_input, between)
        fed = self._normed(norms.mlp_output, self.mlp(given)) * self.multiplier
        return (x + mixed if self.is_parallel else between) + fed, cache

    def _normed(self, name: str | None, x: Hidden) -> Hidden:
        return x if name is None else getattr(self, name)(x)


class Decoder(Model):
    """A decoder of one of the families in `jaxkv.models.families.FAMILIES`.

    Args:
      config: its shape.
      rngs: for random weights.
      dtype: of the weights, and of all that is computed but norms, softmax and logits (float32).

    >>> import jax.numpy as jnp, jaxkv
    >>> config = DecoderConfig(256, 32, 64, num_layers=2, num_heads=4, num_kv_heads=2)
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> cache = jaxkv.create(model.cache_config(max_context_length=16))
    >>> logits, cache = model(jnp.array([72, 101, 108]), cache)
    >>> logits.shape, int(cache.lengths)
    ((3, 256), 3)
    """

    checkpoint_prefix = "model."
    checkpoint_transposes = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
        *("gate_proj", "up_proj", "down_proj", "router", "gate", "lm_head", "eh_proj"),
        *("in_proj", "in_proj_qkvz", "in_proj_ba", "out_proj", "shared_expert_gate"),
        *("linear_left", "linear_right", "per_layer_input_gate", "per_layer_projection"),
        *("correction_coefs", "prediction_coefs", "modality_router", "per_layer_model_projection"),
        *("altup_projections", "altup_unembed_projections"),
    )
    checkpoint_embedding = "embed_tokens"

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        vocab, hidden = config.vocab_size, config.hidden_size
        self.config = config
        self.embed_tokens = Embedding(vocab, hidden, rngs=rngs, dtype=dtype)
        self.layers = nnx.data(
            [Block(config, layer, rngs=rngs, dtype=dtype) for layer in range(config.num_layers)]
        )
        wide = config.streams is not None
        self.streams = Streams(config, rngs=rngs, dtype=dtype) if wide else None
        setattr(self, config.family.norms.last, _norm(hidden, config, dtype))
        if not config.tie_word_embeddings:
            self.lm_head = Linear(hidden, vocab, rngs=rngs, dtype=dtype)
        self.mtp = _mtp(config, rngs=rngs, dtype=dtype) if config.mtp else None

    @promotes_ranks
    def hidden(
        self,
        tokens: Int[Array, "*batch tokens"],
        cache: AnyCache | None = None,
        *,
        num_tokens: NumTokens | None = None,
        ancestors: Ancestors | None = None,
    ) -> tuple[Hidden, AnyCache | None]:
        """What `logits` are made of, after the last norm, and the cache; given as to a call."""
        step = Step(num_tokens, ancestors)
        check_tokens(tokens, cache, step=step)
        if ancestors is not None and any(self.config.mixer_layers):
            raise ConfigError(
                "ancestors=: layers that keep a state would take in all branches. Check one at a "
                "time."
            )
        length, positions = tokens.shape[-1], positions_of(tokens, cache, step)
        ropes = self.config.ropes
        context = length if cache is None else cache.config.max_context_length
        if cache is not None or num_tokens is not None:  # texts may be shorter than that
            check_room(ropes, context)
        rotations: dict[Any, Any] = {
            rope: rotation(rope, positions, context) for rope in dict.fromkeys(ropes) if rope
        }
        rotations[None] = self._growth(positions)
        x, streams = self._embed(tokens), self.streams
        given: list[Any] = [None] * len(ropes)
        if streams is not None:
            x, given = streams.begin(x), streams.inputs(tokens, x)
        kept: Any = Passed() if cache is None and self.config.sources else cache
        for rope, block, own in zip(ropes, self.layers, given, strict=True):
            x, kept = block(x, rotations[rope], kept, step, own)
        if streams is not None:
            x = streams.end(x)
        if cache is not None:
            cache = advance(kept, length if num_tokens is None else num_tokens)
        return getattr(self, self.config.family.norms.last)(x), cache

    def logits(self, hidden: Hidden) -> Float[Array, "*batch tokens vocab"]:
        """Of the token after each, from what `hidden` or `ahead` gives."""
        logits, cap = self._logits(hidden, self.embed_tokens), self.config.logit_softcap
        logits *= self.config.logit_scale
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    @property
    def predicts_ahead(self) -> bool:
        """Whether it has an MTP module, and so `ahead`."""
        return self.mtp is not None

    @promotes_ranks
    def ahead(
        self, hidden: Hidden, tokens: Int[Array, "*batch tokens"], cache: AnyCache
    ) -> tuple[Hidden, AnyCache]:
        """Hidden states one token further, by the MTP module, and the cache with them counted.

        Args:
          hidden: of the tokens at the next positions of the cache, from `hidden` or from this.
          tokens: the ones after these.
          cache: the module keeps keys and values there in a layer after the model's own.
        """
        assert self.mtp is not None, "predicts_ahead says so"
        check_tokens(tokens, cache)
        length, context = tokens.shape[-1], cache.config.max_context_length
        check_room(self.config.ropes, context)
        turned = rotation(self.config.rope, next_positions(cache, length), context)
        hidden, cache = self.mtp(hidden, self._embed(tokens), turned, cache)
        return hidden, advance(cache, length)

    def for_context(self, max_context_length: int) -> Self:
        ropes = {
            field: getattr(self.config, field).for_context(max_context_length)
            for field in ("rope", "local_rope")
        }
        model, config = nnx.clone(self), dataclasses.replace(self.config, **ropes)
        longer = {self.config.with_mtp_layer: config.with_mtp_layer}
        changed = longer | {self.config: config}
        for _, module in nnx.iter_modules(model):
            if isinstance(own := getattr(module, "config", None), DecoderConfig):
                module.config = changed[own]  # type: ignore[attr-defined]
        return model

    def _growth(self, positions: Int[Array, "*batch tokens"]) -> Array | None:
        """What queries of layers without a rope are multiplied by."""
        config = self.config
        if not config.grows_queries:
            return None
        return query_growth(positions, config.query_growth_step, config.query_growth)

    def _embed(self, tokens: Int[Array, "*batch tokens"]) -> Hidden:
        embedded = self.embed_tokens(tokens)
        scale = self.config.embedding_multiplier
        if self.config.family.scales_embeddings:
            scale *= self.config.hidden_size**0.5
        return embedded if scale == 1 else embedded * jnp.asarray(scale, self.dtype)

    @property
    def checkpoint_layout(self) -> Layout:
        family = self.config.family
        num_layers, module = self.config.num_layers, family.mtp
        whole = family.routed is not None and family.routed.whole
        layout = Layout(family.renamed, family.joined, self.config.num_heads, whole_experts=whole)
        if module is None:
            return layout
        if self.config.mtp:
            renamed = (*family.renamed, *names_of(module, num_layers))
            return dataclasses.replace(layout, renamed=renamed, num_layers=num_layers)
        unread = None if module.begins.startswith("layers.") else module.begins
        return dataclasses.replace(layout, num_layers=num_layers, unread=unread)

    @property
    def hidden_size(self) -> int:
        """Numbers of a hidden state."""
        return self.config.hidden_size

    @property
    def dtype(self) -> jnp.dtype:
        return self.embed_tokens.weight.dtype


def _mlp(config: DecoderConfig, layer: int, **shared: Any) -> nnx.Module:
    if config.family.has_experts:
        return MixtureOfExperts(config, **shared)
    if config.experts is not None and config.experts.is_in(layer):
        return RoutedExperts(config, **shared)
    sparsity = config.activation_sparsity[layer] if config.activation_sparsity else 0.0
    return MLP(config, config.intermediate_size, sparsity=sparsity, **shared)


def _mtp(config: DecoderConfig, **shared: Any) -> MTPModule:
    block = Block(config.with_mtp_layer, config.num_layers, **shared)
    return MTPModule(config, block, **shared)


def _norm(features: int, config: DecoderConfig, dtype: Any) -> nnx.Module:
    return NORMS[config.family.norms.kind](features, eps=config.rms_norm_eps, dtype=dtype)
