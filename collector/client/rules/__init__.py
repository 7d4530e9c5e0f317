"""The rules of the wire: each check remembers of one topic what its rules need. No I/O, no clock."""

from collector.client.rules.books import Chain
from collector.client.rules.check import Check
from collector.client.rules.everywhere import Gaps, Joins, States, Times
from collector.client.rules.heartbeats import Heartbeats
from collector.client.rules.trades import Trades

_EVERYWHERE: tuple[type[Check], ...] = (Joins, Times, Gaps, States)
_BY_TYPE: dict[str, tuple[type[Check], ...]] = {"book": (Chain,), "trade": (Trades,), "heartbeat": (Heartbeats,)}


def create_checks(type: str) -> list[Check]:
    """The checks for a new topic of that type."""
    return [create() for create in (*_EVERYWHERE, *_BY_TYPE.get(type, ()))]
