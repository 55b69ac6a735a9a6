"""Chat templates, end tokens and sampling of a checkpoint, and texts as they stream."""

import io
import json
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxkv
from jaxkv.cli.main import main
from jaxkv.errors import CheckpointError
from jaxkv.models import (
    Chat,
    Decoder,
    DecoderConfig,
    TextStream,
    byte_tokenizer,
    load,
    load_chat,
    load_sampling,
    save,
)
from tests.models.gguf_files import metadata_of, tensors_of, write_gguf
from tests.models.variants import hf_config, weights, write_checkpoint

CHATML = (
    "{% for message in messages %}\n"
    "<{{ message['role'] }}>{{ message.content | trim }}{{ eos_token }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = [{"role": "user", "content": " Hi? "}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of bytes with a chat template, whose answers nothing ends."""
    folder = tmp_path_factory.mktemp("chat")
    config = DecoderConfig(256, 32, 48, num_layers=1, num_heads=4, num_kv_heads=2)
    save(Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.float32), folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    about = {"chat_template": CHATML, "eos_token": {"content": "</e>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def tell(folder, **generation):
    (folder / "generation_config.json").write_text(json.dumps(generation))


def test_a_conversation_in_the_models_form(folder):
    chat = load_chat(folder, byte_tokenizer())
    assert chat.render(ASKED) == "<user>Hi?</e>\n<assistant>"
    assert chat.render(ASKED, add_generation_prompt=False) == "<user>Hi?</e>\n"
    assert bytes(chat.encode(ASKED)).decode() == "<user>Hi?</e>\n<assistant>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", " Hi? "),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{% for m in messages %}x{% break %}{% endfor %}", "x"),
        ("{{ think }}", "deep"),
        ("{{ strftime_now('%%') }}", "%"),
    ],
)
def test_what_templates_use(template, expected):
    assert Chat(template, byte_tokenizer()).render(ASKED, think="deep") == expected


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages.__class__.__mro__ }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{% for i in range(9999999) %}{% endfor %}", "Range too big"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_fails_or_breaks_out(template, words):
    with pytest.raises(ValueError, match=f"the chat template refuses these messages: .*({words})"):
        Chat(template, byte_tokenizer()).render(ASKED)


def test_a_template_that_is_not_jinja():
    with pytest.raises(CheckpointError, match="the chat template is not Jinja"):
        Chat("{% for %}", byte_tokenizer())


@pytest.mark.parametrize("messages", [[], "Hi", ["Hi"], [{"content": "Hi"}], {"role": "user"}])
def test_messages_that_are_none(messages):
    with pytest.raises(ValueError, match="messages must be a list such as"):
        Chat(CHATML, byte_tokenizer()).render(messages)


def test_where_a_template_stands(tmp_path):
    def rendered():
        return load_chat(tmp_path, byte_tokenizer()).render(ASKED)

    with pytest.raises(CheckpointError, match="has no chat template"):
        rendered()
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "list"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert rendered() == "list"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert rendered() == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert rendered() == "jinja"
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_chat(tmp_path, None)


def test_a_gguf_file_has_all_of_it(tmp_path):
    config = hf_config("llama")
    file = write_gguf(
        tmp_path / "model.gguf",
        metadata_of(config)
        | {
            "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
            "tokenizer.ggml.tokens": ["<s>", "</s>", "<|im_end|>", "<|end|>", "x"],
            "tokenizer.ggml.token_type": [3, 3, 3, 1, 1],  # an ordinary token ends nothing
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
            "general.sampling.temp": 0.5,
            "general.sampling.top_k": 7,
        },
        tensors_of(config, weights("llama")),
    )
    assert load(file)[0].stop_tokens == (1, 2)
    assert load_chat(file, byte_tokenizer()).render(ASKED) == "<s> Hi? "
    assert load_sampling(file) == jaxkv.Sampling(temperature=0.5, top_k=7)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, [3, 4], (3, 4)),
        ({}, 3, (3,)),
        ({"eos_token_id": 5}, 3, (5,)),
        ({"eos_token_id": [5, 6]}, None, (5, 6)),
    ],
)
def test_generation_config_names_the_end_tokens(tmp_path, generation, config, expected):
    write_checkpoint("llama", tmp_path)
    fields = hf_config("llama") | {"eos_token_id": config}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    if generation is not None:
        tell(tmp_path, **generation)
    assert load(tmp_path)[0].stop_tokens == expected


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, None),
        ({"eos_token_id": 1}, None),
        ({"do_sample": False, "temperature": 0.7}, jaxkv.Sampling()),
        ({"do_sample": True}, jaxkv.Sampling(temperature=1.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20},
            jaxkv.Sampling(0.6, 20, 0.9),
        ),
        ({"do_sample": True, "top_k": 0, "min_p": None}, jaxkv.Sampling(1.0)),
    ],
)
def test_sampling_of_generation_config(tmp_path, generation, expected):
    write_checkpoint("llama", tmp_path)
    tell(tmp_path, **generation)
    assert load_sampling(tmp_path) == expected


def test_sampling_out_of_range_names_the_file(tmp_path):
    write_checkpoint("llama", tmp_path)
    tell(tmp_path, do_sample=True, top_p=7)
    with pytest.raises(CheckpointError, match=r"generation_config.json: Sampling: top_p must be"):
        load_sampling(tmp_path)


def test_the_models_own_end_tokens_end_what_is_generated():
    """By default, in `generate` and in `Engine`; and not where others are given."""

    def count_up(tokens, cache):
        return jax.nn.one_hot(tokens + 1, 16), jaxkv.advance(cache, tokens.shape[-1])

    count_up.stop_tokens = (15, 7)
    pool = jaxkv.Paged(page_size=4, num_pages=4)
    config = jaxkv.KVCacheConfig(1, 16, 1, 4, batch_size=1, addressing=jaxkv.Contiguous())
    for stops, answer, reason in (
        (None, [6, 7], "stop"),
        ((), [6, 7, 8, 9], "length"),
        ([8], [6, 7, 8], "stop"),
    ):
        said = {"max_new_tokens": 4, "stop_tokens": stops}
        result = jaxkv.generate(count_up, [[5]], config=config, **said)
        assert (result.tokens, result.finish_reasons) == ([answer], [reason])
        with jaxkv.Engine(count_up, config.replace(addressing=pool), stop_tokens=stops) as engine:
            request = engine.submit([5], max_new_tokens=4)
            engine.run()
        assert (request.tokens, request.finish_reason) == (answer, reason)


@pytest.mark.parametrize("text", ["aé日🙂b", "🙂🙂"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_streamed_text_is_never_cut_inside_a_character(text, step):
    ids = list(text.encode())
    stream = TextStream(byte_tokenizer(), [112])
    parts = [stream(ids[at : at + step]) for at in range(0, len(ids), step)]
    assert "".join(parts) == text
    assert stream.rest() == ""
    arrived = 0
    for number, part in enumerate(parts, 1):  # each character as soon as it is whole
        arrived += len(part)
        whole = bytes(ids[: number * step]).decode(errors="ignore")
        assert text[:arrived] == whole


def test_the_rest_of_a_stream_that_ends_inside_a_character():
    stream = TextStream(byte_tokenizer())
    assert stream([97, 195]) == "a"
    assert stream.rest() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.slow
def test_chat_in_a_terminal_and_messages_of_a_batch(folder, tmp_path, capsys, monkeypatch):
    """Both are `generate` on the template's tokens; the second turn knows the first."""
    model, tokenizer = load(folder)
    chat = load_chat(folder, tokenizer)

    def answered(messages):
        prompt = chat.encode(messages)
        tokens = jaxkv.generate(model, [prompt], max_new_tokens=6).tokens[0]
        return tokens, tokenizer.decode(tokens)

    first, second = {"role": "user", "content": "Hi?"}, {"role": "user", "content": "And?"}
    tokens, one = answered([first])
    _, two = answered([first, {"role": "assistant", "content": one}, second])
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi?\n\nAnd?\n"))
    line = ["--model", str(folder), "--max-new-tokens", "6"]
    assert main(["chat", *line, "--context", "128"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{one}\n{two}\n"
    assert shown.err == "[cut after 6 tokens]\n" * 2
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"messages": [first]}) + '\n{"messages": "Hi"}\n')
    assert main(["batch", str(file), *line]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out.splitlines()[0])["tokens"] == tokens
    assert "line 2: messages must be a list" in shown.err


def test_chat_without_a_template_is_refused(capsys):
    assert main(["chat", "--prompt", "Hi?"]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_without_jinja(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"pip install jaxkv\[chat\]"):
        Chat(CHATML, byte_tokenizer())
