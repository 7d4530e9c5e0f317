"""Trades of one channel: one message each, after the gap that it shows. Pure.

Facts: trade_seq counts each instrument's trades without a hole (90,988 in a row were measured), on every interval; of
one instrument a later number is never an older trade. An exchange that was reset counts anew, from a lower number.
"""

from collections.abc import Iterable, Set

from msgspec import UNSET, UnsetType

from collector.channels import Channel
from collector.messages import EXCHANGE
from workers.deribit.feeds.feed import Feed
from workers.deribit.feeds.frames import MS, TradeData, read_any, read_trades
from workers.deribit.feeds.trades.losses import Losses
from workers.deribit.feeds.trades.recount import begin_count, find_contradiction, find_count, take_doubt_over
from workers.deribit.feeds.trades.tape import Tape
from workers.deribit.publishing.ledger import NEWEST
from workers.deribit.publishing.payloads import Gap, Trade
from workers.deribit.publishing.streams import Malformed, Published, Stream, Topics


class TradeFeed(Feed):
    """Trades of one instrument or of many, each on the instrument's own topic.

    `tapes` are found by instrument; `changed` is set when one of them has a new hole to heal. A trade that comes twice
    is counted, not published again.
    """

    def __init__(self, channel: Channel, topics: Topics) -> None:
        self.losses = Losses(channel.name, topics.ledger)
        self.tapes: dict[str, Tape] = {}
        super().__init__(channel, topics)

    def _call_healer(self) -> None:
        self.changed = True

    def find_stream(self, instrument: str) -> Stream:
        """The stream of one instrument, made at need, as is its tape. Raises Malformed for a bad name."""
        return self.find_tape(instrument).stream

    def find_tape(self, instrument: str) -> Tape:
        """The tape of one instrument, made at need. Raises Malformed for a name that is bad, or another's."""
        tape = self.tapes.get(instrument)
        if tape is None:
            if self.channel.instrument not in ("", instrument):
                raise Malformed(f"a trade of {instrument[:80]!r}")
            stream = super().find_stream(instrument)
            tape = self.tapes[instrument] = Tape(stream, self.topics, self.losses, self._call_healer)
        return tape

    def forget(self, stream: Stream) -> None:
        """Its instrument expired long ago, and what is missing of it stays so."""
        super().forget(stream)
        del self.tapes[stream.instrument]

    # -- as they come -------------------------------------------------------------------------------------------------

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """The trades of one frame, in the exchange's order, each after the gap that it shows."""
        published: Published = []
        trades, cells = read_trades(frame), self.topics.ledger.cells
        # All names first: a frame is refused as a whole, before any of it has been taken as come.
        tapes = [self.find_tape(data.instrument_name) for data in trades]
        for tape, data in zip(tapes, trades, strict=True):
            stream, seq = tape.stream, data.trade_seq
            last = stream.last_id
            if not last or seq != last + 1 or stream.lost or tape.tail is not None:
                if (known := find_contradiction(tape, data)) is not None:
                    begin_count(tape, known, seq, receive_ts, published)
                    tape.open_hole(None, 1, seq - 1)
                elif seq <= last or tape.is_to_repeat(seq):
                    self._take_late(tape, data, receive_ts, published)
                    continue
                else:
                    tape.find_loss(seq, receive_ts, published)
                    tape.publish_due(receive_ts, published)
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
            EXCHANGE, stream.instrument, stream.epoch, 0, data.timestamp * MS, receive_ts,
            data.price, data.amount, data.direction, str(data.trade_id), data.trade_seq,
            data.mark_price, data.index_price, data.tick_direction, data.iv, data.liquidation,
            _text(data.block_trade_id), data.combo_id, _text(data.combo_trade_id), data.contracts,
            data.starbase_match_id, data.starbase_timestamp, data.block_rfq_id, data.block_trade_leg_count, backfilled,
        )  # fmt: skip

    def _take_late(self, tape: Tape, data: TradeData, receive_ts: int, published: Published) -> None:
        """A trade out of its order fills a hole, or comes before all others; any other has been published already."""
        is_anew = find_count(tape, data, receive_ts, published)
        if data.trade_seq > tape.stream.last_id:  # of an earlier life: it comes as if it had been fetched
            tape.await_tail()
        if (hole := tape.find_hole(data.trade_seq) or tape.open_before(data.trade_seq)) is None:
            self.duplicates += 1
            return
        hole.came.add(data.trade_seq)
        tape.stream.last_id = max(tape.stream.last_id, data.trade_seq)
        tape.await_tail()
        self._say_late(tape, data, is_anew, receive_ts, published)

    def _say_late(self, tape: Tape, data: TradeData, is_anew: bool, now: int, published: Published) -> None:
        """A trade that was missing, after the gap that is due; a later one of the same frame may show another gap.

        Where a new count was just told of, by a gap, that comes after the trade: two gaps do not follow each other.
        """
        if not is_anew:
            tape.publish_due(now, published)
        published.append((tape.stream, self.build_trade(tape.stream, data, now, True)))
        if is_anew:
            tape.publish_due(now, published)

    # -- lost ---------------------------------------------------------------------------------------------------------

    def lose(self, reason: str, now: int) -> None:
        """The connection is gone: from the last thing that we know to have come, all must be fetched."""
        for tape in self.tapes.values():
            if reason == "restart":
                take_doubt_over(tape)
            tape.lose(reason, now)
        self.losses.is_sent = False
        self._note_loss(now)

    def confirm(self, now: int) -> None:
        """The exchange sends this channel. What came of a healing before does not tell what was traded after that."""
        if self.losses.healed_to:
            for tape in self.tapes.values():
                tape.lose("disconnect", now)
        self.losses.confirm(now)

    def skip(self, frame: bytes, now: int) -> None:
        """A frame could not be read: its trades are fetched, those of quiet and of new instruments too."""
        for name in self._find_touched(frame):
            self.tapes[name].lose("sequence", now)
        self._note_loss(now)
        self.changed = True

    def _find_touched(self, frame: bytes) -> Set[str]:
        """Of whom an unreadable frame may have had trades: of all here, unless it is whole and names each."""
        try:
            names = {row["instrument_name"] for row in read_any(frame)}
        except (ValueError, TypeError, KeyError):
            names = {None}
        is_named = not self.channel.instrument and all(isinstance(name, str) for name in names)
        return names & self.tapes.keys() if is_named else self.tapes.keys()

    def _note_loss(self, now: int) -> None:
        streams, cells = self.streams.values(), self.topics.ledger.cells
        last_ts = max((stream.last_ts for stream in streams), default=0)
        self.losses.add(now, last_ts, max((cells[stream.slot + NEWEST] for stream in streams), default=0) * MS)

    def awaits_healing(self, stream: Stream) -> bool:
        """Whether trades that are still to be fetched may be missing on one of its topics."""
        return self.losses.lost_from is not None or bool(self.tapes[stream.instrument].holes)

    def take_last(self, stream: Stream, now: int) -> Gap | None:
        """The gap that is due on one of its topics, though no trade follows; None if all that was lost has come."""
        return None if self.losses.is_checked else self.tapes[stream.instrument].take_last(now)

    def end(self, is_healing: bool, now: int) -> Published:
        """Nobody asks for this channel any more: what came is all that comes; say what is not known to have come.

        `is_healing`: not all that it may lack has been asked for.
        """
        losses = self.losses
        is_unfinished = is_healing or not losses.is_checked
        self.is_ended = True
        losses.begin_healing(now)  # no other healing follows
        losses.end(is_whole=False)
        return [(tape.stream, message) for tape in self.tapes.values() for message in tape.end(is_unfinished, now)]

    def put_last(self, instrument: str) -> None:
        """Have all others healed before this one: while nothing is answered of it, they would wait for ever."""
        if (tape := self.tapes.pop(instrument, None)) is not None:
            self.tapes[instrument] = tape

    def count_healing(self) -> int:
        """How many gaps have their repair still to come."""
        return sum(hole.gap is not None for tape in self.tapes.values() for hole in tape.holes)

    # -- fetched ------------------------------------------------------------------------------------------------------

    def backfill(self, trades: Iterable[TradeData], now: int) -> Published:
        """Fetched trades, in order: those that are missing, marked as such."""
        published: Published = []
        for data in trades:
            try:
                tape = self.find_tape(data.instrument_name)
            except Malformed:  # what the stream itself could not bring either
                self.dropped += 1
            else:
                self._take_fetched(tape, data, now, published)
        return published

    def _take_fetched(self, tape: Tape, data: TradeData, now: int, published: Published) -> None:
        stream, seq = tape.stream, data.trade_seq
        if (known := find_contradiction(tape, data)) is not None:
            begin_count(tape, known, seq, now, published)
            tape.open_hole(None, 1, None)
        is_anew = find_count(tape, data, now, published)
        is_same = seq in (stream.last_id, stream.reached)  # as before the loss
        for hole in tape.holes:
            if hole.known[0] == seq:
                hole.known, is_same = (0, 0), True
        if is_same and self.channel.instrument:
            self.losses.is_checked = True
        if tape.fill(seq):
            stream.last_id = max(stream.last_id, seq)
            cells, place = self.topics.ledger.cells, stream.slot + NEWEST
            cells[place] = max(cells[place], data.timestamp)
            self._say_late(tape, data, is_anew, now, published)


def _text(value: str | int | None) -> str | None:
    return str(value) if isinstance(value, int) else value
