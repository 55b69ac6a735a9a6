"""GGUF files: the same model as the folder they were made of, and what is refused."""

import json
import struct
import sys
import warnings

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import save_file

from jaxkv.cli.main import main
from jaxkv.errors import CheckpointError
from jaxkv.gguf import read_header
from jaxkv.models import DecoderConfig, load
from jaxkv.models.source import source_of
from tests.models.gguf_files import metadata_of as metadata_of_config
from tests.models.gguf_files import tensors_of, write_gguf, write_variant
from tests.models.variants import GOLDENS, hf_config, token_ids, weights, write_checkpoint

_WIDE = hf_config("llama") | {
    "vocab_size": 8,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "rope_theta": 10000.0,
}
_MATRICES = {
    "blk.0.attn_q.weight": "self_attn.q_proj",
    "blk.0.attn_k.weight": "self_attn.k_proj",
    "blk.0.attn_v.weight": "self_attn.v_proj",
    "blk.0.attn_output.weight": "self_attn.o_proj",
    "blk.0.ffn_gate.weight": "mlp.gate_proj",
    "blk.0.ffn_up.weight": "mlp.up_proj",
    "blk.0.ffn_down.weight": "mlp.down_proj",
}
_HEADS = {"blk.0.attn_q.weight": 4, "blk.0.attn_k.weight": 2}
_TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"),
)


@pytest.fixture
def file(tmp_path):
    return write_variant("llama", tmp_path / "model.gguf")


def same_models(one, other):
    """To the bit."""
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(*(np.asarray(x).view(np.uint8) for x in (a, b))),
        nnx.state(one),
        nnx.state(other),
    )


@pytest.mark.parametrize("name", _TYPES)
def test_every_type_is_what_its_package_makes_of_it(tmp_path, name):
    """Beside a safetensors file of its own reader and numbers, rows put in order by hand."""
    kind = Type[name]
    generator = np.random.default_rng(0)
    matrices = {
        matrix: (128 if "attn_k" in matrix or "attn_v" in matrix else 256) for matrix in _MATRICES
    }
    bytes_a_row = gguf.quant_shape_to_byte_shape((256,), kind)[0] if name[0] != "F" else 0
    bytes_a_row = bytes_a_row or 256 * (4 if name == "F32" else 2)
    # Bytes below 64 make no scale of 16 bits that is not finite.
    raw = {
        matrix: generator.integers(0, 64, (rows, bytes_a_row), dtype=np.uint8)
        for matrix, rows in matrices.items()
    }
    if name in ("F32", "F16"):
        raw = {m: b.view(np.float32 if name == "F32" else np.float16) for m, b in raw.items()}
    plain = {name: np.ones(256, np.float32) for name in ("output_norm.weight",)}
    plain |= {f"blk.0.{norm}_norm.weight": np.ones(256, np.float32) for norm in ("attn", "ffn")}
    plain["token_embd.weight"] = generator.standard_normal((8, 256), np.float32)
    types = dict.fromkeys(raw, kind) if name[0] != "F" else {}
    file = write_gguf(tmp_path / "m.gguf", metadata_of_config(_WIDE), plain | raw, types)

    hf = {"model.embed_tokens.weight": plain["token_embd.weight"]}
    norms = ("norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm")
    hf |= {f"model.{norm}.weight": np.ones(256, np.float32) for norm in norms}
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name not in _MATRICES:
            continue
        assert tensor.tensor_type == kind
        numbers = gguf.quants.dequantize(np.array(tensor.data), kind).astype(np.float32)
        if heads := _HEADS.get(tensor.name):
            half = len(numbers) // heads // 2
            rows = [
                numbers[head * 2 * half + 2 * pair + part]
                for head in range(heads)
                for part in range(2)
                for pair in range(half)
            ]
            numbers = np.stack(rows)
        hf[f"model.layers.0.{_MATRICES[tensor.name]}.weight"] = np.ascontiguousarray(numbers)
    save_file(hf, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(_WIDE | {"tie_word_embeddings": True}))
    for dtype in ("float32", "bfloat16"):
        (got, tokenizer), (expected, _) = load(file, dtype=dtype), load(tmp_path, dtype=dtype)
        assert got.config == expected.config
        assert tokenizer is None
        same_models(got, expected)


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("llama", {}),
        ("llama tied", {}),
        ("llama mha", {}),
        ("llama attention bias", {}),
        ("llama mlp bias", {}),
        ("llama head_dim", {}),
        ("llama linear", {}),
        ("llama yarn", {}),
        ("qwen2", {}),
        ("qwen2 yarn", {}),
        ("qwen3 tied", {}),
        ("gemma2", {"query_pre_attn_scalar": 16}),
        ("gemma3", {"query_pre_attn_scalar": 16}),
        ("gemma3 linear", {"query_pre_attn_scalar": 16}),
    ],
)
def test_a_file_is_the_folder_that_it_was_made_of(tmp_path, variant, changes):
    write_checkpoint(variant, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(variant) | changes))
    expected, _ = load(tmp_path)
    got, _ = load(write_variant(variant, tmp_path / "model.gguf"))
    assert got.config == expected.config
    for one, other in zip(
        jax.tree.leaves(nnx.state(got)), jax.tree.leaves(nnx.state(expected)), strict=True
    ):
        # Gemma's norms were rounded when the one was added.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 if "gemma" in variant else 0)


@pytest.mark.slow
def test_divisors_of_a_rope_are_those_of_llama_3(tmp_path):
    """llama.cpp writes what Llama 3.1 does to its wavelengths as a tensor; transformers' logits."""
    variant = "llama llama3"
    config, scaling = hf_config(variant), hf_config(variant)["rope_scaling"]
    turns = 100.0 ** -(np.arange(0, 8, 2) / 8) * scaling["original_max_position_embeddings"]
    turns /= 2 * np.pi
    kept = np.clip((turns - 1.0) / (4.0 - 1.0), 0, 1)
    divisors = 1 / (kept + (1 - kept) / scaling["factor"])
    tensors = tensors_of(config, weights(variant)) | {
        "rope_freqs.weight": divisors.astype(np.float32)
    }
    model, _ = load(write_gguf(tmp_path / "m.gguf", metadata_of_config(config), tensors))
    with np.load(GOLDENS) as goldens:
        logits = model(jnp.asarray(token_ids(variant)))[0]
        np.testing.assert_allclose(logits, goldens[variant], atol=2e-4, rtol=0)
    assert model.cache_config(max_context_length=64).size_bytes  # one rope for texts of any length


def test_a_plan_of_a_file_is_that_of_its_folder(file, tmp_path, capsys):
    write_checkpoint("llama", tmp_path)
    answers = []
    for model in (file, tmp_path):
        assert main(["plan", str(model), "--context", "64", "--device", "1MB", "--json"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def header_of(values=(), tensors=(), version=3):
    """Bytes. A value: key, number of its type, bytes. A tensor: name, axes, type, offset."""
    made = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    for key, kind, value in values:
        made += text(key) + struct.pack("<I", kind) + value
    for name, axes, kind, offset in tensors:
        made += text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)
    return made


def text(content):
    written = content if isinstance(content, bytes) else content.encode()
    return struct.pack("<Q", len(written)) + written


_LONG = 1 << 60
HOSTILE = {
    "another file": (b"PK\x03\x04" * 9, "is a file, but not GGUF"),
    "version": (header_of(version=9), "GGUF version 9; supported are 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "for big-endian machines"),
    "many values": (b"GGUF" + struct.pack("<IQQ", 3, 0, _LONG), "is cut off or damaged"),
    "many tensors": (b"GGUF" + struct.pack("<IQQ", 3, _LONG, 0), "is cut off or damaged"),
    "long text": (header_of([("a", 8, struct.pack("<Q", _LONG))]), "is cut off or damaged"),
    "long array": (header_of([("a", 9, struct.pack("<IQ", 0, _LONG))]), f"goes on for {_LONG}"),
    "array of texts": (header_of([("a", 9, struct.pack("<IQ", 8, _LONG))]), "is cut off or"),
    "arrays of arrays": (header_of([("a", 9, struct.pack("<IQ", 9, 1))]), "an array of arrays"),
    "unknown value": (header_of([("a", 77, b"")]), "a is of the unknown type 77"),
    "a key twice": (header_of([("a", 0, b"1"), ("a", 0, b"1")]), "has a twice"),
    "no text": (header_of([(b"\xff", 0, b"1")]), "is not UTF-8"),
    "alignment": (
        header_of([("general.alignment", 4, struct.pack("<I", 3))]),
        "general.alignment must be a power of two, got 3",
    ),
    "a part": (header_of([("split.count", 2, struct.pack("<H", 3))]), "one of 3 parts"),
    "axes": (header_of(tensors=[("t", (1,) * 5, 0, 0)]), "tensor t has 5 axes"),
    "a tensor twice": (header_of(tensors=[("t", (1,), 0, 0)] * 2), "has tensor t twice"),
    "no architecture": (header_of(), "general.architecture None is not supported"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_named(tmp_path, case):
    contents, words = HOSTILE[case]
    file = tmp_path / "model.gguf"
    file.write_bytes(contents)
    with pytest.raises(CheckpointError, match=f"model.gguf.*{words}"):
        load(file)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count = 8 is not supported"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type 'longrope' is not supported"),
        ({"llama.attention.head_count_kv": [2, 2]}, "head_count_kv = .* which is no number"),
        ({"llama.block_count": 3}, "tensor model.layers.2.* is missing"),
        ({"llama.block_count": 1}, "unexpected tensor blk.1."),
        ({"llama.feed_forward_length": 64}, r"has shape .*; by config.json it must be"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count = 4 with heads of 8 is not"),
        ({"llama.attention.value_length": 4}, "attention.value_length = 4 with heads of 8"),
        ({"general.architecture": "mamba"}, "'mamba' is not supported in a GGUF file"),
        (
            {"tokenizer.ggml.eos_token_id": "</s>"},
            "eos_token_id must be a token id or a list of them",
        ),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, metadata, words):
    config = hf_config("llama")
    made = metadata_of_config(config) | metadata
    file = write_gguf(tmp_path / "model.gguf", made, tensors_of(config, weights("llama")))
    with pytest.raises(CheckpointError, match=words):
        load(file)


def test_metadata_that_nothing_reads_is_warned_of(tmp_path):
    file = write_variant("llama", tmp_path / "m.gguf", **{"llama.attention.scale": 0.5})
    with pytest.warns(UserWarning, match=r"nothing reads llama.attention.scale = 0.5"):
        load(file)


@pytest.mark.parametrize("kind", [Type.I32, Type.Q8_1, 250])
def test_a_type_without_floats_is_named(file, kind):
    place = read_header(file).places["blk.1.ffn_down.weight"]
    contents = bytearray(file.read_bytes())
    end_of_axes = contents.index(b"blk.1.ffn_down.weight") + len(place.name) + 4 + 2 * 8
    contents[end_of_axes : end_of_axes + 4] = struct.pack("<I", kind)
    file.write_bytes(contents)
    name = kind.name if isinstance(kind, Type) else f"type {kind}"
    with pytest.raises(
        CheckpointError, match=f"blk.1.ffn_down.weight is stored as {name}, of which"
    ):
        load(file)


def test_a_file_cut_anywhere_is_named(file):
    """In its header at any byte, and in its tensors."""
    whole, place = file.read_bytes(), max(read_header(file).places.values(), key=lambda p: p.offset)
    header = min(place.offset for place in read_header(file).places.values())
    for length in range(0, header - 32, 7):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.gguf"):
            load(file)
    file.write_bytes(whole[: place.offset + 3])
    with pytest.raises(CheckpointError, match=rf"ends too soon: tensor {place.name} takes bytes"):
        load(file)


def test_damage_anywhere_in_a_header_is_an_error_of_ours_or_none(file):
    whole = file.read_bytes()
    header = min(place.offset for place in read_header(file).places.values())
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[generator.integers(4, header)] ^= 1 << generator.integers(0, 8)
        file.write_bytes(damaged)
        try:
            with warnings.catch_warnings(action="ignore"):
                source = source_of(file)
                DecoderConfig.from_hf(source.config)
                source.tensors("model.")
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_without_its_package(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)  # makes the import fail
    with pytest.raises(ImportError, match=r"pip install jaxkv\[gguf\]"):
        load(file)


def test_a_folder_of_a_gguf_file_names_it(file):
    write_checkpoint("llama", file.parent)
    (file.parent / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"Give the file itself: .*model\.gguf"):
        load(file.parent)
