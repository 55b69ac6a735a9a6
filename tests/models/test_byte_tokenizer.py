from pathlib import Path

import tokenizers

import jaxkv.models
from jaxkv.models import byte_tokenizer


def test_ids_are_bytes():
    text = "def f(x):\n\treturn 'é漢😀' \x00\r\n  " + "".join(map(chr, range(256)))
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.get_vocab_size() == 256
    assert tokenizer.encode("").ids == []


def test_bytes_that_are_no_text_are_replaced():
    assert byte_tokenizer().decode([97, 255, 98]) == "a\N{REPLACEMENT CHARACTER}b"


def test_the_embedded_file_is_this_tokenizer():
    file = Path(jaxkv.models.__file__).parent / "embedded" / "tokenizer.json"
    assert tokenizers.Tokenizer.from_file(str(file)).to_str() == byte_tokenizer().to_str()
