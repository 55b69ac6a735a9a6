"""Pictures of a cache's life, by matplotlib, which is imported when the first is drawn.

Every function draws into ``ax``, or into a new figure, and returns the axes. Colours are
those of Okabe and Ito, which the colour-blind tell apart; every band is named besides.

>>> import jaxkv
>>> jaxkv.plots.pool_occupancy(sequences=5, shared=2, free=9).get_xlabel()
'pages'
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxkv.memory.tracker import Event, MemoryTracker

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["error_by_bits", "memory_over_time", "pool_occupancy"]

_BLACK, _BLUE, _SKY, _GREEN = "#000000", "#0072B2", "#56B4E9", "#009E73"
_ORANGE, _VERMILLION, _PURPLE = "#E69F00", "#D55E00", "#CC79A7"
_PALE = "#DDDDDD"
_COLORS = {
    "before": _PALE,
    "weights": _SKY,
    "kv_cache": _BLUE,
    "activations": _ORANGE,
    "other": _PURPLE,
    "sequences": _BLUE,
    "shared": _ORANGE,
    "cached": _GREEN,
    "free": _PALE,
}
_MARKS = (
    ("o", _BLUE), ("s", _VERMILLION), ("D", _GREEN), ("^", _PURPLE), ("v", _ORANGE), ("P", _SKY),
)  # fmt: skip
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))


def memory_over_time(
    tracker: MemoryTracker | Sequence[Event], *, ax: "Axes | None" = None
) -> "Axes":
    """What was held and for what purpose, from the first change to the last.

    Args:
      tracker: whose ``history`` to draw, or such a history itself.
      ax: where to draw; a new figure if None.

    Raises:
      ValueError: nothing was ever tracked.
      ImportError: matplotlib is not installed.

    >>> import jaxkv
    >>> tracker = jaxkv.MemoryTracker()
    >>> tracker.release(tracker.track(3_000_000, purpose="kv_cache"))
    >>> jaxkv.plots.memory_over_time(tracker).get_ylabel()
    'memory (MB)'
    """
    events = tracker.history if isinstance(tracker, MemoryTracker) else tracker
    if not events:
        raise ValueError("Nothing was tracked, so there is nothing to draw.")
    ax = _axes(ax)
    # What was held at the end is drawn a little further.
    over = (events[-1].seconds - events[0].seconds) / 30
    events = [*events, events[-1]._replace(seconds=events[-1].seconds + over, change_bytes=0)]
    seconds = np.array([event.seconds for event in events])
    totals = np.array([event.total_bytes for event in events])
    bands = {"before": np.full(len(events), totals[0] - events[0].change_bytes)}
    for purpose in dict.fromkeys(event.purpose for event in events):
        changes = [event.change_bytes * (event.purpose == purpose) for event in events]
        bands[str(purpose)] = np.cumsum(changes)
    bands = {name: held for name, held in bands.items() if held.any()}
    unit_size, unit = next(pair for pair in _UNITS if totals.max() >= pair[0] or pair[0] == 1)
    _stack(ax, seconds, {name: held / unit_size for name, held in bands.items()}, step="post")
    peak = int(totals.argmax())
    ax.plot(seconds, totals / unit_size, drawstyle="steps-post", color=_BLACK, linewidth=1)
    ax.annotate(
        f"peak {totals[peak] / unit_size:.4g} {unit}",
        (seconds[peak], totals[peak] / unit_size),
        xytext=(4, 4),
        textcoords="offset points",
    )
    ax.set(xlabel="time (s)", ylabel=f"memory ({unit})", title="Memory held, by purpose")
    ax.set_ylim(0, 1.15 * totals.max() / unit_size or 1)
    return ax


def pool_occupancy(
    *,
    sequences: int | Sequence[int],
    free: int | Sequence[int],
    shared: int | Sequence[int] = 0,
    cached: int | Sequence[int] = 0,
    steps: Sequence[float] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """What the pages of a pool are used for: at one moment, or step by step.

    Args:
      sequences: pages that one sequence owns; a number, or one for each step.
      free: pages that hold nothing.
      shared: pages that several sequences read.
      cached: pages of a finished sequence's prefix, kept for the next that begins so.
      steps: what stands on the axis of steps; 0, 1, 2, ... if None.
      ax: where to draw; a new figure if None.

    Raises:
      ValueError: numbers of different lengths.
      ImportError: matplotlib is not installed.

    >>> import jaxkv
    >>> axes = jaxkv.plots.pool_occupancy(sequences=[5, 7], shared=[0, 2], free=[11, 7])
    >>> axes.get_xlabel(), axes.get_ylabel()
    ('step', 'pages')
    """
    given = {"sequences": sequences, "shared": shared, "cached": cached, "free": free}
    bands = {name: np.atleast_1d(np.asarray(pages)) for name, pages in given.items()}
    count = max(map(len, bands.values()))
    if any(len(pages) not in (1, count) for pages in bands.values()):
        got = ", ".join(f"{len(pages)} of {name}" for name, pages in bands.items())
        raise ValueError(f"The numbers of pages must be one for each step, got {got}.")
    bands = {name: np.broadcast_to(pages, count) for name, pages in bands.items() if pages.any()}
    total = np.sum(list(bands.values()), axis=0)
    if count == 1:
        ax = _axes(ax, height=1.6)
        ends = np.cumsum([pages[0] for pages in bands.values()])
        for (name, pages), end in zip(bands.items(), ends, strict=True):
            label = f"{name}: {pages[0]:,}"
            ax.barh(0, pages[0], left=end - pages[0], color=_COLORS[name], label=label)
        ax.set(xlabel="pages", yticks=[], xlim=(0, int(total[0])))
        ax.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
        return ax
    ax = _axes(ax)
    _stack(ax, np.arange(count) if steps is None else np.asarray(steps), bands, step="post")
    ax.set(xlabel="step", ylabel="pages", title="Pages of the pool")
    ax.set_ylim(0, int(total.max()))
    return ax


def error_by_bits(
    errors: Mapping[str, tuple[float, float]],
    *,
    quantity: str = "relative error",
    limit: bool = True,
    ax: "Axes | None" = None,
) -> "Axes":
    """How much each codec loses against the bits that it takes.

    Args:
      errors: by name, the bits of one number (scales included) and the error.
      quantity: what the errors are; the label of the axis, with its unit if it has one.
      limit: draw Shannon's limit, ``2 ** -bits``: no code of Gaussian numbers has a smaller
        relative root-mean-square error (Shannon 1959; Cover and Thomas, section 10.3).
      ax: where to draw; a new figure if None.

    Raises:
      ImportError: matplotlib is not installed.

    >>> import jaxkv
    >>> axes = jaxkv.plots.error_by_bits({"int8": (8.125, 0.0065), "float8": (8.125, 0.0258)})
    >>> axes.get_xlabel(), axes.get_yscale()
    ('bits a number', 'log')
    """
    ax = _axes(ax)
    for (name, (bits, error)), (mark, color) in zip(
        errors.items(), itertools.cycle(_MARKS), strict=False
    ):
        ax.plot(bits, error, mark, color=color, markersize=7)
        ax.annotate(name, (bits, error), xytext=(7, 3), textcoords="offset points")
    most = max((bits for bits, _ in errors.values()), default=16.0)
    if limit:
        line = np.linspace(1, most * 1.05, 100)
        ax.plot(
            line, 2.0**-line, color=_BLACK, linewidth=1, linestyle="--", label="Shannon's limit"
        )
        ax.legend(frameon=False)
    ax.set(xlabel="bits a number", ylabel=quantity, yscale="log", xlim=(0, most * 1.18))
    ax.set_title("What codecs lose")
    ax.margins(y=0.15)
    ax.grid(alpha=0.3)
    return ax


def _axes(ax: "Axes | None", height: float = 3.2) -> "Axes":
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "jaxkv.plots needs matplotlib, which is not installed: pip install 'jaxkv[viz]'"
        ) from error
    return plt.subplots(figsize=(7, height), layout="constrained")[1]


def _stack(ax: "Axes", x: Any, bands: Mapping[str, np.ndarray], step: str) -> None:
    colors = [_COLORS[name] for name in bands]
    ax.stackplot(x, *bands.values(), labels=list(bands), colors=colors, step=step, edgecolor="w")
    # The first band is the lowest, so the legend names them from the top down.
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(
        handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False
    )
    ax.margins(x=0)
