"""Layers that keep a state of each sequence, in place of attention."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxkv.cache.states import real_tokens, state, with_state
from jaxkv.models.config import DecoderConfig
from jaxkv.models.layers import ACTIVATIONS, INIT_STD, Linear, RMSNorm, Step
from jaxkv.models.mixers import DeltaNetConfig, MambaConfig, MixerConfig, ShortConvConfig
from jaxkv.models.recurrence import Terms, convolve, run

Hidden = Float[Array, "*batch tokens hidden"]
Kept = dict[str, Array]

_UNIT_EPS = 1e-6  # of the lengths of queries and keys, whatever the config says


class Conv(nnx.Module):
    """A convolution of each channel by itself, ``weight [channels, 1, width]``."""

    def __init__(self, channels: int, width: int, *, bias: bool, rngs: nnx.Rngs, dtype: Any):
        normal = jax.nn.initializers.normal(INIT_STD)
        self.weight = nnx.Param(normal(rngs.params(), (channels, 1, width), dtype))
        self.bias = nnx.Param(jnp.zeros(channels, dtype)) if bias else None

    def __call__(
        self, inputs: Array, kept: Kept, real: Bool[Array, "*batch tokens"]
    ) -> tuple[Array, Kept]:
        """Its outputs, and what is to be kept."""
        weight = self.weight[...][:, 0]
        newest = kept.get("conv", inputs[..., :0, :])
        bias = None if self.bias is None else self.bias[...]
        outputs, rest = convolve(inputs, newest, weight, bias, real)
        return outputs, {"conv": rest} if "conv" in kept else {}


class Stateful(nnx.Module):
    """What such layers share: they read what is kept, mix, and write what is to be kept."""

    mixer: Any
    layer: int

    def __call__(self, x: Hidden, rotation: Any, cache: Any, step: Step) -> tuple[Hidden, Any]:
        tokens = x.shape[-2]
        if cache is None:
            return self.mix(x, _nothing(self.mixer, x), jnp.ones(x.shape[:-1], bool))[0], None
        real = real_tokens(cache, tokens, step.num_tokens)
        mixed, kept = self.mix(x, state(cache, self.layer), real)
        return mixed, with_state(cache, self.layer, kept)

    def mix(self, x: Hidden, kept: Kept, real: Array) -> tuple[Hidden, Kept]:
        """What the layer gives, and what it keeps then.

        Args:
          kept: after the tokens before.
          real: which tokens are no padding; others leave no trace in what is kept.
        """
        raise NotImplementedError


def _nothing(mixer: MixerConfig, x: Hidden) -> Kept:
    """What is kept of a text that has not begun."""
    return {
        kept.name: jnp.zeros((*x.shape[:-2], *kept.shape), kept.dtype or x.dtype)
        for kept in mixer.kept
    }


class ShortConv(Stateful):
    """LFM2's: a convolution between two gates."""

    def __init__(
        self, config: DecoderConfig, layer: int, *, rngs: nnx.Rngs, dtype: Any, out_std: float
    ):
        mixer, hidden = config.mixer, config.hidden_size
        assert isinstance(mixer, ShortConvConfig)
        shared = {"bias": mixer.bias, "rngs": rngs, "dtype": dtype}
        self.in_proj = Linear(hidden, 3 * hidden, **shared)
        self.conv = Conv(hidden, mixer.width, **shared)
        self.out_proj = Linear(hidden, hidden, std=out_std, **shared)
        self.mixer, self.layer = mixer, layer

    def mix(self, x: Hidden, kept: Kept, real: Array) -> tuple[Hidden, Kept]:
        before, after, inner = jnp.split(self.in_proj(x), 3, axis=-1)
        outputs, kept = self.conv(before * inner, kept, real)
        return self.out_proj(after * outputs), kept


class DeltaNet(Stateful):
    """Qwen3-Next's gated delta net."""

    def __init__(
        self, config: DecoderConfig, layer: int, *, rngs: nnx.Rngs, dtype: Any, out_std: float
    ):
        mixer, hidden = config.mixer, config.hidden_size
        assert isinstance(mixer, DeltaNetConfig)
        shared = {"rngs": rngs, "dtype": dtype}
        heads = mixer.num_value_heads
        self.in_proj_qkvz = Linear(hidden, 2 * (mixer.keys + mixer.values), **shared)
        self.in_proj_ba = Linear(hidden, 2 * heads, **shared)
        self.conv1d = Conv(mixer.channels, mixer.width, bias=False, **shared)
        self.dt_bias = nnx.Param(jnp.ones(heads, dtype))
        self.A_log = nnx.Param(jnp.zeros(heads, dtype))
        self.norm = RMSNorm(mixer.value_dim, eps=config.rms_norm_eps, dtype=dtype)
        self.out_proj = Linear(mixer.values, hidden, std=out_std, **shared)
        self.activation, self.mixer, self.layer = config.activation, mixer, layer

    def mix(self, x: Hidden, kept: Kept, real: Array) -> tuple[Hidden, Kept]:
        mixer, active = self.mixer, ACTIVATIONS[self.activation]
        parts, gate, beta, step = self._projected(x)
        convolved, rest = self.conv1d(parts, kept, real)
        queries, keys, values = jnp.split(
            active(convolved).astype(jnp.float32), [mixer.keys, 2 * mixer.keys], axis=-1
        )
        rate = -jnp.exp(self.A_log[...].astype(jnp.float32))
        decay = rate * jax.nn.softplus(step + self.dt_bias[...].astype(jnp.float32))
        terms = Terms(
            self._of_heads(queries) * mixer.key_dim**-0.5,
            self._of_heads(keys),
            values.reshape(*values.shape[:-1], -1, mixer.value_dim),
            jnp.where(real[..., None], decay, 0),
            jnp.where(real[..., None], jax.nn.sigmoid(beta), 0),
        )
        read, recurrent = run(terms, kept["recurrent"])
        gated = self.norm(read.astype(x.dtype)) * jax.nn.silu(gate.astype(jnp.float32))
        return self.out_proj(gated.astype(x.dtype).reshape(*x.shape[:-1], -1)), {
            **rest,
            "recurrent": recurrent,
        }

    def _projected(self, x: Hidden) -> tuple[Array, Array, Array, Array]:
        """Queries, keys and values in a row; the output's gate; beta's logits and the step's.

        Each key head has its columns of all of them together.
        """
        mixer, tokens = self.mixer, x.shape[:-1]
        each = mixer.values // mixer.num_key_heads
        by_head = self.in_proj_qkvz(x).reshape(*tokens, mixer.num_key_heads, -1)
        ends = [mixer.key_dim, 2 * mixer.key_dim, 2 * mixer.key_dim + each]
        *parts, gate = jnp.split(by_head, ends, axis=-1)
        together = [part.reshape(*tokens, -1) for part in parts]
        both = self.in_proj_ba(x).reshape(*tokens, mixer.num_key_heads, -1).astype(jnp.float32)
        beta, step = (part.reshape(*tokens, -1) for part in jnp.split(both, 2, axis=-1))
        gate = gate.reshape(*tokens, mixer.num_value_heads, mixer.value_dim)
        return jnp.concatenate(together, axis=-1), gate, beta, step

    def _of_heads(self, vectors: Array) -> Array:
        """Of length one, and one per head of values."""
        mixer = self.mixer
        heads = vectors.reshape(*vectors.shape[:-1], mixer.num_key_heads, mixer.key_dim)
        squares = (heads * heads).sum(axis=-1, keepdims=True)
        unit = heads * jax.lax.rsqrt(squares + _UNIT_EPS)
        return jnp.repeat(unit, mixer.num_value_heads // mixer.num_key_heads, axis=-2)


class Mamba(Stateful):
    """Mamba-2: what it keeps fades by a step of time that each token chooses."""

    def __init__(
        self, config: DecoderConfig, layer: int, *, rngs: nnx.Rngs, dtype: Any, out_std: float
    ):
        mixer, hidden = config.mixer, config.hidden_size
        assert isinstance(mixer, MambaConfig)
        shared = {"rngs": rngs, "dtype": dtype}
        heads = mixer.num_heads
        self.in_proj = Linear(
            hidden, mixer.inner + mixer.channels + heads, bias=mixer.bias, **shared
        )
        self.conv1d = Conv(mixer.channels, mixer.width, bias=mixer.conv_bias, **shared)
        self.dt_bias = nnx.Param(jnp.ones(heads, dtype))
        self.A_log = nnx.Param(jnp.zeros(heads, dtype))
        self.D = nnx.Param(jnp.ones(heads, dtype))
        self.norm = RMSNorm(mixer.inner, eps=config.rms_norm_eps, dtype=dtype)
        self.out_proj = Linear(mixer.inner, hidden, bias=mixer.bias, std=out_std, **shared)
        self.activation, self.mixer, self.layer = config.activation, mixer, layer

    def mix(self, x: Hidden, kept: Kept, real: Array) -> tuple[Hidden, Kept]:
        mixer, active = self.mixer, ACTIVATIONS[self.activation]
        ends = [mixer.inner, mixer.inner + mixer.channels]
        gate, parts, step = jnp.split(self.in_proj(x), ends, axis=-1)
        convolved, rest = self.conv1d(parts, kept, real)
        side = mixer.num_groups * mixer.state_size
        inner, keys, queries = jnp.split(
            active(convolved).astype(jnp.float32), [mixer.inner, mixer.inner + side], axis=-1
        )
        wide = step.astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32)
        time = jnp.where(real[..., None], jnp.clip(jax.nn.softplus(wide), *mixer.step_limits), 0)
        inner = inner.reshape(*x.shape[:-1], mixer.num_heads, mixer.head_dim)
        terms = Terms(
            self._of_heads(queries),
            self._of_heads(keys),
            inner * time[..., None],
            -jnp.exp(self.A_log[...].astype(jnp.float32)) * time,
        )
        read, recurrent = run(terms, kept["recurrent"])
        read += self.D[...].astype(jnp.float32)[:, None] * inner
        gated = read.reshape(*x.shape[:-1], -1) * jax.nn.silu(gate.astype(jnp.float32))
        normed = self.norm(gated).astype(x.dtype)
        return self.out_proj(normed), {**rest, "recurrent": recurrent}

    def _of_heads(self, vectors: Array) -> Array:
        """Those of its group, for each head."""
        mixer = self.mixer
        groups = vectors.reshape(*vectors.shape[:-1], mixer.num_groups, mixer.state_size)
        return jnp.repeat(groups, mixer.num_heads // mixer.num_groups, axis=-2)


# Configs -> layers, and what a checkpoint calls these.
MIXERS: dict[type[MixerConfig], tuple[str, Any]] = {
    ShortConvConfig: ("conv", ShortConv),
    DeltaNetConfig: ("linear_attn", DeltaNet),
    MambaConfig: ("mamba", Mamba),
}
