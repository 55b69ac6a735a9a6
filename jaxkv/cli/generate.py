"""``jaxkv generate``: load a model, allocate its cache, decode, report."""

import argparse
import json
import sys
from typing import Any

from jaxkv.cli.command import Command
from jaxkv.cli.model_options import (
    add_model_arguments,
    add_policy_arguments,
    encode,
    load_model,
    nan_message,
    sampling_of,
    stop_strings_of,
    unicode_text,
)
from jaxkv.drafts import MTP, NGram
from jaxkv.memory import MemoryTracker, Purpose, device_memory
from jaxkv.serve.decode import TOKENS_PER_DISPATCH
from jaxkv.serve.generate import Generation, generate
from jaxkv.serve.speculate import NUM_GUESSES
from jaxkv.show.text import format_bytes
from jaxkv.show.tokens import TextStream, decode_answer, decode_prompt

_EXAMPLES = """\
examples:
  jaxkv generate
      the model that comes with jaxkv writes some Python
  jaxkv generate 'class Stack:' --temperature 0.7 --seed 3 --stop 'def '
      a continuation of your own prompt, which ends before a text
  jaxkv generate - < story.txt
      of what standard input says
  jaxkv generate --model ./Qwen2.5-0.5B --prompt 'Hello' --context 4k --dtype bfloat16
      a Hugging Face folder (config.json, *.safetensors, tokenizer.json), or a Hub name
  jaxkv generate --model SmolLM2-135M-Instruct.Q4_1.gguf --prompt 'Hello'
      a GGUF file
  jaxkv generate --model ./Qwen2.5-Coder-7B --prompt "$(cat task.txt)" --draft ngram
      several tokens per step where the answer repeats the prompt or itself
  jaxkv generate 'def a' 'def b' --json
      several prompts at once, the answers and figures as JSON
  jaxkv generate - --policy snapkv --keep 0.5 < long.py
      half of the prompt's tokens stay in the cache, those that its end looks at

exit status: 0 done, 1 logits that are no numbers ended an answer, 2 the question was not
understood or the model could not be loaded
"""
# Each with the guesses that suit it.
_DRAFTS: dict[str | None, tuple[Any, int]] = {
    None: (None, NUM_GUESSES),
    "mtp": (MTP(), 2),
    "ngram": (NGram(), NUM_GUESSES),
}
_DEFAULT_PROMPT = """\
class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __repr__(self):
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, temperature=0.6)
    add = parser.add_argument
    add("texts", nargs="*", metavar="PROMPT", help="text to go on from; - reads standard input")
    add("--prompt", action="append", default=[], metavar="TEXT", help="likewise")
    add_policy_arguments(parser)
    add(
        "--stream-every", type=int, default=TOKENS_PER_DISPATCH, metavar="N",
        help=f"tokens that are shown at once (default: {TOKENS_PER_DISPATCH})",
    )  # fmt: skip
    add(
        "--draft", choices=sorted(filter(None, _DRAFTS)),
        help="guess tokens, and check several in a step: the same answer, sooner. ngram looks in "
        "the text itself, for what repeats; mtp is the model's own module of multi-token "
        "prediction, which DeepSeek V3, GLM 4.5 and MiMo have",
    )  # fmt: skip
    add("--json", action="store_true", help="print answers and figures as JSON")


def _run(options: argparse.Namespace) -> int:
    sampling = sampling_of(options)
    model, tokenizer = load_model(options)
    stop_strings = stop_strings_of(options, tokenizer)
    tracker = MemoryTracker()
    tracker.track(model, purpose=Purpose.WEIGHTS, name=options.model or "embedded model")
    asked = [*options.texts, *options.prompt] or [_DEFAULT_PROMPT]
    texts = [unicode_text(sys.stdin.read() if text == "-" else text) for text in asked]
    prompts = [encode(tokenizer, text) for text in texts]
    stream = (
        None if options.json or len(texts) > 1 else _Stream(tokenizer, prompts[0], stop_strings)
    )
    draft, num_guesses = _DRAFTS[options.draft]
    result = generate(
        model,
        prompts,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        seed=[options.seed + number for number in range(len(prompts))],
        max_context_length=options.context,
        codec=options.codec,
        tokenizer=tokenizer,
        stop_strings=stop_strings,
        policy=options.policy,
        keep=options.keep,
        on_tokens=stream,
        stream_every=options.stream_every,
        tracker=tracker,
        draft=draft,
        num_guesses=num_guesses,
    )
    shown = result.texts or [
        decode_answer(None, prompt, tokens)
        for prompt, tokens in zip(prompts, result.tokens, strict=True)
    ]
    answers = [
        {"prompt": text, "text": answer, "tokens": tokens, "finish": why}
        for text, answer, tokens, why in zip(
            texts, shown, result.tokens, result.finish_reasons, strict=True
        )
    ]
    figures = _figures(result, tracker)
    if options.json:
        print(json.dumps({"answers": answers, **figures}, indent=2))
    else:
        if stream is None:
            for number, answer in enumerate(answers, 1):
                print(f"--- {number} ---\n{answer['prompt']}{answer['text']}")
        else:
            stream.end()
        print(f"\n\n{_summary(result, figures)}")
    failed = [number for number, answer in enumerate(answers, 1) if answer["finish"] == "nan"]
    for number in failed:
        message = nan_message(len(result.tokens[number - 1]))
        print(f"jaxkv generate: prompt {number}: {message}", file=sys.stderr)
    return 1 if failed else 0


class _Stream:
    """Prints a text as its tokens arrive, prompt first, whole characters only."""

    def __init__(self, tokenizer: Any, prompt: list[int], stop_strings: list[str]):
        self._stream = TextStream(tokenizer, prompt, stop_strings)
        print(decode_prompt(tokenizer, prompt), end="", flush=True)

    def __call__(self, number: int, new: list[int]) -> None:
        print(self._stream(new), end="", flush=True)

    def end(self) -> None:
        print(self._stream.rest(), end="")


def _figures(result: Generation, tracker: MemoryTracker) -> dict[str, Any]:
    memory, timings, config = device_memory(), result.timings, result.config
    worth = result.speculation
    of_draft: dict[str, Any] = (
        {}
        if worth is None
        else {
            "draft_steps": worth.steps,
            "draft_guesses": worth.guesses,
            "draft_accepted": worth.accepted,
            "draft_tokens_per_step": round(worth.tokens_per_step, 2),
        }
    )
    return {
        **of_draft,
        "prefill_tokens": timings.prefill_tokens,
        "prefill_tokens_per_second": round(timings.prefill_tokens_per_second, 1),
        "decode_tokens": timings.decode_tokens,
        "decode_tokens_per_second": round(timings.decode_tokens_per_second, 1),
        "compile_seconds": round(timings.compile_seconds, 2),
        "weight_bytes": tracker.total_usage(Purpose.WEIGHTS),
        "cache_planned_bytes": config.size_bytes + config.index_bytes,
        "cache_held_bytes": tracker.peak_usage(Purpose.KV_CACHE),
        "peak_memory_bytes": memory.peak_bytes or memory.process_peak_bytes,
        "peak_memory_source": "process" if memory.peak_bytes is None else memory.source,
    }


def _summary(result: Generation, figures: dict[str, Any]) -> str:
    peak = figures["peak_memory_bytes"]
    rows = [
        ("prefill", "{prefill_tokens} tokens, {prefill_tokens_per_second:,.0f} tokens/s"),
        ("decode", "{decode_tokens} tokens, {decode_tokens_per_second:,.0f} tokens/s"),
        *([("draft", "{draft_tokens_per_step} tokens per step")] if result.speculation else []),
        ("compiled in", "{compile_seconds:.1f} s"),
        ("KV cache", result.config.describe()),
        ("planned", "{cache_planned_bytes:,} bytes, held {cache_held_bytes:,} bytes"),
        ("weights", format_bytes(figures["weight_bytes"])),
        ("peak memory", f"{format_bytes(peak) if peak else 'unknown'} ({{peak_memory_source}})"),
    ]
    return "\n".join(f"{name:12} {text.format(**figures)}" for name, text in rows)


GENERATE = Command(
    "Continue a prompt: a model of a folder or a GGUF file, or the one that comes along.",
    _EXAMPLES,
    _add_arguments,
    _run,
)
