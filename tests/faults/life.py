"""One life of a worker without its loop: its feeds, its publisher on a real socket, its ledger; and who listens."""

import time
from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from typing import Any

import zmq

from collector.channels import parse_channel
from tests.faults.judge import Received
from workers.deribit.feeds.feed import Feed
from workers.deribit.feeds.normalise import create_feed
from workers.deribit.feeds.trades.feed import TradeFeed
from workers.deribit.feeds.trades.tape import Tape
from workers.deribit.healing.fetch import Ask, Healed, Healing, Page, heal_feed, heal_known
from workers.deribit.publishing.ledger import Ledger
from workers.deribit.publishing.publisher import Publisher
from workers.deribit.publishing.streams import Stream, Topics

CONTEXT = zmq.Context()
SURE = 5_000_000_000


class Reader:
    """A subscriber; `record` grows with what `receive` finds."""

    def __init__(self, endpoint: str, prefix: bytes) -> None:
        self.record: list[Received] = []
        self._socket = CONTEXT.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.subscribe(prefix)
        self._socket.connect(endpoint)

    def receive(self, count: int, now: int) -> None:
        """Receive until there are so many messages. Raises AssertionError if they do not come."""
        while len(self.record) < count:
            assert self._socket.poll(5000), f"{len(self.record)} of {count} messages came"
            topic, payload = self._socket.recv_multipart()
            self.record.append(Received(topic, payload, now))

    def receive_waiting(self, now: int) -> None:
        """Receive what is there."""
        while self._socket.poll(20):
            topic, payload = self._socket.recv_multipart()
            self.record.append(Received(topic, payload, now))

    def close(self) -> None:
        self._socket.close()


class Life:
    """What `workers.deribit.worker` puts together, moved by calls instead of by its loop. `now` is in ns."""

    def __init__(self, directory: Path, channels: list[str], now: int, is_first: bool) -> None:
        self.epoch = now
        self.ledger = Ledger(directory / "ledger", fresh=is_first)
        self.topics = Topics(now, self.ledger)
        self.publisher = Publisher(f"ipc://{directory}/{now}", 0, self.ledger)
        self.feeds = {name: create_feed(parse_channel(name), self.topics) for name in channels}
        self.joined = 0
        self.unsettled: list[tuple[int, Tape]] = []
        self._take_over()
        self.publisher.bind()

    def _take_over(self) -> None:
        recalled = self.topics.recall()
        for feed in self.feeds.values():
            feed.adopt(recalled)
            if isinstance(feed, TradeFeed):
                feed.losses.recall()
            feed.lose("restart", self.epoch)

    def listen(self, prefix: bytes = b"") -> Reader:
        """A new subscriber, and the answer that it gets (see joins.py)."""
        reader = Reader(self.publisher.endpoint, prefix)
        end = time.monotonic() + 5
        while not (prefixes := self.publisher.take_subscriptions()):
            assert time.monotonic() < end, "no subscription came"
            time.sleep(0.0002)
        assert prefixes == [prefix]
        self.publisher.release()  # as after the time that it waits for subscribers of the earlier life
        for stream in self.topics.match(prefix):
            for message in (stream.gap, stream.status, stream.describe()):
                if message is not None:
                    self.publisher.repeat(stream, message)
                    self.joined += 1
        return reader

    @property
    def said(self) -> int:
        """How many messages the first subscriber must get."""
        return self.publisher.published + self.joined

    def take(self, channel: str, frame: bytes, now: int) -> bool:
        """A frame comes. Returns whether something follows from it: a book out of step, a hole in the trades."""
        feed = self.feeds[channel]
        published = feed.take(frame, now)
        if published:
            self.publisher.publish(published, now)
            feed.last_ts = now
        changed, feed.changed = feed.changed, False
        return changed

    def skip(self, channel: str, frame: bytes, now: int) -> bool:
        """A frame comes that cannot be read. Returns whether something follows from it."""
        feed = self.feeds[channel]
        with suppress(ValueError):
            feed.take(frame, now)
            raise AssertionError("it can be read")
        feed.skip(frame, now)
        changed, feed.changed = feed.changed, False
        return changed

    def list_known(self) -> list[Stream]:
        """The topics of trades of which it knows where they go on."""
        feeds = [feed for feed in self.feeds.values() if isinstance(feed, TradeFeed)]
        return [tape.stream for feed in feeds for tape in feed.tapes.values() if tape.is_known]

    def lose(self, now: int) -> None:
        """The connection is lost, or could not be made."""
        for feed in self.feeds.values():
            feed.lose("disconnect", now)

    def confirm(self, channel: str, now: int) -> None:
        """The exchange confirms a channel."""
        feed = self.feeds[channel]
        if isinstance(feed, TradeFeed):
            feed.confirm(now)

    def note_out(self, now: int) -> None:
        """What was published SURE ago has left, even if this life is killed."""
        while self.unsettled and self.unsettled[0][0] <= now:
            _, tape = self.unsettled.pop(0)
            tape.note_out()

    def stop(self, healing: Container[Feed], now: int) -> None:
        """It is asked to end, while these are being healed: it says what it does not know to have come."""
        for feed in self.feeds.values():
            if isinstance(feed, TradeFeed):
                for stream, message in feed.end(feed in healing, now):
                    self.publisher.say(stream, message)

    def end(self) -> None:
        """Gone, whether killed or not."""
        self.publisher.close()
        self.ledger.close()


class Healer:
    """The healing of one feed, step by step (see heal.py)."""

    def __init__(self, life: Life, feed: TradeFeed, now: int, offset: int) -> None:
        self._life, self._feed = life, feed
        feed.changed = False
        self._healing: Healing = heal_feed(feed, now, offset)
        self._delayed: tuple[Healing, Ask] | None = None
        self.is_asked = False
        self.due = 0
        self.ask: Ask | None = None
        self.go_on(None, now)

    def take(self, trades: list[Any], has_more: bool, now: int) -> None:
        """An answer comes."""
        self._life.publisher.publish(self._feed.backfill(trades, now), now, is_fetched=True)
        self.go_on(Page(trades, has_more), now)

    def wait(self, now: int) -> None:
        """The exchange wants to be asked later: what is known to be missing is fetched before that."""
        assert self.ask is not None
        if self._delayed is None and "start_timestamp" in self.ask.params:
            self._delayed, self._healing = (self._healing, self.ask), heal_known(self._feed)
            self.go_on(None, now)

    def go_on(self, page: Page | None, now: int) -> None:
        """Take the next steps, up to the next request; `ask` is None when there is none."""
        self.is_asked, self.ask = False, None
        while True:
            try:
                step = self._healing.send(page)
            except StopIteration:
                if self._delayed is not None:
                    (self._healing, self.ask), self._delayed = self._delayed, None
                return
            page = None
            if isinstance(step, Healed):
                for message in step.tape.end_healing(step.holes, now):
                    self._life.publisher.say(step.tape.stream, message)
                self._life.unsettled.append((now + SURE, step.tape))
            else:
                self.ask, self.due = step, now + int(step.pause * 1e9)
                return
