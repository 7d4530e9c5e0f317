"""Credits that several workers share: Deribit counts them for an account, or for an address where nobody logs in.

A pool lies in a file, which the workers lock in turn for the moment of a look at it. So it holds whoever starts,
reconnects or is killed, and whenever. It goes by the monotonic clock, which is one for all processes of a machine.
"""

import asyncio
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from collector.limits import CALL_BURST, CALL_REFILL, REFILL, SUBSCRIBE_BURST, Credits

_STATE = struct.Struct("ddd?")

MOMENT = 0.002
"""Seconds after which to look again at a pool that another worker looks at just now."""


class SharedCredits:
    """A pool in a file. It is full when the first worker makes the file. Raises OSError if it cannot be had."""

    def __init__(self, path: str, burst: float, refill: float) -> None:
        self._credits = Credits(burst, refill, time.monotonic())
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with self._look(fcntl.LOCK_EX):
            pass  # the first look makes the room that all later ones need: only this one can fail on a full disk

    def take(self, cost: float, now: float, reserve: float = 0.0) -> float:
        """See Credits.take."""
        try:
            with self._look() as credits:
                return credits.take(cost, now, reserve)
        except BlockingIOError:
            return MOMENT

    def shrink(self, now: float) -> None:
        """See Credits.shrink."""
        with self._look(fcntl.LOCK_EX) as credits:
            credits.shrink(now)

    @contextmanager
    def _look(self, lock: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> Iterator[Credits]:
        """The pool as it is for all. Raises BlockingIOError while another worker looks at it."""
        fcntl.flock(self._file, lock)
        try:
            credits = self._credits
            if state := os.pread(self._file, _STATE.size, 0):
                credits.burst, credits.level, credits.since, credits.is_spent = _STATE.unpack(state)
            yield credits
            os.pwrite(self._file, _STATE.pack(credits.burst, credits.level, credits.since, credits.is_spent), 0)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)


Pool = Credits | SharedCredits


async def pay(pool: Pool, cost: float, reserve: float = 0.0) -> None:
    """Wait until the credits of a call are there, and take them."""
    while wait := pool.take(cost, time.monotonic(), reserve):
        await asyncio.sleep(wait)


def create_pools() -> tuple[Credits, Credits]:
    """The pools of one connection alone: of subscribing, and of all other calls."""
    now = time.monotonic()
    return Credits(since=now), Credits(CALL_BURST, CALL_REFILL, now)


def share_pools(path: str) -> tuple[SharedCredits, SharedCredits]:
    """The same, shared by all that name this `path`, beside which they lie."""
    subscribing = SharedCredits(f"{path}.subscribe", SUBSCRIBE_BURST, REFILL)
    return subscribing, SharedCredits(f"{path}.calls", CALL_BURST, CALL_REFILL)
