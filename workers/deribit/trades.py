"""Trades of one channel: numbered by the exchange, so that every hole is seen, announced and - later - healed. Pure.

Fact: trade_seq counts each instrument's trades without a hole (90,988 in a row were measured), on every interval.
"""

from collections.abc import Iterable

from msgspec import UNSET, UnsetType

from collector.channels import Channel
from collector.messages import EXCHANGE
from workers.deribit.feed import Feed
from workers.deribit.frames import MS, TradeData, read_trades
from workers.deribit.payloads import Gap, Repair, Trade
from workers.deribit.streams import Published, Stream, Topics

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
        """The runs that have not come, as (from, to) of trade_seq, inclusive."""
        runs: list[tuple[int, int]] = []
        expected = self.first
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
                published.append((stream, self.build_trade(stream, data, receive_ts)))
                return
        self.duplicates += 1

    def _find_loss(self, stream: Stream, seq: int, receive_ts: int, published: Published) -> None:
        """Trade `seq` follows a loss, or shows one. A gap that is due is published before it by the publisher."""
        first, last, gap = stream.last_id + 1, seq - 1, stream.due
        if stream.has_tail:  # what is being fetched ends before this trade
            stream.has_tail = False
            for hole in self.holes.get(stream, ()):
                hole.last = hole.last or last
        elif stream.last_id == 0 and self.lost_from is not None:  # it may have traded first while we were away
            self._open_hole(stream, None, 1, last)
        elif first > last or stream.last_id == 0:
            if gap is not None:  # nothing known to be missing, so nothing is to be healed
                gap.missing_from, gap.healing = UNSET, False
        else:
            gap = gap or self._announce(stream, receive_ts, published)
            gap.missing_to = last
            self._open_hole(stream, gap, first, last)

    def _announce(self, stream: Stream, receive_ts: int, published: Published) -> Gap:
        gap = stream.lose("sequence", self.topics, receive_ts)
        assert gap is not None  # whoever sees a hole has had a trade, and nothing was lost before
        stream.due, stream.lost, stream.gap = None, False, gap
        published.append((stream, gap))
        return gap

    def lose(self, reason: str, now: int) -> None:
        """The connection is gone: from the last thing that we know to have come, all must be fetched."""
        super().lose(reason, now)
        self.losses += 1
        if self.lost_from is None and self.confirmed_at:
            last_ts = max((stream.last_ts for stream in self.streams.values()), default=0) or self.confirmed_at
            self.lost_from = min(last_ts, self.newest or last_ts)  # the earlier: what came may have come late

    def end_loss(self) -> None:
        """All that a lost connection, or an earlier life, may have cost this channel has been fetched by time."""
        self.lost_from = None
        for stream in self.streams.values():
            if not stream.unhealed:
                stream.repeat_above = None

    def _open_hole(self, stream: Stream, gap: Gap | None, first: int, last: int | None) -> Hole:
        hole = Hole(gap, first, last)
        self.holes.setdefault(stream, []).append(hole)
        self.changed = True
        return hole

    # -- healing ------------------------------------------------------------------------------------------------------

    def find_missing(self, stream: Stream, tails: bool = True) -> tuple[int, int | None] | None:
        """The run of trade_seq to fetch for a stream: (from, to or None for open); None if nothing can be missing.

        Without `tails`: only what is known to be missing, since all that came last has been fetched by time.
        """
        runs = [run for hole in self.holes.get(stream, []) if hole.gap is not None for run in hole.list_missing()]
        first = min((first for first, _ in runs), default=stream.last_id + 1)
        if stream.repeat_above is not None and (tails or stream.unhealed):
            return min(first, stream.repeat_above + 1), None
        if tails and (stream.has_tail or (stream.lost and stream.last_id)):
            return first, None
        return (first, max(last for _, last in runs)) if runs else None

    def lacks_more(self, stream: Stream, tails: bool) -> bool:
        """Whether it is worth it to ask once more for what has been asked for."""
        missing = self.find_missing(stream, tails)
        return missing is not None and (missing[1] is not None or stream in self.holes)

    def backfill(self, trades: Iterable[TradeData], now: int) -> Published:
        """Fetched trades, in order: those that are missing, marked as such."""
        published: Published = []
        for data in trades:
            stream = self.find_stream(data.instrument_name)
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
                    return True
            return self._is_repeat(stream, seq)
        if stream.has_tail:
            self.holes[stream][-1].came.add(seq)
            return True
        if stream.last_id and stream.due is None:
            return False  # newer than all that came, and nothing was lost: it will come by itself
        # The quiet tail of a loss, or the first trades of an instrument that is new to us.
        self._open_hole(stream, stream.due, stream.last_id + 1, None).came.add(seq)
        stream.has_tail = True
        return True

    def _is_repeat(self, stream: Stream, seq: int) -> bool:
        """Whether an earlier life may have taken this trade along unsent; each is said again once."""
        if stream.repeat_above is None or not stream.repeat_above < seq <= stream.repeat_to:
            return False
        stream.repeat_above = seq
        return True

    def end_healing(self, stream: Stream, holes: list[Hole], now: int) -> list[Repair]:
        """All that can be had of these holes has come: say of each of their gaps what stays missing."""
        left = [hole for hole in self.holes.pop(stream, ()) if hole not in holes]
        if left:
            self.holes[stream] = left
        stream.has_tail = any(hole.last is None for hole in left)
        stream.repeat_above = None
        return [
            Repair(EXCHANGE, stream.instrument, self.epoch, 0, 0, now, hole.gap.id, len(hole.came), hole.list_missing())
            for hole in holes
            if hole.gap is not None
        ]


def _text(value: str | int | UnsetType) -> str | UnsetType:
    return str(value) if isinstance(value, int) else value
