"""The trades of one instrument on one channel: which of them are missing, and what is said of that. Pure."""

from collections.abc import Callable

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from collector.messages import EXCHANGE
from workers.deribit.feeds.trades.holes import Hole, Known
from workers.deribit.feeds.trades.losses import Losses
from workers.deribit.publishing.ledger import FIRST, KNOWN, LAST_ID, LAST_TS, NEWEST, UNHEALED
from workers.deribit.publishing.payloads import Gap, Repair
from workers.deribit.publishing.streams import Published, Stream, Topics


class Tape:
    """One instrument's trades.

    `holes` wait to be healed; `tail` is the one of them that has no end yet: what follows `stream.last_id` is being
    fetched. `losses` are those of the whole channel; `call_healer` is called when a hole is new.
    """

    __slots__ = ("call_healer", "holes", "losses", "stream", "tail", "topics")

    def __init__(self, stream: Stream, topics: Topics, losses: Losses, call_healer: Callable[[], None]) -> None:
        self.stream = stream
        self.topics = topics
        self.losses = losses
        self.call_healer = call_healer
        self.holes: list[Hole] = []
        self.tail: Hole | None = None

    @property
    def is_known(self) -> bool:
        """Whether any trade has come before, maybe in an earlier life."""
        return bool(self.stream.last_id or self.stream.last_ts)

    def tell_known(self) -> Known:
        """The last number, and the newest time, of all trades so far."""
        stream = self.stream
        return max(stream.last_id, stream.reached), self.topics.ledger.cells[stream.slot + NEWEST]

    def is_to_repeat(self, seq: int) -> bool:
        """Whether an earlier life has said this trade, and what it said last is still being fetched again."""
        return seq <= self.stream.reached and (self.stream.lost or self.tail is not None)

    # -- what is lost -------------------------------------------------------------------------------------------------

    def lose(self, reason: str, now: int) -> None:
        """The connection is gone: from the last thing that we know to have come, all must be fetched."""
        tail = self.tail
        if tail is None or tail.gap is not self.stream.gap or tail.came:
            self._end_tail(self.stream.last_id)  # what comes from now on belongs to the new gap
            self.stream.lose(reason, self.topics, now)
        else:  # its gap was said last, and nothing has come since: it tells of this loss as well
            tail.known = self.tell_known()  # that nothing was counted anew before tells nothing of this one
            self.note_doubt()

    def find_loss(self, seq: int, now: int, published: Published) -> None:
        """Trade `seq` follows a loss, or shows one: say in the gap that is due, or in a new one, what is missing."""
        stream = self.stream
        first, last, gap = stream.last_id + 1, seq - 1, stream.due
        if self.tail is not None:
            self._end_tail(last)
        elif not self.is_known:
            self._find_first(seq, now, published)
        elif first > last:
            if gap is not None:  # nothing known to be missing, so nothing is to be healed
                gap.missing_from, gap.healing = UNSET, False
                if not self.losses.is_checked:
                    self.open_hole(None, first, last)
        else:
            gap = gap or self.announce(now)
            gap.missing_to = last
            self.open_hole(gap, first, last)

    def _find_first(self, seq: int, now: int, published: Published) -> None:
        """The first trade that we see of the instrument, or since we left it: others may have come before."""
        stream, losses, last = self.stream, self.losses, seq - 1
        if seq <= stream.left_at:  # the exchange has begun to count anew since the topic was left
            stream.left_at = 0
        if losses.lost_from is not None and last > stream.left_at:  # it may have traded first while we were away
            self.open_hole(None, stream.left_at + 1, last)
        else:
            if losses.unanswered_from is not None and stream.left_at < last:
                published.append((stream, self._describe_missing(stream.left_at + 1, last, now)))
                last = stream.left_at
            self._note_first(last + 1)

    def _note_first(self, seq: int) -> None:
        """A later life need not fetch what lies before the first trade that came, or was said to be missing."""
        self.topics.ledger.lower(self.stream.slot, FIRST, seq)

    # -- what is said -------------------------------------------------------------------------------------------------

    def announce(self, now: int) -> Gap:
        """The gap of a loss that nothing but the trades themselves has shown; it is due now."""
        stream = self.stream
        if not stream.last_ts:  # its first trade stands in this very frame, and is noted before it goes out
            stream.last_ts = now
            self.topics.ledger.cells[stream.slot + LAST_TS] = now
            self.topics.ledger.cells[stream.slot + LAST_ID] = stream.last_id
        gap = stream.lose("sequence", self.topics, now)
        assert gap is not None  # nothing was lost before
        return gap

    def publish_due(self, now: int, published: Published) -> None:
        """At once, not when the frame is published: its next trade may show another hole, which has its own gap."""
        if (gap := self.stream.take_due(now)) is not None:
            published.append((self.stream, gap))

    def take_last(self, now: int) -> Gap | None:
        """The gap that is due, if there is one, though no trade follows: what it lacks will not be fetched."""
        gap = self.stream.take_due(now)
        if gap is not None:
            gap.healing = False
        return gap

    def describe_gap(self, now: int) -> Gap:
        """A gap that is said at once, beside the one that may be due."""
        stream = self.stream
        number = self.topics.number_gap()
        if stream.due is not None:  # it will be said later, and ids rise
            number, stream.due.id = stream.due.id, number
        gap = Gap(EXCHANGE, stream.instrument, stream.epoch, 0, 0, now, number, "sequence", stream.last_ts, now)
        gap.end(now)
        gap.healing = False
        stream.gap = gap
        return gap

    def _describe_missing(self, first: int, last: int | UnsetType, now: int, told: Gap | None = None) -> Gap:
        """What may have come, and is not asked for any more: a gap `told` why, or nothing was told of it yet."""
        gap = self.describe_gap(now)
        gap.missing_from, gap.missing_to = first, last
        if told is not None:
            gap.reason = told.reason
        elif (since := self.losses.unanswered_from) is not None:  # it may have traded first while we were away
            gap.reason, gap.from_ts = "disconnect", min(since, gap.from_ts or now)
        return gap

    # -- holes --------------------------------------------------------------------------------------------------------

    def open_hole(self, gap: Gap | None, first: int, last: int | None) -> Hole:
        """These trades are missing (`last` None: and all that follow), as `gap` says or will say, if there is one."""
        hole = Hole(gap, first, last, self.tell_known())
        self.holes.append(hole)
        if last is None:
            self.tail = hole
        if gap is not None:
            self.topics.ledger.lower(self.stream.slot, UNHEALED, first)
        self.note_doubt()
        self.call_healer()
        return hole

    def note_doubt(self) -> None:
        """A later life goes on with the doubts whether the exchange counts anew: the oldest, where there are many."""
        doubts = sorted({hole.known for hole in self.holes if hole.known[0]})
        words = [word for known in doubts for word in known] + [0] * len(KNOWN)
        for cell, word in zip(KNOWN, words, strict=False):
            self.topics.ledger.cells[self.stream.slot + cell] = word

    def await_tail(self) -> None:
        """A gap that is due comes to be published before an older trade: what it lacks has no end yet."""
        if self.stream.due is not None and self.tail is None:
            self.open_hole(self.stream.due, self.stream.last_id + 1, None)

    def _end_tail(self, last: int) -> None:
        if self.tail is not None:
            self.tail.last, self.tail = last, None

    def find_hole(self, seq: int) -> Hole | None:
        """The hole that holds this trade; None if it is not missing."""
        return next((hole for hole in self.holes if hole.holds(seq)), None)

    def open_before(self, seq: int) -> Hole | None:
        """A trade older than the first that came of the instrument has come: what lies between is missing too.

        None if it is not older: it has been said then.
        """
        stream = self.stream
        first = self.topics.ledger.cells[stream.slot + FIRST] if stream.slot else 0
        if not stream.left_at < seq < first or any(seq in hole.came for hole in self.holes):
            return None
        self._note_first(seq)
        self.topics.ledger.lower(stream.slot, UNHEALED, seq)
        return self.open_hole(None, seq, first - 1)

    def fill(self, seq: int) -> bool:
        """Take a fetched trade; false if it is not missing, or not any more."""
        if seq > self.stream.last_id and self.tail is None:
            return self._begin_tail(seq)  # also where a hole from before the topic was left holds it
        if (hole := self.find_hole(seq)) is None:
            return False
        self._fill_hole(hole, seq)
        self.await_tail()
        return True

    def _begin_tail(self, seq: int) -> bool:
        """Take the first fetched trade of a quiet tail, or of an instrument that is new to us; false if of neither."""
        stream = self.stream
        if self.is_known and stream.due is None:
            return False  # newer than all that came, and nothing was lost: it will come by itself
        said = stream.last_id if self.is_known else stream.left_at
        if seq <= said:
            return False
        hole = self.open_hole(stream.due, said + 1, None)
        self._fill_hole(hole, seq)
        if self.losses.is_checked:  # the trade before it was the same
            hole.known = (0, 0)
            self.note_doubt()
        return True

    def _fill_hole(self, hole: Hole, seq: int) -> None:
        hole.came.add(seq)
        # Fetched in order: what lies before it is from before the loss. But a run by number may begin with the last.
        if hole.gap is None and seq != hole.last:
            self._note_first(seq)
            self.topics.ledger.lower(self.stream.slot, UNHEALED, seq)

    # -- healing ------------------------------------------------------------------------------------------------------

    def find_missing(self, tails: bool) -> tuple[int, int | None] | None:
        """The run of trade_seq to fetch: (from, to or None for open); None if nothing can be missing.

        Without `tails`: only what is known to be missing, or in doubt: all that came last has been fetched by time.
        """
        stream, holes = self.stream, self.holes
        runs = [run for hole in holes if not hole.is_full for run in hole.list_missing()]
        # The trade before a hole is fetched too, where nothing else may show whether the exchange counts anew.
        is_open = tails and not self.losses.is_checked
        runs += [(hole.first, hole.first - 1) for hole in holes if hole.is_doubt or (is_open and hole.known[0])]
        firsts = [first for first, _ in runs]
        if tails and (self.tail is not None or stream.lost):
            return min([stream.last_id + 1, *firsts]), None
        return (min(firsts), max(last for _, last in runs)) if runs else None

    @property
    def is_numbered(self) -> bool:
        """Whether what is missing can be told by trade_seq alone."""
        return self.is_known and all(hole.gap or hole.is_doubt for hole in self.holes)

    def lacks_more(self, tails: bool) -> bool:
        """Whether it is worth it to ask once more for what has been asked for."""
        return bool(self.holes) and self.find_missing(tails) is not None

    def end_healing(self, holes: list[Hole], now: int) -> list[Gap | Repair]:
        """All that can be had of these holes has come: say of each of their gaps what stays missing.

        Those that have no gap yet come last: theirs may not follow one that was said last, but the repair of that.
        """
        if not self.holes:  # as of most of thousands that are left together
            return []
        closed = sorted((hole for hole in self.holes if hole in holes), key=lambda hole: hole.gap is None)
        self.holes = [hole for hole in self.holes if hole not in holes]
        if self.tail in closed:
            self.tail = None
        return [said for hole in closed for said in self._close_hole(hole, now)]

    def end(self, is_unfinished: bool, now: int) -> list[Gap | Repair]:
        """No trade follows: say what is not known to have come, what was lost last after all repairs."""
        tail, said = self.tail, self.end_healing(self.holes, now)
        if tail is not None:
            said.append(self._describe_missing(self.stream.last_id + 1, UNSET, now, tail.gap))
        elif is_unfinished and not self.stream.is_over and (gap := self.take_last(now)):
            said.append(gap)
        return said

    def _close_hole(self, hole: Hole, now: int) -> list[Gap | Repair]:
        stream, gap, said = self.stream, hole.gap, []
        missing = hole.list_missing() if gap is not None else self._list_unannounced(hole)
        if gap is None:
            if not missing:
                return []
            gap = self._describe_missing(missing[0][0], missing[-1][1], now)
            gap.healing = True
            said.append(gap)
        if stream.gap is gap:  # who comes from now on has no repair to wait for; what was said is not touched
            stream.gap = replace(gap, healing=False)
        repaired = len(hole.came) if hole.gap is not None else 0
        self.topics.repaired += repaired
        self.topics.missing += sum(last - first + 1 for first, last in missing)
        return [*said, Repair(EXCHANGE, stream.instrument, stream.epoch, 0, 0, now, gap.id, repaired, missing)]

    def _list_unannounced(self, hole: Hole) -> list[tuple[int, int]]:
        """What is missing of a hole without a gap; before the first trade that came, if that was not answered."""
        if hole.last is not None and 0 < hole.last < hole.first:
            return []  # it was a doubt, which tells nothing of what came first
        missing = hole.list_missing()
        first = min(hole.came, default=1 + (self.stream.last_id if hole.last is None else hole.last))
        if self.losses.unanswered_from is not None and hole.first < first:
            missing.insert(0, (hole.first, first - 1))
            first = hole.first
        self._note_first(first)
        return missing

    def note_out(self) -> None:
        """What healing brought is surely out: a later life need not fetch it again."""
        cells, slot = self.topics.ledger.cells, self.stream.slot
        unhealed = [hole.first for hole in self.holes if hole.gap is not None]
        unhealed += [min(hole.came) for hole in self.holes if hole.gap is None and hole.came]
        if self.stream.last_id < self.stream.reached:  # not all that is to be said again has come
            unhealed.append(self.stream.last_id + 1)
        cells[slot + UNHEALED] = min(unhealed, default=0)
        self.note_doubt()
