"""Progress is for a person who waits at a terminal, and for nobody else."""

import io

import jax
import pytest

import jaxkv
from jaxkv.show.progress import progress_bar


class Screen(io.StringIO):
    """What stands in for stderr; a terminal or not."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("jaxkv.show.progress._PATIENCE_SECONDS", -1.0)
    monkeypatch.setenv("TERM", "xterm")


def shown(monkeypatch, terminal, show):
    screen = Screen(terminal)
    monkeypatch.setattr("sys.stderr", screen)
    show()
    return screen.getvalue()


def one_bar(**options):
    with progress_bar("prefill", 10, **options) as advance:
        advance(5)


@pytest.mark.parametrize(
    ("terminal", "options", "seen"),
    [(True, {}, True), (True, {"quiet": True}, False), (False, {}, False)],
)
def test_a_bar_is_for_a_terminal(impatient, monkeypatch, terminal, options, seen):
    text = shown(monkeypatch, terminal, lambda: one_bar(**options))
    assert ("prefill" in text) == seen
    assert bool(text) == seen


def test_short_waits_show_nothing(monkeypatch):
    assert shown(monkeypatch, True, one_bar) == ""


@pytest.mark.parametrize("streams", [True, False])
def test_a_bar_does_not_draw_over_a_streamed_text(impatient, monkeypatch, streams):
    def count_up(tokens, cache):
        return jax.nn.one_hot(tokens + 1, 64), jaxkv.advance(cache, tokens.shape[-1])

    def show():
        config = jaxkv.KVCacheConfig(1, 64, 1, 4, batch_size=1)
        on_tokens = (lambda number, tokens: None) if streams else None
        jaxkv.generate(count_up, [[1, 2]], max_new_tokens=4, config=config, on_tokens=on_tokens)

    assert bool(shown(monkeypatch, True, show)) != streams
