"""Tokenizers out of GGUF metadata give the ids of those that they were written from."""

import itertools
import json
import re

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxkv.errors import CheckpointError
from jaxkv.gguf import gguf_tokenizer, read_header
from tests.models.gguf_files import metadata_of, write_gguf
from tests.models.variants import hf_config

TEXTS = [
    "Hello world, hello 2024!",
    "  two  spaces\n\n\ttabs 12 a  34 ",
    "don't WE'LL größe 日本語 🙂",
    "<|im_start|>user\nhi<|im_end|><tool>x",
]
_CORPUS = [*TEXTS * 3, "hello hello world world 2024 2024 34 12  34", "don't don't we'll WE'LL"]
_SPLITS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def write(tmp_path, **metadata):
    made = metadata_of(hf_config("llama"))
    made |= {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    return read_header(write_gguf(tmp_path / "model.gguf", made, {}))


def trained(cut):
    """A BPE tokenizer with three whole tokens, the last one not special."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut not in _SPLITS)
    before = [pre_tokenizers.Digits(individual_digits=True)] if cut == "smollm" else []
    if cut in _SPLITS:
        before = [pre_tokenizers.Split(Regex(_SPLITS[cut]), "isolated")]
    tokenizer = Tokenizer(models.BPE(ignore_merges=cut == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def metadata_of_bpe(tokenizer, cut):
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    types = [3 if re.fullmatch(r"<\|\w+\|>", token) else 1 for token in tokens]
    types[tokens.index("<tool>")] = 4
    return {
        "model": "gpt2",
        "pre": cut,
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(pair) for pair in merges],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


@pytest.mark.parametrize("cut", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_ids_are_those_of_the_tokenizer_that_was_written(tmp_path, cut):
    expected = trained(cut)
    header = write(tmp_path, **metadata_of_bpe(expected, cut), add_bos_token=False)
    got = gguf_tokenizer(header)
    for text in TEXTS:
        ids = expected.encode(text).ids
        assert got.encode(text).ids == ids
        assert got.decode(ids) == expected.decode(ids)


@pytest.mark.parametrize(
    ("cut", "said", "expected"),
    [
        ("smollm", {}, (False, False)),
        ("llama-bpe", {}, (True, False)),
        ("llama-bpe", {"add_bos_token": False}, (False, False)),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, (True, True)),
    ],
)
def test_what_stands_around_a_text(tmp_path, cut, said, expected):
    header = write(tmp_path, **metadata_of_bpe(trained(cut), cut) | said)
    ids = gguf_tokenizer(header).encode("hello").ids
    assert (ids[0] == 0, ids[-1] == 1) == expected


_PIECES = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{byte:02X}>": 6 for byte in range(256)}
_SCORES = {"▁": -9, "a": -8, "b": -8, "ab": -2, "▁a": -1.5, "ba": -1, "aba": -3, "▁ab": -4}


def sentencepiece(text):
    """Its rule: of all neighbours merge those of the best score, leftmost first."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(_SCORES.get(a + b), -at) for at, (a, b) in enumerate(itertools.pairwise(pieces))]
        known = [pair for pair in pairs if pair[0] is not None]
        if not known:
            return pieces
        at = -max(known)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


@pytest.mark.parametrize("text", ["a", "ab", "aba", "abab ba", "bbaab  abba", "é"])
def test_sentencepiece(tmp_path, text):
    tokens = [*_PIECES, *_SCORES]
    header = write(
        tmp_path,
        model="llama",
        tokens=tokens,
        scores=[0.0] * len(_PIECES) + [float(score) for score in _SCORES.values()],
        token_type=[*_PIECES.values(), *[1] * len(_SCORES)],
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
    )
    tokenizer = gguf_tokenizer(header)
    pieces = sentencepiece(text) if text.isascii() else ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.encode(text).tokens == ["<s>", *pieces]
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_type": [1]}, "tokens with 1 types"),
        ({"merges": ["no such"]}, "its tokenizer is damaged"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens must be a list of texts"),
        ({"model": "llama"}, "tokens with 0 scores"),
    ],
)
def test_what_does_not_go_together_is_named(tmp_path, changes, words):
    header = write(tmp_path, **metadata_of_bpe(trained("smollm"), "smollm") | changes)
    with pytest.raises(CheckpointError, match=words):
        gguf_tokenizer(header)


def test_a_rule_that_is_not_known_gives_no_tokenizer(tmp_path):
    header = write(tmp_path, **metadata_of_bpe(trained("smollm"), "smollm") | {"pre": "tekken"})
    with pytest.warns(UserWarning, match=r"pre 'tekken'\) cuts text is not known here"):
        assert gguf_tokenizer(header) is None
