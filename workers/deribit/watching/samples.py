"""The spread of a measured quantity over its last samples."""

from collections import deque


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
