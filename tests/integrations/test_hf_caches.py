"""Every cache class of transformers goes on here with the right logits, or is refused by name.

Two prompts of unlike lengths go through a tiny Llama in transformers, padded, into a cache; jaxkv
takes the cache and computes the next token. What it must find is what transformers computes for
each prompt alone, without padding and without a cache.
"""

import copy
import importlib
import inspect

import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.integrations.transformers import from_hf, to_hf
from jaxkv.models import load
from tests.models.variants import hf_config, token_ids, weights, write_checkpoint
from tests.oracle import jit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
cache_utils = importlib.import_module("transformers.cache_utils")

LAYERS, TOKENS, SLOTS, SHORT = 2, 12, 16, 7
PROMPTS = [token_ids("llama")[:TOKENS], token_ids("llama")[-SHORT:]]
NEXT = np.array([3, 5], np.int32)


class ExactLayer(cache_utils.QuantizedLayer):
    """What quantizes without loss, for neither of the two libraries that do is needed here."""

    def _quantize(self, tensor, axis):
        return tensor.clone()

    def _dequantize(self, quantized):
        return quantized


@pytest.fixture(scope="module")
def hf_model():
    config = transformers.AutoConfig.for_model(**hf_config("llama"))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.load_state_dict({name: torch.from_numpy(t) for name, t in weights("llama").items()})
    return model.eval()


@pytest.fixture(scope="module")
def expected(hf_model):
    """The logits of each prompt's next token."""
    with torch.no_grad():
        alone = (
            torch.tensor([[*prompt, token]]) for prompt, token in zip(PROMPTS, NEXT, strict=True)
        )
        return np.stack([hf_model(ids).logits[0, -1].numpy() for ids in alone])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_checkpoint("llama", tmp_path_factory.mktemp("checkpoint")))[0]


@jit
def step(model, tokens, cache):
    return model(tokens, cache)


def padded(side):
    """The prompts as a rectangle, and its attention mask."""
    ids, mask = np.zeros((2, TOKENS), int), np.zeros((2, TOKENS), int)
    for row, prompt in enumerate(PROMPTS):
        where = slice(TOKENS - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, where], mask[row, where] = prompt, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def run(hf_model, cache, side="left"):
    """All tokens but one, and then that one; the mask comes back."""
    ids, mask = padded(side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # what generate gives
    with torch.no_grad():
        for part in (slice(0, TOKENS - 1), slice(TOKENS - 1, TOKENS)):
            hf_model(
                ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=positions[:, part],
                **{_name_of_the_cache(hf_model): cache},
            )
    return mask


def _name_of_the_cache(hf_model):
    """A model's argument: `cache` from transformers 5.24 on."""
    known = inspect.signature(hf_model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def windowed(config, window):
    config = copy.deepcopy(config)
    config.sliding_window = window
    return config


def offloaded(config):
    cache = transformers.DynamicCache()
    offload = cache.update

    def update(keys, values, layer, *others, **more):
        states = offload(keys, values, layer, *others, **more)
        cache.layers[layer].offload()
        return states

    cache.update = update
    return cache


# Each by what it is made with: the model's config.
GO_ON = {
    "DynamicCache": lambda config: transformers.DynamicCache(),
    "DynamicCache, a config": lambda config: transformers.DynamicCache(config=config),
    "DynamicCache, a window": lambda config: transformers.DynamicCache(config=windowed(config, 13)),
    "DynamicCache, offloaded": offloaded,
    "StaticCache": lambda config: transformers.StaticCache(config, max_cache_len=SLOTS),
    "StaticCache, full": lambda config: transformers.StaticCache(config, max_cache_len=TOKENS),
    "StaticCache, a window": lambda config: transformers.StaticCache(
        windowed(config, 13), max_cache_len=SLOTS
    ),
    "QuantizedCache": lambda config: cache_utils.Cache(layers=[ExactLayer(), ExactLayer()]),
    "QuantizedCache, all quantized": lambda config: cache_utils.Cache(
        layers=[ExactLayer(residual_length=1), ExactLayer(residual_length=1)]
    ),
}


@pytest.mark.parametrize(
    ("kind", "side"), [(kind, "left") for kind in GO_ON] + [("DynamicCache", "right")]
)
def test_the_next_token_is_that_of_each_prompt_alone(hf_model, model, expected, kind, side):
    filled = GO_ON[kind](hf_model.config)
    mask = run(hf_model, filled, side)
    cache = from_hf(filled, max_context_length=SLOTS, attention_mask=mask)
    assert cache.lengths.tolist() == [TOKENS, SHORT]
    logits, cache = step(model, jnp.asarray(NEXT)[:, None], cache)
    np.testing.assert_allclose(logits[:, 0], expected, atol=2e-4)
    assert cache.lengths.tolist() == [TOKENS + 1, SHORT + 1]


def test_chunks_of_a_padded_batch():
    """Six tokens at a time, of which the shorter sequence has one in the second chunk."""
    original = filled(transformers.DynamicCache(), TOKENS)
    cache = from_hf(
        original,
        max_context_length=SLOTS,
        attention_mask=padded("left")[1].bool(),
        addressing=jaxkv.Ring(TOKENS, chunk=6),
    )
    for row, prompt in enumerate(PROMPTS):
        pairs = to_hf(jaxkv.select(cache, np.array([row])))
        for layer, pair in zip(original.layers, pairs, strict=True):
            for theirs, ours in zip((layer.keys, layer.values), pair, strict=True):
                np.testing.assert_array_equal(ours, theirs[row : row + 1, :, -len(prompt) :])


def test_a_single_sequence_of_a_static_cache():
    original = filled(transformers.StaticCache(CONFIG, max_cache_len=SLOTS), batch=1)
    cache = from_hf(original, max_context_length=SLOTS, single=True)
    assert (cache.config.batch_size, cache.lengths.tolist()) == (None, 5)
    for layer, (keys, values) in zip(original.layers, to_hf(cache), strict=True):
        np.testing.assert_array_equal(keys, layer.keys[:, :, :5])
        np.testing.assert_array_equal(values, layer.values[:, :, :5])


# --- what is refused ---------------------------------------------------------------------------


def filled(cache, tokens=5, layers=range(LAYERS), batch=2):
    torch.manual_seed(0)
    for layer in layers:
        for size in (tokens - 1, 1):
            start = 0 if size > 1 else tokens - 1
            states = torch.randn(2, batch, 3, size, 4)
            cache.update(*states, layer, {"cache_position": torch.arange(start, start + size)})
    return cache


def made(name):
    """One of a class in a model's module, without what it keeps."""
    module, kind = name.split(".")
    module = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    if not hasattr(module, kind):
        pytest.skip(f"this transformers has no {kind}")
    return object.__new__(getattr(module, kind))


def minimax():
    kind = type(made("minimax.MiniMaxCache"))
    return filled(kind())


class LinearAttentionLayer(cache_utils.DynamicLayer):
    """As later versions have: keys, values, and a recurrent state."""


def with_a_zero_key():
    cache = cache_utils.Cache(layers=[cache_utils.StaticLayer(8)])
    keys = torch.ones(2, 3, 5, 4)
    keys[0, 0, 2] = 0
    cache.update(keys, keys, 0)
    if cache.get_seq_length() == 5:
        pytest.skip("this transformers counts tokens without looking at keys")
    return cache


CONFIG = transformers.LlamaConfig(num_hidden_layers=LAYERS, num_key_value_heads=3, head_dim=4)
WINDOWED = windowed(CONFIG, 4)
OTHER_STATE = "may keep other state than keys and values"
REFUSED = {
    "encoder-decoder": (
        lambda: transformers.EncoderDecoderCache(
            filled(transformers.DynamicCache()), filled(transformers.DynamicCache())
        ),
        "Give its self_attention_cache",
    ),
    "a window that has dropped tokens": (
        lambda: filled(transformers.DynamicCache(config=WINDOWED)),
        "DynamicSlidingWindowLayer, counts 5 tokens and holds 3",
    ),
    "a static window that has": (
        lambda: filled(transformers.StaticCache(WINDOWED, max_cache_len=8)),
        "StaticSlidingWindowLayer, counts 5 tokens and holds 4",
    ),
    "a static cache with a key of zeros": (with_a_zero_key, "counts 4 tokens and holds 5"),
    "nothing run": (lambda: transformers.DynamicCache(config=CONFIG), "DynamicLayer, is empty"),
    "nothing run, static": (
        lambda: transformers.StaticCache(CONFIG, max_cache_len=8),
        "StaticLayer, is empty",
    ),
    "a layer that was passed over": (
        lambda: filled(transformers.DynamicCache(), layers=[1]),
        "layer 0, a DynamicLayer, is empty",
    ),
    "no layers": (transformers.DynamicCache, "the same in all layers, got"),
    "layers of unlike lengths": (
        lambda: filled(filled(transformers.DynamicCache()), layers=[1]),
        "the same in all layers, got",
    ),
    "a layer with other state": (
        lambda: filled(cache_utils.Cache(layers=[LinearAttentionLayer() for _ in range(LAYERS)])),
        "layer 0, a LinearAttentionLayer, may keep other state",
    ),
    "linear attention": (minimax, f"a MiniMaxCache, which {OTHER_STATE}"),
    "what iterating yields": (
        lambda: list(filled(transformers.DynamicCache())),
        "must be a pair .keys, values., got 3 entries",
    ),
} | {
    name: (lambda name=name: made(name), f"a {name.split('.')[1]}, which {OTHER_STATE}")
    for name in (
        "mamba.MambaCache",
        "jamba.HybridMambaAttentionDynamicCache",
        "lfm2.Lfm2HybridConvCache",
        "qwen3_next.Qwen3NextDynamicCache",
        "reformer.ReformerDynamicCache",
        "xlstm.xLSTMCache",
    )
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_known_is_refused_by_name(kind):
    make, message = REFUSED[kind]
    with pytest.raises((TypeError, ValueError), match=message):
        from_hf(make(), max_context_length=8)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((2, 6), int), r"= \[2, 5\], a column for each token in the cache, got \[2, 6\]"),
        (
            [[1, 1, 1, 1, 1], [1, 0, 0, 1, 1]],
            r"sequence 1 .* between its tokens, \[1, 0, 0, 1, 1\]",
        ),
    ],
)
def test_a_mask_that_does_not_say_it(mask, message):
    with pytest.raises(ValueError, match=message):
        from_hf(filled(transformers.DynamicCache()), max_context_length=8, attention_mask=mask)
