"""Data of one connection that come late on purpose: each waits until its time, in order. No I/O, no clock."""

from collections import deque
from collections.abc import Iterator

from collector.faults import FOREVER, Faults


class Lateness:
    """The frames that wait; `size` is their bytes. Times are seconds since 1970, `opened` that of the connection."""

    def __init__(self, faults: Faults, opened: float) -> None:
        self._faults = faults
        self._opened = opened
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

    def move(self, by: float) -> None:
        """The clock was set: what waits waits on for as long."""
        self._opened += by
        self._waiting = deque((due + by, text) for due, text in self._waiting)

    def _find_due(self, now: float) -> float:
        """When a frame of this time is to go out: what is later never goes earlier."""
        due = now
        for setting in self._faults.all("lag"):
            if now >= self._opened + setting.at:
                due = max(due, now + setting.value)
        for setting in self._faults.all("backlog"):
            since = now - self._opened - setting.at
            if since > 0:
                due = max(due, now - since + since / setting.value if setting.value > 0 else FOREVER)
        return due
