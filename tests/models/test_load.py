"""Folders in and out: what `load` reads, what it refuses and how it says so."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from jaxkv.errors import CheckpointError
from jaxkv.models import GPT2, Decoder, DecoderConfig, byte_tokenizer, load, save
from tests.models.variants import GOLDENS, hf_config, token_ids, weights, write_checkpoint


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint("llama", tmp_path)


def write_shards(folder, tensors, **index_changes):
    """Two shards and their index, in place of the single file."""
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors").unlink(missing_ok=True)
    index = json.dumps({"metadata": {}, "weight_map": weight_map | index_changes})
    (folder / "model.safetensors.index.json").write_text(index)


def write_config(folder, **changes):
    config = hf_config("llama") | changes
    (folder / "config.json").write_text(json.dumps(config))


def logits_of(model):
    return model(jnp.asarray(token_ids("llama")))[0]


def refused(folder, *words):
    """`load` raises a CheckpointError that has all these words."""
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    for word in words:
        assert str(word) in str(caught.value)


def test_shards_read_as_the_single_file(folder):
    expected = logits_of(load(folder)[0])
    write_shards(folder, weights("llama"))
    np.testing.assert_array_equal(logits_of(load(folder)[0]), expected)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", jnp.bfloat16])
def test_every_stored_dtype_into_every_other(tmp_path, stored, dtype):
    model, _ = load(write_checkpoint("llama", tmp_path, stored), dtype=dtype)
    name = "model.layers.1.self_attn.q_proj.weight"
    expected = weights("llama")[name].astype(jnp.dtype(stored)).astype(jnp.dtype(dtype)).T
    got = model.layers[1].self_attn.q_proj.weight[...]
    assert got.dtype == model.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(got, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        ("qwen3", Decoder),
        ("gemma3 rope_parameters", Decoder),
        ("gpt_oss", Decoder),
        ("gpt2", GPT2),
        ("gpt2 untied", GPT2),
    ],
)
def test_save_then_load_gives_the_same_model(tmp_path, variant, kind):
    (tmp_path / "first").mkdir()
    first, _ = load(write_checkpoint(variant, tmp_path / "first"), dtype="bfloat16")
    save(first, tmp_path / "new" / "second")
    second, _ = load(tmp_path / "new" / "second", dtype="bfloat16")
    assert isinstance(second, kind)
    assert second.config == first.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(first), nnx.state(second))


@pytest.mark.slow_cases("deepseek|starcoder|llama4|gemma")
@pytest.mark.parametrize(
    "variant",
    ["llama", "mixtral", "phi3", "deepseek_v3", "starcoder2", "gpt_neox", "llama4", "gemma3n"],
)
def test_saved_files_are_those_of_the_checkpoint(variant, tmp_path):
    """Experts apart, joined tensors as one, and each under its name there."""
    from safetensors.numpy import load_file

    model, _ = load(write_checkpoint(variant, tmp_path))
    save(model, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, saved, weights(variant))
    assert load(tmp_path / "saved")[0].config == model.config


def test_layers_that_guess_ahead_are_not_read(tmp_path):
    folder = write_checkpoint("deepseek_v3", tmp_path)
    tensors = weights("deepseek_v3")
    ahead = {name.replace("layers.0", "layers.3"): each for name, each in tensors.items()}
    save_file(tensors | ahead, folder / "model.safetensors")
    assert load(folder)[0].config.num_layers == 3


@pytest.mark.parametrize(
    ("variant", "name", "change", "words"),
    [
        ("mixtral", "block_sparse_moe.experts.2.w1", None, ["gate_proj", "expert 2 is missing"]),
        ("mixtral", "block_sparse_moe.experts.2.w1", (3, 3), ["gate_proj", "(3, 3), (48, 32)"]),
        ("phi3", "self_attn.qkv_proj", (63, 32), ["qkv_proj", "[63, 32]", "64 rows"]),
    ],
)
def test_experts_and_joined_tensors_that_do_not_fit(tmp_path, variant, name, change, words):
    folder, name = write_checkpoint(variant, tmp_path), f"model.layers.0.{name}.weight"
    tensors = weights(variant)
    del tensors[name]
    tensors |= {} if change is None else {name: np.zeros(change, np.float32)}
    save_file(tensors, folder / "model.safetensors")
    refused(folder, *words)


def test_names_without_prefix_and_tensors_that_are_no_weights(tmp_path):
    for variant, extra in (
        ("gpt2", ("h.0.attn.bias", "h.0.attn.masked_bias")),
        ("llama", ("layers.0.self_attn.rotary_emb.inv_freq",)),
    ):
        folder = tmp_path / variant
        folder.mkdir()
        write_checkpoint(variant, folder)
        expected, _ = load(folder)
        tensors = {
            name.removeprefix("transformer.").removeprefix("model."): tensor
            for name, tensor in weights(variant).items()
        }
        save_file(tensors | dict.fromkeys(extra, np.zeros((3, 3))), folder / "model.safetensors")
        got, _ = load(folder)
        np.testing.assert_array_equal(logits_of(got), logits_of(expected))


_OTHERS = ("vision_tower.post_layernorm.bias", "multi_modal_projector.mm_soft_emb_norm.weight")


@pytest.mark.slow_cases("llama4|3n")
@pytest.mark.parametrize(
    ("variant", "kind", "prefix", "others"),
    [
        ("gemma3", "Gemma3", "language_model.model.", _OTHERS),
        ("gemma3", "Gemma3", "model.language_model.", _OTHERS),
        ("llama4", "Llama4", "language_model.model.", ("vision_model.norm", _OTHERS[1])),
        ("gemma3n", "Gemma3n", "model.language_model.", ("audio_tower.a", "embed_vision.b")),
    ],
)
def test_text_decoder_of_a_multimodal_folder(tmp_path, variant, kind, prefix, others):
    """Under the names of the Hub, and under those of transformers 5 in memory."""
    expected, _ = load(write_checkpoint(variant, tmp_path))
    tensors = {
        name.replace("model.", prefix, 1).replace("lm_head", "language_model.lm_head"): tensor
        for name, tensor in weights(variant).items()
    }
    before = prefix.removeprefix("language_model.model.").removesuffix("language_model.")
    tensors |= {before + name: np.zeros(3, np.float32) for name in others}
    save_file(tensors, tmp_path / "model.safetensors")
    text = hf_config(variant)
    del text["architectures"]
    about = {"architectures": [f"{kind}ForConditionalGeneration"], "model_type": kind.lower()}
    (tmp_path / "config.json").write_text(json.dumps(about | {"text_config": text}))
    got, _ = load(tmp_path)
    assert got.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(got), nnx.state(expected))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"down_proj_scales": None}, ["down_proj_blocks has no", "down_proj_scales beside it"]),
        ({"down_proj_scales": np.zeros((6, 32), np.uint8)}, ["[6, 32, 1, 16]", "and [6, 32]"]),
        ({"down_proj_scales": np.zeros((6, 32, 1), np.int8)}, ["stored as I8; expected U8"]),
        ({"down_proj_blocks": None}, ["down_proj is missing"]),
    ],
)
def test_mxfp4_that_does_not_go_together(tmp_path, changes, words):
    write_checkpoint("gpt_oss mxfp4", tmp_path)
    named = {f"model.layers.1.mlp.experts.{name}": new for name, new in changes.items()}
    tensors = weights("gpt_oss mxfp4") | named
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, tmp_path / "model.safetensors")
    refused(tmp_path, *words)


@pytest.mark.parametrize(
    ("method", "extra", "config"),
    [
        (
            "GPTQ",
            {"qweight": np.int32, "qzeros": np.int32, "scales": np.float16, "g_idx": np.int32},
            {},
        ),
        ("AWQ or GPTQ", {"qweight": np.int32, "qzeros": np.int32, "scales": np.float16}, {}),
        ("bitsandbytes", {"weight": np.int8, "SCB": np.float32}, {}),
        ("bitsandbytes", {"weight": np.uint8, "weight.absmax": np.uint8}, {}),
        ("fp8 with scales", {"weight": jnp.float8_e4m3fn, "weight_scale_inv": np.float32}, {}),
        ("compressed-tensors", {"weight_packed": np.int32, "weight_scale": np.float16}, {}),
        ("compressed-tensors", {}, {"compression_config": {"format": "pack-quantized"}}),
        ("GPTQ", {}, {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        ("fp8 with scales", {}, {"quantization_config": {"quant_method": "fp8"}}),
    ],
)
def test_quantized_weights_are_refused_by_name(folder, method, extra, config):
    """By what config.json says; and by their tensors, where it says nothing."""
    write_config(folder, **config)
    tensors = weights("llama")
    module = "model.layers.1.mlp.up_proj"
    if extra:
        del tensors[f"{module}.weight"]
    tensors |= {f"{module}.{name}": np.zeros((4, 4), dtype) for name, dtype in extra.items()}
    save_file(tensors, folder / "model.safetensors")
    refused(folder, f"its weights are quantized ({method}), which is not supported", "GGUF")


def test_tokenizer_comes_with_the_folder(folder):
    assert load(folder)[1] is None
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    assert load(folder)[1].encode("é").ids == [195, 169]


def test_missing_tensor(folder):
    tensors = weights("llama")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    refused(folder, folder, "tensor model.layers.1.mlp.up_proj.weight is missing")


def test_missing_head_of_an_untied_model(folder):
    tensors = weights("llama")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "tensor lm_head.weight is missing")


@pytest.mark.parametrize("variant", ["llama", "gpt2 untied"])
@pytest.mark.parametrize("ties", [True, None])
def test_a_head_of_its_own_is_used_though_the_config_ties_it(tmp_path, variant, ties):
    """As transformers: its logits for the untied model, and a warning."""
    config = hf_config(variant) | {"tie_word_embeddings": ties}
    write_checkpoint(variant, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if ties or variant.startswith("gpt2"):
        with pytest.warns(UserWarning, match=r"the file has another one, lm_head\.weight"):
            model, _ = load(tmp_path)
    else:
        model, _ = load(tmp_path)
    assert not model.config.tie_word_embeddings
    with np.load(GOLDENS) as goldens:
        logits = model(jnp.asarray(token_ids(variant)))[0]
        np.testing.assert_allclose(logits, goldens[variant], atol=2e-4, rtol=0)


@pytest.mark.parametrize(("variant", "table"), [("llama tied", "embed_tokens"), ("gpt2", "wte")])
def test_a_head_that_is_the_embedding_once_more(tmp_path, variant, table):
    expected, _ = load(write_checkpoint(variant, tmp_path))
    tensors = weights(variant)
    (embedding,) = (tensor for name, tensor in tensors.items() if table in name)
    save_file(tensors | {"lm_head.weight": embedding}, tmp_path / "model.safetensors")
    got, _ = load(tmp_path)
    assert got.config.tie_word_embeddings
    np.testing.assert_array_equal(logits_of(got), logits_of(expected))


def test_two_tensors_of_one_name(folder):
    twice = {"layers.0.mlp.up_proj.weight": np.zeros((48, 32), np.float32)}
    save_file(weights("llama") | twice, folder / "model.safetensors")
    refused(folder, "model.layers.0.mlp.up_proj.weight", "are the same tensor")


def test_misshaped_tensor(folder):
    write_config(folder, intermediate_size=40)
    refused(folder, "model.safetensors", "mlp.down_proj.weight", "[32, 48]", "must be [32, 40]")


def test_unexpected_tensor(folder):
    extra = {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}
    save_file(weights("llama") | extra, folder / "model.safetensors")
    refused(folder, "unexpected tensor model.layers.0.self_attn.q_proj.bias")


def test_more_layers_than_the_config_has(folder):
    write_config(folder, num_hidden_layers=1)
    refused(folder, "unexpected tensor model.layers.1.", "and 6 more")


def test_quantized_tensor(folder):
    tensors = weights("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.int8)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, name, "stored as I8", "expected one of F32, F16, BF16")


@pytest.mark.parametrize("kept", [0, 5, 100, -4])
def test_truncated_file(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(folder, file, "not a whole safetensors file", f"{file.stat().st_size} bytes")


def test_garbage_file(folder):
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(folder, "model.safetensors is not a whole safetensors file")


def test_absent_shard(folder):
    write_shards(folder, weights("llama"))
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "index.json lists model-00002-of-00002.safetensors", "not in the folder")


def test_shard_outside_of_the_folder(folder):
    write_shards(folder, weights("llama"), extra="../../model.safetensors")
    refused(folder, "lists ../../model.safetensors")


def test_index_that_points_to_a_tensor_not_there(folder):
    shard = "model-00001-of-00002.safetensors"
    write_shards(folder, weights("llama"), **{"model.ghost": shard})
    refused(folder, f"says that {shard} has model.ghost")


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}'])
def test_index_without_a_map(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, "index.json", "expected an object under weight_map")


def test_no_weights_but_others(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "has no weights", "Convert pytorch_model.bin to safetensors")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[]", "must hold a JSON object, got a list")]
)
def test_bad_config_json(folder, text, message):
    (folder / "config.json").write_text(text)
    refused(folder, folder / "config.json", message)


def test_absent_config_json(folder):
    (folder / "config.json").unlink()
    refused(folder, folder / "config.json", "is missing")


def test_unknown_architecture(folder):
    write_config(folder, architectures=["MambaForCausalLM"])
    refused(folder, "'MambaForCausalLM' is not supported", "known are LlamaForCausalLM")


def test_bad_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, folder / "tokenizer.json", "is not a tokenizer")


def test_unknown_dtype(folder):
    with pytest.raises(ValueError, match=r"dtype must be one of float32, .* got int8"):
        load(folder, dtype="int8")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.slow
def test_loading_holds_the_weights_once(tmp_path):
    config = DecoderConfig(512, 1024, 4096, num_layers=4, num_heads=8)
    model = Decoder(config, rngs=nnx.Rngs(0))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    save(model, tmp_path)
    del model
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before = _status_bytes("VmHWM")
    model, _ = load(tmp_path)
    assert _status_bytes("VmHWM") - before < 1.4 * held
    assert model.norm.weight.shape == (1024,)


def _status_bytes(field):
    (kilobytes,) = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)
