"""Deribit's limits as arithmetic: how subscriptions are cut into calls, and what calls cost. No I/O, no clock.

Source: docs.deribit.com, rate limits and connection management, 2026. Credits belong to the account (or address), so
everything that uses the same key draws on the same pool.
"""

from collections.abc import Sequence

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
"""All other calls of a bootstrap: 100 at once, then 20 a second."""

_ENVELOPE = len('{"jsonrpc": "2.0", "id": 18446744073709551615, "method": "", "params": {"channels": []}}')


class Credits:
    """One pool of credits, full at first. Times are in seconds on any clock that does not go back."""

    def __init__(self, pool: float = SUBSCRIBE_BURST, refill: float = REFILL, now: float = 0.0) -> None:
        self.pool = pool
        self.refill = refill
        self._level = pool
        self._since = now

    def take(self, cost: float, now: float) -> float:
        """Take the credits of one call; return the seconds to wait before it may be sent.

        The credits are booked at once: who asks next waits longer, so calls keep their order.
        """
        self._level = min(self.pool, self._level + max(0.0, now - self._since) * self.refill)
        self._since = max(self._since, now)
        self._level -= cost
        return max(0.0, -self._level / self.refill)

    def shrink(self) -> None:
        """The exchange says that we overdrew: others draw on the pool as well, so count on half of it from now on."""
        self.pool = max(SUBSCRIBE_COST, self.pool / 2)
        self._level = min(self._level, 0.0)


def measure_call(channels: Sequence[str], method: str, reserve: int = 0) -> int:
    """Bytes of the JSON frame that asks for these channels, at most; `reserve` for further params."""
    return _ENVELOPE + len(method) + reserve + sum(len(channel.encode()) + 4 for channel in channels)


def chunk_channels(
    channels: Sequence[str], method: str, reserve: int = 0, max_count: int = MAX_CHANNELS, max_bytes: int = MAX_FRAME
) -> list[list[str]]:
    """Cut channels, in order, into calls of at most `max_count` channels and `max_bytes` of JSON."""
    chunks: list[list[str]] = []
    size = max_bytes
    for channel in channels:
        added = len(channel.encode()) + 4
        if not chunks or len(chunks[-1]) >= max_count or size + added > max_bytes:
            chunks.append([])
            size = measure_call((), method, reserve)
        chunks[-1].append(channel)
        size += added
    return chunks


def estimate_seconds(calls: int, cost: int = SUBSCRIBE_COST, pool: int = SUBSCRIBE_BURST) -> float:
    """Seconds until the last of so many calls may be sent, from a full pool on; round trips are not counted."""
    return max(0.0, (calls * cost - pool) / REFILL)
