"""The shape of a cache and its exact bytes, known before any device is touched."""

import dataclasses
import os
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from jaxkv.addressing import Addressing, Contiguous
from jaxkv.cache.newest import Newest, NewestSlots
from jaxkv.cache.pair import Pair, pair_of
from jaxkv.codecs import Codec, Dense, bytes_of, state_bytes, state_specs
from jaxkv.counts import as_count
from jaxkv.errors import ConfigError
from jaxkv.placement import HostMemory
from jaxkv.show.text import sequences

_COUNTS = ("num_layers", "max_context_length", "num_kv_heads", "head_dim")


@dataclasses.dataclass(frozen=True)
class KVCacheConfig:
    """What a cache holds. Frozen, hashable and validated when made.

    Args:
      num_layers: layers of the model that keep keys and values.
      max_context_length: tokens that one sequence may hold, prompt and answer together.
      num_kv_heads: key/value heads per layer: the query heads for MHA, fewer for GQA, 1 for MQA.
      head_dim: numbers in one head's vector.
      batch_size: sequences, or None for one sequence and arrays without a batch axis.
      codec: how a vector is stored.
      addressing: which slot holds which token.
      placement: None for all on the device; `HostMemory` for contexts that do not fit there.
      newest: None, or the newest tokens by a finer codec as well; see `Newest`.
      value_dim: numbers in a value's vector, where they are not ``head_dim`` (MiMo-V2: 192 in a
        key, 128 in a value).
      values_in_keys: a value is the first ``value_dim`` numbers of its key, and is not stored:
        the latent of multi-head latent attention (DeepSeek-V2, 2024, section 2.1). `append` is
        given keys alone then.

    Raises:
      ConfigError: a `ValueError` that names every bad field.

    >>> import jaxkv
    >>> llama3 = jaxkv.KVCacheConfig(
    ...     num_layers=32, max_context_length=8192, num_kv_heads=8, head_dim=128
    ... )
    >>> llama3.size_bytes
    1073741824
    >>> deepseek_v3 = jaxkv.KVCacheConfig(
    ...     61, 8192, num_kv_heads=1, head_dim=512 + 64, value_dim=512, values_in_keys=True
    ... )
    >>> deepseek_v3.bytes_per_token
    70272
    """

    num_layers: int
    max_context_length: int
    num_kv_heads: int
    head_dim: int
    batch_size: int | None = None
    codec: Codec = Dense("bfloat16")
    addressing: Addressing = Contiguous()
    placement: HostMemory | None = None
    newest: Newest | None = None
    value_dim: int | None = None
    values_in_keys: bool = False

    # Of a `HybridConfig`; here all layers are of one group.
    group_of_layer: ClassVar[None] = None
    source_of_layer: ClassVar[tuple[int, ...]] = ()
    states: ClassVar[tuple[Any, ...]] = ()
    cross: ClassVar[tuple["KVCacheConfig", ...]] = ()
    cross_of_layer: ClassVar[tuple[int, ...]] = ()

    per_token: ClassVar[bool] = True  # what it keeps is; a `StateConfig` is of a sequence

    def __post_init__(self) -> None:
        problems = [self._normalize_count(field) for field in _COUNTS]
        if self.batch_size is not None:
            problems.append(self._normalize_count("batch_size", " or None for a single sequence"))
        if isinstance(self.codec, type) or not isinstance(self.codec, Codec):
            problems.append(
                'codec must be a codec such as jaxkv.Dense("bfloat16"), an instance of a subclass '
                f"of jaxkv.Codec, got {self.codec!r}"
            )
        if isinstance(self.addressing, type) or not isinstance(self.addressing, Addressing):
            problems.append(
                f"addressing must be one such as jaxkv.Contiguous(), got {self.addressing!r}"
            )
        if self.placement is not None:
            problems.append(self._check_placement())
        if self.newest is not None:
            problems.append(self._check_newest())
        if self.value_dim is not None:
            problems.append(self._normalize_count("value_dim", " or None for head_dim"))
        if not any(problems):
            shape = self.num_layers, self.num_kv_heads
            problems += [self.addressing.reason_against(*shape), self._check_together()]
        if problems := [problem for problem in problems if problem]:
            raise ConfigError("KVCacheConfig: " + "; ".join(problems) + ".")

    def _check_placement(self) -> str | None:
        if not isinstance(self.placement, HostMemory):
            return f"placement must be jaxkv.HostMemory(...) or None, got {self.placement!r}"
        return self.placement.reason_against(self.addressing)

    def _check_newest(self) -> str | None:
        if not isinstance(self.newest, Newest):
            return f"newest must be jaxkv.Newest(...) or None, got {self.newest!r}"
        return None

    def _check_together(self) -> str | None:
        if self.value_dim == self.head_dim:
            object.__setattr__(self, "value_dim", None)
        if self.newest is not None and self.addressing.aligned:
            return f"newest must be None: newest tokens may be of two chunks of {self.addressing}"
        if self.values_in_keys and self.pair.value_dim > self.head_dim:
            return (
                "value_dim must be at most head_dim where values are in the keys, got "
                f"{self.value_dim} and {self.head_dim}"
            )
        codecs = [self.codec, *([] if self.newest is None else [self._newest_codec])]
        pairs = (dataclasses.replace(self.pair, codec=codec) for codec in codecs)
        return next((reason for pair in pairs if (reason := pair.reason_against)), None)

    def _normalize_count(self, field: str, also_allowed: str = "") -> str | None:
        """Store the field as a plain int, or say what is wrong with it."""
        value = getattr(self, field)
        if (count := as_count(value)) is None:
            return f"{field} must be an int of at least 1{also_allowed}, got {value!r}"
        object.__setattr__(self, field, count)
        return None

    @classmethod
    def from_hf(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any],
        *,
        max_context_length: int,
        **fields: Any,
    ) -> Any:
        """Deprecated: `jaxkv.cache_config` with ``chunk=None``, which this calls.

        Args:
          source: a ``config.json``, the folder that holds it, or its contents as a dict.
          max_context_length: tokens that one sequence may hold.
          **fields: as in `jaxkv.cache_config`.
        """
        import jaxkv

        warnings.warn(
            "KVCacheConfig.from_hf is deprecated: call jaxkv.cache_config, whose layers with a "
            "window hold no more than it needs, or all tokens with chunk=None.",
            DeprecationWarning,
            stacklevel=2,
        )
        return jaxkv.cache_config(
            source, max_context_length=max_context_length, chunk=None, **fields
        )

    def replace(self, **fields: Any) -> Self:
        """The same config with other values in some fields, validated anew."""
        return dataclasses.replace(self, **fields)

    @property
    def groups(self) -> tuple["KVCacheConfig"]:
        """One, as a `HybridConfig` has several."""
        return (self,)

    def layers_of(self, group: int) -> tuple[int, ...]:
        """The numbers of a group's layers: all."""
        return tuple(range(self.num_layers))

    def locate(self, layer: Any, *, to_write: bool = False) -> tuple[int, Any]:
        """The group of a layer, and its number within the group."""
        return 0, layer

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """``()`` for a single sequence, ``(batch_size,)`` for a batch."""
        return () if self.batch_size is None else (self.batch_size,)

    @property
    def num_slots(self) -> int:
        """The size of the buffer's ctx axis: places for a token, over all sequences."""
        return self.addressing.num_slots(self.max_context_length, self.batch_size)

    @property
    def pair(self) -> Pair:
        """How the codec's leaves hold a token's key and value."""
        return pair_of(self.codec, self.head_dim, self.value_dim, self.values_in_keys)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes, keys and values of all layers together."""
        return self.num_layers * self.num_kv_heads * bytes_of(self.pair.leaves)

    @property
    def codec_state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each array of the codec's state, see `Codec.state`."""
        return {
            name: ((self.num_layers, sides, self.num_kv_heads, *shape), dtype)
            for name, (shape, dtype, sides) in state_specs(self.codec, self.head_dim).items()
        }

    @property
    def size_bytes(self) -> int:
        """Exact bytes of the keys and values, scales and the codec's state included, anywhere."""
        state = self.num_layers * self.num_kv_heads * state_bytes(self.codec, self.head_dim)
        newest = 0 if self.newest_config is None else self.newest_config.size_bytes
        return (self.num_slots + self.num_resident_slots) * self.bytes_per_token + state + newest

    @property
    def newest_config(self) -> "KVCacheConfig | None":
        """The config of the cache of `Newest` tokens, which holds no more than a query sees."""
        if self.newest is None:
            return None
        tokens = min(self.newest.tokens, self.addressing.window or 1 << 31)
        slots = NewestSlots(tokens)
        return self.replace(codec=self._newest_codec, addressing=slots, placement=None, newest=None)

    @property
    def _newest_codec(self) -> Codec:
        assert self.newest is not None
        return self.newest.codec_beside(self.codec)

    @property
    def in_host_memory(self) -> bool:
        """Whether buffers are put there: not those of which all slots would be resident."""
        if self.placement is None:
            return False
        return self._shared or self.num_slots > self.placement.resident * (self.batch_size or 1)

    @property
    def num_resident_slots(self) -> int:
        """Slots on the device, over all sequences, of a cache in host memory, if not a pool's."""
        if not self.in_host_memory or self._shared:
            return 0
        assert self.placement is not None
        each = min(self.placement.resident + self.addressing.sinks, self.max_context_length)
        return min(each * (self.batch_size or 1), self.num_slots)

    @property
    def _shared(self) -> bool:
        return self.addressing.num_pages is not None

    @property
    def host_bytes(self) -> int:
        """Exact bytes in host memory; 0 where all is on the device."""
        return self.num_slots * self.bytes_per_token if self.in_host_memory else 0

    @property
    def device_bytes(self) -> int:
        """Exact bytes on the device, all that is not in host memory."""
        return self.size_bytes + self.index_bytes - self.host_bytes

    @property
    def index_bytes(self) -> int:
        """Exact bytes of what stands beside them: lengths, and page tables where there are any."""
        index = self.addressing.index_bytes(self.max_context_length, self.batch_size)
        if self.newest_config is not None:
            index += self.newest_config.index_bytes
        if not self.num_resident_slots:
            return index
        assert self.placement is not None
        bounds = 0
        if self.placement.blocks_per_query is not None:  # of keys, float32, in each block
            blocks = self.placement.num_blocks(self.max_context_length)
            bounds = 8 * self.num_layers * blocks * self.num_kv_heads * self.head_dim
        return index + (4 + bounds) * (self.batch_size or 1)

    @property
    def codec_name(self) -> str:
        """The name of the codec, for messages and tables."""
        if self.newest is None:
            return self.codec.name
        return f"{self.codec.name}, newest {self.newest.tokens} {self.newest.codec.name}"

    def to_dict(self) -> dict[str, Any]:
        """Its fields as plain values, codec and addressing by name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        placement = None if self.placement is None else dataclasses.asdict(self.placement)
        names = {"codec": self.codec.name, "addressing": self.addressing.name}
        newest = None
        if self.newest is not None:
            newest = {"tokens": self.newest.tokens, "codec": self.newest.codec.name}
        return fields | names | {"placement": placement, "newest": newest}

    def describe(self) -> str:
        """One line for messages: ``4096 tokens x 32 layers x 8 KV heads x 128, bfloat16, ring``.

        Contiguous addressing goes without saying.
        """
        batch = "" if self.batch_size is None else f"{sequences(self.batch_size)} x "
        return (
            f"{batch}{self.max_context_length} tokens x {self.num_layers} layers x "
            f"{self.num_kv_heads} KV heads x {self.pair.described}, {self.codec_name}"
            f"{'' if self.addressing == Contiguous() else f', {self.addressing.name}'}"
        )
