"""One order book: levels by price in ticks, amounts in lots (whole numbers, so that nothing is ever rounded twice)."""

from collections.abc import Iterable
from typing import NamedTuple

BID, ASK = 0, 1


class Change(NamedTuple):
    """One level before and after, in lots; 0 is no level."""

    side: int
    tick: int
    old: int
    new: int


class Book:
    """The levels of both sides and the change_id of the last change."""

    __slots__ = ("change_id", "sides", "timestamp")

    def __init__(self) -> None:
        self.sides: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self.change_id = 0
        self.timestamp = 0

    @property
    def best_bid(self) -> int | None:
        """Tick of the best bid; None if there is none."""
        return max(self.sides[BID], default=None)

    @property
    def best_ask(self) -> int | None:
        """Tick of the best ask; None if there is none."""
        return min(self.sides[ASK], default=None)

    def set_level(self, side: int, tick: int, lots: int) -> Change:
        """Set the amount of one level (0 removes it)."""
        levels = self.sides[side]
        old = levels.get(tick, 0)
        if lots:
            levels[tick] = lots
        else:
            levels.pop(tick, None)
        return Change(side, tick, old, lots)


def sort_levels(side: int, ticks: Iterable[int]) -> list[int]:
    """Ticks with the best first: bids descending, asks ascending."""
    return sorted(ticks, reverse=side == BID)
