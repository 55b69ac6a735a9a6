"""The tokenizer of a GGUF file as one of the library ``tokenizers``."""

import warnings
from collections.abc import Sequence
from typing import Any

from jaxkv.errors import CheckpointError
from jaxkv.gguf.header import Header

_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # types of tokens
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space

# How text is cut before merges, by tokenizer.ggml.pre.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _WORDS.replace("{DIGITS}", "{1,3}")
_QWEN2 = _WORDS.replace("{DIGITS}", "")
_AS_GPT2 = ("gpt-2", "smollm")
_AS_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_AS_QWEN2 = ("qwen2",)


def gguf_tokenizer(header: Header) -> Any:
    """A `tokenizers.Tokenizer`; None where the file has none, or with a warning one not known.

    Raises:
      CheckpointError: tokens, scores, merges and types that do not go together.

    Warns:
      UserWarning: a kind of tokenizer, or a rule for cutting text, that is not known here.
    """
    metadata = header.metadata
    kind, cut = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind is None:
        return None
    if kind == "llama":
        make = _sentencepiece
    elif kind == "gpt2" and cut in (*_AS_GPT2, *_AS_LLAMA3, *_AS_QWEN2):
        make = _byte_level
    else:
        warnings.warn(
            f"{header.file}: how its tokenizer (tokenizer.ggml.model {kind!r:.40}, pre "
            f"{cut!r:.40}) cuts text is not known here, so there is no tokenizer. Give token ids.",
            stacklevel=3,
        )
        return None
    tokens = _texts(header, "tokens")
    types = list(metadata.get("tokenizer.ggml.token_type", [1] * len(tokens)))
    if len(types) != len(tokens):
        raise CheckpointError(
            f"{header.file}: {len(tokens)} tokens with {len(types)} types; expected as many."
        )
    try:
        tokenizer = make(header, tokens, types, cut)
        _add_whole_tokens(tokenizer, tokens, types)
        _frame(tokenizer, header, tokens, begins=kind == "llama" or cut in _AS_LLAMA3)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{header.file}: its tokenizer is damaged: {error}") from error
    return tokenizer


def special_tokens(header: Header) -> dict[str, str]:
    """``bos_token`` and its like, as chat templates name them."""
    tokens = header.metadata.get("tokenizer.ggml.tokens", [])
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    numbers = {
        name: header.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()
    }
    return {
        f"{name}_token": tokens[number]
        for name, number in numbers.items()
        if isinstance(number, int) and number < len(tokens)
    }


def _byte_level(header: Header, tokens: list[str], types: Sequence[int], cut: str) -> Any:
    """BPE over bytes, as GPT-2 (Radford et al., 2019) and most models since have it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [_two_tokens(merge) for merge in _texts(header, "merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut in _AS_LLAMA3))
    if cut in _AS_GPT2:
        steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        if cut == "smollm":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    else:
        words = Regex(_LLAMA3 if cut in _AS_LLAMA3 else _QWEN2)
        steps = [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if cut in _AS_QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _two_tokens(merge: str) -> tuple[str, str]:
    first, _, second = merge.partition(" ")
    return first, second


def _sentencepiece(header: Header, tokens: list[str], types: Sequence[int], cut: Any) -> Any:
    """SentencePiece's BPE: of two neighbours those are merged whose whole has the best score."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = header.metadata.get("tokenizer.ggml.scores", ())
    if len(scores) != len(tokens):
        raise CheckpointError(
            f"{header.file}: {len(tokens)} tokens with {len(scores)} scores; expected as many."
        )
    unknown = header.metadata.get("tokenizer.ggml.unknown_token_id")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            _merges(vocabulary, types, list(scores)),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=_BYTE in types,
        )
    )
    prefix = header.metadata.get("tokenizer.ggml.add_space_prefix", True)
    before = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tokenizer


def _merges(
    vocabulary: dict[str, int], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """All pairs that make a token, the token of the best score first."""
    found = []
    for whole, number in vocabulary.items():
        if types[number] in (_CONTROL, _BYTE):
            continue
        for cut in range(1, len(whole)):
            first, second = vocabulary.get(whole[:cut]), vocabulary.get(whole[cut:])
            if first is not None and second is not None:
                found.append((-scores[number], number, first, second, cut, whole))
    return [(whole[:cut], whole[cut:]) for *_, cut, whole in sorted(found)]


def _add_whole_tokens(tokenizer: Any, tokens: list[str], types: Sequence[int]) -> None:
    """Tokens that stand for themselves wherever their text is."""
    from tokenizers import AddedToken

    whole = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(whole)


def _frame(tokenizer: Any, header: Header, tokens: list[str], *, begins: bool) -> None:
    """The tokens that stand before and after each text, where the file wants them.

    Args:
      begins: whether texts have one before them where the file does not say.
    """
    from tokenizers import processors

    def wanted(end: str, default: bool) -> list[int]:
        number = header.metadata.get(f"tokenizer.ggml.{end}_token_id")
        adds = header.metadata.get(f"tokenizer.ggml.add_{end}_token", default)
        return [number] if adds and number is not None else []

    before, after = wanted("bos", begins), wanted("eos", False)
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(tokens[number] for number in before), "$A", *(tokens[n] for n in after)],
            special_tokens=[(tokens[number], number) for number in {*before, *after}],
        )


def _texts(header: Header, key: str) -> list[str]:
    texts = header.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(texts, list):
        raise CheckpointError(f"{header.file}: tokenizer.ggml.{key} must be a list of texts.")
    return texts
