"""The rules of heartbeats."""

from collections.abc import Iterator

from collector.client.rules.check import SECOND, Check, Fault
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
        self._epoch = 0
        self._came = 0
        self._read = 0
        self._published = 0

    def check(self, message: Message, now: int) -> Iterator[Fault]:
        if message.type != "heartbeat":
            return
        if message["wire"] != WIRE:
            yield "heartbeat", f"wire {message['wire']}, this program reads {WIRE}"
        if message.epoch != self._epoch:
            self._epoch, self._published, self._came = message.epoch, 0, 0
        if self._came and message.receive_ts - self._came > SILENCE:
            yield "heartbeat", f"none for {(message.receive_ts - self._came) / SECOND:.1f} s"
        if message["published"] < self._published:
            yield "heartbeat", f"published falls from {self._published} to {message['published']}"
        self._came = 0 if message["state"] in LAST else message.receive_ts
        self._read = now
        self._published = message["published"]

    def finish(self, now: int) -> Iterator[Fault]:
        """Say whether the last one is too long ago: by our clock, since who is behind reads each of them late."""
        if self._came and now - self._read > SILENCE:
            yield "heartbeat", f"none for {(now - self._read) / SECOND:.1f} s at the end"

    def forget(self) -> None:
        self._came = 0
