"""The lives of connections and worker processes: states and transitions as tables, exit codes, backoff delays.

Each state machine is one table with one writer. A pair of state and event that a table lacks is a
bug, and raises. No I/O and no clock here.
"""

from collections.abc import Mapping
from enum import IntEnum

Table = Mapping[tuple[str, str], str]

CONNECTION: Table = {
    ("closed", "connect"): "connecting",
    ("connecting", "opened"): "bootstrapping",
    ("connecting", "lost"): "backoff",
    ("bootstrapping", "bootstrapped"): "live",
    ("bootstrapping", "lost"): "backoff",
    ("live", "lost"): "backoff",
    ("backoff", "retry"): "connecting",
    # refused: the exchange said no for good. exhausted: retry_count attempts in a row came to nothing.
    ("bootstrapping", "refused"): "failed",
    ("live", "refused"): "failed",
    ("backoff", "exhausted"): "failed",
    # broke: an error that nobody foresaw, of the listener for one.
    ("connecting", "broke"): "failed",
    ("bootstrapping", "broke"): "failed",
    ("live", "broke"): "failed",
    ("backoff", "broke"): "failed",
    ("failed", "broke"): "failed",
    ("closing", "broke"): "closed",
    ("closed", "broke"): "closed",
    ("connecting", "close"): "closing",
    ("bootstrapping", "close"): "closing",
    ("live", "close"): "closing",
    ("backoff", "close"): "closing",
    ("closing", "ended"): "closed",
}
"""One WebSocket connection, as its worker sees it. A new one is `closed`."""

PROCESS: Table = {
    ("waiting", "start"): "starting",
    ("starting", "ready"): "running",
    ("starting", "exited"): "backoff",
    ("running", "exited"): "backoff",
    ("backoff", "start"): "starting",
    ("waiting", "give_up"): "failed",
    ("backoff", "give_up"): "failed",
    ("waiting", "stop"): "stopped",
    ("starting", "stop"): "stopping",
    ("running", "stop"): "stopping",
    ("backoff", "stop"): "stopped",
    ("stopping", "exited"): "stopped",
}
"""One worker process over its lives, as the supervisor sees it. A new one is `waiting`."""


class Machine:
    """One state machine: a table, the state now, and the one writer `apply`."""

    def __init__(self, table: Table, state: str) -> None:
        self._table = table
        self.state = state

    def apply(self, event: str) -> str:
        """Go where the table says; return the new state. Raises KeyError on a bug."""
        self.state = self._table[self.state, event]
        return self.state

    def allows(self, event: str) -> bool:
        """Whether the event is possible in the state now."""
        return (self.state, event) in self._table


class Exit(IntEnum):
    """Exit codes of worker processes: why a life ended.

    `collector run` itself uses only 0, 1, 2, 3, and 128 + the number of a second signal that forces it.
    """

    STOPPED = 0  # asked to stop
    CRASHED = 1  # an error that nobody foresaw, or a shortage (memory, files, disk)
    BAD_SPEC = 2  # the spec does not describe something that this kind can run (endpoint already bound, ...)
    CREDENTIALS = 3  # the exchange refused the credentials
    BANNED = 4  # the exchange refuses this host or account for good
    GAVE_UP = 5  # retry_count attempts in a row came to nothing
    ORPHANED = 6  # the supervisor is gone


FINAL_EXITS = frozenset({Exit.CREDENTIALS, Exit.BANNED})
"""Exits after which another start could not help."""

BEAT_INTERVAL = 1.0
"""Seconds between two beats of a worker."""

BEATS_MISSED = 4.0
"""Seconds without a beat after which a worker counts as stuck: three beats and some slack."""

READY_TIMEOUT = 15.0
"""Seconds that a worker may take from its start to `ready`."""

STEADY_AFTER = 10.0
"""Seconds that a life must last, once live, to count as a good start: then restarts back off from the beginning."""

MAX_RESTARTS = 5
"""Restarts in a row of a worker that was never live, after which it ends for good."""

STOP_GRACE = 2.5
"""Seconds that a worker has to end in order when it is asked to; then it is killed."""

ORPHAN_GRACE = 2.0
"""Seconds that a worker has to end in order once the supervisor is gone."""

BACKOFF_CAP = 60.0
"""Seconds: no backoff is longer."""


def backoff_delay(attempt: int, first: float, jitter: float) -> float:
    """Seconds to wait after failed attempt number `attempt` (1, 2 ...).

    Doubles from `first`, capped at BACKOFF_CAP; `jitter` in [0, 1) takes up to half of it away,
    so that many connections that were cut together do not come back together.
    """
    delay = min(BACKOFF_CAP, first * 2.0 ** min(attempt - 1, 32))
    return delay * (1.0 - jitter / 2.0)
