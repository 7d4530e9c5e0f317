"""From the market's events to frames for subscribers: one feed a channel, each frame encoded once for all."""

from typing import Any, Protocol

from workers.exchange.channels.account import Account
from workers.exchange.channels.feeds import Feed
from workers.exchange.channels.names import open_feed
from workers.exchange.market.market import MAX_BEHIND, Event, Market
from workers.exchange.protocol.rpc import encode_notification


class Frame:
    """One notification: its data, or its text if it is a recorded one. One with a label is for one subscriber alone."""

    __slots__ = ("_text", "channel", "data", "feed", "label")

    def __init__(
        self, channel: str, data: Any, feed: Feed | None = None, text: bytes | None = None, label: str | None = None
    ) -> None:
        self.channel, self.data, self.feed, self.label = channel, data, feed, label
        self._text = text

    @property
    def text(self) -> bytes:
        """The encoded notification."""
        if self._text is None:
            self._text = encode_notification(self.channel, self.data, self.label)
        return self._text

    @property
    def recorded(self) -> bool:
        """Whether it must go out as it was recorded."""
        return self.feed is None


class Subscriber(Protocol):
    """What takes frames: one connection."""

    def deliver(self, frame: Frame) -> None: ...


class _Line:
    """A channel with those who listen to it."""

    __slots__ = ("dirty", "feed", "subscribers")

    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self.subscribers: dict[Subscriber, None] = {}
        self.dirty = False


class Hub:
    """All channels that somebody listens to."""

    def __init__(self, market: Market, account: Account, recorded: frozenset[str] = frozenset()) -> None:
        self._market, self._account = market, account
        self._recorded = recorded
        self._lines: dict[str, _Line] = {}
        self._named: dict[str, list[_Line]] = {}
        self._wide: list[_Line] = []
        self._boundary = market.now // 100

    def offers(self, channel: str) -> bool:
        """Whether there is such a channel."""
        if channel in self._lines or channel in self._recorded:
            return True
        return open_feed(channel, self._market, self._account) is not None

    def subscribe(self, channel: str, subscriber: Subscriber) -> list[Frame]:
        """Add a listener to a channel that is offered; return the frames that it gets first."""
        line = self._lines.get(channel) or self._open(channel)
        if line is None:
            return []
        line.subscribers[subscriber] = None
        return [Frame(channel, data, line.feed) for data in line.feed.open()]

    def _open(self, channel: str) -> _Line | None:
        feed = Feed(channel, self._market) if channel in self._recorded else None
        feed = feed or open_feed(channel, self._market, self._account)
        if feed is None:
            return None
        line = self._lines[channel] = _Line(feed)
        if channel not in self._recorded:
            self._find_row(feed).append(line)
        return line

    def _find_row(self, feed: Feed) -> list[_Line]:
        return self._wide if feed.instrument is None else self._named.setdefault(feed.instrument.name, [])

    def unsubscribe(self, channel: str, subscriber: Subscriber) -> None:
        """Take a listener away; the feed ends with its last one."""
        line = self._lines.get(channel)
        if line is None:
            return
        line.subscribers.pop(subscriber, None)
        if not line.subscribers:
            del self._lines[channel]
            row = self._find_row(line.feed)
            if line in row:
                row.remove(line)

    def advance(self, now: int) -> list[Event]:
        """Let the market live until `now` and send what follows; return its events."""
        events = []
        while self._market.step(now):
            # Windows end before the quantum's first event: a frame never says half of an event.
            self._catch_up()
            for event in self._market.move():
                self.take(event)
                events.append(event)
        return events

    def take(self, event: Event) -> None:
        """Send what follows from one event."""
        self._account.take(event)
        for line in (*self._named.get(event.instrument.name, ()), *self._wide):
            if line.feed.take(event):
                self._note(line)

    def _catch_up(self) -> None:
        end = self._market.now // 100
        if abs(end - self._boundary) > MAX_BEHIND // 100:  # as the market does
            self._boundary = end - 1
        while self._boundary < end:
            self._boundary += 1
            self._tick(self._boundary * 100)

    def _note(self, line: _Line) -> None:
        line.dirty = True
        if line.feed.period == 0:
            self._flush(line)

    def _tick(self, now: int) -> None:
        for line in list(self._lines.values()):
            feed = line.feed
            alive = feed.instrument is None or feed.instrument.state == "open"
            if feed.refresh and alive and now % feed.refresh == 0:
                self._note(line)
            due = feed.period and now % feed.period == 0
            if due and (line.dirty or feed.steady):
                self._flush(line)

    def _flush(self, line: _Line) -> None:
        line.dirty = False
        while True:
            data = line.feed.flush()
            if data is not None:
                self._publish(line, Frame(line.feed.channel, data, line.feed))
            if not line.feed.more():
                return

    def _publish(self, line: _Line, frame: Frame) -> None:
        for subscriber in list(line.subscribers):
            subscriber.deliver(frame)

    def relay(self, frame: Frame) -> bool:
        """Send a recorded frame to whoever subscribed to its channel; False if nobody did."""
        line = self._lines.get(frame.channel)
        if line is None or not line.subscribers:
            return False
        self._publish(line, frame)
        return True
