"""When reading rests, so that frames which come fast and one by one come together. No I/O, no clock; times are ns."""

SECOND = 1_000_000_000


class Pace:
    """When to rest between reads, as network cards do it: at a high rate, frames that come one by one cost more in
    waking than in work, so a short rest lets several come together.

    Off while it is quiet (no latency is added), and off at full speed (frames come together anyhow).
    """

    RATE = 8000
    """Frames a second from which on it rests."""

    WINDOW = SECOND // 100
    """Time over which the rate is taken."""

    FULL = 32
    """Frames read together that need no rest."""

    def __init__(self, pause: float) -> None:
        self.pause = pause
        self._is_fast = False
        self._since = 0
        self._count = 0
        self._seen = 0

    def should_pause(self, frames: int, now: int) -> bool:
        """Whether to rest after a burst that ends with frame number `frames`, read at `now`."""
        if not self.pause:
            return False
        burst, self._seen = frames - self._seen, frames
        if not 0 <= (elapsed := now - self._since) < self.WINDOW:  # below 0: the clock was set back
            self._is_fast = 0 < self.RATE * elapsed < (frames - self._count) * SECOND
            self._since, self._count = now, frames
        return self._is_fast and burst < self.FULL
