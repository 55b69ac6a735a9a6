"""Answers that end before a text, wherever tokens end."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tokenizers

import jaxkv
from jaxkv.models import TextStream

# A model that says one after the other; the last one again and again.
PIECES = ["a", "bE", "N", "Dc", "<0xC3>", "<0xA9>", "d!", "!e", "EN", "f"]
STOPS = ["END", "!!"]
NEW = 6
# Of each prompt: the text, how many tokens count, why it ends.
ANSWERS = {0: ("b", 3, "stop"), 3: ("éd", 4, "stop"), 7: ("ENfffff", 6, "length")}


@pytest.fixture(scope="module")
def tokenizer():
    words = {piece: number for number, piece in enumerate(PIECES)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    decoders = tokenizers.decoders
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return made


def next_piece(tokens, cache):
    following = jnp.minimum(tokens + 1, len(PIECES) - 1)
    return jax.nn.one_hot(following, len(PIECES)), jaxkv.advance(cache, tokens.shape[-1])


def config(**fields):
    return jaxkv.KVCacheConfig(1, 16, 1, 4, batch_size=len(ANSWERS), **fields)


def tokens_of(prompt):
    count = ANSWERS[prompt][1]
    return [min(prompt + n, len(PIECES) - 1) for n in range(1, count + 1)]


@pytest.mark.parametrize("every", [1, 4])
def test_generate_ends_before_them(tokenizer, every):
    streams = [TextStream(tokenizer, [prompt], STOPS) for prompt in ANSWERS]
    given, arrived = [""] * len(streams), []

    def on_tokens(number, tokens):
        given[number] += streams[number](tokens)
        arrived.append(len(tokens))

    result = jaxkv.generate(
        next_piece,
        [[prompt] for prompt in ANSWERS],
        max_new_tokens=NEW,
        config=config(),
        tokenizer=tokenizer,
        stop_strings=STOPS,
        stream_every=every,
        on_tokens=on_tokens,
    )
    found = zip(result.texts, map(len, result.tokens), result.finish_reasons, strict=True)
    assert list(found) == list(ANSWERS.values())
    assert result.tokens == [tokens_of(prompt) for prompt in ANSWERS]
    assert [len(logprobs) for logprobs in result.logprobs] == [3, 4, 6]
    assert [
        text + stream.rest() for text, stream in zip(given, streams, strict=True)
    ] == result.texts
    assert max(arrived) == every


@dataclasses.dataclass(frozen=True)
class NextPieces:
    """Guesses all that the model says, past its answers' ends too."""

    def propose(self, tokens, lengths, k):
        last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)
        return jnp.minimum(last + 1 + jnp.arange(k, dtype=jnp.int32), len(PIECES) - 1)


def test_with_a_draft_generate_ends_before_them(tokenizer):
    options = {"tokenizer": tokenizer, "stop_strings": STOPS, "config": config()}
    prompts = [[prompt] for prompt in ANSWERS]
    result = jaxkv.generate(next_piece, prompts, max_new_tokens=NEW, draft=NextPieces(), **options)
    found = zip(result.texts, map(len, result.tokens), result.finish_reasons, strict=True)
    assert list(found) == list(ANSWERS.values())
    counts = [len(guessed) for guessed in result.speculation.guessed]
    assert counts == [count for _, count, _ in ANSWERS.values()]
    assert result.speculation.accepted > 0


@pytest.mark.parametrize("steps", [1, 4])
def test_an_engine_ends_before_them(tokenizer, steps):
    pool = config(addressing=jaxkv.Paged(4, 12))
    options = {"tokenizer": tokenizer, "stop_strings": STOPS[0], "decode_steps": steps}
    with jaxkv.Engine(next_piece, pool, **options) as engine:
        requests = [
            engine.submit([prompt], max_new_tokens=NEW, stop_strings=STOPS[1:])
            for prompt in ANSWERS
        ]
        engine.step()
        fork = engine.fork(requests[2], seed=1)
        engine.run()
        engine.pages.check()
    for prompt, request in zip([*ANSWERS, 7], [*requests, fork], strict=True):
        found = request.text, len(request.logprobs), request.finish_reason
        assert (request.tokens, found) == (tokens_of(prompt), ANSWERS[prompt])


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_stream_holds_back_what_may_begin_one(tokenizer, step):
    stream = TextStream(tokenizer, [9], ["ENDE", "Dcé"])
    given = [stream(range(10)[at : at + step]) for at in range(0, 10, step)]
    assert "".join(given) == stream.text == "abEN"  # of what is complete first
    assert stream.stopped
    assert stream.rest() == ""
    if step == 1:
        assert given[:3] == ["a", "b", ""]


@pytest.mark.parametrize(
    ("text", "stops", "before"),
    [
        ("xabcd", ("abcd", "bc"), "xa"),  # the one that is complete first
        ("xabc", ("bc", "abc"), "x"),  # of two at once the longer
        ("abab", ("ab",), ""),
        ("abba", ("abc", "ac"), None),
    ],
)
def test_which_one_ends_it_does_not_depend_on_how_it_came(text, stops, before):
    class Letters:
        def decode(self, tokens):
            return "".join(map(chr, tokens))

    for step in range(1, len(text) + 1):
        stream = TextStream(Letters(), (), stops)
        for at in range(0, len(text), step):
            stream([ord(letter) for letter in text[at : at + step]])
        stream.rest()
        assert stream.text == (text if before is None else before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_strings": "x"}, "give tokenizer= as well as stop_strings="),
        ({"stop_strings": [""], "tokenizer": object()}, "a text that is not empty, got ''"),
        ({"stop_strings": [7], "tokenizer": object()}, "a text that is not empty, got 7"),
        ({"stream_every": 0}, "stream_every must be an int of at least 1, got 0"),
    ],
)
def test_what_is_refused(options, message):
    prompts = [[0]] * len(ANSWERS)
    with pytest.raises(ValueError, match=message):
        jaxkv.generate(next_piece, prompts, max_new_tokens=1, config=config(), **options)
    if "stop_strings" in options:
        pool = config(addressing=jaxkv.Paged(4, 12))
        with pytest.raises(ValueError, match=message):
            jaxkv.Engine(next_piece, pool, **options)


def test_an_engine_without_a_tokenizer_has_no_texts():
    with jaxkv.Engine(next_piece, config(addressing=jaxkv.Paged(4, 12))) as engine:
        with pytest.raises(ValueError, match="give tokenizer= as well"):
            engine.submit([0], max_new_tokens=1, stop_strings="x")
        request = engine.submit([0], max_new_tokens=1)
        with pytest.raises(ValueError, match="Engine with tokenizer="):
            _ = request.text
