"""How late data come, and when that is more than chance. No I/O, no clock; times are ns."""

import math
from collections import deque

from workers.deribit.feeds.rhythm import SECOND

LAGGING, TOO_FAR_BEHIND = 5 * SECOND, 30 * SECOND
"""Lag that is announced once it has lasted LASTING, and lag at which the connection is given up while it rises."""

LASTING = 5
"""Seconds."""

RISEN = 3 * SECOND
"""Lag rises once it is so much above its least: less is a busy machine, or the clock's error."""


class Samples:
    """The last 1,000 samples of one quantity, in ns."""

    def __init__(self) -> None:
        self._samples: deque[int] = deque(maxlen=1000)

    def add(self, sample: int) -> None:
        """Take one sample."""
        self._samples.append(sample)

    @property
    def newest(self) -> int:
        """The last sample; 0 if there is none."""
        return self._samples[-1] if self._samples else 0

    def describe(self) -> dict[str, float]:
        """Median and 99th percentile in seconds; empty without samples."""
        ordered = sorted(self._samples)
        if not ordered:
            return {}
        return {"p50": ordered[len(ordered) // 2] / 1e9, "p99": ordered[len(ordered) * 99 // 100] / 1e9}


class LagWatch:
    """Whether data come too late, from the least lag of each second."""

    def __init__(self) -> None:
        self._least: int | None = None
        self._lags: list[int] = []
        self._least_far = math.inf
        self.is_lagging = False

    def add(self, lag: int) -> None:
        """Take one sample."""
        if self._least is None or lag < self._least:
            self._least = lag

    def end_second(self) -> bool:
        """Close one second. Returns whether the connection should be given up; `is_lagging` says the rest."""
        least, self._least = self._least, None
        if least is None:
            return False
        self._lags = [*self._lags[1 - LASTING :], least]
        lasting = min(self._lags) if len(self._lags) == LASTING else 0
        self.is_lagging = lasting > LAGGING
        self._least_far = min(self._least_far, lasting) if lasting > TOO_FAR_BEHIND else math.inf
        return least > self._least_far + RISEN
