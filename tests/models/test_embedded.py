"""The model that comes along: as good as its record says, and able to write Python."""

import ast
import json

import pytest

import jaxkv
from benchmarks import corpus
from jaxkv.models import load
from jaxkv.models.source import EMBEDDED


@pytest.fixture(scope="module")
def embedded():
    return load()


def test_it_is_small():
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir()) <= 8 * 10**6


@pytest.mark.slow
def test_it_reaches_its_recorded_bits_per_byte_on_held_out_files(embedded):
    model, _ = embedded
    recorded = json.loads((EMBEDDED / "training.json").read_text())["held_out_bits_per_byte"]
    sample = corpus.held_out()
    assert corpus.bits_per_byte(model, sample[::8]) == pytest.approx(recorded["eighth"], abs=5e-3)
    assert recorded["all"] < 2.0


def test_it_writes_python(embedded):
    model, tokenizer = embedded
    prompt = "import unittest\n\n\nclass StackTest(unittest.TestCase):\n    def test_push(self):\n"
    result = jaxkv.generate(model, [tokenizer.encode(prompt).ids], max_new_tokens=160)
    text = prompt + tokenizer.decode(result.tokens[0])
    body = ast.parse(text[: text.rindex("\n")]).body[1]
    assert isinstance(body, ast.ClassDef)
    assert "self.assert" in text
