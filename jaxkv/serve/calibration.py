"""What codecs learn, from tokens of nobody's: so no answer depends on who came first."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxkv.addressing import Contiguous
from jaxkv.cache.config import KVCacheConfig
from jaxkv.cache.create import create
from jaxkv.cache.hybrid import AnyCache, AnyConfig
from jaxkv.cache.kv_cache import KVCache
from jaxkv.codecs import Codec, Dense, LeafSpecs, Leaves, State
from jaxkv.drafts.mtp import MTP, PredictsAhead
from jaxkv.serve.model_step import Model, ModelStep, Weights

# A codec's state, of each group of layers.
Constants = tuple[State, ...]

_NUM_TOKENS = 128


def calibrate(
    model: Model,
    tokens: Sequence[int] | None = None,
    *,
    codec: Codec | str | Sequence[Codec | str] | None = None,
    config: AnyConfig | None = None,
) -> Constants:
    """What a codec with state (`Centred`, `Stair`) learns from these tokens of a model.

    For ``constants=`` of `generate` and `Engine`, so that a cache holds what suits your texts. Save
    the arrays as you save any, or a cache that has them by `jaxkv.save`.

    Args:
      model: any ``model(tokens, cache) -> (logits, cache)``, as for `generate`.
      tokens: ids of a text like those to come; some hundred are enough. If None, 128 that are drawn
        once and for all from the vocabulary.
      codec: of the cache; one or one per layer.
      config: the whole cache config, for a model without a ``cache_config`` method. Where and how
        long it holds tokens does not matter.

    Returns:
      A dict of arrays for each group of layers, one for a cache that is not hybrid; see
      `KVCache.codec_state`.

    Raises:
      ValueError: no tokens.

    >>> import jaxkv
    >>> from jaxkv.models import load
    >>> model, tokenizer = load()
    >>> codec = jaxkv.Centred(jaxkv.Int8())
    >>> constants = jaxkv.calibrate(model, tokenizer.encode("def f(x):").ids, codec=codec)
    >>> sorted(constants[0])
    ['means', 'sinks']
    >>> prompt = tokenizer.encode("import ").ids
    >>> answer = jaxkv.generate(model, [prompt], max_new_tokens=2, codec=codec, constants=constants)
    """
    if tokens is not None and len(tokens) == 0:
        raise ValueError("calibrate: no tokens were given.")
    if config is None:
        count = _NUM_TOKENS if tokens is None else len(tokens)
        config = model.cache_config(max_context_length=count, codec=codec, chunk=None)  # type: ignore[attr-defined]
    return _learned(Weights.of(model), config, tokens)


def with_constants(
    weights: Weights, cache: AnyCache, constants: Constants | None, mesh: Mesh | None = None
) -> AnyCache:
    """A cache whose codecs, if they have state, never learn from what is put into it.

    Raises:
      ValueError: constants of another config.
    """
    held = [array for group in cache.groups for array in group.codec_state.values()]
    if not held:
        return cache
    cache = cache.with_groups(
        [dataclasses.replace(group, learns=False) for group in cache.groups], cache.states
    )
    if any(map(_is_set, held)):  # by a loaded prefix
        return cache
    found = _learned(weights, cache.config, mesh=mesh) if constants is None else constants
    expected = [
        {name: shape for name, (shape, _) in group.config.codec_state.items()}
        for group in cache.groups
    ]
    given = [jax.tree.map(jnp.shape, dict(state)) for state in found]
    if given != expected:
        raise ValueError(f"constants must have the shapes {expected}, got {given}.")
    pairs = zip(cache.groups, found, strict=True)
    placed = [group.with_codec_state(_placed(group, own)) for group, own in pairs]
    return cache.with_groups(placed, cache.states)


def _is_set(array: Array) -> bool:
    return any(np.asarray(shard.data).any() for shard in array.addressable_shards)


def _placed(group: KVCache, state: State) -> State:
    """Copies where the cache has them, for a step is given its arrays to keep."""
    copies = 1 if group.spread is None else group.spread.copies(group.config)
    own = {}
    for name, array in group.codec_state.items():
        heads = jnp.repeat(jnp.asarray(state[name], array.dtype), copies, axis=2)
        # One that is bound to a device beside ones that are not has a program compiled twice.
        own[name] = jnp.array(heads)
        if array.committed:
            own[name] = jax.device_put(own[name], array.sharding)
    return own


def _learned(
    weights: Weights,
    config: AnyConfig,
    tokens: Sequence[int] | None = None,
    mesh: Mesh | None = None,
) -> Constants:
    device = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    if tokens is None:
        one = create(_heard(config, 1), device=device)
        tokens = _drawn(_num_logits(weights, jnp.zeros((1, 1), jnp.int32), one)).tolist()
    ids = jnp.asarray(np.asarray(tokens, np.int32))[None]
    return _learn(weights, ids, create(_heard(config, ids.size), device=device))


@functools.partial(ModelStep, donated=[])
def _learn(model: Any, tokens: Array, cache: AnyCache) -> Constants:
    # A module that predicts ahead has a layer of its own, which learns too.
    if isinstance(model, PredictsAhead) and model.predicts_ahead:
        model = MTP().filling(model)
        tokens = jnp.concatenate([tokens, tokens[:, :1]], axis=1)
    return tuple(group.codec_state for group in model(tokens, cache)[1].groups)


def _num_logits(weights: Weights, tokens: Array, cache: AnyCache) -> int:
    return _logits.lower(weights, tokens, cache).out_info.shape[-1]


@functools.partial(ModelStep, donated=[])
def _logits(model: Model, tokens: Array, cache: AnyCache) -> Array:
    return model(tokens, cache)[0]


def _drawn(vocabulary: int) -> np.ndarray:
    """Numpy keeps the stream of this old generator for good."""
    return np.random.RandomState(0).randint(0, vocabulary, _NUM_TOKENS).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class _Listening(Codec):
    """Learns what a codec would, and keeps vectors as they are: programs for codes are long."""

    codec: Codec

    @property
    def name(self) -> str:
        return f"{self.codec.name}, learning"

    def leaves(self, head_dim: int) -> LeafSpecs:
        return _EXACT.leaves(head_dim)

    def encode(self, vectors: Array) -> Leaves:
        return _EXACT.encode(vectors)

    def decode(self, leaves: Leaves, head_dim: int, dtype: jnp.dtype) -> Array:
        return _EXACT.decode(leaves, head_dim, dtype)

    def state(self, head_dim: int) -> LeafSpecs:
        return self.codec.state(head_dim)

    @property
    def asks_queries(self) -> bool:
        return self.codec.asks_queries

    @property
    def learns_over_devices(self) -> bool:
        return self.codec.learns_over_devices

    def update_state(self, *arguments: Any, **options: Any) -> State:
        return self.codec.update_state(*arguments, **options)


_EXACT = Dense("float32")


def _heard(config: AnyConfig, tokens: int) -> AnyConfig:
    """`one_sequence`, of which codecs learn."""
    one = one_sequence(config, tokens)
    groups = (one,) if isinstance(one, KVCacheConfig) else one.groups
    heard = tuple(
        group.replace(codec=_Listening(group.codec)) if group.codec_state else group
        for group in groups
    )
    return heard[0] if isinstance(one, KVCacheConfig) else dataclasses.replace(one, groups=heard)


def one_sequence(config: AnyConfig, tokens: int = 1) -> AnyConfig:
    """For a batch of one, of so many tokens, all of which are kept."""

    def plain(group: KVCacheConfig) -> KVCacheConfig:
        fields: dict[str, Any] = {"placement": None, "newest": None}
        return group.replace(
            max_context_length=tokens, batch_size=1, addressing=Contiguous(), **fields
        )

    if isinstance(config, KVCacheConfig):
        return plain(config)
    groups = tuple(plain(group) for group in config.groups)
    states = tuple(each.replace(batch_size=1) for each in config.states)
    cross = tuple(each.replace(batch_size=1) for each in config.cross)
    return dataclasses.replace(config, groups=groups, states=states, cross=cross)
