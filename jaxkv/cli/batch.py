"""``jaxkv batch``: a file of prompts through the engine, all over one pool of pages."""

import argparse
import contextlib
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TextIO

from jaxkv.addressing import Paged
from jaxkv.cli.command import Command, argument_type
from jaxkv.cli.model_options import (
    add_model_arguments,
    add_policy_arguments,
    encode,
    load_chat,
    load_model,
    nan_message,
    sampling_of,
    stop_strings_of,
    unicode_text,
)
from jaxkv.counts import ceil_div
from jaxkv.memory import parse_tokens
from jaxkv.serve import Engine, Request
from jaxkv.serve.sampling import Sampling
from jaxkv.show.progress import progress_bar
from jaxkv.show.text import format_bytes
from jaxkv.show.tokens import decode_answer

_EXAMPLES = """\
examples:
  jaxkv batch prompts.jsonl
      the model that comes with jaxkv answers each line, to standard output in the same order
  jaxkv batch prompts.jsonl --model ./Qwen2.5-0.5B --rows 16 --pool 64k --output answers.jsonl
      16 requests at once over one pool of 65,536 tokens
  head -5 prompts.jsonl | jaxkv batch -
      lines of standard input
  jaxkv batch prompts.jsonl --policy snapkv --keep 256
      256 tokens of each prompt stay, and more requests run at once in the same pool
  jaxkv batch prompts.jsonl --output answers.jsonl --json
      the report as JSON

A line is a text in quotes, or an object: {"prompt": TEXT or [token ids]}, or {"messages":
[{"role": "user", "content": TEXT}, ...]} for a model with a chat template; and if wanted
"max_new_tokens", "seed", "temperature", "top_k", "top_p", "min_p", "stop_tokens" (ids),
"stop_strings" and "salt" (only equal ones share pages). Lines that start alike are computed once.

exit status: 0 done, 1 some lines could not be run or their logits are no numbers, and are named,
2 none could be run
"""
_SAMPLING = {field.name for field in dataclasses.fields(Sampling)}
_FIELDS = {"prompt", "messages", "max_new_tokens", "seed", "stop_tokens", "stop_strings", "salt"}
_FIELDS |= _SAMPLING


class _Line(NamedTuple):
    number: int
    fields: dict[str, Any]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", help="one prompt per line, as JSON; - for standard input"
    )
    add_model_arguments(parser, temperature=0.0)
    add_policy_arguments(parser)
    add = parser.add_argument
    add("--rows", type=int, default=8, metavar="N", help="requests at once (default: 8)")
    add(
        "--pool", type=argument_type(parse_tokens), metavar="TOKENS",
        help="size of the pool that all requests share (default: half of what all rows could hold)",
    )  # fmt: skip
    add("--page-size", type=int, default=16, metavar="N", help="tokens per page (default: 16)")
    add(
        "--output",
        metavar="FILE",
        help="file for the answers, one per line (default: standard output)",
    )
    add("--json", action="store_true", help="print the report as JSON")


def _run(options: argparse.Namespace) -> int:
    sampling = sampling_of(options)
    model, tokenizer = load_model(options)
    stop_strings = stop_strings_of(options, tokenizer)
    lines, bad = _read(options, tokenizer, sampling)
    longest = max(
        (len(line.fields["prompt"]) + line.fields["max_new_tokens"] for line in lines), default=1
    )
    context = options.context or ceil_div(longest, options.page_size) * options.page_size
    pool = options.pool or max(context, options.rows * context // 2)
    config = model.cache_config(
        max_context_length=context,
        batch_size=options.rows,
        codec=options.codec,
        addressing=Paged(options.page_size, max(1, pool // options.page_size)),
    )
    with Engine(
        model,
        config,
        sampling=sampling,
        tokenizer=tokenizer,
        stop_strings=stop_strings,
        policy=options.policy,
        keep=options.keep,
    ) as engine:
        requests: list[tuple[int, Request]] = []
        for number, fields in lines:
            try:
                requests.append((number, engine.submit(**fields)))
            except ValueError as error:
                bad.append((number, str(error)))
        seconds, first_round = _drive(engine, [request for _, request in requests])
        report = _report(engine, requests, len(bad), seconds, first_round)
    failed = [
        (number, nan_message(len(request.tokens)))
        for number, request in requests
        if request.finish_reason == "nan"
    ]
    for number, problem in sorted(bad + failed):
        print(f"jaxkv batch: {options.file}, line {number}: {problem}", file=sys.stderr)
    _write(options.output, _answers(requests, tokenizer))
    if not requests:
        return 2
    text = json.dumps(report, indent=2) if options.json else _summary(report, config.describe())
    print(text, file=sys.stdout if options.output else sys.stderr)
    return 1 if bad or failed else 0


def _read(
    options: argparse.Namespace, tokenizer: Any, sampling: Sampling
) -> tuple[list[_Line], list[tuple[int, str]]]:
    """The lines that say something, and what is wrong with the others."""
    lines, bad = [], []
    chat = functools.cache(lambda: load_chat(options, tokenizer))
    with _opened(options.file) as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                fields = _parsed(text, tokenizer, chat)
                own = {name: fields.pop(name) for name in _SAMPLING & fields.keys()}
                fields["sampling"] = dataclasses.replace(sampling, **own)
            except (ValueError, TypeError) as error:
                bad.append((number, str(error)))
                continue
            fields = {
                "max_new_tokens": options.max_new_tokens,
                "seed": options.seed + number - 1,
            } | fields
            lines.append(_Line(number, fields))
    return lines, bad


def _opened(path: str) -> contextlib.AbstractContextManager[TextIO]:
    return contextlib.nullcontext(sys.stdin) if path == "-" else open(path, encoding="utf-8")


def _parsed(text: str, tokenizer: Any, chat: Callable[[], Any]) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    fields = {"prompt": fields} if isinstance(fields, str) else fields
    if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
        raise ValueError('expected a text in quotes or an object with a "prompt" or "messages"')
    if unknown := sorted(fields.keys() - _FIELDS):
        raise ValueError(f"unknown {', '.join(unknown)}; there are {', '.join(sorted(_FIELDS))}")
    if not isinstance(fields.get("max_new_tokens", 1), int):
        raise ValueError(f"max_new_tokens must be an int, got {fields['max_new_tokens']!r}")
    if "messages" in fields:
        fields["prompt"] = chat().encode(fields.pop("messages"))
    if isinstance(fields["prompt"], str):
        fields["prompt"] = encode(tokenizer, unicode_text(fields["prompt"]))
    if not isinstance(fields["prompt"], list):
        raise ValueError(f"a prompt must be a text or a list of ids, got {fields['prompt']!r}")
    return fields


def _drive(engine: Engine, requests: list[Request]) -> tuple[float, float]:
    """Run all; the seconds it took, and those of the first round, which compiles."""
    marks = [time.perf_counter()]
    wanted = sum(request.max_new_tokens for request in requests)
    with progress_bar("tokens", wanted) as advance_bar:
        while engine.busy:
            for request, tokens in engine.step():
                unused = request.max_new_tokens - len(request.tokens) if request.done else 0
                advance_bar(len(tokens) + unused)
            marks.append(time.perf_counter())
    first_round = marks[1] - marks[0] if len(marks) > 1 else 0.0
    return marks[-1] - marks[0], first_round


def _answers(requests: list[tuple[int, Request]], tokenizer: Any) -> Iterator[str]:
    for number, request in requests:
        answer = {
            "line": number,
            "text": request.text
            if tokenizer is not None
            else decode_answer(None, request.prompt.tokens.tolist(), request.tokens),
            "tokens": request.tokens,
            "finish": request.finish_reason,
            "cached_tokens": request.num_cached,
        }
        yield json.dumps(answer, ensure_ascii=False)


def _write(path: str | None, answers: Iterator[str]) -> None:
    if path is None:
        for answer in answers:
            print(answer)
        return
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{answer}\n" for answer in answers)


def _report(
    engine: Engine, requests: list[tuple[int, Request]], bad: int, seconds: float, first: float
) -> dict[str, Any]:
    figures, usage = engine.figures, engine.pages.usage()
    waits = [
        request.first_token - request.submitted
        for _, request in requests
        if request.first_token is not None
    ]
    return {
        "requests": len(requests),
        "bad_lines": bad,
        "prompt_tokens": sum(len(request.prompt) for _, request in requests),
        "hit_rate": round(usage.hit_rate, 4),
        "prefilled_tokens": figures.prefilled_tokens,
        "generated_tokens": figures.generated_tokens,
        "seconds": round(seconds, 3),
        "first_round_seconds": round(first, 3),
        "generated_tokens_per_second": round(figures.generated_tokens / seconds, 1)
        if seconds
        else 0,
        "median_seconds_to_first_token": round(statistics.median(waits), 3) if waits else None,
        "pool_bytes": engine.config.size_bytes + engine.config.index_bytes,
        "pool_pages": usage.num_pages,
        "most_pages_held": usage.most_held_pages,
        "mean_occupancy": round(figures.occupancy, 4),
        "mean_waste": round(figures.waste, 4),
        "preemptions": figures.preemptions,
        "evictions": usage.evictions,
    }


def _summary(report: dict[str, Any], cache: str) -> str:
    rows = [
        ("requests", "{requests:,}, and {bad_lines:,} lines that could not be run"),
        ("prompts", "{prompt_tokens:,} tokens, {hit_rate:.0%} of them found in the pool"),
        ("answers", "{generated_tokens:,} tokens, {generated_tokens_per_second:,.0f} tokens/s"),
        (
            "time",
            "{seconds:.1f} s, {first_round_seconds:.1f} s of it the first round, which compiles",
        ),
        ("first token", "after {median_seconds_to_first_token} s, the median"),
        ("KV cache", f"{cache}, {format_bytes(report['pool_bytes'])}"),
        (
            "pool",
            "{most_pages_held:,} of {pool_pages:,} pages at most, {mean_occupancy:.0%} on average",
        ),
        ("waste", "{mean_waste:.1%} of held slots hold no token"),
        ("made room", "{preemptions:,} preemptions, {evictions:,} evictions"),
    ]
    return "\n".join(f"{name:12} {text.format(**report)}" for name, text in rows)


BATCH = Command(
    "Answer a file of prompts: many at once, over one pool of pages, shared beginnings once.",
    _EXAMPLES,
    _add_arguments,
    _run,
)
