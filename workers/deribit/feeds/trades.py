"""Trades of one channel: numbered by the exchange, so that every hole is seen, announced and - later - healed. Pure.

Fact: trade_seq counts each instrument's trades without a hole (90,988 in a row were measured), on every interval.
"""

import re
from collections.abc import Iterable

from msgspec import UNSET, UnsetType

from collector.channels import Channel
from collector.messages import EXCHANGE
from workers.deribit.feeds.feed import Feed
from workers.deribit.feeds.frames import MS, TradeData, read_trades
from workers.deribit.publishing.payloads import Gap, Repair, Trade
from workers.deribit.publishing.streams import Malformed, Published, Stream, Topics

_NAME = re.compile(rb'"instrument_name":"([A-Za-z0-9_-]{1,200})"')

MAX_HELD = 100_000
"""Trades of one hole that are kept track of; what a larger hole lacks beyond them stays missing."""


class Hole:
    """One run of missing trades, `first` to `last` (None: open to the end), as its gap announced it.

    Without a gap: what may have come before the first trade that we ever saw of an instrument.
    """

    def __init__(self, gap: Gap | None, first: int, last: int | None) -> None:
        self.gap = gap
        self.first = first
        self.last = last
        self.is_tail = last is None
        self.came: set[int] = set()

    def holds(self, seq: int) -> bool:
        """Whether this trade is missing here still."""
        return (
            self.first <= seq
            and (self.last is None or seq <= self.last)
            and seq not in self.came
            and len(self.came) < MAX_HELD
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


class TradeFeed(Feed):
    """Trades of one instrument or of many: one message each, on the instrument's own topic.

    `holes` are what waits to be healed, by stream; `changed` is set when one is new. `lost_from` (ns) is since when
    all of them may lack trades, None if they do not; `losses` counts lost connections; `newest` is the exchange's time
    of the newest trade (ns). A trade that comes twice is counted, not published again.
    """

    def __init__(self, channel: Channel, topics: Topics) -> None:
        super().__init__(channel, topics)
        self.holes: dict[Stream, list[Hole]] = {}
        self.confirmed_at = 0
        self.lost_from: int | None = None
        self.losses = 0
        self.newest = 0

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """The trades of one frame, in the exchange's order, each after the gap that it shows."""
        published: Published = []
        trades = read_trades(frame)
        # All names first: a frame is refused as a whole, before any of it has been taken as come.
        streams = [self.find_stream(data.instrument_name) for data in trades]
        for stream, data in zip(streams, trades, strict=True):
            seq, last = data.trade_seq, stream.last_id
            if seq != last + 1 or stream.lost or stream.has_tail:
                if seq <= last:
                    self._take_late(stream, data, receive_ts, published)
                    continue
                self._find_loss(stream, seq, receive_ts, published)
                self._publish_due(stream, receive_ts, published)
            stream.last_id = seq
            published.append((stream, self.build_trade(stream, data, receive_ts)))
        if trades:
            self.newest = trades[-1].timestamp * MS
        return published

    def build_trade(
        self, stream: Stream, data: TradeData, receive_ts: int, backfilled: bool | UnsetType = UNSET
    ) -> Trade:
        """One trade as a message."""
        return Trade(
            EXCHANGE, stream.instrument, self.epoch, 0, data.timestamp * MS, receive_ts,
            data.price, data.amount, data.direction, str(data.trade_id), data.trade_seq,
            data.mark_price, data.index_price, data.tick_direction, data.iv, data.liquidation,
            _text(data.block_trade_id), data.combo_id, _text(data.combo_trade_id), data.contracts, backfilled,
        )  # fmt: skip

    def _take_late(self, stream: Stream, data: TradeData, receive_ts: int, published: Published) -> None:
        """A trade out of its order fills a hole; any other has been published already."""
        for hole in self.holes.get(stream, ()):
            if hole.holds(data.trade_seq):
                hole.came.add(data.trade_seq)
                self._await_tail(stream)
                marked = True if hole.gap is None else UNSET  # no gap says that older ones may come
                published.append((stream, self.build_trade(stream, data, receive_ts, marked)))
                return
        self.duplicates += 1

    def _find_loss(self, stream: Stream, seq: int, receive_ts: int, published: Published) -> None:
        """Trade `seq` follows a loss, or shows one: say in the gap that is due, or in a new one, what is missing."""
        first, last, gap = stream.last_id + 1, seq - 1, stream.due
        if stream.has_tail:  # what is being fetched ends before this trade
            stream.has_tail = False
            for hole in self.holes.get(stream, ()):
                hole.last = hole.last or last
        elif not is_known(stream) and self.lost_from is not None:  # it may have traded first while we were away
            self._open_hole(stream, None, 1, last)
        elif not is_known(stream):
            self._note_first(stream, seq)
        elif first > last:
            if gap is not None:  # nothing known to be missing, so nothing is to be healed
                gap.missing_from, gap.healing = UNSET, False
        else:
            gap = gap or self._announce(stream, receive_ts, published)
            gap.missing_to = last
            self._open_hole(stream, gap, first, last)

    def _note_first(self, stream: Stream, seq: int) -> None:
        """A later life need not fetch what lies before the first trade of all."""
        cells, place = self.topics.ledger.cells, stream.slot + 4
        cells[place] = min(cells[place] or seq, seq)

    def _publish_due(self, stream: Stream, receive_ts: int, published: Published) -> None:
        """At once, not when the frame is published: its next trade may show another hole, which has its own gap."""
        gap, stream.due, stream.lost = stream.due, None, False
        if gap is not None:
            gap.to_ts = gap.receive_ts = receive_ts
            stream.gap = gap
            published.append((stream, gap))

    def _await_tail(self, stream: Stream) -> None:
        """A gap that is due comes to be published before an older trade: what it lacks has no end yet."""
        if stream.due is not None and not stream.has_tail:
            self._open_hole(stream, stream.due, stream.last_id + 1, None)
            stream.has_tail = True

    def _announce(self, stream: Stream, receive_ts: int, published: Published) -> Gap:
        stream.last_ts = stream.last_ts or receive_ts  # its first trade may stand in this very frame
        gap = stream.lose("sequence", self.topics, receive_ts)
        assert gap is not None  # nothing was lost before
        return gap

    def lose(self, reason: str, now: int) -> None:
        """The connection is gone: from the last thing that we know to have come, all must be fetched."""
        for stream in [stream for stream in self.holes if stream.has_tail]:
            stream.has_tail = False  # what comes from now on belongs to the new gap
            for hole in self.holes[stream]:
                hole.last = stream.last_id if hole.last is None else hole.last
        super().lose(reason, now)
        self.losses += 1
        self._note_loss()

    def _note_loss(self) -> None:
        if self.lost_from is None and self.confirmed_at:
            last_ts = max((stream.last_ts for stream in self.streams.values()), default=0) or self.confirmed_at
            self.lost_from = min(last_ts, self.newest or last_ts)  # the earlier: what came may have come late

    def skip(self, frame: bytes, now: int) -> None:
        """A frame could not be read: its trades are fetched, those of quiet and of new instruments too."""
        for name in set(_NAME.findall(frame)):
            stream = self.streams.get(name.decode())
            if stream is not None:
                stream.lose("sequence", self.topics, now)
        self.losses += 1
        self._note_loss()
        self.changed = True

    def _open_hole(self, stream: Stream, gap: Gap | None, first: int, last: int | None) -> Hole:
        hole = Hole(gap, first, last)
        self.holes.setdefault(stream, []).append(hole)
        self.changed = True
        if gap is not None:
            cells, mark = self.topics.ledger.cells, stream.slot + 3
            cells[mark] = min(cells[mark] or first, first)
        return hole

    # -- healing ------------------------------------------------------------------------------------------------------

    def find_missing(self, stream: Stream, tails: bool = True) -> tuple[int, int | None] | None:
        """The run of trade_seq to fetch for a stream: (from, to or None for open); None if nothing can be missing.

        Without `tails`: only what is known to be missing, since all that came last has been fetched by time.
        """
        runs = [run for hole in self.holes.get(stream, ()) for run in hole.list_missing()]
        first = min((first for first, _ in runs), default=stream.last_id + 1)
        if tails and (stream.has_tail or (stream.lost and is_known(stream))):
            return first, None
        return (first, max(last for _, last in runs)) if runs else None

    def is_numbered(self, stream: Stream) -> bool:
        """Whether what it lacks can be told by trade_seq alone."""
        return is_known(stream) and all(hole.gap is not None for hole in self.holes.get(stream, ()))

    def lacks_more(self, stream: Stream, tails: bool) -> bool:
        """Whether it is worth it to ask once more for what has been asked for."""
        missing = self.find_missing(stream, tails)
        return missing is not None and (missing[1] is not None or stream in self.holes)

    def backfill(self, trades: Iterable[TradeData], now: int) -> Published:
        """Fetched trades, in order: those that are missing, marked as such."""
        published: Published = []
        for data in trades:
            try:
                stream = self.find_stream(data.instrument_name)
            except Malformed:  # what the stream itself could not bring either
                self.dropped += 1
                continue
            if self._fill(stream, data.trade_seq):
                stream.last_id = max(stream.last_id, data.trade_seq)
                published.append((stream, self.build_trade(stream, data, now, True)))
        return published

    def _fill(self, stream: Stream, seq: int) -> bool:
        """Whether a fetched trade is missing still; then it counts as come."""
        if seq <= stream.last_id:
            for hole in self.holes.get(stream, ()):
                if hole.holds(seq):
                    hole.came.add(seq)
                    self._await_tail(stream)
                    return True
            return False
        if stream.has_tail:
            self.holes[stream][-1].came.add(seq)
            return True
        if is_known(stream) and stream.due is None:
            return False  # newer than all that came, and nothing was lost: it will come by itself
        # The quiet tail of a loss, or the first trades of an instrument that is new to us.
        self._open_hole(stream, stream.due, stream.last_id + 1, None).came.add(seq)
        stream.has_tail = True
        return True

    def end_healing(self, stream: Stream, holes: list[Hole], now: int) -> list[Gap | Repair]:
        """All that can be had of these holes has come: say of each of their gaps what stays missing."""
        left = [hole for hole in self.holes.pop(stream, ()) if hole not in holes]
        if left:
            self.holes[stream] = left
        stream.has_tail = any(hole.last is None for hole in left)
        return [repair for hole in holes for repair in self._close_hole(stream, hole, now)]

    def _close_hole(self, stream: Stream, hole: Hole, now: int) -> list[Gap | Repair]:
        missing, gap, said = hole.list_missing(), hole.gap, []
        if gap is None:
            self._note_first(stream, min(hole.came, default=(hole.last or stream.last_id) + 1))
            if not missing:
                return []
            gap = self._describe_gap(stream, missing, now)
            said.append(gap)
        repaired = len(hole.came) if hole.gap is not None else 0
        return [*said, Repair(EXCHANGE, stream.instrument, self.epoch, 0, 0, now, gap.id, repaired, missing)]

    def _describe_gap(self, stream: Stream, missing: list[tuple[int, int]], now: int) -> Gap:
        number, from_ts = self.topics.number_gap(), stream.last_ts
        if stream.due is not None:  # it will be said later, and ids rise
            number, stream.due.id = stream.due.id, number
        gap = Gap(EXCHANGE, stream.instrument, self.epoch, 0, 0, now, number, "sequence", from_ts, max(now, from_ts))
        gap.missing_from, gap.missing_to, gap.healing = missing[0][0], missing[-1][1], True
        stream.gap = gap
        return gap

    def settle(self, stream: Stream) -> None:
        """What healing brought is surely out: a later life need not fetch it again."""
        holes = [hole.first for hole in self.holes.get(stream, ()) if hole.gap is not None]
        self.topics.ledger.cells[stream.slot + 3] = min(holes, default=0)


def is_known(stream: Stream) -> bool:
    """Whether any trade of it has come before, maybe in an earlier life."""
    return bool(stream.last_id or stream.last_ts)


def _text(value: str | int | UnsetType) -> str | UnsetType:
    return str(value) if isinstance(value, int) else value
