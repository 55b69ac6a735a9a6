"""What a file has of one kind of layer, and the tensors that takes."""

import dataclasses
from collections.abc import Iterator, Sequence

from jaxkv.cache.config import KVCacheConfig
from jaxkv.snapshot.container import Spec


@dataclasses.dataclass(frozen=True)
class Group:
    """One `KVCache` of the file: all of it, or a hybrid cache's layers of one kind.

    Attributes:
      written: how far each sequence was ever written; more than its length after a rollback.
      held: tokens of each sequence that are in the file; fewer than its length for a ring. Of a
        compressed cache, tokens of single heads.
      newest: where the config has `Newest` tokens, those of each sequence that are in the file too.
    """

    config: KVCacheConfig
    written: tuple[int, ...]
    held: tuple[int, ...]
    newest: tuple[int, ...] | None = None

    @property
    def of_newest(self) -> "Group | None":
        """What the file has of the cache of `Newest` tokens."""
        config = self.config.newest_config
        if config is None or self.newest is None:
            return None
        return Group(config, self.written, self.newest)

    def of_sequences(self, rows: Sequence[int]) -> "Group":
        """The same of some sequences."""
        written, held = (tuple(each[row] for row in rows) for each in (self.written, self.held))
        newest = None if self.newest is None else tuple(self.newest[row] for row in rows)
        return dataclasses.replace(self, written=written, held=held, newest=newest)

    @property
    def is_compressed(self) -> bool:
        """Whether heads keep tokens of their own."""
        return self.config.addressing.per_head

    def layout(self, lengths: tuple[int, ...]) -> Iterator[tuple[str, Spec]]:
        """The tensors of each sequence, ``sequence.leaf``, and ``newest.`` those of the newest."""
        config = self.config
        for name, (shape, dtype) in config.codec_state.items():
            yield name, Spec(dtype, shape)
        layers, kv_heads = config.num_layers, config.num_kv_heads
        for sequence, (held, length) in enumerate(zip(self.held, lengths, strict=True)):
            for leaf, (shape, dtype, sides) in config.pair.leaves.items():
                whole = (layers, sides, held, kv_heads, *shape)
                if self.is_compressed:
                    whole = (held, sides, *shape)
                yield f"{sequence}.{leaf}", Spec(dtype, whole)
            if self.is_compressed:
                yield f"{sequence}.counts", Spec("int32", (layers, kv_heads))
                yield f"{sequence}.first_new", Spec("int32", ())
            if self.is_compressed or held != length:
                yield f"{sequence}.positions", Spec("int32", (held,))
            if names := config.addressing.state:
                yield from ((f"{sequence}.{name}", Spec("float32", (held,))) for name in names)
                yield f"{sequence}.since", Spec("int32", ())
        if self.of_newest is not None:
            yield from ((f"newest.{name}", spec) for name, spec in self.of_newest.layout(lengths))
