"""The bands of a picture are the numbers they were drawn from; looks are for eyes."""

import sys

import matplotlib as mpl
import numpy as np
import pytest

import jaxkv
from jaxkv import plots
from jaxkv.memory import Event, Purpose

mpl.use("Agg")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def tops(ax):
    """The highest point of each band, by name."""
    return {each.get_label(): each.get_paths()[0].vertices[:, 1].max() for each in ax.collections}


def test_memory_by_purpose_and_its_peak():
    tracker = jaxkv.MemoryTracker()
    weights = tracker.track(5_000_000, purpose="weights")
    cache = tracker.track(3_000_000, purpose="kv_cache")
    tracker.release(weights)
    tracker.release(cache)
    ax = plots.memory_over_time(tracker)
    (line,) = ax.lines
    np.testing.assert_array_equal(line.get_ydata(), [5, 8, 3, 0, 0])
    assert tops(ax) == {"weights": 5, "kv_cache": 8}
    assert [text.get_text() for text in ax.texts] == ["peak 8 MB"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time (s)", "memory (MB)")


def test_what_was_held_before_the_history_begins_is_drawn_too():
    events = [Event(1.0, "later", Purpose.KV_CACHE, 2000, 9000)]
    ax = plots.memory_over_time(events)
    assert tops(ax) == {"before": 7, "kv_cache": 9}
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [9, 9])


def test_a_pool_over_steps_and_at_one_moment():
    ax = plots.pool_occupancy(sequences=[5, 7], shared=[0, 2], cached=0, free=[11, 7])
    assert tops(ax) == {"sequences": 7, "shared": 9, "free": 16}
    assert ax.get_ylim() == (0, 16)
    ax = plots.pool_occupancy(sequences=3, shared=1, free=4)
    assert [bar.get_width() for bar in ax.patches] == [3, 1, 4]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["sequences: 3", "shared: 1", "free: 4"]
    with pytest.raises(ValueError, match="one for each step, got 2 of sequences"):
        plots.pool_occupancy(sequences=[1, 2], free=[1, 2, 3])


def test_errors_and_the_limit():
    ax = plots.error_by_bits({"int8": (8.0, 0.0065), "two": (2.0, 0.34)})
    *points, limit = ax.lines
    assert [point.get_xydata().tolist() for point in points] == [[[8.0, 0.0065]], [[2.0, 0.34]]]
    bits, error = limit.get_xydata().T
    np.testing.assert_allclose(error, 2.0**-bits)
    assert [text.get_text() for text in ax.texts] == ["int8", "two"]
    assert len(plots.error_by_bits({"int8": (8.0, 1e-6)}, limit=False).lines) == 1


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="Nothing was tracked"):
        plots.memory_over_time(jaxkv.MemoryTracker())


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxkv\[viz\]'"):
        plots.error_by_bits({"int8": (8.0, 0.0065)})
