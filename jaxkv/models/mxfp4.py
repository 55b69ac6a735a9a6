"""MXFP4 weights, as gpt-oss is released, into floats."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxkv.errors import CheckpointError
from jaxkv.models.checkpoint import StoredTensor

# "OCP Microscaling Formats (MX) Specification v1.0" (2023), section 5.3.3: FP4 E2M1.
_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_VALUES = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
_BIAS = 127  # of a scale, which is a power of two (E8M0)
_BLOCK = 32  # numbers that share a scale


@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """A tensor stored as two: stands where a `StoredTensor` does."""

    name: str
    blocks: StoredTensor
    scales: StoredTensor

    @property
    def file(self) -> Path:
        return self.blocks.file

    @property
    def shape(self) -> tuple[int, ...]:
        experts, out, blocks = self.scales.shape
        return experts, _BLOCK * blocks, out

    def read(self) -> np.ndarray:
        """Its numbers, in bfloat16, which holds all of them."""
        return dequantize(self.blocks.read_bytes(), self.scales.read_bytes())


def with_packed(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor | PackedTensor]:
    """The tensors of a checkpoint, each pair ``*_blocks`` and ``*_scales`` of it as one.

    Raises:
      CheckpointError: blocks without scales, or of a shape that does not go with theirs.
    """
    tensors: dict[str, StoredTensor | PackedTensor] = dict(stored)
    for blocks_name in (name for name in stored if name.endswith("_blocks")):
        name = blocks_name.removesuffix("_blocks")
        blocks, scales = stored[blocks_name], stored.get(f"{name}_scales")
        if scales is None:
            raise CheckpointError(f"{blocks.file}: {blocks_name} has no {name}_scales beside it.")
        if len(scales.shape) != 3 or blocks.shape != (*scales.shape, _BLOCK // 2):
            raise CheckpointError(
                f"{blocks.file}: {blocks_name} and {name}_scales have shapes {list(blocks.shape)} "
                f"and {list(scales.shape)}; expected [experts, out, blocks, 16] and the same "
                "without the 16."
            )
        del tensors[blocks_name], tensors[scales.name]
        tensors[name] = PackedTensor(name, blocks, scales)
    return tensors


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The matrices of all experts, bfloat16 ``[experts, in, out]``.

    Args:
      blocks: uint8 ``[experts, out, blocks, 16]``: 32 numbers of 4 bits a block, the first of
        two in the low half of a byte.
      scales: uint8 ``[experts, out, blocks]``: the exponent of a block's scale.

    >>> blocks = np.full((1, 1, 1, 16), 0x91, np.uint8)  # 1 is 0.5, 9 is -0.5
    >>> dequantize(blocks, np.full((1, 1, 1), 128, np.uint8))[0, :4, 0].tolist()
    [1.0, -1.0, 1.0, -1.0]
    """
    experts, out, per_row = scales.shape
    matrices = np.empty((experts, _BLOCK * per_row, out), jnp.bfloat16)
    for matrix, packed, exponents in zip(matrices, blocks, scales, strict=True):
        codes = np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(out, per_row, _BLOCK)
        numbers = np.ldexp(_VALUES[codes], exponents[..., None].astype(np.int32) - _BIAS)
        matrix[...] = numbers.reshape(out, -1).T
    return matrices
