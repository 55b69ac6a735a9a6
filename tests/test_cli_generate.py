"""``jaxkv generate`` as a shell sees it."""

import json

import jax.numpy as jnp
import pytest
from flax import nnx

from jaxkv.cli import main
from jaxkv.models import Decoder, DecoderConfig, save

FIGURES = {
    "prefill_tokens",
    "decode_tokens_per_second",
    "cache_planned_bytes",
    "cache_held_bytes",
    "peak_memory_bytes",
}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint without a tokenizer."""
    config = DecoderConfig(40, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2)
    save(Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16), tmp_path / "model")
    return tmp_path / "model"


def test_the_embedded_model_streams_and_reports(capsys):
    line = ["generate", "--prompt", "import os\n", "--max-new-tokens", "20", "--context", "64"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert out.startswith("import os\n")
    assert "decode       20 tokens, " in out
    planned = 2 * 5 * 64 * 2 * 64 * 4 + 4
    assert f"planned      {planned:,} bytes, held {planned:,} bytes" in out
    assert "1 sequence x 64 tokens x 5 layers x 2 KV heads x 64, float32" in out


def test_a_folder_as_json(folder, capsys):
    line = ["generate", "--model", str(folder), "--prompt", "1 2 3", "--prompt", "4", "--json"]
    assert main([*line, "--max-new-tokens", "5", "--codec", "int8", "--dtype", "bfloat16"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.keys() >= FIGURES
    assert report["cache_held_bytes"] == 2 * 512 * (2 * 2 * 2 * (8 + 2)) + 8
    assert [len(answer["tokens"]) for answer in report["answers"]] == [5, 5]
    assert report["answers"][0]["text"].split() == [str(t) for t in report["answers"][0]["tokens"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "FOLDER", "--prompt", "hello"], "no tokenizer.json, so --prompt takes token"),
        (["--model", "FOLDER", "--prompt", "41"], "token 41, outside the vocabulary of 40 tokens"),
        (["--model", "FOLDER", "--prompt", "1", "--context", "8"], "and the context holds 8"),
        (["--temperature", "-1"], "temperature must be 0, or from 1.2e-38 to 8.5e+37, got -1.0"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_what_cannot_be_done_is_one_line(folder, capsys, options, message):
    line = [str(folder) if option == "FOLDER" else option for option in options]
    assert main(["generate", *line]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("jaxkv generate: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_damaged_file_is_named(folder, capsys):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["generate", "--model", str(folder), "--prompt", "1"]) == 2
    assert "model.safetensors" in capsys.readouterr().err
