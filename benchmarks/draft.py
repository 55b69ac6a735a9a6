"""Drafts: tokens a second of `jaxkv.generate` with NGram over plain decode, on a released model."""

from collections.abc import Iterator

import numpy as np

import jaxkv
from benchmarks.corpus import standard_library
from benchmarks.report import Row, Table, target
from jaxkv.drafts import NGram
from tests.real.checkpoint import smollm2

_GOAL, _LEAST = 1.6, 0.95
_GREEDY, _DRAWN = jaxkv.Sampling(), jaxkv.Sampling(temperature=1.5)


def run(quick: bool) -> Iterator[Table]:
    """One table: texts that repeat themselves, and one that does not."""
    try:
        model, tokenizer = jaxkv.models.load(smollm2(), dtype="float32")
    except OSError as error:
        yield Table("Drafts", [{"text": f"not measured: {error}"}])
        return
    context, new, repeats = (1024, 64, 2) if quick else (4096, 128, 3)
    texts = _texts(tokenizer, context - new)
    rows, goals = [], []
    for name, (prompt, sampling, goal) in texts.items():
        row = _measure(model, prompt, sampling, new, context, repeats)
        rows.append({"text": name, **row})
        goals.append(target(f"{name}, over plain decode", row["x plain"], goal))
    how = (
        f"SmolLM2-135M-Instruct, float32, {context - new:,} tokens of prompt and {new} of answer, "
        f"{NGram()} with 7 guesses. Medians of {repeats} generations, with and without in turns; "
        "the answers are compared, token for token. Seconds are those of decode alone."
    )
    yield Table("Drafts: decode with NGram beside plain decode", rows, [how, *goals])


def _texts(tokenizer, size: int) -> dict[str, tuple[list[int], jaxkv.Sampling, float]]:
    code = (standard_library() / "argparse.py").read_text()
    lines = "".join(
        f"2026-11-{day:02} GET /index.html 200 {day * 7919} bytes\n" for day in range(400)
    )
    words = np.random.default_rng(0).integers(1000, tokenizer.get_vocab_size() - 1000, size)
    return {
        "code": (tokenizer.encode(code).ids[:size], _GREEDY, _GOAL),
        "log lines": (tokenizer.encode(lines).ids[:size], _GREEDY, _GOAL),
        "random words, drawn at 1.5": (words.tolist(), _DRAWN, _LEAST),
    }


def _measure(
    model, prompt: list[int], sampling: jaxkv.Sampling, new: int, context: int, repeats: int
) -> Row:
    options = {
        "max_new_tokens": new,
        "max_context_length": context,
        "sampling": sampling,
        "stop_tokens": (),
    }
    rates: dict[bool, list[float]] = {False: [], True: []}  # tokens per second
    results = {}
    for _ in range(repeats):
        for drafts in (False, True):
            draft = NGram() if drafts else None
            results[drafts] = jaxkv.generate(model, [prompt], draft=draft, **options)
            rates[drafts].append(results[drafts].timings.decode_tokens_per_second)
    plain, drafted = (float(np.median(rates[drafts])) for drafts in (False, True))
    worth = results[True].speculation
    return {
        "plain tokens/s": plain,
        "with draft": drafted,
        "x plain": drafted / plain,
        "tokens per step": worth.tokens_per_step,
        "% of guesses right": 100 * worth.accepted / max(1, worth.guesses),
        "same tokens": str(results[True].tokens == results[False].tokens),
    }
