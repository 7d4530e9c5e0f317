"""When silence is more than chance, judged on what came before. No I/O, no clock; times are ns, of a clock that nobody
sets.

Silence is normal on Deribit (a still book sends nothing), so each channel is held to its own rhythm.
"""

from collector.channels import Channel

SECOND = 1_000_000_000

QUIET = 15 * SECOND
"""No channel is stale before this, whatever its rhythm."""

MEANS, LONGESTS, SAMPLES = 20, 3, 20
"""Silence is out of the rhythm once it is longer than MEANS mean intervals and LONGESTS times the longest one; of less
than SAMPLES intervals there is no rhythm."""

NEVER_QUIET = 60 * SECOND
"""What is never quiet (see is_never_quiet) is out of any rhythm after so long, also before its own is known."""


def is_never_quiet(channel: Channel) -> bool:
    """Whether its silence cannot be the market's: marks and indices move all the time, books of perpetuals too."""
    if channel.instrument.endswith("-PERPETUAL"):
        return channel.type in ("book", "ticker", "quote", "funding")
    return channel.type in ("ticker", "index")


class Rhythm:
    """How often something comes, by looks whether it has come; they are some seconds apart at most.

    `last_ts` tells what came last from what came before: when that was, by whatever clock. `is_steady` is set for what
    is never quiet.
    """

    def __init__(self, is_steady: bool = False) -> None:
        self.is_steady = is_steady
        self._since = 0
        self._last_ts = 0
        self._is_own = False
        self._mean = 0.0
        self._longest = 0
        self._samples = 0

    def look(self, last_ts: int, now: int) -> None:
        """Take note of whether it has come since the last look."""
        if last_ts == self._last_ts:
            return
        if self._is_own:
            interval = now - self._since
            self._samples += 1
            # A mean that forgets slowly: the rhythm of the last hundred counts, not that of yesterday.
            self._mean += (interval - self._mean) / min(self._samples, 100)
            self._longest = max(interval, self._longest - self._longest // 100)
        self._since, self._is_own, self._last_ts = now, True, last_ts

    def restart(self, last_ts: int, now: int) -> None:
        """It has just been asked for: silence counts from now on, and the first interval is none of its own."""
        self._since, self._is_own, self._last_ts = now, False, last_ts

    def admit(self, now: int) -> None:
        """A silence up to `now` that led to nothing belongs to the rhythm: only a longer one is out of it again."""
        self._longest = max(self._longest, now - self._since)

    def is_broken(self, now: int) -> bool:
        """Whether the silence up to `now` is out of the rhythm."""
        if self._samples < SAMPLES:
            is_known = self.is_steady and self._since > 0
            return is_known and now - self._since > max(NEVER_QUIET, LONGESTS * self._longest)
        return now - self._since > max(QUIET, MEANS * self._mean, LONGESTS * self._longest)

    def measure_silence(self, now: int) -> float:
        """Seconds since it came last, or was asked for."""
        return (now - self._since) / SECOND
