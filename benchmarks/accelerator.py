"""On a GPU or TPU: how fast are prompts, decode and requests, beside the device's limits and peers?

`accelerator-checks` asks whether answers are right and memory is as promised.
"""

import functools
import signal
import time
from collections.abc import Callable, Iterator

import jax

from benchmarks.accelerator_attention import CONTEXTS, compile_ahead, large_heads, sweep
from benchmarks.accelerator_decode import STATES, decode, llama
from benchmarks.accelerator_prefill import prefill
from benchmarks.accelerator_prompts import first_tokens, peer_of, requests
from benchmarks.report import Table


def run(quick: bool) -> Iterator[Table]:
    """A table a question."""
    if jax.default_backend() == "cpu":
        yield Table("Accelerator: this machine has none", [])
        return
    print(f"device         {jax.devices()[0].device_kind}", flush=True)
    yield within("Prefill", 150, prefill)
    yield within("Compiled", 150, functools.partial(compile_ahead, CONTEXTS))
    for batch, context in CONTEXTS:
        title = f"Decode attention, {batch} x {context}"
        yield within(title, 120, functools.partial(sweep, batch, context))
    yield within("Decode attention, heads of 256", 60, large_heads)
    model = llama(layers=8 if quick else 32)
    yield within("Decode", 300, lambda: decode(model, STATES))
    peer = peer_of(model)
    yield within("First token", 150, lambda: first_tokens(model, peer))
    yield within("Engine", 150, lambda: requests(model, peer))


def within(title: str, seconds: int, part: Callable[[], Table]) -> Table:
    """A part's table; or why there is none, so that one part's failure is not that of the rest."""

    def give_up(*_):
        raise TimeoutError(f"not done after {seconds} s")

    started = time.monotonic()
    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        table = part()
        table.notes.append(f"({time.monotonic() - started:.0f} s)")
        return table
    except Exception as error:
        return Table(title, [], [f"{type(error).__name__}: {str(error)[:300]}"])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
