"""Timing that is fair on a noisy machine, and the machine's own limits."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import psutil

# Every worker thread of the last competitor, which may spin for a while, is asleep by then.
_SETTLE_SECONDS = 0.01
# Large enough that the caches of most processors hold a part of it only.
_LIMIT_BYTES = 512 << 20


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
      seconds: the median of ``repeats`` samples.
      spread: between the quartiles, as a share of the median.
    """

    seconds: float
    spread: float
    repeats: int

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, (high - low) / median, len(samples))


def interleaved(
    competitors: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    calls: int = 1,
    lead_in: int = 0,
    warm_up: int = 2,
    most_seconds: float = 30.0,
) -> dict[str, Timing]:
    """Time the competitors in turns, A B A B, so that a slow spell of the machine hits all.

    Args:
      competitors: name -> one call; what it returns is waited for.
      repeats: samples of each, if time allows.
      calls: made a sample, for calls that are too short to time alone.
      lead_in: calls right before each sample that are not timed, after which caches hold what they
        hold in a loop of such calls, and not what the last competitor read.
      warm_up: samples that are thrown away.
      most_seconds: no further turn begins after this time, once there are three.
    """
    samples: dict[str, list[float]] = {name: [] for name in competitors}
    began = time.perf_counter()
    for turn in range(warm_up + repeats):
        if turn - warm_up >= 3 and time.perf_counter() - began > most_seconds:
            break
        for name, call in competitors.items():
            time.sleep(_SETTLE_SECONDS)
            for _ in range(lead_in):
                jax.block_until_ready(call())
            started = time.perf_counter()
            for _ in range(calls):
                result = call()
            jax.block_until_ready(result)
            elapsed = time.perf_counter() - started
            del result  # buffers are freed outside the timed part
            if turn >= warm_up:
                samples[name].append(elapsed / calls)
    return {name: Timing.of(times) for name, times in samples.items()}


class OtherLoad:
    """What other processes take of the machine while this one measures."""

    def __init__(self):
        self._machine, self._own = psutil.cpu_times(), time.process_time()

    def share(self) -> float:
        """Of all cores' time since this was made."""
        own = time.process_time() - self._own
        passed = {
            kind: after - before
            for (kind, before), after in zip(
                self._machine._asdict().items(), psutil.cpu_times(), strict=True
            )
        }
        idle = passed["idle"] + passed.get("iowait", 0)
        return max(0.0, 1 - (idle + own) / sum(passed.values()))


class ReadLimit:
    """A plain numpy sum of a buffer larger than most caches, on all cores: a competitor as well.

    XLA's own sum runs on one core.
    """

    NAME = "plain sum"
    size_bytes = _LIMIT_BYTES

    def __init__(self):
        cores = os.cpu_count() or 1
        self._parts = np.array_split(np.ones(_LIMIT_BYTES // 4, np.float32), cores)
        self._pool = ThreadPoolExecutor(cores)

    def __call__(self) -> list[np.floating]:
        return list(self._pool.map(np.sum, self._parts))
