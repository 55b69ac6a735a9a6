"""A Hugging Face folder or a GGUF file into a model and its tokenizer; a model into a folder."""

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxkv.cache.axes import Axes, Spread
from jaxkv.errors import CheckpointError, ConfigError
from jaxkv.models.checkpoint import SINGLE_FILE, StoredTensor
from jaxkv.models.config import MTP_FIELD, DecoderConfig
from jaxkv.models.decoder import Decoder
from jaxkv.models.gpt2 import GPT2, GPT2Config
from jaxkv.models.hf_config import decoder_fields
from jaxkv.models.hf_fields import eos_token_ids, hf_decoder
from jaxkv.models.model import Model
from jaxkv.models.mtp import copies_of
from jaxkv.models.sharding import sharding_of, split_axis
from jaxkv.models.source import Source, Tensors, source_of
from jaxkv.show.progress import progress_bar

DTYPES = ("float32", "float16", "bfloat16")
# Tensors that are no weights of their own: tables that follow from the config.
_NO_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$|\.(attn|self_attn)\.(masked_)?bias$")
_HEAD = "lm_head.weight"


def load(
    folder: str | os.PathLike[str] | None = None,
    *,
    dtype: Any = "float32",
    mtp: bool = False,
    mesh: Mesh | None = None,
    axes: Axes | None = None,
) -> tuple[Model, Any]:
    """A model and its tokenizer from a folder as Hugging Face writes it, or from a GGUF file.

    Reads ``config.json``, ``model.safetensors`` (or the shards that its index lists) and
    ``tokenizer.json``; of ``generation_config.json`` the tokens that end a text, which come before
    those of ``config.json``. Tensors go to the device one at a time: beside the model, memory
    holds one tensor. Experts in MXFP4, as gpt-oss is released, are read as floats; of a multimodal
    Gemma 3 or 3n or Llama 4 the text decoder. The numbers of a GGUF file are those that its package
    ``gguf`` makes.

    Args:
      folder: the folder, the GGUF file, or a name such as ``Qwen/Qwen2.5-0.5B`` that is fetched
        from the Hugging Face Hub. None for the small model that comes with jaxkv: bytes as
        tokens, trained on Python's standard library.
      dtype: of the weights and of what is computed: ``float32``, ``bfloat16`` or ``float16``.
        The file's own dtype may be another.
      mtp: read the module of multi-token prediction too, for `jaxkv.drafts.MTP`: of DeepSeek V3,
        GLM 4.5, GLM 4.6 and MiMo (DeepSeek-V3, 2024, section 2.2). It takes about the memory of a
        layer, and its cache is a layer more of the model's.
      mesh, axes: the devices that share the model and how, as in `jaxkv.create`. Heads, inner
        features and the vocabulary are split over the devices that ``axes.heads`` names, each of
        which is given its part of a tensor alone; what cannot be split is on all of them.

    Returns:
      The model, a `Decoder` or a `GPT2`, and a `tokenizers.Tokenizer`, or None where there is
      none. The model's ``stop_tokens`` end what `jaxkv.generate` and `jaxkv.Engine` write.

    Raises:
      CheckpointError: an architecture or feature that is not supported; a file that is missing,
        damaged or not JSON; a tensor that is missing, mis-shaped or unknown. It names it.
      FileNotFoundError: no such folder or file.
      ImportError: a name of the Hub without the package ``huggingface_hub``, or a GGUF file
        without the package ``gguf``.
      ValueError: another dtype.

    >>> model, tokenizer = load()
    >>> logits, _ = model(jnp.array(tokenizer.encode("impor").ids))
    >>> tokenizer.decode([int(logits[-1].argmax())])
    't'
    """
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"load: dtype must be one of {', '.join(DTYPES)}, got {name}.")
    source = source_of(folder)
    config, path = _read_config(source), source.path
    kind: Any = GPT2 if isinstance(config, GPT2Config) else Decoder
    tensors = source.tensors(kind.checkpoint_prefix)
    if mtp:
        config = _with_mtp(config, source, tensors)
    if config.tie_word_embeddings and _HEAD in tensors:
        config = _with_its_head(config, tensors, f"{kind.checkpoint_embedding}.weight", path)
    model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0), dtype=name))
    spread = Spread.of(mesh, axes)
    _fill(model, tensors, path, None if spread is None else spread.automatic)
    return model, source.tokenizer()


def num_parameters(folder: str | os.PathLike[str], devices: int = 1) -> int:
    """Numbers of a folder's or GGUF file's model on one of the devices that share its heads.

    Raises:
      CheckpointError: a config that `load` refuses.
    """
    config = _read_config(source_of(folder))
    kind: Any = GPT2 if isinstance(config, GPT2Config) else Decoder
    model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))
    return sum(
        param.size // (1 if split_axis(model, path, param, devices) is None else devices)
        for path, _, param, _ in _params(model)
    )


def save(model: Model, folder: str | os.PathLike[str]) -> None:
    """Write ``config.json`` and ``model.safetensors`` so that `load` and transformers read them.

    Args:
      folder: made if it is not there; files of these names are replaced.

    >>> import tempfile
    >>> model = Decoder(DecoderConfig(16, 8, 8, num_layers=1, num_heads=1), rngs=nnx.Rngs(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(model, folder)
    ...     load(folder)[0].config == model.config
    True
    """
    import safetensors.numpy

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for _, name, param, transposed in _params(model):
        array = np.asarray(param[...])
        tensors[name] = array.swapaxes(-1, -2) if transposed else array
    tensors = model.checkpoint_layout.written(tensors)
    safetensors.numpy.save_file(tensors, path / SINGLE_FILE, metadata={"format": "pt"})
    config = model.config.to_hf() | {"torch_dtype": model.dtype.name}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _read_config(source: Source) -> GPT2Config | DecoderConfig:
    fields = source.config
    try:
        is_gpt2 = hf_decoder(fields)[0] == "GPT2LMHeadModel"
        kind: Any = GPT2Config if is_gpt2 else DecoderConfig
        config, ends = kind.from_hf(fields), eos_token_ids(source.generation)
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from error
    return dataclasses.replace(config, eos_token_ids=ends) if ends else config


def _with_its_head(config: Any, tensors: Tensors, embedding: str, folder: Path) -> Any:
    """A config that ties the head to the embedding, untied where the file has another head.

    A head that is the embedding once more is dropped from the tensors.
    """
    head = tensors[_HEAD]
    if _equal(head, tensors.get(embedding)):
        del tensors[_HEAD]
        return config
    warnings.warn(
        f"{folder}: tie_word_embeddings in config.json makes the embedding the head, but the file "
        f"has another one, {head.name}, which is used. Set tie_word_embeddings to false.",
        stacklevel=3,
    )
    return dataclasses.replace(config, tie_word_embeddings=False)


def _equal(one: Any, other: Any) -> bool:
    """Are these the same numbers, stored as such?"""
    stored = isinstance(one, StoredTensor) and isinstance(other, StoredTensor)
    return stored and one.equals(other)


def _with_mtp(config: Any, source: Source, tensors: Tensors) -> Any:
    """A config with an MTP module; what it shares with the model is dropped from the tensors.

    Raises:
      CheckpointError: there is none, or one that is not read.

    Warns:
      UserWarning: what it should share is other numbers in the file.
    """
    path, count = source.path, decoder_fields(source.config).get(MTP_FIELD)
    if not isinstance(config, DecoderConfig):
        raise CheckpointError(f"{path}: a GPT2LMHeadModel has no MTP module. Load it without mtp=.")
    try:
        config = dataclasses.replace(config, mtp=True)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error} Load it without mtp=True.") from error
    if count != 1:
        raise CheckpointError(
            f"{path}: config.json says {MTP_FIELD} = {count}, and mtp=True reads one MTP module. "
            "Load it without."
        )
    assert config.family.mtp is not None, "or it were refused"
    for name, original in copies_of(config.family.mtp, config.num_layers).items():
        copy, own = tensors.pop(name, None), tensors.get(original)
        own = tensors["embed_tokens.weight"] if own is None else own  # is the head
        if copy is not None and not _equal(copy, own):
            warnings.warn(
                f"{path}: tensor {copy.name} differs from {own.name}, which is used for both. No "
                "answer depends on it; guesses of the MTP module may be worse.",
                stacklevel=3,
            )
    return config


def _params(model: Model) -> Iterator[tuple[tuple[Any, ...], str, nnx.Param[Any], bool]]:
    """Each parameter's path, name in a checkpoint, itself, and whether it is transposed there."""
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *above, kind = path
        module = next(name for name in reversed(above) if isinstance(name, str))  # or of its list
        prefix = "" if module == "lm_head" else model.checkpoint_prefix
        transposed = kind == "weight" and module in model.checkpoint_transposes
        yield path, prefix + ".".join(map(str, path)), param, transposed


def _fill(model: Model, stored: Tensors, folder: Path, spread: Spread | None) -> None:
    """Put every tensor of a checkpoint in its place in an abstract model."""
    params = list(_params(model))
    shapes = {name: _shape_there(param, transposed) for _, name, param, transposed in params}
    tensors = _matched(shapes, _laid_out(model, stored, shapes), model.checkpoint_prefix, folder)
    filled = []
    with progress_bar("Loading weights", sum(param.size for _, _, param, _ in params)) as advance:
        for at, name, param, transposed in params:
            array = tensors[name].read().astype(param.dtype, copy=False)
            array = np.ascontiguousarray(array.swapaxes(-1, -2) if transposed else array)
            place = None if spread is None else sharding_of(model, at, param, spread)
            filled.append((at, param.replace(jax.device_put(array, place))))
            advance(param.size)
    nnx.update(model, nnx.from_flat_state(filled))


def _shape_there(param: nnx.Param[Any], transposed: bool) -> tuple[int, ...]:
    if not transposed:
        return param.shape
    *stack, rows, columns = param.shape
    return (*stack, columns, rows)


def _laid_out(model: Model, stored: Tensors, shapes: dict[str, tuple[int, ...]]) -> Tensors:
    prefix = model.checkpoint_prefix
    rows = {name.removeprefix(prefix): shape[0] for name, shape in shapes.items()}
    return model.checkpoint_layout.read(stored, prefix, rows)


def _matched(
    shapes: dict[str, tuple[int, ...]], stored: Tensors, prefix: str, folder: Path
) -> Tensors:
    """The tensor of each name, once all are there, of the right shape, and no other is."""
    unused = dict(stored)
    matched = {}
    for name, expected in shapes.items():
        tensor = unused.pop(name.removeprefix(prefix), None)
        if tensor is None:
            raise CheckpointError(f"{folder}: tensor {name} is missing.")
        if tensor.shape != expected:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}; by "
                f"config.json it must be {list(expected)}."
            )
        matched[name] = tensor
    unknown = [tensor.name for name, tensor in unused.items() if not _NO_WEIGHTS.search(name)]
    if unknown:
        raise CheckpointError(
            f"{folder}: unexpected tensor {', '.join(sorted(unknown)[:3])}"
            f"{f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''}; the model that "
            "config.json describes has no place for it."
        )
    return matched
