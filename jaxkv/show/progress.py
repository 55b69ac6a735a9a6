"""What a person sees while waiting."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

# Shorter waits than this show nothing.
_PATIENCE_SECONDS = 2.0


@contextlib.contextmanager
def progress_bar(
    description: str, total: int, *, quiet: bool = False
) -> Iterator[Callable[..., None]]:
    """Yields a function to call with the units done and, with a draft, tokens per step so far.

    Quiet when stderr is not a terminal.

    Ask for ``quiet`` where the caller prints meanwhile: a bar redraws its line over theirs.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda done, per_step=None: None
        return
    from rich.console import Console
    from rich.progress import Progress

    started = time.monotonic()
    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(description, total=total)

    def advance(done: int, per_step: float | None = None) -> None:
        bar.advance(task, done)
        if per_step is not None:
            bar.update(task, description=f"{description}, {per_step:.1f} tokens per step")
        if not bar.live.is_started and time.monotonic() - started > _PATIENCE_SECONDS:
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()
