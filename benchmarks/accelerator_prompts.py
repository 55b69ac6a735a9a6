"""Whole models on an accelerator, from prompts: time to the first token, and many requests."""

import functools
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import jaxkv
from benchmarks.report import Row, Table, target
from jaxkv.models import Decoder

SIZES = ((1, 8000), (8, 2000), (1, 1000))  # prompts, tokens of each
_REQUESTS, _NEW_TOKENS = 64, 128
_SEED = 0
# Of pages that the requests above may take, all at once.
_PAGE, _TOKENS_HELD = 64, 65536


def peer_of(model: Decoder) -> "Transformers | None":
    """A model of as many layers in transformers, where that is."""
    found = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    here = found and jax.default_backend() == "gpu"
    return Transformers(model.config.num_layers) if here else None


def first_tokens(model: Decoder, peer: "Transformers | None") -> Table:
    rows: list[Row] = []
    notes: list[str] = []
    for batch, tokens in SIZES:
        given = _random_prompts([tokens] * batch)
        calls: dict[str, Callable[[], Any]] = {
            "jaxkv.generate": functools.partial(_first, model, given)
        }
        if peer is not None:
            calls["transformers"] = functools.partial(peer.first, given)
        seconds = {what: _median_of(call) for what, call in calls.items()}
        for what, taken in seconds.items():
            rows.append({"prompts": f"{batch} x {tokens:,}", "what": what, "ms": taken * 1e3})
            print(" ", *rows[-1].values(), file=sys.stderr, flush=True)
        if peer is not None:
            share = seconds["jaxkv.generate"] / seconds["transformers"]
            notes.append(
                target(f"{batch} x {tokens:,}, of transformers' time", share, 1.0, at_most=True)
            )
    return Table("Time to the first token, Llama-3-8B shapes, bfloat16", rows, notes)


def _first(model: Decoder, given: list[list[int]]) -> None:
    jaxkv.generate(model, given, max_new_tokens=1)


def requests(model: Decoder, peer: "Transformers | None") -> Table:
    """A queue of requests, all there from the beginning."""
    lengths = np.random.default_rng(_SEED).integers(256, 1025, _REQUESTS)
    given = _random_prompts(lengths)
    pool = jaxkv.Paged(_PAGE, _TOKENS_HELD // _PAGE)
    config = model.cache_config(max_context_length=1280, batch_size=_REQUESTS, addressing=pool)
    rows: list[Row] = []
    with jaxkv.Engine(model, config) as engine:

        def together() -> None:
            engine.pages.forget()  # or the second time all prompts are there
            for prompt in given:
                engine.submit(prompt, max_new_tokens=_NEW_TOKENS)
            engine.run()

        started = time.perf_counter()
        together()
        first = time.perf_counter() - started
        taken = _median_of(together)
    rows.append({"engine": "jaxkv.Engine", "s": taken, "with compilation s": first})
    print(" ", *rows[-1].values(), file=sys.stderr, flush=True)
    notes = [
        f"{_REQUESTS} requests, {lengths.sum():,} prompt tokens (256 to 1,024 each), "
        f"{_NEW_TOKENS} new tokens each, greedy, the defaults of Engine.",
        target("seconds", taken, 2.5, at_most=True),
        target("seconds of compilation", first - taken, 20.0, at_most=True),
    ]
    if peer is not None:
        try:
            rows.append(
                {"engine": "transformers, generate_batch", "s": peer.together(given, _NEW_TOKENS)}
            )
            print(" ", *rows[-1].values(), file=sys.stderr, flush=True)
        except Exception as error:  # its batching is young, and another's failure is not ours
            rows.append({"engine": f"transformers: {type(error).__name__}: {str(error)[:200]}"})
    return Table("Engine, Llama-3-8B shapes, bfloat16", rows, notes)


def _random_prompts(lengths: Sequence[int]) -> list[list[int]]:
    rng = np.random.default_rng(_SEED)
    return [rng.integers(1, 128000, length).tolist() for length in lengths]


def _median_of(call: Callable[[], Any], repeats: int = 3) -> float:
    """Seconds; the first call is not counted."""
    seconds = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


class Transformers:
    """A LlamaForCausalLM of the same shapes, with random weights of its own."""

    def __init__(self, layers: int):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        config = transformers.LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=16384,
            attn_implementation="sdpa", eos_token_id=None, bos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            self.model = transformers.LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)

    def first(self, given: list[list[int]]) -> None:
        import torch

        ids = torch.tensor(given, device="cuda")
        with torch.no_grad():
            output = self.model(ids, use_cache=True, logits_to_keep=1)
            output.logits.argmax(-1).tolist()

    def together(self, given: list[list[int]], new_tokens: int) -> float:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        wanted = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        own = ContinuousBatchingConfig(max_batch_tokens=2048)
        started = time.perf_counter()
        self.model.generate_batch(
            inputs=given, generation_config=wanted, continuous_batching_config=own, warmup=False
        )
        return time.perf_counter() - started
