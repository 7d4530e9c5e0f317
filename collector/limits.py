"""Deribit's limits as arithmetic: how subscriptions are cut into calls, and what calls cost. No I/O, no clock.

Source: docs.deribit.com, rate limits and connection management, 2026. Credits belong to the account (or address), so
everything that uses the same key draws on the same pool.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_CONNECTIONS = 32
"""From one address at a time, REST requests in flight included; the next upgrade gets HTTP 429."""

MAX_CHANNELS = 500
"""Channels of one subscribe call."""

MAX_FRAME = 30_000
"""Bytes of one call as we send it; Deribit refuses more than 32 kB with -32600."""

REFILL = 10_000.0
"""Credits that each pool regains in a second."""

SUBSCRIBE_COST, SUBSCRIBE_POOL = 3_000, 30_000
"""public/subscribe and private/subscribe: 10 at once, then 3.3 a second."""

SUBSCRIBE_BURST = SUBSCRIBE_POOL - SUBSCRIBE_COST
"""What we use of that pool: calls that bunch up on the way must not overdraw it, which would end the session."""

CALL_COST, CALL_POOL = 500, 50_000
"""All other calls: 100 at once, then 20 a second."""

CALL_BURST, CALL_REFILL = 0.9 * CALL_POOL, 0.9 * REFILL
"""What we use of that pool by ourselves; the rest is for answers to test_request."""

REGAIN = 3_600.0
"""Seconds in which a pool that was made smaller (see Credits.shrink) grows from nothing to its whole size."""

_TINY = 0.01
"""Credits: less than the rounding of clocks brings about."""

_ENVELOPE = len('{"jsonrpc": "2.0", "id": 18446744073709551615, "method": "", "params": {"channels": []}}')


@dataclass(slots=True)
class Credits:
    """One pool: `level` credits at `since`, in seconds on any clock that does not go back; never more than `burst`.

    `burst` is `whole`, or less for a while after the exchange has said that we overdrew.
    """

    burst: float = SUBSCRIBE_BURST
    refill: float = REFILL
    since: float = 0.0
    level: float = field(init=False)
    whole: float = field(init=False)
    is_spent: bool = False

    def __post_init__(self) -> None:
        self.level = self.whole = self.burst

    def take(self, cost: float, now: float, reserve: float = 0.0) -> float:
        """Take the credits of one call and return 0, if they are there and `reserve` stays behind.

        Else take nothing; return the seconds after which to ask again. Nothing is booked ahead: who asks may be killed.
        """
        self._pass_time(now)
        lacking = min(cost + reserve, self.burst) - self.level
        if lacking > _TINY:
            return lacking / self.refill
        self.level -= cost
        self.is_spent = False
        return 0.0

    def _pass_time(self, now: float) -> None:
        passed = max(0.0, now - self.since)
        self.burst = min(self.whole, self.burst + passed * self.whole / REGAIN)
        self.level = min(self.burst, self.level + passed * self.refill)
        self.since = max(self.since, now)

    def shrink(self, now: float) -> None:
        """The exchange says that we overdrew: somebody else draws on the pool, so count on half of it at first.

        Until something is taken again, further such words are about the same event.
        """
        self._pass_time(now)
        if not self.is_spent:
            self.burst = max(SUBSCRIBE_COST, self.burst / 2)
            self.level = min(self.level, 0.0)
            self.is_spent = True


def measure_call(channels: Sequence[str], method: str) -> int:
    """Bytes of the JSON frame that asks for these channels, at most."""
    return _ENVELOPE + len(method) + sum(len(channel.encode()) + 4 for channel in channels)


def chunk_channels(channels: Sequence[str], method: str) -> list[list[str]]:
    """Cut channels, in order, into calls of at most MAX_CHANNELS channels and MAX_FRAME bytes of JSON."""
    chunks: list[list[str]] = []
    size = MAX_FRAME
    for channel in channels:
        added = len(channel.encode()) + 4
        if not chunks or len(chunks[-1]) >= MAX_CHANNELS or size + added > MAX_FRAME:
            chunks.append([])
            size = measure_call((), method)
        chunks[-1].append(channel)
        size += added
    return chunks


def estimate_seconds(
    calls: int, cost: float = SUBSCRIBE_COST, burst: float = SUBSCRIBE_BURST, refill: float = REFILL
) -> float:
    """Seconds until the last of so many calls may be sent, from a full pool on; round trips are not counted."""
    return max(0.0, (calls * cost - burst) / refill)
