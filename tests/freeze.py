"""What must not change while the code does: hashes of bits, at fixed seeds.

    python -m tests.freeze before.json        # on the old code
    python -m tests.freeze after.json --against before.json

Hashed are outputs, the arrays of a cache whatever their order in the pytree, the bytes of saved
files, answers of loops, and programs as JAX traces them. A program may differ where arrays moved
within the pytree; nothing else may.
"""

import argparse
import functools
import hashlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv

LAYERS, CONTEXT, HEADS, KV_HEADS, DIM = 2, 24, 4, 2, 16
ROPE = jaxkv.Rope.of(100.0, rotary_dim=8)
CODECS = {
    "float32": jaxkv.Dense("float32"),
    "bfloat16": jaxkv.Dense("bfloat16"),
    "float16": jaxkv.Dense("float16"),
    "int8": jaxkv.Int8(),
    "float8": jaxkv.Float8(),
    "rotated4": jaxkv.Rotated(4),
    "rotated3/int8": jaxkv.KeysValues(jaxkv.Rotated(3), jaxkv.Int8()),
    "centred int8": jaxkv.Centred(jaxkv.Int8(), ROPE),
    "centred rotated2": jaxkv.Centred(jaxkv.Rotated(2), ROPE),
}
ADDRESSINGS = {
    "contiguous": jaxkv.Contiguous(),
    "ring": jaxkv.Ring(window=5, sinks=1, chunk=7),
    "paged": jaxkv.Paged(page_size=4),
}
COMPRESSED = {("float32", "contiguous"), ("rotated2-centred", "paged")}
# Steps of one prompt: tokens given, and how many of them are real in each row.
STEPS = [(5, (5, 3)), (5, (1, 5)), (1, (1, 1)), (1, (1, 0))]


def configs() -> Iterator[tuple[str, jaxkv.KVCacheConfig]]:
    """Every codec and addressing ragged, each once single, and each placement more than once."""
    for codec, addressing, batch in itertools.product(CODECS, ADDRESSINGS, (None, 2)):
        config = jaxkv.KVCacheConfig(
            *(LAYERS, CONTEXT, KV_HEADS, DIM, batch), CODECS[codec], ADDRESSINGS[addressing]
        )
        if batch is None and addressing != "contiguous" and codec != "int8":
            continue
        name = f"{codec}, {addressing}, {'ragged' if batch else 'single'}"
        yield name, config
        if batch and codec in ("int8", "centred rotated2"):
            finer = jaxkv.Newest(3, jaxkv.Rotated(4))
            yield f"{name}, newest", config.replace(newest=finer)
            yield f"{name}, host", config.replace(placement=jaxkv.HostMemory(4, 3))


def digest(*trees: object) -> str:
    """Of all arrays of these trees, in whatever order they come."""
    found = []
    for leaf in jax.tree.leaves(trees):
        array = np.asarray(leaf)
        found.append(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return hashlib.sha256(b"".join(sorted(found))).hexdigest()[:16]


def vectors(config: jaxkv.KVCacheConfig, heads: int, tokens: int, seed: int) -> jax.Array:
    rng = np.random.default_rng(seed)
    shape = (*config.batch_shape, tokens, heads, config.head_dim)
    return jnp.asarray(rng.standard_normal(shape, np.float32))


def one_step(cache, tokens, num_tokens, seed, implementation):
    """All layers of one step; names that cannot serve it are left to the default."""
    outputs = []
    for layer in range(LAYERS):
        keys, values = (vectors(cache.config, KV_HEADS, tokens, seed + i) for i in (1, 2))
        queries = vectors(cache.config, HEADS, tokens, seed)
        cache = append(cache, keys, values, layer=layer, num_tokens=num_tokens)
        try:
            attend = attends[implementation]
            output = attend(cache, queries, layer=layer, num_tokens=num_tokens)
        except ValueError:
            output = attends[None](cache, queries, layer=layer, num_tokens=num_tokens)
        outputs.append(output)
    return advance(cache, num_tokens), outputs


# There are thousands of small programs here, so they are compiled in haste.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
append = jit(jaxkv.append)
advance, truncate, reset = jit(jaxkv.advance), jit(jaxkv.truncate), jit(jaxkv.reset)
fork, layer_of = jit(jaxkv.fork, static_argnums=1), jit(jaxkv.layer, static_argnums=1)
evict = jit(jaxkv.evict, static_argnames=("policy", "sinks", "tokens"))


def _attend(name, **options):
    def run(cache, queries, *, layer, num_tokens):
        return jaxkv.attend(
            cache, queries, layer=layer, num_tokens=num_tokens, implementation=name, **options
        )

    return jit(run)


attends = {name: _attend(name) for name in (None, "native", "reference", "blockwise", "streamed")}
with_options = _attend(
    None, scale=0.7, softcap=0.8, window=3, sink_logits=jnp.array([0.5, -1.0, 2.0, 0.0])
)


def verbs(name: str, config: jaxkv.KVCacheConfig) -> Iterator[tuple[str, str]]:
    """Filled by each implementation, and what each verb makes of the last of them."""
    cache = jaxkv.create(config)
    for implementation in ("native", "reference", "blockwise") if config.batch_size else (None,):
        cache = jaxkv.create(config)
        outputs = []
        for number, (tokens, counts) in enumerate(STEPS):
            num_tokens = jnp.int32(counts if config.batch_size else counts[0])
            cache, out = one_step(cache, tokens, num_tokens, 10 * number, implementation)
            outputs.append(out)
        yield f"{name}, {implementation}", digest(outputs)
    queries = vectors(config, HEADS, 1, 99)
    one = jnp.ones(config.batch_shape, jnp.int32)
    yield f"{name}, options", digest(with_options(cache, queries, layer=1, num_tokens=one))
    yield f"{name}, leaves", digest(cache)
    yield f"{name}, layer", digest(layer_of(cache, 1))
    yield f"{name}, truncate", digest(truncate(cache, cache.lengths - 2))
    yield f"{name}, reset", digest(reset(cache))
    if config.placement is None:
        yield f"{name}, fork", digest(fork(cache, 2))
        yield f"{name}, offload", digest(jaxkv.prefetch(jaxkv.offload(cache)))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "cache")
        jaxkv.save(cache, file)
        content = re.sub(rb'"saved_by": ?"[^"]*"', b"", file.read_bytes())
        yield f"{name}, file", hashlib.sha256(content).hexdigest()[:16]
        yield f"{name}, loaded", digest(jaxkv.load(file))
    kind = config.codec.name, config.addressing.name
    if config.placement is None and config.batch_size and kind in COMPRESSED:
        yield from compressed(name, cache)


def compressed(name: str, cache: jaxkv.KVCache) -> Iterator[tuple[str, str]]:
    """After `compress`, then a step, then `evict`."""
    every = jnp.stack([vectors(cache.config, HEADS, 4, 7)] * LAYERS)
    budgets = {
        "half": 0.5,
        "by layer": (3, 5),
        "by head": np.array([[2, 4], [5, 1]]),
    }
    policies = {
        "recent": jaxkv.policies.SinksAndRecent(sinks=1),
        "h2o": jaxkv.policies.HeavyHitters(),
        "snapkv": jaxkv.policies.QueryWindow(window=2, pool=1),
    }
    for (budget, keep), (policy_name, policy) in itertools.product(
        budgets.items(), policies.items()
    ):
        kept = jaxkv.compress(cache, policy, keep=keep, new=3, queries=every, sinks=1)
        here = f"{name}, {policy_name} {budget}"
        yield f"{here}, compressed", digest(kept)
        if budget != "half":
            continue
        for seed in (50, 60):
            num_tokens = jnp.ones(cache.config.batch_shape, jnp.int32)
            kept, outputs = one_step(kept, 1, num_tokens, seed, None)
            newest = jnp.stack([vectors(cache.config, HEADS, 1, seed)] * LAYERS)
            kept = evict(kept, policy, queries=newest, sinks=1, tokens=3)
            yield f"{here}, evicted {seed}", digest(kept, outputs)


def loops() -> Iterator[tuple[str, str]]:
    """Answers of the embedded model, by `generate` and by an engine."""
    model, _ = jaxkv.models.load()
    text = (Path(__file__).parents[1] / "LICENSE").read_bytes()
    prompts = [list(text[:30]), list(text[100:250]), list(text[300:340])]
    kinds = {"float32": {}, "int8": {}, "rotated2-centred": {"newest": jaxkv.Newest(8)}}
    for seed, (codec, more) in enumerate(kinds.items()):
        sampling = jaxkv.Sampling(0.8, top_p=0.9) if seed else jaxkv.Sampling()
        codec = jaxkv.codecs.CODECS[codec]
        plain = model.cache_config(max_context_length=256, batch_size=3, codec=codec, **more)
        result = jaxkv.generate(
            model, prompts, max_new_tokens=6, sampling=sampling, seed=seed, config=plain
        )
        answers = [result.tokens, [np.float32(row) for row in result.logprobs]]
        yield f"generate, {codec.name}", digest(answers)
        pool = jaxkv.Paged(page_size=16, num_pages=24)
        config = model.cache_config(
            max_context_length=256, batch_size=2, codec=codec, addressing=pool, **more
        )
        with jaxkv.Engine(model, config, sampling=sampling) as engine:
            requests = [engine.submit(p, max_new_tokens=6, seed=seed) for p in prompts]
            engine.run()
            answers = [(r.tokens, np.float32(r.logprobs)) for r in requests]
        yield f"engine, {codec.name}", digest(answers)


def programs() -> Iterator[tuple[str, str]]:
    """A decode step as JAX traces it, without the names of functions."""
    for name, config in configs():
        cache = jaxkv.create(config)
        queries, keys, values = (
            vectors(config, heads, 1, 0) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )

        def step(cache, queries, keys, values):
            cache = jaxkv.append(cache, keys, values, layer=1)
            return jaxkv.advance(cache, 1), jaxkv.attend(cache, queries, layer=1)

        text = str(jax.make_jaxpr(step)(cache, queries, keys, values))
        text = re.sub(r"name=\S+|0x[0-9a-f]+", "", text)
        yield f"program, {name}", hashlib.sha256(text.encode()).hexdigest()[:16]


def frozen() -> dict[str, str]:
    found: dict[str, str] = {}
    for name, config in configs():
        found |= verbs(name, config)
    found |= loops()
    found |= programs()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.freeze", description=__doc__)
    parser.add_argument("file", type=Path, help="where the hashes go")
    parser.add_argument("--against", type=Path, help="hashes of before, to compare with")
    arguments = parser.parse_args()
    found = frozen()
    arguments.file.write_text(json.dumps(found, indent=1))
    print(f"{len(found)} hashes")
    if arguments.against is None:
        return
    before = json.loads(arguments.against.read_text())
    differ = sorted(
        name for name in before.keys() | found.keys() if before.get(name) != found.get(name)
    )
    for name in differ:
        print(f"differs: {name}")
    if differ:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
