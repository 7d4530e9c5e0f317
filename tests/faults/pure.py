"""Seeded cases of the code that judges frames: exchange, connection and worker in one process, moved by chance."""

import shutil
import tempfile
import traceback
from pathlib import Path
from random import Random

import msgspec

from collector.client.stream import read_message
from tests.faults.exchange import DAY, FAR_BEHIND, TRADED, Exchange, Item, Line, Loss, sort_levels
from tests.faults.judge import Received, Truth, describe_message, judge
from tests.faults.life import SURE, Healer, Life, Reader
from workers.deribit.feeds.book import BookFeed
from workers.deribit.feeds.frames import TradeData
from workers.deribit.feeds.trades.feed import TradeFeed
from workers.deribit.publishing.ledger import HEARD, OUT

MS = 1_000_000
START = 1_790_000_000_000
"""ms: when the exchange's clock starts."""


def draw_loss(rng: Random) -> Loss:
    """How bad it is: most cases suffer from a few things only."""
    return Loss(*(rng.choice((0.0, 0.0, 0.05, 0.25)) for _ in Loss._fields))


def garble(frame: bytes, rng: Random) -> bytes:
    """A frame as nobody can read it; of whom it speaks may still be seen, or of some of them."""
    if rng.random() < 0.3:
        frame = frame.replace(b"instrument_name", b"name")
    if rng.random() < 0.5:
        return frame[: rng.randrange(frame.index(b'"data":'), len(frame))]
    return frame.replace(b'"timestamp":', b'"timestamp":"')


class Case:
    """One case. The same seed gives the same course."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.rng = rng = Random(seed)
        self.directory = directory
        self.offset = rng.randrange(-3000, 3000) * MS
        self.truth = Truth()
        self.exchange = Exchange(rng, START, draw_loss(rng), self.truth)
        # The courses of other seeds stay what they were: tests name some of them.
        self.may_stop = seed % 3 == 2
        if self.may_stop:
            self.exchange.garble = rng.choice((0.0, 0.05, 0.25))
        self.record: list[Received] = []
        self.late: list[Reader] = []
        self.is_up = False
        self.healers: dict[TradeFeed, Healer] = {}
        self.waiting: dict[TradeFeed, None] = {}
        self.broken: set[Line] = set()
        self.refusals = rng.choice((0, 0, 0, 3, 60))
        # Where only the last try finds anything, one refusal may cost it.
        self.truth.is_mean = self.refusals > (0 if self.exchange.behind == FAR_BEHIND else 5)
        self.forget = rng.choice((0.0, 0.0, 0.1))
        self.log: list[str] = []
        self._begin(is_first=True)

    @property
    def now(self) -> int:
        """The worker's clock, ns."""
        return self.exchange.now * MS - self.offset

    def _begin(self, is_first: bool) -> None:
        channels = [line.channel for line in self.exchange.lines]
        self.life = Life(self.directory, channels, self.now, is_first)
        self.main = self.life.listen()

    # what can happen

    def run(self) -> list[str]:
        """Let it happen; return what is wrong with the outcome."""
        # What was not sure, and told with its last words, a later life does not tell again.
        kills = 0 if self.truth.is_mean else 0.4
        resets = 0 if self.forget else self.rng.choice((0, 0.3))
        weights = {
            self._trade: 8, self._change_book: 6, self._deliver: 14, self._heal: 6, self._repair_book: 2,
            self._cut: self.rng.choice((0, 1)), self._connect: 3, self._kill: self.rng.choice((0, 0, kills)),
            self._join: 0.3, self._pause: 3, self._reset: resets,
            self._wait_long: self.rng.choice((0, 0, 0.3)), self._sleep: 0 if resets else self.rng.choice((0, 0.3)),
        }  # fmt: skip
        self._connect()
        for action in self.rng.choices(list(weights), list(weights.values()), k=self.rng.randrange(30, 220)):
            self.log.append(action.__name__)
            action()
        if self.may_stop and self.rng.random() < 0.5:
            self._stop(resets > 0)
        else:
            self._settle()
        return [*judge(self.record, self.truth), *self._judge_late()]

    def _trade(self) -> None:
        for _ in range(self.rng.randrange(1, 4)):
            self.exchange.trade(self.rng.choice(TRADED), self.rng.choice((1, 1, 2, 4)), self.forget)
        self._pause()

    def _change_book(self) -> None:
        for _ in range(self.rng.randrange(1, 4)):
            self.exchange.change_book(self.rng.choice(TRADED[:2]))
        self._pause()

    def _pause(self) -> None:
        self.exchange.pass_time(self.rng.choice((1, 5, 20, 60)))

    def _wait_long(self) -> None:
        self.exchange.release()  # no frame is so late
        self.exchange.pass_time(self.rng.choice((3000, 9000)))

    def _sleep(self) -> None:
        """A quiet day and more, connected or not: what was traded before it can not be had by time any more.

        Not where the exchange counts anew too: then a gap says so, but nothing can show what came before that day.
        """
        self._connect()
        self.exchange.pass_time(150)  # no frame is so late
        self._calm()
        if self.rng.random() < 0.5:
            self.truth.is_mean = True  # it cannot tell what it may have missed of those that it had not heard of
            self._cut()
            self._trade()
        self.exchange.pass_time(DAY + self.rng.choice((5_000, 3_600_000)))
        if not self.is_up:  # of an instrument that it had never heard of it cannot know
            known = {stream.topic.decode() for stream in self.life.list_known()}
            self.truth.owed = {topic: number for topic, number in self.truth.owed.items() if topic in known}

    def _deliver(self) -> None:
        for _ in range(min(len(self.exchange.pipe), self.rng.randrange(1, 12))):
            self._take(self.exchange.take())
        self._pause()

    def _take(self, item: Item) -> None:
        if item.kind == "ack":
            for line in item.data:
                self.life.confirm(line.channel, self.now)
                self._call(line.channel)
        elif item.kind == "answer":
            trades, has_more = item.data
            feed, healer = item.whom
            if feed in self.healers and self.healers[feed] is healer:
                healer.take(msgspec.convert(trades, list[TradeData]), has_more, self.now)
        elif item.line is not None:
            frame = item.line.encode(item.data)
            if item.kind == "garbled":
                changed = self.life.skip(item.line.channel, garble(frame, self.rng), self.now)
            else:
                changed = self.life.take(item.line.channel, frame, self.now)
            if changed and item.line.family == "trades":
                self._call(item.line.channel)

    def _call(self, channel: str) -> None:
        feed = self.life.feeds[channel]
        if isinstance(feed, TradeFeed):
            self.waiting[feed] = None

    def _heal(self) -> None:
        """Start what waits, send what is due; one healing of a feed at a time."""
        self.life.note_out(self.now)
        for feed in list(self.waiting):
            if feed not in self.healers:
                del self.waiting[feed]
                self.healers[feed] = Healer(self.life, feed, self.now, self.offset)
        for feed, healer in list(self.healers.items()):
            if healer.ask is None:
                del self.healers[feed]
                if feed.changed:
                    self.waiting[feed] = None
            elif not healer.is_asked and healer.due <= self.now:
                self._ask(feed, healer)

    def _ask(self, feed: TradeFeed, healer: Healer) -> None:
        assert healer.ask is not None
        if not self.is_up:
            del self.healers[feed]  # heal.py: it goes on after the next bootstrap
        elif self.refusals and self.rng.random() < (0.3 if self.refusals < 5 else 0.9):
            self.refusals -= 1
            healer.go_on(None, self.now)
        elif self.rng.random() < 0.2:
            healer.wait(self.now)
        else:
            healer.is_asked = True
            self.exchange.answer(healer.ask.method, healer.ask.params, (feed, healer))

    def _repair_book(self) -> None:
        """Ask for a new snapshot of each book that is out of step."""
        if self.is_up and not any(item.kind == "ack" for item in self.exchange.pipe):
            for line in self.exchange.lines:
                feed = self.life.feeds[line.channel]
                if isinstance(feed, BookFeed) and not feed.is_complete and line in self.exchange.subscribed:
                    self.exchange.unsubscribe(line)
                    self.exchange.subscribe([line])

    def _cut(self) -> None:
        if self.is_up:
            self._go_down()
        for _ in range(self.rng.choice((1, 1, 2))):
            self.life.lose(self.now)
        self._pause()

    def _go_down(self) -> None:
        self.is_up = False
        self.exchange.cut()
        # A request on its way is lost with the connection; one that still waits for its time may come to be sent.
        self.healers = {feed: healer for feed, healer in self.healers.items() if not healer.is_asked}

    def _reset(self) -> None:
        """The exchange is started anew without what it knew; or it only counts anew, and every frame comes."""
        if self.rng.random() < 0.7 or self.exchange.loss.drop or self.exchange.loss.swap:
            self._cut()
        self.exchange.reset()
        self.exchange.pass_time(self.rng.choice((60, 500)))

    def _connect(self) -> None:
        if not self.is_up:
            self.is_up = True
            self.exchange.subscribe(self.exchange.lines, late=self.rng.random() < 0.3)

    def _kill(self) -> None:
        if self.is_up:
            self.life.ledger.cells[HEARD] = self.now  # patrol.py: once a second
        self.life.ledger.cells[OUT] = self.now
        self._go_down()
        self._end_life(unsent=self.rng.choice((0, 0, 1, 5, 20)))
        self.exchange.pass_time(self.rng.choice((2, 30, 500)))
        self._begin(is_first=False)

    def _end_life(self, unsent: int) -> None:
        """It is gone; its last messages may have gone with it."""
        self.main.receive(self.life.said, self.now)
        sent = len(self.main.record)
        while unsent and sent and self._is_fresh(self.main.record[sent - 1]):
            sent, unsent = sent - 1, unsent - 1
        self.record += self.main.record[:sent]
        self.main.close()
        for reader in self.late:
            reader.receive_waiting(self.now)
            reader.close()
        if unsent or not self.is_settled:
            self.late.clear()  # they saw no end that could be judged
        self.life.end()
        self.healers.clear()
        self.waiting.clear()

    def _is_fresh(self, received: Received) -> bool:
        """Whether a message is so new that it may not have left."""
        return read_message(received.topic, received.payload).receive_ts > self.now - SURE

    is_settled = False

    def _join(self) -> None:
        prefix = self.rng.choice((b"", b"deribit.book.", b"deribit.book.BTC-PERPETUAL.raw"))
        self.late.append(self.life.listen(prefix))

    # the end

    def _settle(self) -> None:
        """Everything is well again; each instrument trades and each book changes, so that every loss has shown.

        Some end without a trade: those that were lost with the last connection must come all the same.
        """
        self.exchange.loss, self.exchange.garble, self.refusals = Loss(), 0.0, 0
        if is_quiet := not self.forget and self.rng.random() < 0.3:
            for name in TRADED:
                self.exchange.trade(name, 1)
            self._cut()
        self._connect()
        for _ in range(3):
            self._calm()
            for name in () if is_quiet else TRADED:
                self.exchange.trade(name, 1)
            for name in TRADED[:2]:
                before = sort_levels(self.exchange.books[name])
                while sort_levels(self.exchange.books[name]) == before:
                    self.exchange.change_book(name)
            self.exchange.pass_time(150)
        self._calm()
        for line in self.exchange.lines:
            if line.family == "book":
                self.truth.final[line.name_topic(line.instruments[0])] = {line.change_id}
        self.is_settled = True
        self._end_life(unsent=0)

    def _stop(self, may_count_anew: bool) -> None:
        """The worker is asked to end, in the midst of it all: what it knows to be lost, and has not fetched, it names.

        Not where the exchange may have begun to count anew, which the worker has not found out; nor where a frame that
        could not be read had overtaken the first of its topic, which no WebSocket lets it do.
        """
        self.truth.is_mean = True
        known = {stream.topic.decode(): stream.instrument for stream in self.life.list_known()}
        for topic, name in known.items():
            last = self.exchange.shown.get(topic, 0)
            self.truth.waived[topic] = {number for number in self.truth.trades[name] if number > last}
        owed = self.truth.owed.items()
        is_unclear = may_count_anew or (self.exchange.garble and self.exchange.loss.swap)
        self.truth.owed = {} if is_unclear else {topic: first for topic, first in owed if topic in known}
        self.life.stop(self.healers.keys() | self.waiting.keys(), self.now)
        self._end_life(unsent=0)

    def _calm(self) -> None:
        for _ in range(800):
            while self.exchange.pipe:
                self._take(self.exchange.take())
            self._repair_book()
            self._heal()
            if not (self.exchange.pipe or self.healers or self.waiting):
                return
            self.exchange.pass_time(100)
        raise AssertionError("it does not come to rest: healing goes on and on")

    def _judge_late(self) -> list[str]:
        return [
            f"late subscriber: {text}"
            for reader in self.late
            for text in judge(reader.record, self._narrow(reader), False)
        ]

    def _narrow(self, reader: Reader) -> Truth:
        truth = Truth()
        truth.books, truth.trades = self.truth.books, self.truth.trades
        said = {received.topic.decode() for received in reader.record}
        truth.final = {topic: ids for topic, ids in self.truth.final.items() if topic in said}
        return truth


def run_case(seed: int, verbose: bool = False) -> list[str]:
    """Run one case in a directory of its own; return what is wrong."""
    directory = Path(tempfile.mkdtemp(prefix="f-", dir="/tmp"))
    case: Case | None = None
    try:
        case = Case(seed, directory)
        return case.run()
    except Exception:
        return [traceback.format_exc()]
    finally:
        if verbose and case is not None:
            for received in case.record:
                print(describe_message(received))
        shutil.rmtree(directory)
