"""Tensors that a checkpoint names or packs otherwise than the model that is made of them."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxkv.errors import CheckpointError
from jaxkv.models import expert_tensors
from jaxkv.models.checkpoint import PartOfTensor
from jaxkv.models.families import Joined

_LAYER = re.compile(r"layers\.(\d+)\.")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+\.weight)")


class Tensor(Protocol):
    """A tensor of a checkpoint that is read when it is asked for."""

    name: str
    file: Path

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Tensors of one shape, as one with an axis before the others."""

    name: str
    parts: Sequence[Any]

    @property
    def file(self) -> Path:
        return self.parts[0].file

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    def read(self) -> np.ndarray:
        return np.stack([part.read() for part in self.parts])


@dataclasses.dataclass(frozen=True)
class Rows(PartOfTensor):
    """Some rows of a tensor, so many of each head's if there are heads."""

    heads: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return ((self.stop - self.start) * self.heads, *self.whole.shape[1:])

    def read(self) -> np.ndarray:
        whole = self.whole.read()
        by_head = whole.reshape(self.heads, -1, *whole.shape[1:])
        return by_head[:, self.start : self.stop].reshape(-1, *whole.shape[1:])


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the tensors of a family's checkpoints become those of a model, and back.

    Attributes:
      renamed: parts of names there, and what they are here.
      joined: modules whose tensors are one there.
      num_heads: of those that are joined by head.
      num_layers: layers from this number on are there and not here; None: there are none.
      unread: what the names of other tensors begin with that are there and not here; None: none.
      whole_experts: a projection of all experts is one tensor there.
    """

    renamed: tuple[tuple[str, str], ...] = ()
    joined: tuple[Joined, ...] = ()
    num_heads: int = 1
    num_layers: int | None = None
    whole_experts: bool = False
    unread: str | None = None

    def read(
        self, stored: Mapping[str, Any], prefix: str, rows: Mapping[str, int]
    ) -> dict[str, Any]:
        """Tensors by the names that they have here, experts stacked and joined ones apart.

        Args:
          stored: by their names there; ``prefix`` is left out in either.
          rows: of each tensor of the model, as it is there.

        Raises:
          CheckpointError: an expert is missing, or experts differ in shape.
        """
        named = {self._here(name).removeprefix(prefix): each for name, each in stored.items()}
        if self.unread is not None:
            named = {n: each for n, each in named.items() if not n.startswith(self.unread)}
        if self.num_layers is not None:
            own = functools.partial(_is_below, self.num_layers)
            named = {name: tensor for name, tensor in named.items() if own(name)}
        stacked = dict(expert_tensors.apart(named)) if self.whole_experts else _stacked(named)
        return dict(self._apart(stacked, rows))

    def written(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The other way round, of full names."""
        apart: dict[str, np.ndarray] = {}
        if self.whole_experts:
            arrays = expert_tensors.together(arrays)
        for name, array in arrays.items():
            head, experts, tail = name.rpartition(".experts.")
            if experts and array.ndim == 3 and tail.endswith(".weight"):
                apart |= {f"{head}.experts.{i}.{tail}": each for i, each in enumerate(array)}
            else:
                apart[name] = array
        for joined in self.joined:
            first = f".{joined.parts[0]}."
            for name in [name for name in apart if first in name]:
                parts = [apart.pop(name.replace(first, f".{part}.")) for part in joined.parts]
                heads = self.num_heads if joined.by_head else 1
                by_head = [part.reshape(heads, -1, *part.shape[1:]) for part in parts]
                whole = np.concatenate(by_head, axis=1).reshape(-1, *parts[0].shape[1:])
                apart[name.replace(first, f".{joined.whole}.")] = whole
        return {self._there(name): np.ascontiguousarray(array) for name, array in apart.items()}

    def _apart(self, named: dict[str, Any], rows: Mapping[str, int]) -> Iterator[tuple[str, Any]]:
        every = {joined.whole: joined for joined in self.joined}
        for name, tensor in named.items():
            *path, module, kind = ["", *name.split(".")]
            if module not in every:
                yield name, tensor
                continue
            start, heads = 0, self.num_heads if every[module].by_head else 1
            for part in every[module].parts:
                own = ".".join([*path[1:], part, kind])
                stop = start + rows.get(own, 0) // heads
                yield own, Rows(tensor, start, stop, heads)
                start = stop
            if start * heads != tensor.shape[0]:
                raise CheckpointError(
                    f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}; by "
                    f"config.json it must have {start * heads} rows."
                )

    def _here(self, name: str) -> str:
        for there, here in self.renamed:
            name = name.replace(there, here)
        return name

    def _there(self, name: str) -> str:
        for there, here in reversed(self.renamed):
            name = name.replace(here, there)
        return name


def _is_below(num_layers: int, name: str) -> bool:
    match = _LAYER.match(name)
    return match is None or int(match[1]) < num_layers


def _stacked(named: dict[str, Any]) -> dict[str, Any]:
    """Projections that each expert has a tensor of, as one tensor each."""
    stacks: dict[str, dict[int, Any]] = {}
    others = {}
    for name, tensor in named.items():
        if match := _EXPERT.fullmatch(name):
            stacks.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
        else:
            others[name] = tensor
    for name, experts in stacks.items():
        if missing := sorted(set(range(max(experts))) - experts.keys()):
            raise CheckpointError(
                f"{next(iter(experts.values())).file}: {name} of expert {missing[0]} is missing, "
                f"and there are experts up to {max(experts)}."
            )
        parts = [experts[number] for number in sorted(experts)]
        if len({part.shape for part in parts}) > 1:
            raise CheckpointError(
                f"{parts[0].file}: {name} of experts has shapes "
                f"{sorted({part.shape for part in parts})}; expected one."
            )
        others[name] = Stacked(parts[0].name, parts)
    return others
