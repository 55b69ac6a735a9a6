"""Experts whose projections are one tensor for all of them, as Llama 4's checkpoints have them.

There they are ``[experts, in, out]``, with gate and up projection side by side in one.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxkv.models.checkpoint import PartOfTensor

_WHOLE = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclasses.dataclass(frozen=True)
class Columns(PartOfTensor):
    """Some columns of each expert's matrix, as rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        experts, rows, _ = self.whole.shape
        return (experts, self.stop - self.start, rows)

    def read(self) -> np.ndarray:
        return self.whole.read()[..., self.start : self.stop].swapaxes(-1, -2)


def apart(named: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each projection's own tensor, ``[experts, out, in]``."""
    for name, tensor in named.items():
        match = _WHOLE.fullmatch(name)
        if match is None or len(tensor.shape) != 3:
            yield name, tensor
            continue
        parts = _PARTS[match[2]]
        size = tensor.shape[-1] // len(parts)
        for number, part in enumerate(parts):
            yield f"{match[1]}.{part}.weight", Columns(tensor, number * size, (number + 1) * size)


def together(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The other way round."""
    whole = dict(arrays)
    for joined, parts in _PARTS.items():
        first = f".experts.{parts[0]}.weight"
        for name in [name for name in whole if name.endswith(first)]:
            head = name.removesuffix(first)
            each = [whole.pop(f"{head}.experts.{part}.weight") for part in parts]
            columns = np.concatenate(each, axis=1).swapaxes(-1, -2)
            whole[f"{head}.experts.{joined}"] = columns
    return whole
