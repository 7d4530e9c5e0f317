"""What is missing of one instrument's trades, as runs of trade_seq; what shows that the exchange counts anew. Pure."""

from workers.deribit.feeds.frames import TradeData
from workers.deribit.publishing.payloads import Gap

MAX_HELD = 100_000
"""Trades of one hole that are kept track of; what a larger hole lacks beyond them stays missing."""

JITTER_MS = 50
"""A trade must be so much newer than all before to show that it bears a number that was given before."""

Known = tuple[int, int]
"""A trade_seq, and a time of the exchange (ms) than which no trade up to it is newer; 0 where that is not known."""


class Hole:
    """One run of missing trades, `first` to `last` (None: open to the end), as its gap announced it.

    Without a gap: what may have come before the first trade that we ever saw of an instrument, or of a new count.
    `known` is what was known before the hole, as long as the trades fetched may show that the exchange counts anew.
    """

    def __init__(self, gap: Gap | None, first: int, last: int | None, known: Known) -> None:
        self.gap = gap
        self.first = first
        self.last = last
        self.known = known
        self.came: set[int] = set()

    @property
    def is_doubt(self) -> bool:
        """Whether nothing is known to be missing: it only asks whether the exchange has begun to count anew."""
        return self.last is not None and self.last < self.first and self.known[0] > 0

    @property
    def is_bounded(self) -> bool:
        """Whether a gap has said from where to where trades are missing."""
        return self.gap is not None and self.last is not None

    @property
    def is_full(self) -> bool:
        """Whether nothing more of it is kept."""
        return len(self.came) >= MAX_HELD

    def holds(self, seq: int) -> bool:
        """Whether this trade is missing here still."""
        return (
            self.first <= seq and (self.last is None or seq <= self.last) and seq not in self.came and not self.is_full
        )

    def list_missing(self) -> list[tuple[int, int]]:
        """The runs of trade_seq (from, to) that have not come; without a gap, those after the first that has."""
        runs: list[tuple[int, int]] = []
        if self.gap is None and not self.came:
            return runs
        expected = self.first if self.gap is not None else min(self.came)
        end = max(self.came, default=self.first - 1) if self.last is None else self.last
        for seq in [*sorted(self.came), end + 1]:
            if seq > expected:
                runs.append((expected, seq - 1))
            expected = seq + 1
        return runs


def contradicts(known: Known, data: TradeData) -> bool:
    """Whether a trade bears a number that was given before: no trade up to that number can be as new."""
    number, newest = known
    return data.trade_seq <= number and 0 < newest < data.timestamp - JITTER_MS
