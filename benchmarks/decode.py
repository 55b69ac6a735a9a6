"""Decode, end to end: tokens a second of a 12-layer Llama beside its peers, same weights."""

import functools
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxkv
from benchmarks import decode_peers
from benchmarks.caches import filled
from benchmarks.measure import ReadLimit, Timing, interleaved
from benchmarks.report import Row, Table, missing, target
from jaxkv.models import Decoder, DecoderConfig
from jaxkv.serve.decode import TOKENS_PER_DISPATCH, Program, State
from jaxkv.serve.sampling import Sampling

MODEL = DecoderConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1408,
    num_layers=12,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
)
_TOKENS = TOKENS_PER_DISPATCH  # a call of each competitor, always from the same context
_ROOM = 512  # slots after the context
_LOOP, _STEPS = "jaxkv, on-device loop", "jaxkv, one step a call"
_NNX_CONTEXT = 4096
# Tokens a second over the faster cache of transformers, by context.
_GOALS = {512: 2.0, 4096: 2.0, 16384: 2.0}
_NNX_GOAL = 2.0
# Tokens after a prefill: the first ones, beside those that come later.
_FIRST, _ALL, _PREFILL_CHUNK = 20, 80, 512
_MOST_OVER_LATER = 1.2


def run(quick: bool) -> Iterator[Table]:
    """One table a context length."""
    repeats = 5 if quick else 9
    model, limit = Decoder(MODEL, rngs=nnx.Rngs(0)), ReadLimit()
    absent = missing("torch", "transformers")
    peer = None if absent else decode_peers.Transformers(model)
    how = [
        f"{MODEL.num_layers} layers, width {MODEL.hidden_size}, {MODEL.num_heads}/"
        f"{MODEL.num_kv_heads} heads of {MODEL.head_dim}, float32, one sequence, greedy. {_TOKENS} "
        "tokens a call, always from the same context, which is in the cache already; "
        f"{_ROOM} slots of room. Medians, all in turns. Limit: the time in which a plain "
        "sum reads the weights and the used cache, as every token must. transformers runs eagerly, "
        "on the same weights and cache; flax.nnx has random weights of these shapes, and no rope."
    ]
    for context in (512, 4096) if quick else (512, 4096, 16384):
        config = model.cache_config(max_context_length=context + _ROOM, batch_size=1)
        needed = _weight_bytes(model) + context * config.bytes_per_token
        timings = _measure(model, peer, filled(config, context), limit, repeats)
        rows = _rows(timings, needed)
        if absent:
            rows.append({"decoder": f"transformers: {absent}"})
        if context == _NNX_CONTEXT and decode_peers.nnx_missing():
            rows.append({"decoder": f"flax.nnx cache: {decode_peers.nnx_missing()}"})
        title = f"Decode: {context:,} tokens in the cache, {needed / 1e6:.0f} MB to read a token"
        yield Table(title, rows, how + _goals(context, timings))
        how = []
    yield _first_tokens(model, (512, 4096) if quick else (512, 4096, 16384))


def _first_tokens(model: Decoder, contexts: tuple[int, ...]) -> Table:
    """What an answer begins with: a short one is nothing else."""
    rows: list[Row] = []
    for context in contexts:
        step = _Steps(model, [], context)
        for _ in range(2):
            seconds = step.after_prefill()
            first, later = statistics.mean(seconds[:_FIRST]), statistics.mean(seconds[_FIRST:])
            row = {"context": context, "ms a token, 1-20": 1e3 * first, "later": 1e3 * later}
            rows.append(row | {"over later": first / later})
    worst = max(row["over later"] for row in rows)
    how = [
        f"A new cache and a prefill in chunks of {_PREFILL_CHUNK}, then {_ALL} tokens, one jitted "
        f"step each: the mean of the first {_FIRST} and that of the others. Twice each."
    ]
    goal = target("tokens 1-20 over later ones", worst, _MOST_OVER_LATER, at_most=True)
    return Table("The first tokens after a prefill", rows, [*how, goal])


def _measure(
    model: Decoder,
    peer: "decode_peers.Transformers | None",
    cache: jaxkv.KVCache,
    limit: ReadLimit,
    repeats: int,
) -> dict[str, Timing]:
    context = int(cache.lengths[0])
    competitors: dict[str, Callable] = {ReadLimit.NAME: limit}
    if peer is not None:
        _check_agreement(model, cache, peer.logits(cache, context))
        competitors |= peer.competitors(cache, context, _TOKENS)
    if context == _NNX_CONTEXT and not decode_peers.nnx_missing():
        competitors |= decode_peers.nnx_competitors(MODEL, context, _ROOM, _TOKENS)
    holder = [cache]  # one cache for both: each call donates it and puts it back
    competitors[_LOOP] = _Loop(model, holder, context)
    competitors[_STEPS] = _Steps(model, holder, context)
    return interleaved(competitors, repeats=repeats)


def _rows(timings: dict[str, Timing], needed_bytes: int) -> list[Row]:
    limit = ReadLimit.size_bytes / timings[ReadLimit.NAME].seconds / needed_bytes
    peer = _fastest(timings, decode_peers.TRANSFORMERS)
    rows = []
    for name, timing in timings.items():
        rate = limit if name == ReadLimit.NAME else _TOKENS / timing.seconds
        row = {
            "decoder": name,
            "tokens/s": rate,
            "spread %": 100 * timing.spread,
            "repeats": timing.repeats,
            "ms a token": 1e3 / rate,
            "% of limit": 100 * rate / limit,
            "x transformers": rate / peer if peer else None,
        }
        rows.append(row)
    return rows


def _goals(context: int, timings: dict[str, Timing]) -> list[str]:
    ours = _fastest(timings, (_LOOP, _STEPS))
    goals = []
    if peer := _fastest(timings, decode_peers.TRANSFORMERS):
        goals.append(target("over transformers", ours / peer, _GOALS[context]))
    if peer := _fastest(timings, decode_peers.NNX):
        goals.append(target("over flax.nnx", ours / peer, _NNX_GOAL))
    return goals


def _fastest(timings: dict[str, Timing], names: tuple[str, ...]) -> float:
    """Tokens a second of the best of these; 0 if none ran."""
    return max((_TOKENS / timings[name].seconds for name in names if name in timings), default=0.0)


def _weight_bytes(model: Decoder) -> int:
    """All weights but the embedding table, of which a token reads one row."""
    table = model.embed_tokens.weight[...]
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) - table.nbytes


class _Loop:
    """The decode loop of `jaxkv.generate`, one dispatch of it a call."""

    def __init__(self, model: Decoder, holder: list[jaxkv.KVCache], context: int):
        self.program = Program.of(model, Sampling(), stop_tokens=())
        self.holder, self.context = holder, context

    def __call__(self) -> jax.Array:
        cache = jaxkv.truncate(self.holder[0], self.context)
        one = np.ones(1, np.int32)
        state = State(last=one, remaining=_TOKENS * one, seeds=one)
        _, self.holder[0], new = self.program.decode(state, cache)
        return new.tokens


class _Steps:
    """A Python loop around one jitted step, which sees every token as it comes."""

    def __init__(self, model: Decoder, holder: list[jaxkv.KVCache], context: int):
        self.weights, structure = jax.tree.flatten(model)
        self.holder, self.context, self.model = holder, context, model

        @functools.partial(jax.jit, donate_argnames="cache")
        def step(weights, tokens, cache):
            logits, cache = structure.unflatten(weights)(tokens, cache)
            return jnp.argmax(logits[:, -1], axis=-1), cache

        self.step = step

    def __call__(self) -> list[int]:
        cache, tokens = jaxkv.truncate(self.holder[0], self.context), [1]
        for _ in range(_TOKENS):
            token, cache = self.step(self.weights, np.int32([tokens[-1:]]), cache)
            tokens.append(int(token[0]))
        self.holder[0] = cache
        return tokens

    def after_prefill(self) -> list[float]:
        """Seconds of each token that follows on a prefill into a new cache."""
        config = self.model.cache_config(max_context_length=self.context + _ROOM, batch_size=1)
        cache, seconds = jaxkv.create(config), []
        chunk, one = np.ones((1, _PREFILL_CHUNK), np.int32), np.ones((1, 1), np.int32)
        prefill, step = (
            self.step.lower(self.weights, tokens, cache).compile() for tokens in (chunk, one)
        )
        for _ in range(self.context // _PREFILL_CHUNK):
            token, cache = prefill(self.weights, chunk, cache)
        token = np.int32(token)
        for _ in range(_ALL):
            started = time.perf_counter()
            token, cache = step(self.weights, token[:, None], cache)
            token = np.int32(token)
            seconds.append(time.perf_counter() - started)
        return seconds


def _check_agreement(model: Decoder, cache: jaxkv.KVCache, expected: np.ndarray) -> None:
    """The peer has the same weights and cache, so it must say the same of the next token."""
    logits, _ = jax.jit(model.__call__)(jnp.ones((1, 1), jnp.int32), cache)
    worst = np.abs(np.asarray(logits[0, -1]) - expected).max()
    if not worst < 1e-3:
        raise RuntimeError(f"logits differ from transformers' by {worst}: no comparison.")
