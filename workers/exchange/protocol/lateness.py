"""Data of one connection that come late on purpose: each waits until its time, in order. No I/O, no clock."""

from collections import deque
from collections.abc import Iterator

from collector.faults import FOREVER, Faults


class Lateness:
    """The frames that wait; `size` is their bytes. Times are seconds since the connection was opened."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._waiting: deque[tuple[float, bytes]] = deque()
        self.size = 0

    def hold(self, text: bytes, now: float) -> None:
        """Take a frame that a punctual exchange would send now."""
        self._waiting.append((self._find_due(now), text))
        self.size += len(text)

    def take_due(self, now: float) -> Iterator[bytes]:
        """Give back the frames whose time has come, in order."""
        while self._waiting and self._waiting[0][0] <= now:
            text = self._waiting.popleft()[1]
            self.size -= len(text)
            yield text

    def _find_due(self, now: float) -> float:
        """When a frame of this time is to go out: what is later never goes earlier."""
        due = now
        for setting in self._faults.all("lag"):
            if now >= setting.at:
                due = max(due, now + setting.value)
        for setting in self._faults.all("backlog"):
            since = now - setting.at
            if since > 0:
                due = max(due, now - since + since / setting.value if setting.value > 0 else FOREVER)
        return due
