"""``jaxkv batch`` as a shell sees it."""

import json

import pytest
from flax import nnx

from jaxkv.cli.main import main
from jaxkv.models import Decoder, DecoderConfig, save

LONG = list(range(1, 36)) * 4  # 140 tokens: more than a prefill chunk


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint without a tokenizer."""
    config = DecoderConfig(40, 32, 48, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16)
    folder = tmp_path_factory.mktemp("model")
    save(Decoder(config, rngs=nnx.Rngs(0)), folder)
    return str(folder)


def run(folder, tmp_path, lines, *options):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return main(["batch", str(path), "--model", folder, "--max-new-tokens", "5", *options])


def test_good_lines_run_and_bad_ones_are_named(folder, tmp_path, capsys):
    lines = [
        '"1 2 3"',
        "",
        "not json",
        {"prompt": LONG, "max_new_tokens": 3},
        {"prompt": []},
        {"prompt": [1, 40]},
        {"promt": "1"},
        {"prompt": [1], "max_new_tokens": "many"},
        {"prompt": [1], "topk": 3},
        {"prompt": "one two"},
        [1, 2],
        {"prompt": [1], "temperature": "hot"},
        {"prompt": [1, 2], "temperature": 1.5, "top_k": 1, "max_new_tokens": 2},
    ]
    assert run(folder, tmp_path, lines) == 1
    captured = capsys.readouterr()
    answers = [json.loads(line) for line in captured.out.splitlines()]
    assert [(answer["line"], len(answer["tokens"])) for answer in answers] == [
        (1, 5),
        (4, 3),
        (13, 2),
    ]
    assert answers[0]["text"].split() == [str(token) for token in answers[0]["tokens"]]
    for number, what in {
        3: "not JSON",
        5: "at least one token id, got an empty one",
        6: "token 40, outside the vocabulary of 40",
        7: 'expected a text in quotes or an object with a "prompt"',
        8: "max_new_tokens must be an int, got 'many'",
        9: "unknown topk; there are",
        10: "this model has no tokenizer",
        11: 'expected a text in quotes or an object with a "prompt"',
        12: "temperature must be a number, got 'hot'",
    }.items():
        assert any(
            f"line {number}: " in line and what in line for line in captured.err.splitlines()
        ), (what, captured.err)
    assert "requests     3, and 9 lines that could not be run" in captured.err


def test_the_report_as_json(folder, tmp_path, capsys):
    lines = [{"prompt": [*LONG, number], "salt": "a"} for number in range(1, 4)]
    output = tmp_path / "answers.jsonl"
    options = ["--json", "--output", str(output), "--rows", "2", "--pool", "512"]
    assert run(folder, tmp_path, lines, *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(output.read_text().splitlines()) == 3
    assert report["requests"] == 3
    assert report["generated_tokens"] == 15
    assert report["hit_rate"] == round(2 * 140 / 423, 4)
    assert report["prefilled_tokens"] == 140
    assert report["pool_pages"] == 32
    assert report["pool_bytes"] == 2 * 512 * 16 * 4 + 2 * 4 * (1 + 10)
    assert 0 < report["mean_waste"] < 1
    assert report["most_pages_held"] > 9


def test_a_policy_gives_the_answers_that_generate_does(folder, tmp_path, capsys):
    policy = ["--policy", "keydiff", "--keep", "0.25"]
    lines = [{"prompt": [*LONG, number]} for number in range(1, 4)]
    options = ["--rows", "3", "--pool", "320", "--page-size", "8", "--json"]
    output = tmp_path / "answers.jsonl"
    assert run(folder, tmp_path, lines, *options, "--output", str(output), *policy) == 0
    report = json.loads(capsys.readouterr().out)
    answers = [json.loads(line)["tokens"] for line in output.read_text().splitlines()]
    # A prompt takes 18 pages, and what stays of the one before it 5.
    assert (report["requests"], report["most_pages_held"]) == (3, 18 + 5)
    prompts = [" ".join(map(str, line["prompt"])) for line in lines]
    options = ["--model", folder, "--max-new-tokens", "5", "--context", "152", "--json"]
    assert main(["generate", *prompts, *options, "--temperature", "0", *policy]) == 0
    expected = json.loads(capsys.readouterr().out)["answers"]
    assert answers == [answer["tokens"] for answer in expected]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (["--policy", "snapkv"], "Give both, such as policy='snapkv', keep=0.5"),
        (["--policy", "h2o", "--keep", "9"], "'h2o' looks at the queries of whole prompts"),
    ],
)
def test_a_policy_that_cannot_be_is_one_line(folder, tmp_path, capsys, policy, message):
    assert run(folder, tmp_path, ['"1 2 3"'], *policy) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("jaxkv batch: Engine: ")
    assert message in captured.err


@pytest.mark.parametrize(
    ("lines", "message"),
    [(["{"], "line 1: not JSON"), ([{"prompt": [1] * 100}], "and the context holds 64")],
)
def test_nothing_to_run(folder, tmp_path, capsys, lines, message):
    assert run(folder, tmp_path, lines, "--context", "64") == 2
    assert message in capsys.readouterr().err
    assert main(["batch", "no/such/file", "--model", folder]) == 2
    assert "no/such/file" in capsys.readouterr().err
