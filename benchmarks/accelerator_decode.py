"""Decode of whole models on an accelerator, and what share that is of reading their bytes once."""

import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxkv
from benchmarks.caches import compile_fill, filled
from benchmarks.measure import interleaved
from benchmarks.report import Row, Table, target
from jaxkv.models import Decoder, DecoderConfig, load
from jaxkv.serve.decode import TOKENS_PER_DISPATCH, Program, State
from jaxkv.serve.model_step import Model, ModelStep, Weights
from jaxkv.show.text import format_bytes

_SHAPE = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}  # Llama-3-8B
# Prompts, tokens that each holds already, and the cache's codec.
STATES = ((1, 1000, "bfloat16"), (8, 8000, "bfloat16"))
MORE_STATES = ((8, 8000, "int8"), (8, 8000, "rotated4"))
_DISPATCHES = 6
_TOKENS = (1, 5, 8)  # of a sequence, in a step


def generate() -> Table:
    """The embedded model, from prompts."""
    model, tokenizer = load()
    prompt = tokenizer.encode("class Stack:\n    def push(self, item):\n").ids
    result = jaxkv.generate(model, [prompt] * 4, max_new_tokens=256)
    timings = result.timings
    row = {
        "model": "embedded, 4 prompts",
        "decode tokens/s": timings.decode_tokens_per_second,
        "prefill tokens/s": timings.prefill_tokens_per_second,
        "compile s": timings.compile_seconds,
    }
    return Table("Generate", [row], [f"It went on: {tokenizer.decode(result.tokens[0])[:60]!r}"])


def decode(model: Decoder, states: Sequence[tuple[int, int, str]]) -> Table:
    """Steps of Llama-3-8B's shapes, after many tokens."""
    program = Program.of(model, jaxkv.Sampling(), ())
    configs = [cache_config(model, batch, length, codec) for batch, length, codec in states]
    started = time.perf_counter()
    with ThreadPoolExecutor() as pool:  # of them all, since it takes longer than decoding
        lengths = (length for _, length, _ in states)
        list(pool.map(functools.partial(_compile, program), configs, lengths))
    compiled = time.perf_counter()
    # Of the table of embeddings a token reads one row.
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    weights = held - model.embed_tokens.weight[...].nbytes
    reading = _reading_rate()
    rows: list[Row] = []
    for (batch, length, codec), config in zip(states, configs, strict=True):
        step = decoding(program, config, length)
        step()
        seconds = statistics.median(step() for _ in range(_DISPATCHES)) / TOKENS_PER_DISPATCH
        read = weights + config.size_bytes * length // config.max_context_length
        rows.append(
            {
                "sequences": f"{batch} x {length:,}, {codec}",
                "ms a step": seconds * 1e3,
                "limit ms": read / reading * 1e3,
                "share of limit": read / reading / seconds,
                "tokens/s": batch / seconds,
            }
        )
        print(" ", *rows[-1].values(), file=sys.stderr, flush=True)
        del step
    note = (
        f"{TOKENS_PER_DISPATCH} steps a dispatch, greedy. Limit: {format_bytes(weights)} of "
        f"weights and the cache's tokens, read once at {reading / 1e9:,.0f} GB/s, XLA's sum. "
        f"Compiling took {compiled - started:.0f} s."
    )
    layers = model.config.num_layers
    return Table(f"Decode: {layers} layers of Llama-3-8B, random weights, bfloat16", rows, [note])


def few_tokens(model: Decoder) -> Table:
    """What a step takes longer for several tokens of each sequence, as a draft asks for."""
    rows: list[Row] = []
    notes, weights = [], Weights.of(model)
    configs = [cache_config(model, *state) for state in STATES]
    shapes = [jax.eval_shape(functools.partial(jaxkv.create, config)) for config in configs]
    compilations = [
        _step.compilation(weights, jnp.ones((shape.config.batch_size, tokens), jnp.int32), shape)
        for shape, tokens in itertools.product(shapes, _TOKENS)
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda compilation: compilation(), compilations))
    for (batch, length, _), config in zip(STATES, configs, strict=True):
        cache, times = filled(config, length), {}
        for tokens in _TOKENS:
            given = jnp.ones((batch, tokens), jnp.int32)

            def call(given=given):
                nonlocal cache
                for _ in range(TOKENS_PER_DISPATCH):
                    chosen, cache = _step(weights, given, cache)
                return chosen

            measured = interleaved({"step": call}, repeats=_DISPATCHES)["step"]
            times[tokens] = measured.seconds / TOKENS_PER_DISPATCH
            row = {"sequences": f"{batch} x {length:,}", "tokens": tokens}
            rows.append(row | {"ms a step": times[tokens] * 1e3})
            print(" ", *rows[-1].values(), file=sys.stderr, flush=True)
        share = times[5] / times[1]
        notes.append(target(f"{batch} x {length:,}, 5 tokens over 1", share, 1.15, at_most=True))
    return Table("Steps of several tokens, Llama-3-8B shapes, bfloat16", rows, notes)


@functools.partial(ModelStep, donated=[1], few_rows=True)
def _step(model: Model, tokens: jax.Array, cache: jaxkv.KVCache) -> tuple[jax.Array, jaxkv.KVCache]:
    logits, after = model(tokens, cache)
    return logits.argmax(axis=-1), jaxkv.truncate(after, cache.lengths[0])


def llama(layers: int) -> Decoder:
    """Llama-3-8B's shapes with random weights."""
    config = DecoderConfig(**_SHAPE, num_layers=layers, num_heads=32, num_kv_heads=8, head_dim=128)
    return Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)


def cache_config(model: Decoder, batch: int, length: int, codec: str) -> jaxkv.KVCacheConfig:
    """Room for these tokens and for those that are decoded here."""
    slots = 64 * (-(-length // 64) + 4)
    return model.cache_config(
        max_context_length=slots, batch_size=batch, codec=jaxkv.codecs.CODECS[codec]
    )


def _compile(program: Program, config: jaxkv.KVCacheConfig, length: int) -> None:
    compile_fill(config, length)
    cache = jax.eval_shape(functools.partial(jaxkv.create, config))
    program.compile_decode(_state(config), cache)


def _state(config: jaxkv.KVCacheConfig) -> State:
    return State(*(np.full(config.batch_size, number, np.int32) for number in (1, 1 << 30, 0)))


def decoding(program: Program, config: jaxkv.KVCacheConfig, length: int) -> Callable[[], float]:
    """A call that decodes after ``length`` tokens of noise, and gives its seconds."""
    holder = [filled(config, length)]

    def step() -> float:
        started = time.perf_counter()
        _, cache, new = program.decode(_state(config), holder[0])
        jax.block_until_ready(new)
        elapsed = time.perf_counter() - started
        holder[0] = jaxkv.truncate(cache, length)
        return elapsed

    return step


def _reading_rate() -> float:
    """Bytes a second at which XLA sums an array, many times as large as the device's L2."""
    array = jnp.ones(1 << 31, jnp.uint16)
    total = jax.jit(jnp.sum)
    times = interleaved({"sum": lambda: total(array)}, repeats=9, calls=10)
    return array.nbytes / times["sum"].seconds
