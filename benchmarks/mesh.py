"""A cache over several devices of one host: what each holds, what moves, and what it gains.

``XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m benchmarks mesh`` runs it, at small
sizes, on a CPU.
"""

import functools
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxkv
from benchmarks.report import Row, Table, target
from jaxkv.cache.axes import Spread
from jaxkv.models import Decoder, DecoderConfig
from jaxkv.models.sharding import sharding_of

_SHAPES = {  # hidden, inner, layers, heads, KV heads
    "Llama-3-8B": (4096, 14336, 32, 32, 8),
    "Llama-3-70B, 8 of 80 layers": (8192, 28672, 8, 64, 8),
}
_SMALL = {"small": (256, 512, 2, 8, 8)}
_COLLECTIVE = re.compile(r"= (.*?) (all-[a-z-]+|collective-permute|reduce-scatter)(?:-start)?\(")
_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1}


def run(quick: bool) -> Iterator[Table]:
    """All splits over as many devices as there are."""
    small = quick or jax.devices()[0].platform == "cpu"
    rates = {
        "read": _read_rate(small),
        "multiply": _multiply_rate(small),
        "link": _link_rate(small),
    }
    yield _limits(rates)
    # In one program, so many that the host's call of it is not what is measured.
    for context, layers in ((16_384, 2),) if small else ((131_072, 32), (1_048_576, 4)):
        yield _split_context(context, layers, rates)
    for name, shape in (_SMALL if small else _SHAPES).items():
        yield _decode(name, shape, 8, 256 if small else 8192, rates)
        yield _prefill(name, shape, 128 if small else 8192, rates)
        yield _serve(name, shape, 4 if small else 16, 128 if small else 1024)


def _counts() -> list[int]:
    return [count for count in (1, 2, 4, 8) if count <= len(jax.devices())]


def _mesh(**sizes: int) -> dict[str, Any]:
    devices = jax.devices()[: math.prod(sizes.values())]
    auto = (AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices)
    return {"mesh": mesh, "axes": jaxkv.Axes(**{what: what for what in sizes})}


def _seconds(call: Callable[[], Any], passes: int = 10) -> float:
    """The least of three means: others only slow it down."""
    jax.block_until_ready(call())
    means = []
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(passes):
            result = call()
        jax.block_until_ready(result)
        means.append((time.perf_counter() - started) / passes)
    return min(means)


def _read_rate(small: bool) -> float:
    """Bytes per second that a sum reads on one device."""
    numbers = jnp.ones((1 << (24 if small else 31),), jnp.bfloat16)
    total = jax.jit(lambda each: each.sum(dtype=jnp.float32))
    return numbers.nbytes / _seconds(functools.partial(total, numbers))


def _multiply_rate(small: bool) -> float:
    """Operations per second of a product of square matrices on one device."""
    size = 512 if small else 8192
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    return 2 * size**3 / _seconds(functools.partial(jax.jit(jnp.matmul), matrix, matrix))


def _link_rate(small: bool) -> float | None:
    """Bytes per second of an all-reduce over all devices: of the result, on each."""
    count = len(jax.devices())
    if count == 1:
        return None
    mesh = jax.make_mesh((count,), ("all",), axis_types=(AxisType.Auto,))
    numbers = jnp.ones((count, 1 << (18 if small else 26)), jnp.bfloat16)
    numbers = jax.device_put(numbers, NamedSharding(mesh, PartitionSpec("all")))

    def add(part: jax.Array) -> jax.Array:
        return jax.lax.psum(part, "all")

    split = PartitionSpec("all")
    summed = jax.jit(jax.shard_map(add, mesh=mesh, in_specs=split, out_specs=PartitionSpec(None)))
    return numbers.nbytes / count / _seconds(functools.partial(summed, numbers))


def _limits(rates: dict[str, Any]) -> Table:
    rows: list[Row] = [
        {"what": "a sum reads, one device, GB/s", "rate": rates["read"] / 1e9},
        {"what": "a product of matrices, one device, TFLOP/s", "rate": rates["multiply"] / 1e12},
    ]
    if rates["link"]:
        what = f"an all-reduce over {len(jax.devices())} devices, GB/s of its result"
        rows.append({"what": what, "rate": rates["link"] / 1e9})
    missing = [count for count in (2, 4, 8) if count > len(jax.devices())]
    notes = [f"not run: {missing} devices; there are {len(jax.devices())}"] if missing else []
    return Table("Limits of this machine", rows, notes)


def _split_context(context: int, layers: int, rates: dict[str, Any]) -> Table:
    """A layer's decode attention of one sequence whose tokens are dealt out over devices."""
    config = jaxkv.KVCacheConfig(layers, context, 8, 128, batch_size=1)
    rows: list[Row] = []
    for count in _counts():
        place = _mesh(context=count)
        cache = _filled(config, place, context - 1)
        run = jax.jit(_attend_layers)
        queries = jnp.ones((1, 1, 32, 128), jnp.bfloat16)
        seconds = _seconds(functools.partial(run, cache, queries)) / layers
        limit = config.size_bytes / layers / count / rates["read"]
        rows.append(
            {
                "devices": count,
                "us a layer": seconds * 1e6,
                "share of the limit": limit / seconds,
                "times one device": rows[0]["us a layer"] / seconds / 1e6 if rows else 1.0,
                "bytes on each": _held(cache),
                "by plan": jaxkv.plan(config, 1, **place).needed_bytes,
            }
        )
        print(f"  1 x {context}:", *rows[-1].values(), file=sys.stderr, flush=True)
        del cache
    notes = _gains(rows, {8: 6.0} if context > 1_000_000 else {})
    return Table(f"Context split, decode attention of 1 x {context:,} bfloat16", rows, notes)


def _attend_layers(cache: jaxkv.KVCache, queries: jax.Array) -> jax.Array:
    for layer in range(cache.config.num_layers):  # each waits for the one before
        queries = queries + jaxkv.attend(cache, queries, layer=layer)
    return queries


def _filled(config: jaxkv.KVCacheConfig, place: dict[str, Any], tokens: int) -> Any:
    """A cache whose lengths say that it is full; what it holds is zeros, which read as fast."""
    return jaxkv.advance(jaxkv.create(config, **place), tokens)


def _decode(
    name: str, shape: tuple[int, ...], rows_of: int, context: int, rates: dict[str, Any]
) -> Table:
    """Steps of a whole model, its heads, inner features and vocabulary over devices."""
    rows: list[Row] = []

    def step(model: Any, cache: Any, tokens: jax.Array) -> Any:
        logits, cache = model(tokens, cache)
        return jaxkv.truncate(cache, context - 64), logits[:, -1:].argmax(-1).astype(jnp.int32)

    for count in _counts():
        place = _mesh(heads=count)
        model = _random_model(shape, place)
        config = model.cache_config(max_context_length=context, batch_size=rows_of)
        holder = [_filled(config, place, context - 64)]
        tokens = jnp.zeros((rows_of, 1), jnp.int32)
        seconds, collectives = _measured(step, model, holder, tokens, place)
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
        limit = (weights + config.size_bytes) / rates["read"]
        rows.append(
            _steps_row(rows, count, seconds, limit, collectives, rates)
            | {
                "cache on each": _held(holder[0]),
                "by plan": jaxkv.plan(config, 1, **place).needed_bytes,
            }
        )
        print(f"  decode, {name}:", *rows[-1].values(), file=sys.stderr, flush=True)
        del holder, model
    title = f"Tensor parallel decode, {name} shapes, bfloat16, {rows_of} x {context:,}"
    return Table(title, rows, _gains(rows, {2: 1.7, 8: 5.0}))


def _prefill(name: str, shape: tuple[int, ...], tokens: int, rates: dict[str, Any]) -> Table:
    """A prompt in one step, of a model that is split as for decode."""
    rows: list[Row] = []
    whole = jnp.full(1, tokens, jnp.int32)

    def step(model: Any, cache: Any, prompt: jax.Array) -> Any:
        logits, cache = model.next_logits(prompt, cache, num_tokens=whole)
        return jaxkv.truncate(cache, 0), logits.argmax(-1)

    for count in _counts():
        place = _mesh(heads=count)
        model = _random_model(shape, place)
        config = model.cache_config(max_context_length=tokens, batch_size=1)
        holder = [jaxkv.create(config, **place)]
        prompt = jnp.zeros((1, tokens), jnp.int32)
        seconds, collectives = _measured(step, model, holder, prompt, place, passes=3)
        limit = _operations(shape, tokens) / rates["multiply"]
        rows.append(_steps_row(rows, count, seconds, limit, collectives, rates))
        print(f"  prefill, {name}:", *rows[-1].values(), file=sys.stderr, flush=True)
        del holder, model
    return Table(f"Tensor parallel prefill, {name} shapes, bfloat16, 1 x {tokens:,}", rows, [])


def _measured(
    step: Callable[..., Any],
    model: Any,
    holder: list[Any],
    tokens: jax.Array,
    place: dict[str, Any],
    passes: int = 10,
) -> tuple[float, tuple[int, int]]:
    """Seconds of ``step(model, cache, tokens)``; its collectives, and the bytes that they move.

    Args:
      holder: of the cache, which each step is given and returns.
    """
    graph, state = nnx.split(model)
    tokens = jax.device_put(tokens, NamedSharding(place["mesh"], PartitionSpec()))

    def run(cache: Any, state: Any, tokens: jax.Array) -> Any:
        return step(nnx.merge(graph, state), cache, tokens)

    compiled = jax.jit(run, donate_argnums=0).lower(holder[0], state, tokens).compile()

    def once() -> jax.Array:
        holder[0], found = compiled(holder[0], state, tokens)
        return found

    return _seconds(once, passes), _collectives(compiled.as_text())


def _steps_row(
    rows: list[Row],
    count: int,
    seconds: float,
    limit: float,
    collectives: tuple[int, int],
    rates: dict[str, Any],
) -> Row:
    """Beside the rows of fewer devices; ``limit`` is one device's seconds, without collectives."""
    number, moved = collectives
    least = limit / count + (moved / rates["link"] if count > 1 else 0)
    return {
        "devices": count,
        "ms a step": seconds * 1e3,
        "share of the limit": least / seconds,
        "times one device": rows[0]["ms a step"] / seconds / 1e3 if rows else 1.0,
        "collectives": number,
        "bytes moved": moved,
    }


def _operations(shape: tuple[int, ...], tokens: int) -> float:
    """Of a prefill's products, two for each number of a weight, and of its causal attention."""
    hidden, inner, layers, heads, kv_heads = shape
    weights = hidden * hidden * (2 + 2 * kv_heads / heads) + 3 * hidden * inner
    return layers * tokens * (2 * weights + 2 * tokens * hidden)


def _serve(name: str, shape: tuple[int, ...], rows_per_rank: int, context: int) -> Table:
    """An engine with as many rows on each data rank, and twice as many requests."""
    count = _counts()[-1]
    splits = [{"heads": 1}]
    if count > 1:
        splits += [{"batch": count}, {"heads": count}]
    if count > 2:
        splits += [{"batch": 2, "heads": count // 2}]
    rows: list[Row] = []
    for sizes in splits:
        devices = math.prod(sizes.values())
        place = _mesh(**sizes) if devices > 1 else {}
        model, num_rows = _random_model(shape, place), rows_per_rank * sizes.get("batch", 1)
        pool = jaxkv.Paged(16, num_pages=num_rows * context // 16)
        config = model.cache_config(
            max_context_length=context, batch_size=num_rows, addressing=pool
        )
        with jaxkv.Engine(model, config, **place) as engine:
            _answered(engine, 1, context)  # compiles
            tokens, seconds = _answered(engine, 2 * num_rows, context)
        rate = tokens / seconds / devices
        rows.append(
            {
                "devices": devices,
                "split": " x ".join(f"{what} {size}" for what, size in sizes.items()),
                "rows": num_rows,
                "tokens/s": tokens / seconds,
                "tokens/s of a device": rate,
                "share of one alone": rate / rows[0]["tokens/s of a device"] if rows else 1.0,
            }
        )
        print(f"  engine, {name}:", *rows[-1].values(), file=sys.stderr, flush=True)
        del engine, model
    notes = [] if jax.devices()[0].platform != "cpu" else [
        "devices of a CPU share its cores: of n of them each can have 1/n at best, and that is "
        "no figure of scaling"
    ]  # fmt: skip
    return Table(f"Engine, {name} shapes, answers of {context // 4} tokens", rows, notes)


def _answered(engine: jaxkv.Engine, num_requests: int, context: int) -> tuple[int, float]:
    """Tokens of answers, and seconds, prompts of half the context included."""
    numbers = np.random.default_rng(num_requests).integers(0, 512, (num_requests, context // 2))
    requests = [
        engine.submit(prompt, max_new_tokens=context // 4, stop_tokens=()) for prompt in numbers
    ]
    started = time.perf_counter()
    while engine.busy:
        engine.step()
    return sum(len(request.tokens) for request in requests), time.perf_counter() - started


def _random_model(shape: tuple[int, ...], place: dict[str, Any]) -> Any:
    """With each array made where it is going to be, in its parts."""
    hidden, inner, layers, heads, kv_heads = shape
    config = DecoderConfig(
        128_256 if hidden > 1024 else 512, hidden, inner,
        num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
    )  # fmt: skip
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    spread = Spread.of(place["mesh"], place["axes"]) if place else None
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    for path, param in params:
        where = None if spread is None else sharding_of(model, path, param, spread)
        param.set_value(_normal(param.shape, param.dtype, where))
    nnx.update(model, nnx.from_flat_state(params))
    return model


@functools.lru_cache(maxsize=64)
def _normal_program(shape: tuple[int, ...], dtype: Any, where: NamedSharding | None) -> Any:
    def draw() -> jax.Array:
        return jax.random.normal(jax.random.key(0), shape, dtype) * jnp.asarray(0.02, dtype)

    return jax.jit(draw, out_shardings=where)


def _normal(shape: tuple[int, ...], dtype: Any, where: NamedSharding | None) -> jax.Array:
    return _normal_program(shape, dtype, where)()


def _held(cache: Any) -> int:
    """Bytes of a cache on the first device."""
    device = jax.devices()[0]
    shards = (
        shard.data.nbytes
        for leaf in jax.tree.leaves(cache)
        for shard in leaf.addressable_shards
        if shard.device == device
    )
    return sum(shards)


def _collectives(text: str) -> tuple[int, int]:
    """Their number in a program, and the bytes of their results on one device."""
    found = _COLLECTIVE.findall(text)
    shapes = [each for results, _ in found for each in re.findall(r"(\w+)\[([\d,]*)\]", results)]
    sizes = (
        _BYTES.get(kind, 4) * math.prod(int(size) for size in dims.split(",") if size)
        for kind, dims in shapes
    )
    return len(found), sum(sizes)


def _gains(rows: list[Row], goals: dict[int, float]) -> list[str]:
    notes = [
        target(f"{row['devices']} devices over one", row["times one device"], goals[row["devices"]])
        for row in rows
        if row["devices"] in goals
    ]
    keys = ("bytes on each", "cache on each")
    planned = all(row[key] == row["by plan"] for row in rows for key in keys if key in row)
    return [*notes, f"bytes held on a device are those of the plan: {planned}"]
