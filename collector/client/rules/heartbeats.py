"""The rules of heartbeats."""

from collections.abc import Iterator

from collector.client.rules.check import SECOND, Check, Fault, Now
from collector.client.stream import Message
from collector.messages import WIRE

SILENCE = 3 * SECOND
"""A heartbeat that is due each second has not come."""

LAST = frozenset({"closed", "failed"})
"""States of a connection after which none is due, until the next one comes."""


class Heartbeats(Check):
    """The heartbeats of one connection."""

    rules = ("heartbeat",)

    def __init__(self) -> None:
        super().__init__()
        self._epoch = self._came = self._read = self._published = 0

    def check(self, message: Message, now: Now) -> Iterator[Fault]:
        if message.type != "heartbeat":
            return
        if message["wire"] != WIRE:
            yield "heartbeat", f"wire {message['wire']}, this program reads {WIRE}"
        if message.epoch != self._epoch:
            self._epoch, self._published, self._came = message.epoch, 0, 0
        # By both: the clock of who sends them may be set, and who is behind reads them late.
        silence = min(message.receive_ts - self._came, now.steady - self._read)
        if self._came and silence > SILENCE:
            yield "heartbeat", f"none for {silence / SECOND:.1f} s"
        if message["published"] < self._published:
            yield "heartbeat", f"published falls from {self._published} to {message['published']}"
        self._came = 0 if message["state"] in LAST else message.receive_ts
        self._read = now.steady
        self._published = message["published"]

    def finish(self, now: int) -> Iterator[Fault]:
        """Say whether the last one is too long ago: by our clock, since who is behind reads each of them late."""
        if self._came and now - self._read > SILENCE:
            yield "heartbeat", f"none for {(now - self._read) / SECOND:.1f} s at the end"

    def forget(self) -> None:
        self._came = 0
