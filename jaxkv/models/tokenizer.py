"""A tokenizer whose tokens are bytes, for the embedded model."""

from typing import Any


def byte_tokenizer() -> Any:
    """A `tokenizers.Tokenizer` with 256 tokens: the id of a byte is its value.

    Text goes in and out as UTF-8; bytes that are none come out as U+FFFD.

    >>> tokenizer = byte_tokenizer()
    >>> tokenizer.encode("é!").ids
    [195, 169, 33]
    >>> tokenizer.decode([195, 169, 33])
    'é!'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in enumerate(_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _characters() -> list[str]:
    """The library's byte-level alphabet.

    A byte is itself where it can be printed, else the next character from U+0100 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
