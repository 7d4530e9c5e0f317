"""What every check is."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

from collector.client.stream import Message

SECOND = 1_000_000_000
"""In ns, as all times here."""

AHEAD = 5 * SECOND
"""How far the clocks of two programs may differ."""

Fault = tuple[str, str]
"""A rule and what was seen."""


class Now(NamedTuple):
    """When a message was read, in ns: by our clock, which may be set, and by one that nobody sets."""

    wall: int
    steady: int


class Check(ABC):
    """What is remembered of one topic for some rules."""

    rules: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.count = 0

    @abstractmethod
    def check(self, message: Message, now: Now) -> Iterator[Fault]:
        """Say what is wrong with the next message."""

    def forget(self) -> None:  # noqa: B027 - many have nothing to forget
        """Messages were lost on the way to us: what they said is not known."""

    def finish(self, now: int) -> Iterator[Fault]:
        """Say what should have come by now (steady) and has not."""
        return iter(())
