"""What a file has of one kind of layer, and the tensors that takes."""

import dataclasses
from collections.abc import Iterator

from jaxkv.addressing import Kept, KeptByHead
from jaxkv.codecs import leaf_specs
from jaxkv.config import KVCacheConfig
from jaxkv.snapshot.container import Spec


@dataclasses.dataclass(frozen=True)
class Group:
    """One `KVCache` of the file: all of it, or a hybrid cache's layers of one kind.

    Attributes:
      written: how far each sequence was ever written; more than its length after a rollback.
      held: tokens of each sequence that are in the file; fewer than its length for a ring. Of a
        compressed cache, tokens of single heads.
    """

    config: KVCacheConfig
    written: tuple[int, ...]
    held: tuple[int, ...]

    @property
    def is_compressed(self) -> bool:
        """Whether heads keep tokens of their own."""
        return isinstance(self.config.addressing, Kept | KeptByHead)

    def layout(self, lengths: tuple[int, ...]) -> Iterator[tuple[str, Spec]]:
        """The tensors of each sequence: ``sequence.leaf``."""
        config = self.config
        layers, kv_heads = config.num_layers, config.num_kv_heads
        for sequence, (held, length) in enumerate(zip(self.held, lengths, strict=True)):
            for leaf, (shape, dtype, sides) in leaf_specs(config.codec, config.head_dim).items():
                whole = (layers, sides, held, kv_heads, *shape)
                if self.is_compressed:
                    whole = (held, sides, *shape)
                yield f"{sequence}.{leaf}", Spec(dtype, whole)
            if self.is_compressed:
                yield f"{sequence}.counts", Spec("int32", (layers, kv_heads))
                yield f"{sequence}.first_new", Spec("int32", ())
            if self.is_compressed or held != length:
                yield f"{sequence}.positions", Spec("int32", (held,))
            if getattr(config.addressing, "sums", False):
                yield f"{sequence}.sums", Spec("float32", (held,))
                yield f"{sequence}.since", Spec("int32", ())
