"""Every way to keep a released model's cache: its answers are those of the plainest way.

With 8 devices (``XLA_FLAGS=--xla_force_host_platform_device_count=8`` on a CPU) meshes too.
"""

import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks.report import Row, Table, target
from jaxkv.models import load
from jaxkv.show.progress import progress_bar
from tests.real.checkpoint import smollm2
from tests.real.make_goldens import GOLDENS

_CODECS = ("float32", "bfloat16", "int8", "float8", "rotated4", "rotated4-centred", "stair4")
_FEW = ("float32", "int8", "stair4")
_CONTEXT, _NEW, _PAGE = 96, 32, 16  # tokens
_NUM_PROMPTS = _NUM_DEVICES = 8
_POOL = jaxkv.Paged(page_size=_PAGE, num_pages=_NUM_PROMPTS * _CONTEXT // _PAGE)
_RING = jaxkv.Ring(window=_CONTEXT)
_HOST = jaxkv.HostMemory(resident=16, block=16)

Answers = list[list[int]]


class Kept:
    """A model and the prompts; the answers from a cache of one codec, in each of the ways."""

    def __init__(self, model: Any, prompts: Answers, codec: str):
        self.model, self.prompts = model, prompts
        self.config = functools.partial(
            model.cache_config,
            max_context_length=_CONTEXT,
            codec=jaxkv.codecs.CODECS[codec],
            batch_size=_NUM_PROMPTS,
        )
        self.constants = jaxkv.calibrate(model, codec=jaxkv.codecs.CODECS[codec])

    def generated(self, *, axes: jaxkv.Axes | None = None, **fields: Any) -> Answers:
        """With another addressing, placement or mesh."""
        mesh = None if axes is None else jax.make_mesh((_NUM_DEVICES,), ("devices",))
        options = {"constants": self.constants, "mesh": mesh, "axes": axes}
        config = self.config(**fields)
        return jaxkv.generate(
            self.model, self.prompts, max_new_tokens=_NEW, config=config, **options
        ).tokens

    def one_by_one(self) -> Answers:
        """Each prompt in a cache of its own."""
        config, constants = self.config(batch_size=1), self.constants
        options = {"max_new_tokens": _NEW, "config": config, "constants": constants}
        return [jaxkv.generate(self.model, [own], **options).tokens[0] for own in self.prompts]

    def served(self) -> Answers:
        """By an engine of two rows; what the prompts share is computed once."""
        config = self.config(addressing=_POOL, batch_size=2)
        with jaxkv.Engine(self.model, config, constants=self.constants, prefill_chunk=16) as engine:
            requests = [engine.submit(prompt, max_new_tokens=_NEW) for prompt in self.prompts]
            engine.run()
            assert all(request.num_cached for request in requests[2:]), "a hit each"
        return [request.tokens for request in requests]

    def saved(self) -> Answers:
        """By a loop of one's own, whose cache goes through a file between prompt and answer."""
        return [self._saved(prompt) for prompt in self.prompts]

    def _saved(self, prompt: list[int]) -> list[int]:
        cache = jaxkv.create(self.config(batch_size=None))
        (constants,) = self.constants  # its layers are all alike
        copies = jax.tree.map(jnp.array, constants)  # a step is given them to keep
        cache = cache.with_codec_state(copies)
        padded = jnp.zeros(_CONTEXT // 2, jnp.int32).at[: len(prompt)].set(jnp.asarray(prompt))
        logits, cache = _step(self.model, padded, jaxkv.padded_after(cache, len(prompt)))
        token, cache = logits[len(prompt) - 1].argmax(), jaxkv.padded_after(cache, None)
        with tempfile.TemporaryDirectory() as folder:
            jaxkv.save(cache, f"{folder}/prompt", tokens=prompt, model="smollm2")
            cache = jaxkv.load(f"{folder}/prompt", tokens=prompt, model="smollm2")
        answer = [int(token)]
        while len(answer) < _NEW and answer[-1] not in self.model.stop_tokens:
            logits, cache = _step(self.model, jnp.asarray(answer[-1:], jnp.int32), cache)
            answer.append(int(logits[-1].argmax()))
        return answer


@functools.partial(jax.jit, donate_argnums=2)
def _step(model: Any, tokens: jax.Array, cache: jaxkv.KVCache) -> tuple[jax.Array, jaxkv.KVCache]:
    return model(tokens, cache)


_PLAIN = "a batch, contiguous"
WAYS: dict[str, Callable[[Kept], Answers]] = {
    _PLAIN: Kept.generated,
    "one by one": Kept.one_by_one,
    "ring": lambda kept: kept.generated(addressing=_RING),
    "pages of each sequence": lambda kept: kept.generated(addressing=jaxkv.Paged(_PAGE)),
    "host memory, streamed": lambda kept: kept.generated(placement=_HOST),
    "engine, shared prefix": Kept.served,
    "saved and loaded": Kept.saved,
}
_MESHES = {
    "8 devices, batch": lambda kept: kept.generated(axes=jaxkv.Axes(batch="devices")),
    "8 devices, context": lambda kept: kept.generated(axes=jaxkv.Axes(context="devices")),
}


def run(quick: bool) -> Iterator[Table]:
    """One table: how many answers are those of the plainest way, by way and codec."""
    try:
        model, _ = load(smollm2(), dtype="float32")
    except OSError as error:
        yield Table("Ways", [{"way": f"not measured: {error}"}])
        return
    asked = json.loads(Path(GOLDENS).read_text(encoding="utf-8"))["answers"][:_NUM_PROMPTS]
    prompts = [each["prompt"] for each in asked]
    ways = WAYS | (_MESHES if len(jax.devices()) >= _NUM_DEVICES else {})
    codecs = _FEW if quick else _CODECS
    found: dict[str, dict[str, Answers]] = {way: {} for way in ways}
    with progress_bar("SmolLM2", len(ways) * len(codecs)) as advance_bar:
        for codec in codecs:
            kept = Kept(model, prompts, codec)
            for way, answers in ways.items():
                found[way][codec] = answers(kept)
                alike = _same(found[way][codec], found[_PLAIN][codec])
                print(f"  {codec}, {way}: {alike} of {len(prompts)}", file=sys.stderr, flush=True)
                jax.clear_caches()  # programs of 30 layers, which no other way runs
                advance_bar(1)
    known = [each["answer"][:_NEW] for each in asked]
    rows: list[Row] = [
        {"way": way, **{codec: _same(given[codec], found[_PLAIN][codec]) for codec in codecs}}
        for way, given in found.items()
    ]
    plain = found[_PLAIN]
    rows.insert(0, {"way": "beside transformers", **{c: _same(plain[c], known) for c in codecs}})
    same = [row[codec] for row in rows[1:] for codec in codecs]
    missing = "" if len(ways) > len(WAYS) else " Meshes were not run: there are too few devices."
    yield Table(
        "Ways: answers of SmolLM2-135M-Instruct",
        rows,
        [
            f"Of {_NUM_PROMPTS} questions, greedy, up to {_NEW} tokens: how many answers are, "
            "token for token, those of a contiguous cache of the same codec, decoded as a batch; "
            f"in the first row those of transformers in float32.{missing}",
            target("answers alike, float32 and transformers", rows[0]["float32"] / len(known), 1),
            target("answers alike, ways of one codec", float(np.mean(same)) / len(known), 1),
        ],
    )


def _same(answers: Answers, expected: Answers) -> int:
    return sum(map(list.__eq__, answers, expected))
