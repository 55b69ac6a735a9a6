"""``jaxkv generate`` as a shell sees it."""

import io
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from jaxkv.cli.main import main
from jaxkv.models import Decoder, DecoderConfig, byte_tokenizer, load, save
from jaxkv.show.tokens import decode_answer
from tests.drafts.ahead import counting_checkpoint

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
    config = DecoderConfig(40, 32, 48, num_layers=1, num_heads=4, num_kv_heads=2)
    save(Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tokenizer(folder):
    """Of words as SentencePiece has them, with their space before them; in the folder too."""
    words = {"\u2581größe": 0} | {f"\u2581w{number}": number for number in range(1, 40)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="\u2581größe"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def test_the_embedded_model_streams_and_reports(capsys):
    line = ["generate", "--prompt", "import os\n", "--max-new-tokens", "20", "--context", "64"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert out.startswith("import os\n")
    assert "decode       19 tokens, " in out
    planned = 2 * 5 * 64 * 2 * 64 * 4 + 4
    assert f"planned      {planned:,} bytes, held {planned:,} bytes" in out
    assert "1 sequence x 64 tokens x 5 layers x 2 KV heads x 64, float32" in out


def test_a_folder_as_json(folder, capsys):
    line = ["generate", "--model", str(folder), "--prompt", "1 2 3", "--prompt", "4", "--json"]
    assert main([*line, "--max-new-tokens", "5", "--codec", "int8", "--dtype", "bfloat16"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.keys() >= FIGURES
    assert report["cache_held_bytes"] == 2 * 512 * (2 * 2 * (8 + 2)) + 8
    assert [len(answer["tokens"]) for answer in report["answers"]] == [5, 5]
    assert report["answers"][0]["text"].split() == [str(t) for t in report["answers"][0]["tokens"]]


def test_every_way_to_show_an_answer_has_the_space_before_it(folder, tokenizer, tmp_path, capsys):
    options = ["--model", str(folder), "--temperature", "0", "--max-new-tokens", "4"]
    prompts = ["w3 größe", "w7"]
    asked = ["--prompt", prompts[0], "--prompt", prompts[1]]
    assert main(["generate", *options, *asked, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    texts = [
        tokenizer.decode(tokenizer.encode(prompt).ids + answer["tokens"])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert [answer["prompt"] + answer["text"] for answer in answers] == texts
    assert main(["generate", *options, *asked]) == 0
    assert capsys.readouterr().out.startswith(f"--- 1 ---\n{texts[0]}\n--- 2 ---\n{texts[1]}\n")
    assert main(["generate", *options, *asked[:2]]) == 0
    assert capsys.readouterr().out.startswith(f"{texts[0]}\n\n")
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, prompts)))
    assert main(["batch", str(file), *options]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [prompt + line["text"] for prompt, line in zip(prompts, lines, strict=True)] == texts


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["ngram", "mtp"])
def test_a_draft_says_the_same_and_what_it_was_worth(draft, folder, tmp_path, capsys):
    model = folder if draft == "ngram" else counting_checkpoint(tmp_path, "token")
    line = ["generate", "--model", str(model), "--prompt", "1 2 3 1 2", "--temperature", "0"]
    line += ["--max-new-tokens", "40"]
    reports = []
    for more in ([], ["--draft", draft]):
        assert main([*line, *more, "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0]["answers"] == reports[1]["answers"]
    assert 0 < reports[1]["draft_accepted"] <= reports[1]["draft_guesses"]
    assert main([*line, "--draft", draft]) == 0
    assert f"draft        {reports[1]['draft_tokens_per_step']} tokens per step" in (
        capsys.readouterr().out
    )


@pytest.mark.usefixtures("tokenizer")
def test_prompts_from_stdin_and_answers_that_end_before_a_text(folder, capsys, monkeypatch):
    options = ["--model", str(folder), "--temperature", "0", "--max-new-tokens", "8"]
    assert main(["generate", "w3 größe", *options, "--json"]) == 0
    (free,) = json.loads(capsys.readouterr().out)["answers"]
    stop = free["text"][4:7]  # wherever tokens end
    before = free["text"][: free["text"].index(stop)]
    for more in (["--json"], ["--stream-every", "1"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("w3 größe"))
        assert main(["generate", "-", *options, "--stop", stop, *more]) == 0
        out = capsys.readouterr().out
        if "--json" in more:
            (answer,) = json.loads(out)["answers"]
            assert (answer["text"], answer["finish"]) == (before, "stop")
        else:
            assert out.startswith(f"w3 größe{before}\n\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps("w3 größe")))
    assert main(["batch", "-", *options, "--stop", stop]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["finish"]) == (before, "stop")


def test_an_answer_may_begin_within_a_character():
    tokenizer = byte_tokenizer()
    assert decode_answer(tokenizer, [97, 195], [169, 33]) == "é!"
    assert decode_answer(tokenizer, [97], [195]) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.usefixtures("tokenizer")
def test_a_prompt_that_is_not_ascii_in_a_c_locale(folder, monkeypatch):
    typed = "w1 größe".encode().decode("ascii", "surrogateescape")  # what Python gives there
    line = ["jaxkv", "generate", "--model", str(folder), "--prompt", typed, "--temperature", "0"]
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "argv", [*line, "--max-new-tokens", "1", "--no-compilation-cache"])
    monkeypatch.setattr(sys, "stdout", shown)
    assert main() == 0
    shown.flush()
    assert shown.buffer.getvalue().startswith("w1 größe w".encode())


@pytest.mark.usefixtures("tokenizer")
def test_a_prompt_that_is_no_text_is_named(folder, tmp_path, capsys):
    assert main(["generate", "--model", str(folder), "--prompt", "w1 \udcff"]) == 2
    assert "a prompt must be Unicode text, got 'w1 \\udcff'" in capsys.readouterr().err
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps("w1 \ud800"))
    assert main(["batch", str(file), "--model", str(folder)]) == 2
    assert "line 1: a prompt must be Unicode text, got 'w1 \\ud800'" in capsys.readouterr().err


def test_logits_that_are_no_numbers_are_told_of(folder, tmp_path, capsys):
    model, _ = load(folder)
    model.embed_tokens.weight[...] = model.embed_tokens.weight[...].at[7].set(np.nan)
    save(model, folder)
    options = ["--model", str(folder), "--temperature", "0", "--max-new-tokens", "4"]
    assert main(["generate", *options, "--prompt", "1 7", "--prompt", "2", "--json"]) == 1
    captured = capsys.readouterr()
    told = "after 0 tokens of the answer the model's logits are no numbers"
    assert f"jaxkv generate: prompt 1: {told}" in captured.err
    assert [answer["finish"] for answer in json.loads(captured.out)["answers"]] == ["nan", "length"]
    file = tmp_path / "prompts.jsonl"
    file.write_text('"1 7"\n"2"')
    assert main(["batch", str(file), *options]) == 1
    captured = capsys.readouterr()
    assert f"line 1: {told}" in captured.err
    assert [json.loads(line)["finish"] for line in captured.out.splitlines()] == ["nan", "length"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "FOLDER", "--prompt", "hello"], "no tokenizer, so --prompt takes token"),
        (["--model", "FOLDER", "--prompt", "41"], "token 41, outside the vocabulary of 40 tokens"),
        (["--model", "FOLDER", "--prompt", "1", "--context", "8"], "and the context holds 8"),
        (["--model", "FOLDER", "1", "--stop", "x"], "no tokenizer, so its answers have no text"),
        (["1", "--policy", "snapkv", "--keep", "0"], "keep must be from 1 to"),
        (["1", "--policy", "snapkv"], "Give both, such as policy='snapkv', keep=0.5"),
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
