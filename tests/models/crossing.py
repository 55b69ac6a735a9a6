"""Tiny decoders with cross-attention, as a user would write them, and what transformers gives.

Their encoders are not run: what one would make of the audio, text or image is made up. Weights are
made from their names, so that `benchmarks.make_cross_goldens` needs no tables of shapes.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from tests.models.variants import _generator

GOLDENS = Path(__file__).parent / "goldens" / "cross_logits.npz"
VOCABULARY, NUM_TOKENS, MOST, WIDTH = 64, 10, 12, 64
# Tokens of the encoder for each of three texts. Those of the third of an mllama have no image.
LENGTHS = {"whisper": (12, 5, 8), "bart": (3, 12, 7), "t5": (1, 9, 12), "mllama": (6, 3, 0)}
# Of an mllama the first text has a token before its image.
IMAGE_BEGINS = (1, 0, 0)

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "whisper": {
        "model_type": "whisper",
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "decoder_layers": 3,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "encoder_layers": 1,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 16,
        "max_source_positions": MOST,
        "max_target_positions": 32,
        "num_mel_bins": 8,
        **_TOKENS,
    },
    "bart": {
        "model_type": "bart",
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "max_position_embeddings": 32,
        **_TOKENS,
    },
    "t5": {
        "model_type": "t5",
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "d_kv": 16,
        "num_layers": 1,
        "num_decoder_layers": 2,
        "num_heads": 3,
        "d_ff": 48,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
        **_TOKENS,
    },
    "mllama": {
        "model_type": "mllama_text_model",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "cross_attention_layers": [1, 3],
        "intermediate_size": 48,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}

Tensor = Callable[..., Any]


def tensor_of(kind: str, name: str, *shape: int) -> np.ndarray:
    """A weight of a checkpoint. Wide, so that logits are not flat."""
    noise = 0.3 * _generator(kind + name).standard_normal(shape)
    is_norm = "norm" in name and name.endswith("weight")
    return (noise + is_norm).astype(np.float32)


def texts(kind: str) -> np.ndarray:
    return _generator(kind).integers(3, VOCABULARY, (3, NUM_TOKENS), dtype=np.int32)


def encoded(kind: str) -> np.ndarray:
    """What the encoder made, ``[3, MOST, WIDTH]``, of which each text has its first `LENGTHS`."""
    return _generator(f"{kind} encoded").standard_normal((3, MOST, WIDTH)).astype(np.float32)


@functools.cache
def goldens() -> dict[str, np.ndarray]:
    """Teacher-forced logits ``[3, tokens, vocabulary]`` of transformers, each text by itself."""
    with np.load(GOLDENS) as file:
        return dict(file)


def cache_config(kind: str, **fields: Any) -> jaxkv.HybridConfig:
    """What jaxkv reads of the config.json."""
    config = jaxkv.cache_config(
        CONFIGS[kind], max_context_length=16, max_encoder_length=MOST, codec="float32", **fields
    )
    assert isinstance(config, jaxkv.HybridConfig)
    return config


def decoder_of(kind: str) -> Callable[[Any, Any], Any]:
    """A ``model(tokens, cache)``, as `jaxkv.generate` takes one."""
    return functools.partial(_DECODERS[kind], _tensors_of(kind))


def write(kind: str, cache: Any, states: Any, lengths: Any) -> Any:
    """Keys and values of what an encoder made, in every layer that has cross-attention."""
    tensor = _tensors_of(kind)
    for layer, number in enumerate(cache.config.cross_of_layer):
        if number >= 0:
            keys, values = _SOURCES[kind](tensor, layer, states)
            cache = jaxkv.write_cross(cache, keys, values, layer=layer, lengths=lengths)
    return cache


def _tensors_of(kind: str) -> Tensor:
    return lambda *named: jnp.asarray(tensor_of(kind, *named))


def _linear(tensor: Tensor, name: str, x: Any, size: int, bias: bool = False) -> Any:
    y = x @ tensor(f"{name}.weight", size, x.shape[-1]).T
    return y + tensor(f"{name}.bias", size) if bias else y


def _layer_norm(tensor: Tensor, name: str, x: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    weight, bias = (tensor(f"{name}.{kind}", x.shape[-1]) for kind in ("weight", "bias"))
    return centred * scale * weight + bias


def _rms_norm(tensor: Tensor, name: str, x: Any, epsilon: float) -> Any:
    scale = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)
    return x * scale * tensor(f"{name}.weight", x.shape[-1])


def _split(x: Any, head_dim: int = 16) -> Any:
    return x.reshape(*x.shape[:-1], -1, head_dim)


def _joined(x: Any) -> Any:
    return x.reshape(*x.shape[:-2], -1)


# --- Whisper and BART: a norm before each part, or after it ------------------------------------


def _bart_source(tensor: Tensor, layer: int, states: Any, key_bias: bool = True) -> Any:
    at = f"model.decoder.layers.{layer}.encoder_attn."
    keys = _linear(tensor, f"{at}k_proj", states, WIDTH, key_bias)
    return _split(keys), _split(_linear(tensor, f"{at}v_proj", states, WIDTH, bias=True))


def _bart(tensor: Tensor, tokens: Any, cache: Any, first: bool = False) -> Any:
    """Norms come ``first`` in Whisper, whose keys have no bias and positions no offset."""
    table = tensor("model.decoder.embed_tokens.weight", VOCABULARY, WIDTH)
    offset = 0 if first else 2
    places = tensor("model.decoder.embed_positions.weight", 32 + offset, WIDTH)
    x = table[tokens] + places[jaxkv.next_positions(cache, tokens.shape[-1]) + offset]
    if not first:
        x = _layer_norm(tensor, "model.decoder.layernorm_embedding", x)
    for layer in range(cache.config.num_layers):
        at = f"model.decoder.layers.{layer}."

        def part(x: Any, norm: str, work: Callable[[Any], Any], at: str = at) -> Any:
            if first:
                return x + work(_layer_norm(tensor, at + norm, x))
            return _layer_norm(tensor, at + norm, x + work(x))

        def own(x: Any, at: str = at, layer: int = layer) -> Any:
            nonlocal cache
            queries, keys, values = (
                _split(_linear(tensor, f"{at}self_attn.{n}_proj", x, WIDTH, not first or n != "k"))
                for n in "qkv"
            )
            cache = jaxkv.append(cache, keys, values, layer=layer)
            read = _joined(jaxkv.attend(cache, queries, layer=layer))
            return _linear(tensor, f"{at}self_attn.out_proj", read, WIDTH, bias=True)

        def cross(x: Any, at: str = at, layer: int = layer) -> Any:
            queries = _split(_linear(tensor, f"{at}encoder_attn.q_proj", x, WIDTH, bias=True))
            read = _joined(jaxkv.attend_cross(cache, queries, layer=layer))
            return _linear(tensor, f"{at}encoder_attn.out_proj", read, WIDTH, bias=True)

        def mlp(x: Any, at: str = at) -> Any:
            inner = jax.nn.gelu(_linear(tensor, f"{at}fc1", x, 48, bias=True), approximate=False)
            return _linear(tensor, f"{at}fc2", inner, WIDTH, bias=True)

        x = part(x, "self_attn_layer_norm", own)
        x = part(x, "encoder_attn_layer_norm", cross)
        x = part(x, "final_layer_norm", mlp)
    if first:
        x = _layer_norm(tensor, "model.decoder.layer_norm", x)
    return x @ table.T, jaxkv.advance(cache, tokens.shape[-1])


# --- T5: distances are a bias of the text's scores, which is read back for that ----------------


def _t5_source(tensor: Tensor, layer: int, states: Any) -> Any:
    at = f"decoder.block.{layer}.layer.1.EncDecAttention."
    return tuple(_split(_linear(tensor, at + name, states, 48)) for name in "kv")


def _t5_bias(tensor: Tensor, positions: Any, slots: int) -> Any:
    """``[*batch, heads, tokens, slots]``: by exact distances below 4, then by their logarithms."""
    distance = positions[..., None] - jnp.arange(slots)
    far = 4 + (jnp.log(jnp.maximum(distance, 1) / 4) / np.log(12 / 4) * 4).astype(jnp.int32)
    bucket = jnp.where(distance < 4, jnp.maximum(distance, 0), jnp.minimum(far, 7))
    name = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    bias = jnp.moveaxis(tensor(name, 8, 3)[bucket], -1, -3)
    return jnp.where(distance[..., None, :, :] >= 0, bias, -jnp.inf)


def _t5(tensor: Tensor, tokens: Any, cache: Any) -> Any:
    table = tensor("shared.weight", VOCABULARY, WIDTH)
    x = table[tokens]
    bias = _t5_bias(tensor, jaxkv.next_positions(cache, tokens.shape[-1]), 16)
    for layer in range(2):
        at = f"decoder.block.{layer}.layer."
        h = _rms_norm(tensor, f"{at}0.layer_norm", x, 1e-6)
        queries, keys, values = (
            _split(_linear(tensor, f"{at}0.SelfAttention.{name}", h, 48)) for name in "qkv"
        )
        cache = jaxkv.append(cache, keys, values, layer=layer)
        keys, values = jaxkv.layer(cache, layer)
        weights = jax.nn.softmax(jnp.einsum("...thd,...shd->...hts", queries, keys) + bias)
        read = _joined(jnp.einsum("...hts,...shd->...thd", weights, values))
        x += _linear(tensor, f"{at}0.SelfAttention.o", read, WIDTH)
        h = _rms_norm(tensor, f"{at}1.layer_norm", x, 1e-6)
        queries = _split(_linear(tensor, f"{at}1.EncDecAttention.q", h, 48))
        read = _joined(jaxkv.attend_cross(cache, queries, layer=layer, scale=1.0))
        x += _linear(tensor, f"{at}1.EncDecAttention.o", read, WIDTH)
        h = _rms_norm(tensor, f"{at}2.layer_norm", x, 1e-6)
        inner = jax.nn.relu(_linear(tensor, f"{at}2.DenseReluDense.wi", h, 48))
        x += _linear(tensor, f"{at}2.DenseReluDense.wo", inner, WIDTH)
    x = _rms_norm(tensor, "decoder.final_layer_norm", x, 1e-6) * WIDTH**-0.5
    return x @ table.T, jaxkv.advance(cache, tokens.shape[-1])


# --- Llama 3.2 Vision: layers that attend to images alone, let in by gates ---------------------


def _mllama_source(tensor: Tensor, layer: int, states: Any) -> Any:
    at = f"model.layers.{layer}.cross_attn."
    keys, values = (_split(_linear(tensor, f"{at}{name}_proj", states, 32)) for name in "kv")
    return _rms_norm(tensor, f"{at}k_norm", keys, 1e-5), values


def _turned(x: Any, positions: Any) -> Any:
    angles = positions[..., None, None].astype(jnp.float32) * 1e4 ** (
        -np.arange(8, dtype=np.float32) / 8
    )
    cosines, sines = jnp.cos(angles), jnp.sin(angles)
    low, high = x[..., :8], x[..., 8:]
    return jnp.concatenate([low * cosines - high * sines, high * cosines + low * sines], -1)


def _mllama(tensor: Tensor, tokens: Any, cache: Any) -> Any:
    positions = jaxkv.next_positions(cache, tokens.shape[-1])
    x = tensor("model.embed_tokens.weight", VOCABULARY + 8, WIDTH)[tokens]
    begins = jnp.asarray(IMAGE_BEGINS) if positions.ndim == 2 else jnp.asarray(IMAGE_BEGINS[0])
    # In transformers such a token sees the image, and what follows of the layer is left out.
    about = (positions >= begins[..., None]) & (cache.cross[0].lengths[..., None] > 0)
    for layer, number in enumerate(cache.config.cross_of_layer):
        at = f"model.layers.{layer}."
        h = _rms_norm(tensor, f"{at}input_layernorm", x, 1e-5)
        if number < 0:
            queries, keys, values = (
                _split(_linear(tensor, f"{at}self_attn.{name}_proj", h, size))
                for name, size in zip("qkv", (64, 32, 32), strict=True)
            )
            queries, keys = (_turned(each, positions) for each in (queries, keys))
            cache = jaxkv.append(cache, keys, values, layer=layer)
            read = _joined(jaxkv.attend(cache, queries, layer=layer))
            x += _linear(tensor, f"{at}self_attn.o_proj", read, WIDTH)
        else:
            queries = _split(_linear(tensor, f"{at}cross_attn.q_proj", h, 64))
            queries = _rms_norm(tensor, f"{at}cross_attn.q_norm", queries, 1e-5)
            read = _joined(jaxkv.attend_cross(cache, queries, layer=layer))
            read = _linear(tensor, f"{at}cross_attn.o_proj", read, WIDTH)
            x += jnp.tanh(tensor(f"{at}cross_attn_attn_gate", 1)) * read
        h = _rms_norm(tensor, f"{at}post_attention_layernorm", x, 1e-5)
        gate, up = (_linear(tensor, f"{at}mlp.{name}_proj", h, 48) for name in ("gate", "up"))
        inner = _linear(tensor, f"{at}mlp.down_proj", jax.nn.silu(gate) * up, WIDTH)
        if number >= 0:
            gate = jnp.tanh(tensor(f"{at}cross_attn_mlp_gate", 1))
            inner = jnp.where(about[..., None], gate * inner, 0)
        x += inner
    x = _rms_norm(tensor, "model.norm", x, 1e-5)
    return _linear(tensor, "lm_head", x, VOCABULARY), jaxkv.advance(cache, tokens.shape[-1])


_DECODERS: dict[str, Any] = {
    "whisper": functools.partial(_bart, first=True),
    "bart": _bart,
    "t5": _t5,
    "mllama": _mllama,
}
_SOURCES: dict[str, Any] = {
    "whisper": functools.partial(_bart_source, key_bias=False),
    "bart": _bart_source,
    "t5": _t5_source,
    "mllama": _mllama_source,
}
