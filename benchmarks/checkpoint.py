"""A released model, SmolLM2-135M-Instruct, on a CPU beside transformers and llama.cpp.

Peers that are not installed are left out and named. llama.cpp (``llama-cpp-python``) reads the file
as it is, with weights of 4 bits, and as float32, which is what the other two compute with.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import jaxkv
from benchmarks.corpus import standard_library
from benchmarks.report import Row, Table, target
from jaxkv.models import load, save
from jaxkv.show.progress import progress_bar
from tests.real.checkpoint import smollm2

_NEW, _GOAL = 64, 2.0
_OURS, _TRANSFORMERS = "jaxkv, float32", "transformers, float32"
_LLAMA_FLOAT, _LLAMA_FILE = "llama.cpp, float32", "llama.cpp, the file's Q4_1"

# A prompt -> seconds of prefill, seconds of decode per token, and the answer.
Run = Callable[[list[int]], tuple[float, float, list[int]]]


def run(quick: bool) -> Iterator[Table]:
    """A table a length of prompt; the competitors take turns."""
    try:
        file = smollm2()
    except OSError as error:
        yield Table("A released model", [{"who": f"not measured: {error}"}])
        return
    model, tokenizer = load(file, dtype="float32")
    text = tokenizer.encode((standard_library() / "argparse.py").read_text()).ids
    with tempfile.TemporaryDirectory() as folder:
        competitors = {_OURS: _ours(model)}
        missing = []
        for add in (_transformers, _llama):
            try:
                competitors |= add(model, file, Path(folder))
            except ImportError as error:
                missing.append(str(error.name))
        for length in (1024,) if quick else (1024, 8000):
            yield _table(competitors, text[:length], 1 if quick else 3, missing)


def _table(
    competitors: dict[str, Run], prompt: list[int], repeats: int, missing: list[str]
) -> Table:
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in competitors}
    answers = {}
    with progress_bar(f"{len(prompt)} tokens", (repeats + 1) * len(competitors)) as advance_bar:
        for _ in range(repeats + 1):
            for name, compute in competitors.items():
                *measured, answers[name] = compute(prompt)
                seconds[name].append((measured[0], measured[1]))
                advance_bar(1)
    medians = {name: np.median(each[1:], axis=0) for name, each in seconds.items()}  # but the first
    rows: list[Row] = [
        {
            "who": name,
            "prefill tokens/s": len(prompt) / prefill,
            "decode tokens/s": 1 / decode,
            "x prefill": medians[_OURS][0] / prefill,
            "x decode": medians[_OURS][1] / decode,
            "same answer": str(answers[name] == answers[_OURS]),
        }
        for name, (prefill, decode) in medians.items()
    ]
    notes = [
        f"A prompt of {len(prompt):,} tokens of Python source and {_NEW} greedy ones after it; "
        f"medians of {repeats}, in turns. x: times jaxkv's rate."
        + (f" Not installed: {', '.join(missing)}." if missing else "")
    ]
    if _TRANSFORMERS in medians:
        ratio = medians[_TRANSFORMERS][1] / medians[_OURS][1]
        notes.append(target("decode over transformers", ratio, _GOAL))
    return Table(f"SmolLM2-135M-Instruct, {len(prompt):,} tokens", rows, notes)


def _ours(model: Any) -> Run:
    def compute(prompt: list[int]) -> tuple[float, float, list[int]]:
        result = jaxkv.generate(
            model, [prompt], max_new_tokens=_NEW, max_context_length=len(prompt) + _NEW,
            stop_tokens=(),
        )  # fmt: skip
        timings = result.timings
        seconds = 1 / timings.decode_tokens_per_second
        return timings.prefill_seconds, seconds, result.tokens[0]

    return compute


def _transformers(model: Any, file: Path, folder: Path) -> dict[str, Run]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    save(model, folder)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def compute(prompt: list[int]) -> tuple[float, float, list[int]]:
        started = time.perf_counter()
        found = peer(torch.tensor([prompt]), logits_to_keep=1)
        answer = [int(found.logits[0, -1].argmax())]
        between = time.perf_counter()
        for _ in range(_NEW - 1):
            token = torch.tensor([answer[-1:]])
            found = peer(token, past_key_values=found.past_key_values)
            answer.append(int(found.logits[0, -1].argmax()))
        return between - started, (time.perf_counter() - between) / (_NEW - 1), answer

    return {_TRANSFORMERS: compute}


def _llama(model: Any, file: Path, folder: Path) -> dict[str, Run]:
    import llama_cpp

    whole = folder / "float32.gguf"
    options = llama_cpp.llama_model_quantize_default_params()
    options.allow_requantize, options.ftype = True, llama_cpp.LLAMA_FTYPE_ALL_F32
    if llama_cpp.llama_model_quantize(str(file).encode(), str(whole).encode(), options):
        raise RuntimeError("llama.cpp could not write the file as float32")

    def reading(path: Path) -> Run:
        peer = llama_cpp.Llama(
            str(path), n_ctx=8192, n_threads=os.cpu_count(), n_threads_batch=os.cpu_count(),
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=False,
        )  # fmt: skip

        def compute(prompt: list[int]) -> tuple[float, float, list[int]]:
            peer.reset()
            started = time.perf_counter()
            peer.eval(prompt)
            answer = [peer.sample(temp=0.0)]
            between = time.perf_counter()
            for _ in range(_NEW - 1):
                peer.eval(answer[-1:])
                answer.append(peer.sample(temp=0.0))
            return between - started, (time.perf_counter() - between) / (_NEW - 1), answer

        return compute

    return {_LLAMA_FLOAT: reading(whole), _LLAMA_FILE: reading(file)}
