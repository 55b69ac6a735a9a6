"""``jaxkv chat``: a conversation in the terminal, each turn over the pages of those before."""

import argparse
import sys
from collections.abc import Iterator

from jaxkv.addressing import Paged
from jaxkv.cli.command import Command
from jaxkv.cli.model_options import (
    add_model_arguments,
    load_chat,
    load_model,
    nan_message,
    sampling_of,
    stop_strings_of,
    unicode_text,
)
from jaxkv.counts import ceil_div
from jaxkv.serve import Engine, Request
from jaxkv.show.tokens import TextStream

_EXAMPLES = """\
examples:
  jaxkv chat --model SmolLM2-135M-Instruct.Q4_1.gguf
      asks for a line, answers it, and so on; Ctrl-D ends
  jaxkv chat --model ./Qwen2.5-0.5B-Instruct 'What is the capital of France?'
      one answer; a Hugging Face folder with a chat template
  jaxkv chat --model model.gguf --system 'Answer in one word.' < questions.txt
      a line is a turn

exit status: 0 done, 1 logits that are no numbers ended an answer, 2 the question was not
understood, the model could not be loaded, or the conversation is longer than --context
"""
_PAGE_SIZE = 16
_CONTEXT = 4096
# So small that a turn computes little more than what is new; few, so that words come one by one.
_PREFILL_CHUNK, _DECODE_STEPS = 32, 2


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, temperature=0.0, max_new_tokens=512)
    parser.add_argument("text", nargs="?", metavar="PROMPT", help="answer this and end")
    parser.add_argument("--prompt", metavar="TEXT", help="likewise")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")


def _run(options: argparse.Namespace) -> int:
    sampling = sampling_of(options)
    model, tokenizer = load_model(options)
    stop_strings = stop_strings_of(options, tokenizer)
    chat = load_chat(options, tokenizer)
    trained = getattr(getattr(model.config, "rope", None), "max_position_embeddings", _CONTEXT)
    context = options.context or min(_CONTEXT, trained)
    config = model.cache_config(
        max_context_length=context,
        batch_size=1,
        codec=options.codec,
        addressing=Paged(_PAGE_SIZE, ceil_div(context, _PAGE_SIZE)),
    )
    messages = []
    if options.system is not None:
        messages.append({"role": "system", "content": unicode_text(options.system)})
    with Engine(
        model,
        config,
        sampling=sampling,
        prefill_chunk=_PREFILL_CHUNK,
        decode_steps=_DECODE_STEPS,
        tokenizer=tokenizer,
        stop_strings=stop_strings,
    ) as engine:
        asked = options.text if options.prompt is None else options.prompt
        for number, question in enumerate(_questions(asked)):
            messages.append({"role": "user", "content": question})
            prompt = chat.encode(messages)
            room = min(options.max_new_tokens, max(1, context - len(prompt)))
            request = engine.submit(prompt, max_new_tokens=room, seed=options.seed + number)
            text = _shown(engine, request, TextStream(tokenizer, prompt, stop_strings))
            messages.append({"role": "assistant", "content": text})
            if request.finish_reason == "nan":
                print(f"jaxkv chat: {nan_message(len(request.tokens))}", file=sys.stderr)
                return 1
            if request.finish_reason == "length":
                print(f"[cut after {len(request.tokens)} tokens]", file=sys.stderr)
    return 0


def _questions(prompt: str | None) -> Iterator[str]:
    """The one that was given, or the lines that are typed or piped in."""
    if prompt is not None:
        yield unicode_text(prompt)
        return
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield unicode_text(line.strip())


def _shown(engine: Engine, request: Request, stream: TextStream) -> str:
    """Print an answer as it comes, and return it."""
    for token in engine.stream(request):
        print(stream([token]), end="", flush=True)
    print(stream.rest())
    return stream.text


CHAT = Command(
    "Talk to an instruct model: from a GGUF file, a Hugging Face folder or a name of its Hub.",
    _EXAMPLES,
    _add_arguments,
    _run,
)
