"""Trades of one channel: numbered by the exchange, so that every hole is seen, announced and - later - healed. Pure.

Facts: trade_seq counts each instrument's trades without a hole (90,988 in a row were measured), on every interval; of
one instrument a later number is never an older trade. An exchange that was reset counts anew, from a lower number.
"""

import re
from collections.abc import Iterable
from operator import itemgetter

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from collector.channels import Channel
from collector.messages import EXCHANGE
from workers.deribit.feeds.feed import Feed
from workers.deribit.feeds.frames import MS, TradeData, read_trades
from workers.deribit.feeds.holes import Hole, Known, contradicts
from workers.deribit.publishing.ledger import BEFORE, BEGUN, FIRST, KNOWN_ID, KNOWN_TIME, NEWEST, UNHEALED
from workers.deribit.publishing.payloads import Gap, Repair, Trade
from workers.deribit.publishing.streams import Malformed, Published, Stream, Topics

_NAME = re.compile(rb'"instrument_name":"([A-Za-z0-9_-]{1,200})"')


class TradeFeed(Feed):
    """Trades of one instrument or of many: one message each, on the instrument's own topic.

    `confirmed_at` is since when the exchange sends the channel. `holes` are what waits to be healed, by stream;
    `changed` is set when one is new. `lost_from` is since when all of them may lack trades, `unsure_from` since when
    those may that have not been heard of, as not all could be asked for, `away_from` when the connection that was lost
    stood last (times in ns, None if there is none). `losses` counts what may have cost some; `is_checked` is unset
    while the exchange may have begun to count anew in the last of them. A trade that comes twice is counted, not
    published again.
    """

    def __init__(self, channel: Channel, topics: Topics) -> None:
        super().__init__(channel, topics)
        self.holes: dict[Stream, list[Hole]] = {}
        self.confirmed_at = 0
        self.lost_from: int | None = None
        self.unsure_from: int | None = None
        self.away_from: int | None = None
        self.losses = 0
        self.is_checked = True

    def confirm(self, now: int) -> None:
        """The exchange sends this channel, since `now` (ns) unless it did before; a later life is told since when."""
        self.confirmed_at = self.confirmed_at or now
        ledger = self.topics.ledger
        ledger.cells[ledger.find_slot(self.channel.name) + FIRST] = self.confirmed_at

    def recall(self) -> None:
        """What an earlier life has told of this channel."""
        ledger = self.topics.ledger
        if ledger.had(self.channel.name):
            slot = ledger.find_slot(self.channel.name)
            self.confirmed_at, self.lost_from = ledger.cells[slot + FIRST], ledger.cells[slot + UNHEALED] or None
            self.away_from = (self.confirmed_at and ledger.heard_at) or None

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """The trades of one frame, in the exchange's order, each after the gap that it shows."""
        published: Published = []
        trades, cells = read_trades(frame), self.topics.ledger.cells
        # All names first: a frame is refused as a whole, before any of it has been taken as come.
        streams = [self.find_stream(data.instrument_name) for data in trades]
        for stream, data in zip(streams, trades, strict=True):
            seq, last = data.trade_seq, stream.last_id
            if seq != last + 1 or stream.lost or stream.has_tail:
                if (known := self._find_contradiction(stream, data)) is not None:
                    self._begin_count(stream, known, seq, receive_ts, published)
                    self._open_hole(stream, None, 1, seq - 1)
                elif seq <= last:
                    self._take_late(stream, data, receive_ts, published)
                    continue
                else:
                    self._find_loss(stream, seq, receive_ts, published)
                    self._publish_due(stream, receive_ts, published)
            stream.last_id = seq
            if cells[stream.slot + NEWEST] < data.timestamp:
                cells[stream.slot + NEWEST] = data.timestamp
            published.append((stream, self.build_trade(stream, data, receive_ts)))
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
        is_anew = self._find_count(stream, data, receive_ts, published)
        for hole in self.holes.get(stream, ()):
            if hole.holds(data.trade_seq):
                hole.came.add(data.trade_seq)
                self._await_tail(stream)
                published.append((stream, self.build_trade(stream, data, receive_ts, True)))
                if is_anew:  # two gaps do not follow each other
                    self._publish_due(stream, receive_ts, published)
                return
        self.duplicates += 1

    def _find_loss(self, stream: Stream, seq: int, receive_ts: int, published: Published) -> None:
        """Trade `seq` follows a loss, or shows one: say in the gap that is due, or in a new one, what is missing."""
        first, last, gap = stream.last_id + 1, seq - 1, stream.due
        if stream.has_tail:  # what is being fetched ends before this trade
            stream.has_tail = False
            for hole in self.holes.get(stream, ()):
                hole.last = last if hole.last is None else hole.last
        elif not is_known(stream):
            if seq <= stream.left_at:  # the exchange has begun to count anew since the topic was left
                stream.left_at = 0
            if self.lost_from is not None:  # it may have traded first while we were away
                self._open_hole(stream, None, stream.left_at + 1, last)
            else:
                if self.unsure_from is not None and stream.left_at < last:
                    published.append((stream, self._describe_missing(stream, stream.left_at + 1, last, receive_ts)))
                self._note_first(stream, seq)
        elif first > last:
            if gap is not None:  # nothing known to be missing, so nothing is to be healed
                gap.missing_from, gap.healing = UNSET, False
                if not self.is_checked:
                    self._open_hole(stream, None, first, last)
        else:
            gap = gap or self._announce(stream, receive_ts, published)
            gap.missing_to = last
            self._open_hole(stream, gap, first, last)

    def _describe_missing(self, stream: Stream, first: int, last: int, now: int) -> Gap:
        """What may have come before the first trade of an instrument, or before the subscription: that is not known."""
        gap = self._describe_gap(stream, now)
        gap.missing_from, gap.missing_to = first, last
        if self.unsure_from is not None:
            gap.reason, gap.from_ts = "disconnect", min(self.unsure_from, gap.from_ts or now)
        return gap

    def _note_first(self, stream: Stream, seq: int) -> None:
        """A later life need not fetch what lies before the first trade of all."""
        self.topics.ledger.lower(stream.slot, FIRST, seq)

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
        if reason == "restart":
            self._take_doubts_over()
        for stream in self.streams.values():
            if self._has_new_gap(stream):
                continue  # nothing has come since it was said: it tells of this loss as well
            if stream.has_tail:  # what comes from now on belongs to the new gap
                stream.has_tail = False
                for hole in self.holes[stream]:
                    hole.last = stream.last_id if hole.last is None else hole.last
            stream.lose(reason, self.topics, now)
        self._note_loss(now)

    def _has_new_gap(self, stream: Stream) -> bool:
        """Whether the last gap was said before older trades, and all that it lacks is still to come."""
        holes = self.holes.get(stream, ()) if stream.has_tail and stream.gap is not None else ()
        return any(hole.gap is stream.gap and hole.last is None and not hole.came for hole in holes)

    def _note_loss(self, now: int) -> None:
        self.losses += 1
        self.is_checked = False
        if self.confirmed_at:
            self.away_from = min(self.away_from or now, now)
            streams, cells = self.streams.values(), self.topics.ledger.cells
            last_ts = max((stream.last_ts for stream in streams), default=0) or self.confirmed_at
            newest = max((cells[stream.slot + NEWEST] for stream in streams), default=0) * MS
            self._doubt_from(min(last_ts, newest or last_ts))  # the earlier: what came may have come late

    def _doubt_from(self, since: int) -> None:
        """All that was traded since then must be fetched by time; by a later life, if this one is killed before."""
        ledger = self.topics.ledger
        ledger.lower(ledger.find_slot(self.channel.name), UNHEALED, since)
        self.lost_from = min(self.lost_from or since, since)

    def end_loss(self, is_whole: bool = True) -> None:
        """All that can be had by time of what a loss cost the channel has come; unless `is_whole`, that may not be all.

        A later life would ask once more.
        """
        if self.lost_from is None:
            return
        if not is_whole:
            self.unsure_from = min(self.unsure_from or self.lost_from, self.lost_from)
        self.lost_from = self.away_from = None
        ledger = self.topics.ledger
        ledger.cells[ledger.find_slot(self.channel.name) + UNHEALED] = self.unsure_from or 0

    def skip(self, frame: bytes, now: int) -> None:
        """A frame could not be read: its trades are fetched, those of quiet and of new instruments too."""
        for name in set(_NAME.findall(frame)):
            stream = self.streams.get(name.decode())
            if stream is not None:
                stream.lose("sequence", self.topics, now)
        self._note_loss(now)
        self.changed = True

    def _open_hole(self, stream: Stream, gap: Gap | None, first: int, last: int | None) -> Hole:
        hole = Hole(gap, first, last, self._tell_known(stream))
        self.holes.setdefault(stream, []).append(hole)
        self.changed = True
        if gap is not None:
            self.topics.ledger.lower(stream.slot, UNHEALED, first)
        self._note_doubt(stream)
        return hole

    def _note_doubt(self, stream: Stream) -> None:
        """A later life goes on with the oldest doubt whether the exchange counts anew."""
        doubts = [hole.known for hole in self.holes.get(stream, ()) if hole.known[0]]
        cells, slot = self.topics.ledger.cells, stream.slot
        cells[slot + KNOWN_ID], cells[slot + KNOWN_TIME] = min(doubts, default=(0, 0))

    # -- an exchange that counts anew ---------------------------------------------------------------------------------

    def _tell_known(self, stream: Stream) -> Known:
        return max(stream.last_id, stream.reached), self.topics.ledger.cells[stream.slot + NEWEST]

    def _find_contradiction(self, stream: Stream, data: TradeData) -> Known | None:
        """What is known that cannot be, unless the exchange counts anew; None if it does not."""
        known = [self._tell_known(stream)]
        if stream.due is not None and stream.due.reason == "restart":
            # Nothing has been said in this life: what the one before had not found out counts as well.
            known += [hole.known for hole in self.holes.get(stream, ())]
        return min((each for each in known if contradicts(each, data)), key=itemgetter(1), default=None)

    def _begin_count(self, stream: Stream, known: Known, seq: int, now: int, published: Published) -> None:
        """A trade bears a number that was given before: a gap says so, and nothing goes on from what was before it."""
        holes = self.holes.get(stream, [])
        if any(hole.gap is stream.due for hole in holes if hole.gap is not None):
            self._publish_due(stream, now, published)  # its repair follows
        published += [(stream, said) for said in self.end_healing(stream, holes, now)]
        gap = stream.due or self._announce(stream, now, published)
        gap.missing_from, gap.healing = UNSET, False
        gap.reason = "sequence" if gap.reason == "disconnect" else gap.reason
        self._publish_due(stream, now, published)
        self._forget_count(stream, known, seq)
        stream.last_id = 0

    def _take_doubts_over(self) -> None:
        """What an earlier life had not found out: whether the exchange has begun to count anew."""
        cells = self.topics.ledger.cells
        for stream in self.streams.values():
            known = cells[stream.slot + KNOWN_ID], cells[stream.slot + KNOWN_TIME]
            if stream.slot and known[0]:
                self.holes[stream] = [Hole(None, known[0] + 1, known[0], known)]

    def _find_count(self, stream: Stream, data: TradeData, now: int, published: Published) -> bool:
        """Whether a fetched trade shows that a hole lies between two counts: the newer had passed the older by then."""
        holes = self.holes.get(stream, [])
        places = [place for place, hole in enumerate(holes) if contradicts(hole.known, data)]
        if not places:
            return False
        older, newer = holes[: places[-1]], holes[places[-1] :]
        published += [(stream, said) for said in self.end_healing(stream, older, now)]
        published.append((stream, self._describe_gap(stream, now)))
        self._open_hole(stream, None, 1, min(hole.first for hole in newer) - 1)
        self._forget_count(stream, newer[0].known, stream.last_id)
        newer[0].known = (0, 0)
        return True

    def _forget_count(self, stream: Stream, known: Known, begun: int) -> None:
        """What the new count lacks is found by time, from the newest trade of the old one on."""
        self.losses += 1
        self._doubt_from(min(stream.last_ts, known[1] * MS))
        cells, slot = self.topics.ledger.cells, stream.slot
        cells[slot + FIRST], cells[slot + BEGUN], cells[slot + BEFORE] = 0, begun, known[1]
        stream.reached = 0
        self.note_out(stream)

    # -- healing ------------------------------------------------------------------------------------------------------

    def find_missing(self, stream: Stream, tails: bool = True) -> tuple[int, int | None] | None:
        """The run of trade_seq to fetch for a stream: (from, to or None for open); None if nothing can be missing.

        Without `tails`: only what is known to be missing, or in doubt: all that came last has been fetched by time.
        """
        holes = self.holes.get(stream, ())
        runs = [run for hole in holes for run in hole.list_missing()]
        # The trade before a hole is fetched too, where nothing else may show whether the exchange counts anew.
        is_open = tails and not self.is_checked
        runs += [(hole.first, hole.first - 1) for hole in holes if hole.is_doubt or (is_open and hole.known[0])]
        firsts = [first for first, _ in runs]
        if tails and (stream.has_tail or (stream.lost and is_known(stream))):
            return min([stream.last_id + 1, *firsts]), None
        return (min(firsts), max(last for _, last in runs)) if runs else None

    def is_numbered(self, stream: Stream) -> bool:
        """Whether what it lacks can be told by trade_seq alone."""
        return is_known(stream) and all(hole.gap or hole.is_doubt for hole in self.holes.get(stream, ()))

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
            else:
                self._take_fetched(stream, data, now, published)
        return published

    def _take_fetched(self, stream: Stream, data: TradeData, now: int, published: Published) -> None:
        if (known := self._find_contradiction(stream, data)) is not None:
            self._begin_count(stream, known, data.trade_seq, now, published)
            self._open_hole(stream, None, 1, None)
            stream.has_tail = True
        is_anew = self._find_count(stream, data, now, published)
        is_same = data.trade_seq in (stream.last_id, stream.reached)  # as before the loss
        for hole in self.holes.get(stream, ()):
            if hole.known[0] == data.trade_seq:
                hole.known, is_same = (0, 0), True
        if is_same and self.channel.instrument:
            self.is_checked = True
        if self._fill(stream, data.trade_seq):
            stream.last_id = max(stream.last_id, data.trade_seq)
            cells, place = self.topics.ledger.cells, stream.slot + NEWEST
            cells[place] = max(cells[place], data.timestamp)
            published.append((stream, self.build_trade(stream, data, now, True)))
            if is_anew:  # two gaps do not follow each other
                self._publish_due(stream, now, published)

    def _fill(self, stream: Stream, seq: int) -> bool:
        """Whether a fetched trade is missing still; then it counts as come."""
        if seq <= stream.last_id:
            for hole in self.holes.get(stream, ()):
                if hole.holds(seq):
                    self._fill_hole(stream, hole, seq)
                    self._await_tail(stream)
                    return True
            return False
        if stream.has_tail:
            tail = next(hole for hole in self.holes[stream] if hole.last is None)
            if is_held := tail.holds(seq):
                self._fill_hole(stream, tail, seq)
            return is_held
        if is_known(stream) and stream.due is None:
            return False  # newer than all that came, and nothing was lost: it will come by itself
        said = stream.last_id if is_known(stream) else stream.left_at
        if seq <= said:
            return False
        # The quiet tail of a loss, or the first trades of an instrument that is new to us.
        hole = self._open_hole(stream, stream.due, said + 1, None)
        self._fill_hole(stream, hole, seq)
        if self.is_checked:  # the trade before it was the same
            hole.known = (0, 0)
            self._note_doubt(stream)
        stream.has_tail = True
        return True

    def _fill_hole(self, stream: Stream, hole: Hole, seq: int) -> None:
        hole.came.add(seq)
        if hole.gap is None:  # fetched in order: what lies before it is from before the loss
            self._note_first(stream, seq)

    def end_healing(self, stream: Stream, holes: list[Hole], now: int) -> list[Gap | Repair]:
        """All that can be had of these holes has come: say of each of their gaps what stays missing."""
        there = self.holes.pop(stream, [])
        left = [hole for hole in there if hole not in holes]
        if left:
            self.holes[stream] = left
        stream.has_tail = any(hole.last is None for hole in left)
        return [said for hole in there if hole in holes for said in self._close_hole(stream, hole, now)]

    def _close_hole(self, stream: Stream, hole: Hole, now: int) -> list[Gap | Repair]:
        missing, gap, said = hole.list_missing(), hole.gap, []
        if gap is None:
            last = stream.last_id if hole.last is None else hole.last
            first = min(hole.came, default=last + 1)
            self._note_first(stream, first)
            if self.unsure_from is not None and hole.first < first:
                missing.insert(0, (hole.first, first - 1))
            if not missing:
                return []
            gap = self._describe_missing(stream, missing[0][0], missing[-1][1], now)
            gap.healing = True
            said.append(gap)
        if stream.gap is gap:  # who comes from now on has no repair to wait for; what was said is not touched
            stream.gap = replace(gap, healing=False)
        repaired = len(hole.came) if hole.gap is not None else 0
        return [*said, Repair(EXCHANGE, stream.instrument, self.epoch, 0, 0, now, gap.id, repaired, missing)]

    def _describe_gap(self, stream: Stream, now: int) -> Gap:
        number, from_ts = self.topics.number_gap(), stream.last_ts
        if stream.due is not None:  # it will be said later, and ids rise
            number, stream.due.id = stream.due.id, number
        gap = Gap(EXCHANGE, stream.instrument, self.epoch, 0, 0, now, number, "sequence", from_ts, max(now, from_ts))
        gap.healing = False
        stream.gap = gap
        return gap

    def note_out(self, stream: Stream) -> None:
        """What healing brought is surely out: a later life need not fetch it again."""
        if self.is_ended:  # the topic is left, or another channel's by now
            return
        holes, cells, slot = self.holes.get(stream, ()), self.topics.ledger.cells, stream.slot
        cells[slot + UNHEALED] = min((hole.first for hole in holes if hole.gap is not None), default=0)
        self._note_doubt(stream)


def is_known(stream: Stream) -> bool:
    """Whether any trade of it has come before, maybe in an earlier life."""
    return bool(stream.last_id or stream.last_ts)


def _text(value: str | int | UnsetType) -> str | UnsetType:
    return str(value) if isinstance(value, int) else value
