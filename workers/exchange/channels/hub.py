"""From the market's events to frames for subscribers: one feed a channel, each frame encoded once for all."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Protocol

from workers.exchange.channels.account import Account
from workers.exchange.channels.feeds import Feed
from workers.exchange.channels.names import open_feed
from workers.exchange.market.instruments import Instrument
from workers.exchange.market.market import Event, Market
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


class Hub:
    """All channels that somebody listens to."""

    def __init__(self, market: Market, account: Account, recorded: frozenset[str] = frozenset()) -> None:
        self._market, self._account = market, account
        self._recorded = recorded
        self._feeds: dict[str, Feed] = {}
        self._of: defaultdict[Instrument | None, list[Feed]] = defaultdict(list)
        self._boundary = market.now // 100

    def offers(self, channel: str) -> bool:
        """Whether there is such a channel."""
        return self._find(channel) is not None

    def _find(self, channel: str) -> Feed | None:
        recorded = Feed(channel, self._market) if channel in self._recorded else None
        return self._feeds.get(channel) or recorded or open_feed(channel, self._market, self._account)

    def subscribe(self, channel: str, subscriber: Subscriber) -> list[Frame]:
        """Add a listener to a channel that is offered; return the frames that it gets first."""
        feed = self._find(channel)
        assert feed is not None, "it is offered"
        if channel not in self._feeds:
            self._feeds[channel] = feed
            if channel not in self._recorded:
                self._of[feed.instrument].append(feed)
        feed.subscribers[subscriber] = None
        return [Frame(channel, data, feed) for data in feed.open()]

    def unsubscribe(self, channel: str, subscriber: Subscriber) -> None:
        """Take a listener away; the feed ends with its last one."""
        feed = self._feeds[channel]
        feed.subscribers.pop(subscriber, None)
        if not feed.subscribers:
            del self._feeds[channel]
            if channel not in self._recorded:
                self._of[feed.instrument].remove(feed)

    def advance(self, now: int) -> list[Event]:
        """Let the market live until `now` and send what follows; return its events."""
        events = []
        while self._market.step(now):
            # Windows end before the quantum's first event: a frame never says half of an event.
            if (boundary := self._market.now // 100) != self._boundary:
                self._boundary = boundary
                self._tick(boundary * 100)
            events += self.take(self._market.move())
        return events

    def take(self, events: Iterable[Event]) -> list[Event]:
        """Send what follows from each event, while it is the newest; return them."""
        taken = []
        for event in events:
            taken.append(event)
            self._account.take(event)
            for feed in (*self._of.get(event.instrument, ()), *self._of[None]):
                if feed.take(event):
                    self._note(feed)
        return taken

    def _note(self, feed: Feed) -> None:
        feed.dirty = True
        if feed.period == 0:
            self._flush(feed)

    def _tick(self, now: int) -> None:
        for feed in list(self._feeds.values()):
            alive = feed.instrument is None or feed.instrument.state == "open"
            if feed.refresh and alive and now % feed.refresh == 0:
                self._note(feed)
            due = feed.period and now % feed.period == 0
            if due and (feed.dirty or feed.steady):
                self._flush(feed)

    def _flush(self, feed: Feed) -> None:
        feed.dirty = False
        for data in feed.flush():
            self._publish(feed, Frame(feed.channel, data, feed))

    def _publish(self, feed: Feed, frame: Frame) -> None:
        for subscriber in list(feed.subscribers):
            subscriber.deliver(frame)

    def relay(self, frame: Frame) -> None:
        """Send a recorded frame to whoever subscribed to its channel."""
        feed = self._feeds.get(frame.channel)
        if feed is not None:
            self._publish(feed, frame)
