"""Since when the instruments of one channel may lack trades: these are fetched by time. Pure."""

from workers.deribit.publishing.ledger import AWAY, FIRST, HEARD, UNHEALED, Ledger


class Losses:
    """What one channel may have lost. A later life is told of it by the ledger. All times in ns."""

    def __init__(self, channel: str, ledger: Ledger) -> None:
        self._channel = channel
        self._ledger = ledger
        self.confirmed_at = 0
        """Since when the exchange sends the channel; 0: not yet."""
        self.is_sent = False
        """Whether it does so on this connection."""
        self.healed_to = 0
        """Up to when it was healed while the exchange did not send it; 0: it was not."""
        self.lost_from: int | None = None
        """Since when every instrument may lack trades; None: none does."""
        self.unanswered_from: int | None = None
        """Since when those may lack trades of which nothing has been heard, as not all was answered; None: none do."""
        self.away_from: int | None = None
        """When the connection that was lost stood last."""
        self.is_checked = True
        """Unset while the exchange may have begun to count anew in the last of them."""
        self._begun_at = 0
        self.newer_from: int | None = None
        """Since when trades may be missing that the healing under way does not fetch."""

    def confirm(self, now: int) -> None:
        """The exchange sends this channel, since `now` unless it did before.

        What was healed before is whole only up to then: a channel may be refused for a while.
        """
        if not self.is_sent:
            if self.healed_to:
                self.away_from = self.healed_to
                self.add_since(self.healed_to)
            if self._begun_at:  # the healing under way fetches nothing newer
                self.newer_from = min(self.newer_from or self._begun_at, self._begun_at)
        self.confirmed_at, self.is_sent, self.healed_to = self.confirmed_at or now, True, 0
        self._ledger.cells[self._ledger.find_slot(self._channel) + FIRST] = self.confirmed_at

    def recall(self) -> None:
        """Go on from what an earlier life has told."""
        cells = self._ledger.cells
        if slot := self._ledger.find_slot(self._channel):
            self.confirmed_at, self.lost_from = cells[slot + FIRST], cells[slot + UNHEALED] or None
            self.away_from = (self.confirmed_at and (cells[slot + AWAY] or cells[HEARD])) or None

    def add(self, now: int, last_ts: int, newest: int) -> None:
        """All after the last trade is lost: that was read at `last_ts`, and `newest` was its own time (0: none)."""
        self.is_checked = False
        if self.confirmed_at:
            self.away_from = min(self.away_from or now, now)
            last_ts = last_ts or self.confirmed_at
            self.add_since(min(last_ts, newest or last_ts))  # the earlier: what came may have come late

    def add_since(self, since: int) -> None:
        """All that was traded since then must be fetched; by a later life, if this one is killed before."""
        slot = self._ledger.find_slot(self._channel)
        self._ledger.lower(slot, UNHEALED, since)
        if self.away_from is not None:
            self._ledger.lower(slot, AWAY, self.away_from)
        self.lost_from = min(self.lost_from or since, since)
        self.newer_from = min(self.newer_from or since, since)

    def begin_healing(self, now: int) -> None:
        """What was lost by `now` is fetched; what is lost from now on is for the next healing."""
        self._begun_at, self.newer_from = now, None

    def end(self, is_whole: bool = True) -> None:
        """All that can be had by time of what was lost before the healing began has come.

        Unless `is_whole`, some may be missing, and a later life asks again.
        """
        if self.lost_from is None:
            return
        if not self.is_sent:
            self.healed_to = self._begun_at
        if not is_whole:
            self.unanswered_from = min(self.unanswered_from or self.lost_from, self.lost_from)
        self.lost_from = self.newer_from
        if self.away_from is not None:  # what is newer was lost while the connection stood, at first
            self.away_from = None if self.lost_from is None else max(self.away_from, self._begun_at)
        open_from = [since for since in (self.unanswered_from, self.lost_from) if since is not None]
        cells, slot = self._ledger.cells, self._ledger.find_slot(self._channel)
        cells[slot + UNHEALED] = min(open_from, default=0)
        if self.unanswered_from is None:
            cells[slot + AWAY] = self.away_from or 0
