"""The engine: pages beside one run of slots, time to the first token, requests together."""

import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxkv
from benchmarks import engine_peers
from benchmarks.caches import filled
from benchmarks.decode import MODEL
from benchmarks.measure import Timing, interleaved
from benchmarks.report import Row, Table, missing, target
from jaxkv.models import Decoder, DecoderConfig
from jaxkv.serve.decode import TOKENS_PER_DISPATCH, Program, State

_PAGE = 16
# Seconds, and the answers.
Sample = tuple[float, list[list[int]]]


def run(quick: bool) -> Iterator[Table]:
    """On the 12 layers of the decode benchmark."""
    model = Decoder(MODEL, rngs=nnx.Rngs(0))
    yield _paged_decode(model, 5 if quick else 9)
    yield _first_tokens(model, 3 if quick else 7)
    yield _throughput(model, 8 if quick else 24, 2 if quick else 3)


def _paged_decode(model: Decoder, repeats: int) -> Table:
    """`jaxkv.generate`'s decode loop over 4,096 tokens, in one run of slots and in pages."""
    context, room = 4096, 512
    timings = interleaved(
        {
            name: _loop(model, addressing, context, room)
            for name, addressing in (
                ("contiguous", jaxkv.Contiguous()),
                ("paged", jaxkv.Paged(_PAGE)),
                ("paged, pages shuffled", None),
            )
        },
        repeats=repeats,
    )
    base = timings["contiguous"].seconds
    rows: list[Row] = [
        {
            "addressing": name,
            "tokens/s": TOKENS_PER_DISPATCH / timing.seconds,
            "spread %": 100 * timing.spread,
            "x the time of contiguous": timing.seconds / base,
        }
        for name, timing in timings.items()
    ]
    slowest = max(row["x the time of contiguous"] for row in rows)
    notes = [f"{context:,} tokens in the cache, one sequence, greedy, float32, pages of {_PAGE}."]
    goal = target("time over contiguous", slowest, 1.1, at_most=True)
    return Table("Paged decode", rows, [*notes, goal])


def _loop(
    model: Decoder, addressing: jaxkv.Addressing | None, context: int, room: int
) -> Callable[[], jax.Array]:
    config = model.cache_config(
        max_context_length=context + room,
        batch_size=1,
        addressing=addressing or jaxkv.Paged(_PAGE),
    )
    cache = filled(config, context)
    if addressing is None:  # the values are noise, so any page may stand for any other
        order = np.random.default_rng(0).permutation(cache.index.table.shape[-1])
        index = cache.index.with_table(jnp.asarray(order[None], jnp.int32))
        cache = jaxkv.KVCache(cache.storage, index, config)
    program, holder = Program.of(model, jaxkv.Sampling(), stop_tokens=()), [cache]

    def call() -> jax.Array:
        one = np.ones(1, np.int32)
        state = State(last=one, remaining=TOKENS_PER_DISPATCH * one, seeds=one)
        cache = jaxkv.truncate(holder[0], context)
        _, holder[0], new = program.decode(state, cache)
        return new.tokens

    return call


def _engine(model: Decoder, context: int, rows: int, num_pages: int) -> jaxkv.Engine:
    config = model.cache_config(
        max_context_length=context,
        batch_size=rows,
        addressing=jaxkv.Paged(_PAGE, num_pages),
    )
    return jaxkv.Engine(model, config)


# Layers with a state beside those that attend, three to one, as their families have them.
_PLAIN = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}
_STATEFUL = {
    "Qwen3-Next": _PLAIN
    | {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "head_dim": 64}
    | {"layer_types": (3 * ["linear_attention"] + ["full_attention"]) * 2}
    | {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64}
    | {"linear_value_head_dim": 64, "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.25}
    | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    | {"shared_expert_intermediate_size": 256},
    "Bamba (Mamba-2)": _PLAIN
    | {"architectures": ["BambaForCausalLM"], "model_type": "bamba", "attn_layer_indices": [3, 7]}
    | {"mamba_n_heads": 16, "mamba_n_groups": 1, "mamba_d_state": 64, "mamba_d_conv": 4}
    | {"mamba_expand": 2, "mamba_d_head": "auto", "partial_rotary_factor": 0.5},
}


def _first_tokens(model: Decoder, repeats: int) -> Table:
    """New prompts of which 90 % is in the pool, beside new prompts."""
    length, rows, goals = 2048, [], []
    models = {"attention alone": model} | {
        name: Decoder(DecoderConfig.from_hf(config), rngs=nnx.Rngs(0))
        for name, config in _STATEFUL.items()
    }
    for name, each in models.items():
        found, shared = _first_token(each, length, repeats)
        gain = found["nothing shared"].seconds / found["90 % shared"].seconds
        rows += [
            {
                "layers": name,
                "prompt": prompt,
                "ms to the first token": 1e3 * timing.seconds,
                "spread %": 100 * timing.spread,
                "MB of snapshots": shared / 1e6 if prompt.startswith("90") else None,
            }
            for prompt, timing in found.items()
        ]
        goals.append(target(f"gain, {name}", gain, 5.0))
    notes = [
        f"Prompts of {length:,} tokens, each new, in turns; the 12 layers of the decode benchmark, "
        "and 8 random ones of each kind with a state, three of them to one that attends. A hit "
        "ends at a multiple of 128 tokens, the prefill chunk, so 256 tokens are computed."
    ]
    return Table("Time to first token", rows, [*notes, *goals])


def _first_token(model: Decoder, length: int, repeats: int) -> tuple[dict[str, Timing], int]:
    """The time from each kind of prompt to its first token, and the bytes of snapshots of state."""
    rng = np.random.default_rng(0)
    with _engine(model, 2560, 1, 600) as engine:
        shared = rng.integers(0, model.vocab_size, length * 9 // 10)

        def wait(start: np.ndarray) -> float:
            rest = rng.integers(0, model.vocab_size, length - len(start))
            request = engine.submit([*start.tolist(), *rest.tolist()], max_new_tokens=1)
            engine.run()
            return request.first_token - request.submitted

        for _ in range(3):  # the pages; where prompts part, a snapshot; a hit
            wait(shared)
        samples: dict[str, list[float]] = {"nothing shared": [], "90 % shared": []}
        for _ in range(repeats):
            samples["nothing shared"].append(wait(shared[:0]))
            samples["90 % shared"].append(wait(shared))
        engine.pages.check()
        size = engine.figures.snapshot_bytes
    return {name: Timing.of(times) for name, times in samples.items()}, size


def _throughput(model: Decoder, count: int, repeats: int) -> Table:
    """A queue of requests: the engine, one after the other, and transformers' own batching."""
    rng = np.random.default_rng(0)
    new_tokens = 64
    prompts = [rng.integers(0, MODEL.vocab_size, n).tolist() for n in rng.integers(16, 257, count)]
    engine = _engine(model, 512, 8, 256)

    def together() -> Sample:
        engine.pages.forget()  # or the second time all prompts are there
        requests = [engine.submit(prompt, max_new_tokens=new_tokens) for prompt in prompts]
        started = time.perf_counter()
        engine.run()
        return time.perf_counter() - started, [request.tokens for request in requests]

    def one_by_one() -> Sample:
        seconds, answers = 0.0, []
        for prompt in prompts:
            result = jaxkv.generate(
                model, [prompt], max_new_tokens=new_tokens, max_context_length=512
            )
            seconds += result.timings.prefill_seconds + result.timings.decode_seconds
            answers += result.tokens
        return seconds, answers

    competitors: dict[str, Callable[[], Sample]] = {
        "jaxkv.Engine": together,
        "jaxkv.generate": one_by_one,
    }
    absent = missing("torch", "transformers") or engine_peers.missing_batching()
    if absent is None:
        peer = engine_peers.ContinuousBatching(model)
        competitors[engine_peers.NAME] = lambda: peer(prompts, new_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    answers: dict[str, list[list[int]]] = {}
    for turn in range(1 + repeats):  # the first compiles
        for name, call in competitors.items():
            taken, answers[name] = call()
            if turn:
                seconds[name].append(taken)
    timings = {name: Timing.of(samples) for name, samples in seconds.items()}
    expected = answers["jaxkv.generate"]
    base = timings["jaxkv.generate"].seconds
    rows: list[Row] = [
        {
            "engine": name,
            "tokens/s": count * new_tokens / timing.seconds,
            "spread %": 100 * timing.spread,
            "x one by one": base / timing.seconds,
            "same tokens": f"{sum(a == b for a, b in zip(answers[name], expected, strict=True))} "
            f"of {count}",
        }
        for name, timing in timings.items()
    ]
    if absent:
        rows.append({"engine": f"transformers: {absent}"})
    notes = [
        f"{count} requests, prompts of 16 to 256 tokens, {new_tokens} new tokens each, greedy, "
        f"float32, 8 rows, pool of 4,096 tokens, the 12 layers of the decode benchmark. Prefill "
        f"included, nothing shared. jaxkv.generate: one prompt after the other, the time to "
        f"compile not counted. transformers runs on the CPU, where its batching has no paged "
        f"kernel, with a pool of as many tokens."
    ]
    ours = timings["jaxkv.Engine"].seconds
    goals = [target("over one by one", base / ours, 1.0)]
    if engine_peers.NAME in timings:
        goals.append(target("over transformers", timings[engine_peers.NAME].seconds / ours, 1.0))
    engine.close()
    return Table("Engine throughput", rows, notes + goals)
