"""From what a model is to the cache that fits it, layers with windows in rings."""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict, Unpack

from jaxkv.addressing import Addressing, Chunked, Contiguous, Paged, Ring
from jaxkv.cache.config import KVCacheConfig
from jaxkv.cache.hybrid import AnyConfig, HybridConfig
from jaxkv.cache.newest import Newest
from jaxkv.cache.state import StateArray, StateConfig
from jaxkv.codecs import CODECS, Codec
from jaxkv.counts import ceil_div
from jaxkv.errors import ConfigError
from jaxkv.placement import HostMemory

RING_CHUNK = 128  # tokens; what `jaxkv.generate` prefills at once


# One codec for all layers or one per layer, by value or by its name in `jaxkv.codecs.CODECS`.
Codecs = Codec | str | Sequence[Codec | str]


def codec_of_each_layer(codecs: Codecs, num_layers: int) -> tuple[Codec, ...]:
    """One codec per layer.

    Raises:
      ConfigError: an unknown name, or a number of codecs that is not that of the layers.

    >>> codec_of_each_layer("int8", 2)
    (Int8(), Int8())
    """
    if isinstance(codecs, Codec | str):
        codecs = (codecs,) * num_layers
    if len(codecs) != num_layers:
        raise ConfigError(
            f"codec must be one, or one for each of {num_layers} layers, got {len(codecs)}."
        )
    if unknown := [codec for codec in codecs if isinstance(codec, str) and codec not in CODECS]:
        raise ConfigError(f"codec must be one of {', '.join(CODECS)}, got {unknown[0]!r}.")
    return tuple(CODECS[codec] if isinstance(codec, str) else codec for codec in codecs)


class SameInAllLayers(TypedDict, total=False):
    """Fields of `KVCacheConfig` that are the same in all layers, and left out most times."""

    placement: HostMemory | None
    newest: Newest | None


class Heads(NamedTuple):
    """What a layer keeps of a token; fields as in `KVCacheConfig`."""

    num_kv_heads: int
    head_dim: int
    value_dim: int | None = None
    values_in_keys: bool = False


class Kept(NamedTuple):
    """An array that a layer keeps as state of each sequence; a dtype of None is the model's own.

    ``by_head`` says that its first axis is of heads.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None
    by_head: bool = False


class Cross(NamedTuple):
    """Cross-attention of a decoder to what an encoder made of the audio, image or text.

    Attributes:
      layers: the numbers of those that have it.
      heads: what they keep of one of the encoder's tokens.
      max_length: the most of these that the model can be given; None where nothing says it.
      alone: whether they attend to nothing else, and not to the text too (Llama 3.2 Vision).
    """

    layers: tuple[int, ...]
    heads: Heads
    max_length: int | None = None
    alone: bool = False


class Shape(NamedTuple):
    """What a model decides about its cache.

    Attributes:
      windows: for each layer the newest tokens that it sees, or None for all; ``()`` for a
        model without windows.
      value_dim, values_in_keys: as in `KVCacheConfig`.
      heads: what each layer keeps, where layers differ; ``()`` where they do not.
      aligned: windows are chunks of the text, as `Chunked` has them (Llama 4).
      sources: for each layer, the layer whose keys and values it reads, as in `HybridConfig`.
      state: what layers keep that have a state in place of keys and values.
      stateful: whether each layer is such a one; ``()`` for a model that has none.
      cross: cross-attention, of a model that has some.

    >>> local_and_global = Shape(6, num_kv_heads=1, head_dim=256).sliding(512, full_every=6)
    >>> local_and_global.windows
    (512, 512, 512, 512, 512, None)
    >>> local_and_global.cache_config(max_context_length=32_768).size_bytes
    36831232
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...] = ()
    value_dim: int | None = None
    values_in_keys: bool = False
    heads: tuple[Heads, ...] = ()
    sources: tuple[int, ...] = ()
    aligned: bool = False
    state: tuple[Kept, ...] = ()
    stateful: tuple[bool, ...] = ()
    cross: Cross | None = None

    @classmethod
    def latent(cls, num_layers: int, rank: int, rope_dim: int) -> "Shape":
        """Of multi-head latent attention: a latent and the rope's numbers per token, no heads.

        >>> Shape.latent(61, rank=512, rope_dim=64).cache_config(max_context_length=1).size_bytes
        70272
        """
        return cls(num_layers, 1, rank + rope_dim, value_dim=rank, values_in_keys=True)

    def sliding(self, window: int, full_every: int | None = None) -> "Shape":
        """The same with windows in all layers but every ``full_every``-th."""
        layers = range(1, self.num_layers + 1)
        windows = (None if full_every and layer % full_every == 0 else window for layer in layers)
        return self._replace(windows=tuple(windows))

    def cache_config(
        self,
        *,
        max_context_length: int,
        batch_size: int | None = None,
        codec: Codecs = "bfloat16",
        addressing: Addressing = Contiguous(),
        chunk: int | None = RING_CHUNK,
        state_dtype: str = "bfloat16",
        max_encoder_length: int | None = None,
        **fields: Unpack[SameInAllLayers],
    ) -> AnyConfig:
        """The cache: a `KVCacheConfig`, or a `HybridConfig` where layers differ.

        Args:
          max_context_length, batch_size: as in `KVCacheConfig`.
          codec: how a vector is stored; one codec or one per layer, by value or by name.
          addressing: which slot holds which token, in layers that see all tokens.
          chunk: the most tokens that a step brings. Layers with a window keep ``window - 1 +
            chunk`` tokens: in a `Ring`, or in pages of their own where ``addressing`` is a
            shared pool. None for steps of any size: they keep all tokens, in ``addressing``,
            and see the newest. Chunks of the text are kept in `Chunked`, or in pages of their own.
          state_dtype: of those parts of a state that have the model's own dtype.
          max_encoder_length: tokens of an encoder that one sequence's cross-attention may read;
            the most that the model can be given if None.
          **fields: other fields of `KVCacheConfig`, the same in all layers: ``placement`` and
            ``newest``.

        Returns:
          A `KVCacheConfig`, or a `HybridConfig` where layers differ.

        Raises:
          ConfigError: as `KVCacheConfig`, or a number of codecs that is not that of the layers, or
            no ``chunk`` for layers that attend within chunks of the text, or a
            ``max_encoder_length`` that is missing, or of no use.
        """
        if self.aligned and chunk is None:
            raise ConfigError(
                "chunk must be the most tokens that a step brings, got None: layers that attend "
                "within chunks of the text are kept in jaxkv.Chunked, which holds so many more."
            )
        codecs = codec_of_each_layer(codec, self.num_layers)
        rows = batch_size or 1
        addressings = [
            addressing
            if window is None or chunk is None
            else _windowed(addressing, window, chunk, rows, self.aligned)
            for window in self.windows or (None,) * self.num_layers
        ]
        alike = Heads(self.num_kv_heads, self.head_dim, self.value_dim, self.values_in_keys)
        heads = self.heads or (alike,) * self.num_layers
        layers = list(zip(addressings, codecs, heads, strict=True))
        sources = self.sources or range(self.num_layers)
        attends = [not stateful for stateful in self.stateful or (False,) * self.num_layers]
        for layer in self.cross.layers if self.cross is not None and self.cross.alone else ():
            attends[layer] = False
        own = [
            layers[layer]
            for layer, source in enumerate(sources)
            if layer == source and attends[layer]
        ]
        if not own:
            raise ConfigError(
                "stateful and cross must leave some layer that attends to the text: a cache here "
                "has keys and values of it."
            )
        kinds = list(dict.fromkeys(own))
        groups = tuple(
            KVCacheConfig(
                num_layers=own.count(kind),
                max_context_length=max_context_length,
                batch_size=batch_size,
                addressing=kind[0],
                codec=kind[1],
                **kind[2]._asdict(),
                **fields,
            )
            for kind in kinds
        )
        cross, cross_of_layer = self._cross(codecs, batch_size, max_encoder_length)
        if len(groups) == 1 and not self.sources and all(attends) and not cross:
            return groups[0]
        numbers = tuple(
            kinds.index(layers[source]) if attends[layer] else -1
            for layer, source in enumerate(sources)
        )
        states = self._states(state_dtype, batch_size)
        return HybridConfig(groups, numbers, self.sources, states, cross, cross_of_layer)

    def _cross(
        self, codecs: Sequence[Codec], batch_size: int | None, max_length: int | None
    ) -> tuple[tuple[KVCacheConfig, ...], tuple[int, ...]]:
        """What cross-attention reads, a kind per codec, and the kind of each layer."""
        if self.cross is None:
            if max_length is not None:
                raise ConfigError(
                    f"max_encoder_length must be None, got {max_length}: this model has no "
                    "cross-attention."
                )
            return (), ()
        max_length = self.cross.max_length if max_length is None else max_length
        if max_length is None:
            raise ConfigError(
                "max_encoder_length must be the most tokens of an encoder that a sequence's "
                "cross-attention may read: nothing in this model's config says it."
            )
        own = [codecs[layer] for layer in self.cross.layers]
        kinds = list(dict.fromkeys(own))
        configs = tuple(
            KVCacheConfig(
                own.count(codec),
                max_length,
                batch_size=batch_size,
                codec=codec,
                **self.cross.heads._asdict(),
            )
            for codec in kinds
        )
        numbers = [-1] * self.num_layers
        for layer in self.cross.layers:
            numbers[layer] = kinds.index(codecs[layer])
        return configs, tuple(numbers)

    def _states(self, dtype: str, batch_size: int | None) -> tuple[StateConfig, ...]:
        keeping = tuple(layer for layer, stateful in enumerate(self.stateful) if stateful)
        if not keeping or not self.state:
            return ()
        arrays = tuple(
            StateArray(kept.name, kept.shape, kept.dtype or dtype) for kept in self.state
        )
        by_head = tuple(kept.name for kept in self.state if kept.by_head)
        return (StateConfig(keeping, arrays, batch_size, by_head),)


def _windowed(
    addressing: Addressing, window: int, chunk: int, rows: int, aligned: bool
) -> Addressing:
    if addressing.per_head or addressing.num_pages is None or addressing.page_size is None:
        return Chunked(window, chunk) if aligned else Ring(window, chunk=chunk)
    # What all rows hold at once, and as much again for the ends of prompts that may come back.
    held = rows * (ceil_div(window + chunk, addressing.page_size) + 1)
    num_pages = min(addressing.num_pages, 2 * held)
    return Paged(addressing.page_size, num_pages, window, aligned)


def wide_at_the_ends(
    num_layers: int, inner: Codec, outer: Codec, *, ends: int = 1
) -> tuple[Codec, ...]:
    """One codec per layer: ``outer`` for the first and last, which suffer most from few bits.

    Args:
      num_layers: of the model.
      inner: codec of the layers between.
      outer: codec of the first ``ends`` and of the last ``ends`` layers.
      ends: how many layers that is, on each side.

    >>> import jaxkv
    >>> codecs = wide_at_the_ends(4, jaxkv.Int8(), jaxkv.Dense("bfloat16"))
    >>> [codec.name for codec in codecs]
    ['bfloat16', 'int8', 'int8', 'bfloat16']
    """
    return tuple(
        inner if ends <= layer < num_layers - ends else outer for layer in range(num_layers)
    )
