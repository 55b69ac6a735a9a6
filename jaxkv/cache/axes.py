"""Which axes of a mesh a cache is split over, and what one device holds of it."""

import dataclasses
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from jaxkv.cache.config import KVCacheConfig
from jaxkv.errors import ConfigError
from jaxkv.show.text import format_bytes

_Kind = TypeVar("_Kind")  # `KVCacheConfig` or `StateConfig`


@dataclasses.dataclass(frozen=True)
class Axes:
    """Names of mesh axes, by what of a cache they split; None for what is not split.

    Args:
      batch: sequences. Each device has the slots, or the pool of pages, of its own ones.
      heads: KV heads. Where there are more devices than heads, each head is on several.
      context: tokens, position p on device p modulo the axis' size; partial attention is merged.

    Raises:
      ConfigError: one mesh axis for two of them.

    >>> Axes(batch="data", heads="tensor")
    Axes(batch='data', heads='tensor', context=None)
    """

    batch: str | None = None
    heads: str | None = None
    context: str | None = None

    def __post_init__(self) -> None:
        named = [name for name in dataclasses.astuple(self) if name is not None]
        if len(set(named)) < len(named):
            raise ConfigError(f"Axes: each must be a mesh axis of its own, got {named}.")


@dataclasses.dataclass(frozen=True)
class Spread:
    """A mesh, and which of its axes split a cache. Static: part of a cache's type."""

    mesh: Any  # a `Mesh`, or an `AbstractMesh` for a plan
    axes: Axes

    @classmethod
    def of(cls, mesh: Mesh | AbstractMesh | None, axes: Axes | None) -> "Spread | None":
        """Of the arguments ``mesh`` and ``axes``; None where no axes are named.

        Raises:
          ConfigError: axes without a mesh, or that the mesh does not have.
        """
        if axes is None or not any(dataclasses.astuple(axes)):
            return None
        if mesh is None:
            mesh = jax.sharding.get_mesh()
        unknown = set(dataclasses.astuple(axes)) - {None, *mesh.axis_names}
        if unknown:
            has = ", ".join(map(repr, mesh.axis_names)) or "none"
            raise ConfigError(
                f"axes: the mesh has no axis {', '.join(map(repr, sorted(unknown)))}; it has {has}."
                " Give mesh=, or enter one with jax.set_mesh."
            )
        return cls(mesh, axes)

    def size(self, what: str) -> int:
        """Devices along the axis that splits this; 1 if none does."""
        name = getattr(self.axes, what)
        return 1 if name is None else self.mesh.shape[name]

    @property
    def names(self) -> tuple[str, ...]:
        """The mesh axes that split a cache."""
        return tuple(name for name in dataclasses.astuple(self.axes) if name is not None)

    @property
    def platform(self) -> str:
        """Of its devices."""
        return self.mesh.devices.flat[0].platform

    @property
    def automatic(self) -> "Spread":
        """The same with axes for XLA to reckon with: a model's products name no shardings."""
        return Spread(Mesh(self.mesh.devices, self.mesh.axis_names), self.axes)

    @property
    def is_explicit(self) -> bool:
        return AxisType.Explicit in self.mesh.axis_types

    def spec(self, *what: str | None) -> PartitionSpec:
        """Of an array, from what each of its axes is."""
        return PartitionSpec(*(each and getattr(self.axes, each) for each in what))

    def copies(self, config: KVCacheConfig) -> int:
        """Devices that hold the same KV head, where there are more devices than heads."""
        return max(self.size("heads") // config.num_kv_heads, 1) if config.per_token else 1

    def copied_bytes(self, config: KVCacheConfig) -> int:
        """How many bytes of what one device holds would not be there without copies of KV heads."""
        copies = self.copies(config)
        return self.local(config).size_bytes * (copies - 1) // copies

    def held(self, config: KVCacheConfig) -> KVCacheConfig:
        """Of all arrays together: copies of a KV head count as heads."""
        if not config.per_token:
            return config
        return _with_heads(config, config.num_kv_heads * self.copies(config))

    def whole(self, before: KVCacheConfig, own: KVCacheConfig) -> KVCacheConfig:
        """Of all devices' parts together, after a verb; it can change sequences and placement."""
        sequences = own.batch_size and own.batch_size * self.size("batch")
        fields = {"placement": own.placement} if own.per_token else {}
        return before.replace(batch_size=sequences, **fields)

    def local(self, config: _Kind, *only: str) -> _Kind:
        """Of what one device holds.

        Args:
          only: split over these axes and no other; all if none is named.

        Raises:
          ConfigError: a number that its axis does not divide, or what cannot be split so.
        """
        kind: Any = config
        batch, heads, context = (
            self.size(what) if not only or what in only else 1
            for what in ("batch", "heads", "context")
        )
        if batch > 1:
            if kind.batch_size is None:
                raise ConfigError("axes: batch needs a config with a batch_size, got None.")
            check_divides("batch_size", kind.batch_size, batch, self.axes.batch)
        if kind.per_token:
            kind = self._local_of_tokens(kind, batch, heads, context)
        else:
            kind = kind.part(batch, heads, self.axes.heads)
        own: _Kind = kind
        return own

    def _local_of_tokens(
        self, config: KVCacheConfig, batch: int, heads: int, context: int
    ) -> KVCacheConfig:
        held = self.held(config)
        check_divides("num_kv_heads", held.num_kv_heads, heads, self.axes.heads)
        own = _with_heads(held, held.num_kv_heads // heads)
        fields: dict[str, Any] = {}
        if batch > 1 and config.batch_size is not None:
            _check_state(config)
            fields["batch_size"] = config.batch_size // batch
        if context > 1:
            _check_context(config)
            unit = context * (config.addressing.page_size or 1)
            check_divides("max_context_length", config.max_context_length, unit, self.axes.context)
            fields["max_context_length"] = config.max_context_length // context
        pages = config.addressing.num_pages
        if pages is not None and batch * context > 1:
            check_divides("num_pages", pages, batch * context, "batch or context")
        return own.replace(addressing=own.addressing.shared_by(batch * context), **fields)


def _with_heads(config: KVCacheConfig, num_kv_heads: int) -> KVCacheConfig:
    addressing = config.addressing.with_heads(num_kv_heads)
    return config.replace(num_kv_heads=num_kv_heads, addressing=addressing)


def words_of_copies(copies: int, copied_bytes: int) -> str:
    """What copies of KV heads cost, for plans and explanations."""
    return (
        f"each KV head is on {copies} devices, so that {format_bytes(copied_bytes)} of what each "
        f"holds are copies; a context split over {copies} of them needs none"
    )


def check_divides(field: str, value: int, parts: int, axis: str | None) -> None:
    """Refuse a number that an axis does not divide."""
    if value % parts:
        raise ConfigError(
            f"axes: {field} must be a multiple of {parts} to be split over {axis!r}, got {value}."
        )


def _check_state(config: KVCacheConfig) -> None:
    """Refuse codecs that learn from all sequences, and not from those on other devices."""
    for each in (config, config.newest_config):
        if each is not None and each.codec_state and not each.codec.learns_over_devices:
            raise ConfigError(
                f"axes: a {each.codec.name} cache is not split by batch, since its codec's state "
                "is of all sequences, and update_state sees those of one device. Leave batch out "
                "of its axes; heads and context split it."
            )


def _check_context(config: KVCacheConfig) -> None:
    """Refuse what is not split by context: what forgets tokens, or keeps some twice."""
    whole: dict[str, Any] = {
        "a window": config.addressing.window,
        "HostMemory": config.placement,
        "newest tokens": config.newest,
    }
    for what, present in whole.items():
        if present is not None:
            raise ConfigError(
                f"axes: a cache with {what} is not split by context. Leave context out of its "
                "axes; batch and heads split it."
            )
    if not config.addressing.by_position:
        raise ConfigError(
            f"axes: a {config.addressing.name} cache is not split by context. Leave context out "
            "of its axes; batch and heads split it."
        )
