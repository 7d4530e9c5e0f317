"""What the exchange knows of one WebSocket: login, subscriptions, heartbeat; and what its requests cost.

Times (seconds) are passed in.
"""

from dataclasses import dataclass, field

from workers.exchange.protocol.auth import Login

FIRST, EACH, GRACE, FLOOR = 1.2, 1.06, 10.0, 10.0
"""Measured at interval 10: the first test_request after 12.0-12.6 s, then one each 10.6-10.7 s; cut 10.0 s after the
first that stays unanswered."""

IDLE = 60.5
"""Seconds after which a silent socket without subscription and heartbeat is dropped, without a close frame."""

REFILL = 10_000.0
"""Credits a second, for each pool."""

_COSTS = {
    "public/subscribe": (3_000, 30_000), "private/subscribe": (3_000, 30_000),
    "public/get_instruments": (10_000, 500_000),
}  # fmt: skip
"""(cost, pool) of the methods that have their own; subscribe's two share one."""


class Heartbeat:
    """When to send heartbeat and test_request, and when to close because nobody answered."""

    def __init__(self, interval: float, now: float) -> None:
        self.interval = interval
        self._next = now + FIRST * interval
        self._unanswered: float | None = None
        self._grace = min(GRACE, interval)

    def answer(self) -> None:
        """Any request answers."""
        self._unanswered = None

    def find_due(self, now: float, last_sent: float) -> list[str]:
        """What is due at `now`: test_request, with heartbeat beside it where nothing else was sent; or close."""
        if abs(now - self._next) > 2 * self.interval:  # a standstill, or the clock was set: it goes on from now
            self._next, self._unanswered = now, None
        if self._unanswered is not None and now - self._unanswered >= self._grace:
            return ["close"]
        if now < self._next:
            return []
        self._next += EACH * self.interval
        if self._unanswered is None:
            self._unanswered = now
        return ["test_request", "heartbeat"] if now - last_sent >= self.interval * 0.99 else ["test_request"]


class Credits:
    """The request credits of one account, or of one address for all who are not logged in."""

    def __init__(self, now: float, limit: float | None = None) -> None:
        self._limit = limit
        self._pools: dict[str, tuple[float, float]] = {}
        self._start = now

    def spend(self, method: str, now: float) -> bool:
        """Take the cost of one call; False if its pool has too little left."""
        cost, size = _COSTS.get(method, (500, 50_000))
        pool = method.partition("/")[2] if method in _COSTS else ""
        full = size if self._limit is None else min(float(size), self._limit)
        left, since = self._pools.get(pool, (full, self._start))
        left = min(full, left + max(0.0, now - since) * REFILL)  # the clock may be set back
        self._pools[pool] = (left - cost if left >= cost else left, now)
        return left >= cost


@dataclass(slots=True)
class Session:
    """The state of one connection; `number` is its number since the exchange started.

    Its times are of its age, in seconds.
    """

    number: int
    subscriptions: dict[str, str | None] = field(default_factory=dict)  # channel -> label
    login: Login | None = None
    heartbeat: Heartbeat | None = None
    cancel_on_disconnect: bool = False
    last_request: float = 0.0
    last_sent: float = 0.0
    ended: bool = False

    def is_logged_in(self, now: int) -> bool:
        """Whether a login holds at `now` (ms)."""
        return self.login is not None and self.login.expires > now

    def is_idle(self, age: float, limit: float) -> bool:
        """Whether Deribit would drop it: nothing subscribed, no heartbeat, and silent for `limit` seconds."""
        return not self.subscriptions and self.heartbeat is None and age - self.last_request >= limit
