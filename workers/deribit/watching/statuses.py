"""What is said of states: of each channel on its topics, of the connection on its own topic."""

import time
from collections.abc import Iterable

from collector.messages import EXCHANGE
from workers.deribit.connection.client import Client
from workers.deribit.connection.subscriptions import EXPIRED
from workers.deribit.feeds.feed import Feed
from workers.deribit.feeds.trades.feed import TradeFeed
from workers.deribit.publishing.payloads import Status
from workers.deribit.publishing.publisher import Publisher
from workers.deribit.publishing.streams import Stream, Topics

REPEAT = 60
"""Seconds in which each topic's status is said again: its seq shows a subscriber that it missed the last ones."""

FAREWELLS = 2
"""How often the last status of a topic that was left is said again: a subscriber may have missed it too."""

LAST_DATA = 60 * 1_000_000_000
"""Time from the end of an instrument (ns) after which no trade of it comes late any more, nor anything else where
nothing has come for as long."""

UNSUBSCRIBED, STOPPED, FAILED = ("closed", "unsubscribed"), ("closed", "stopped"), ("closed", "failed")
"""State and reason of a channel that was given up, of all when the worker is asked to stop, and of all when the
exchange has refused the connection for good."""

MUTE = ("stale", "mute")
"""State and reason of one that is silent against its own rhythm."""

OVER = ("expired", EXPIRED)
"""Those of one whose instrument has ended."""


class Statuses:
    """Says each change of state once, and all of them again from time to time.

    `heard_until` is the exchange's time (ns) up to which all that it has sent has come, as far as is known.
    """

    heard_until = 0

    def __init__(self, publisher: Publisher, topics: Topics, name: str, client: Client) -> None:
        self._publisher = publisher
        self._topics = topics
        self._name = name
        self._client = client
        self._connection = topics.find("status", name, "connection")
        self._left: dict[Stream, tuple[Status, int]] = {}

    def tell_connection(self, state: str, reason: str) -> None:
        """The connection went into another state."""
        self._say(self._connection, state, reason)

    def tell(self, feed: Feed, state: str, reason: str) -> None:
        """A channel is in this state now; said if it is a change."""
        if (state, reason) != feed.condition:
            feed.condition = (state, reason)
            self.tell_first(feed)

    def tell_first(self, feed: Feed) -> None:
        """A channel is asked for now: its state is said on each of its topics that may have been said to be closed."""
        for stream in feed.streams.values():
            self._tell_topic(feed, stream)

    def tell_awaited(self, feed: Feed) -> None:
        """The exchange gives a channel whose first full state is to come: said unless its topics stand so already.

        What an earlier life said of them may have been `live`.
        """
        if feed.condition[0] == "refused":
            self.tell(feed, "recovering", "subscribe")
        elif any(stream.status is None for stream in feed.streams.values()):
            self.tell_first(feed)

    def end(self, stream: Stream) -> None:
        """A topic of an earlier life has no channel any more; what was lost of its trades is not fetched."""
        is_over = not stream.last_ts or stream.has_expired(self._client.session.read_exchange_clock())
        if stream.type == "trade" and (gap := stream.lose("restart", self._topics, self._client.read_clock())):
            gap.healing = False
            self._publisher.say(stream, gap)
        self._say(stream, *(OVER if is_over else UNSUBSCRIBED))

    def leave(self, stream: Stream, is_over: bool = False) -> None:
        """Nobody asks for a topic any more (see Topics.leave): its last status is said again FAREWELLS times."""
        if stream.status is not None:
            self._left[stream] = stream.status, FAREWELLS
        self._topics.leave(stream, time.monotonic_ns(), is_over)

    def repeat(self, feeds: Iterable[Feed], part: int) -> None:
        """Say again one part in REPEAT of all topics; called each second with the next part, it covers all in a minute.

        A topic's part is its own, whatever comes and goes beside it. Topics that have come up since, on channels that
        feed many, are told theirs at once; those of which nothing has come at all are told that they are waited for.
        """
        for feed in feeds:
            for stream in feed.streams.values():
                if _is_due(stream, part) or (stream.seq and stream.status is None):
                    self._tell_topic(feed, stream)

    def repeat_others(self, part: int) -> None:
        """The same for what no feed has: the connection's own state, and topics that were left and not taken up."""
        if self._connection.status is not None and _is_due(self._connection, part):
            self.tell_connection(self._connection.status.state, self._connection.status.reason)
        for stream in [stream for stream in self._left if _is_due(stream, part)]:
            status, times = self._left.pop(stream)
            if stream.left_since:  # else it has been taken up again, or forgotten
                self._publisher.say(stream, self._build(stream, status.state, status.reason))
                if times > 1:
                    self._left[stream] = status, times - 1

    def _tell_topic(self, feed: Feed, stream: Stream) -> None:
        """The channel's state; but of trades of many instruments each has its own end."""
        condition = feed.condition
        if isinstance(feed, TradeFeed):
            if not feed.channel.instrument and self._is_over(feed, stream):
                condition = OVER
            if condition == OVER and not stream.is_over and (gap := feed.take_last(stream, self._client.read_clock())):
                self._publisher.say(stream, gap)
        self._say(stream, *condition)

    def _is_over(self, feed: TradeFeed, stream: Stream) -> bool:
        """Whether nothing comes any more of an instrument: it has ended, nothing is on its way, nothing to be fetched.

        It stays so whatever the channel loses later.
        """
        if not stream.has_expired(self.heard_until - LAST_DATA):
            return False
        return stream.is_over or not feed.awaits_healing(stream)

    def _say(self, stream: Stream, state: str, reason: str) -> None:
        stream.status = self._build(stream, state, reason)
        self._publisher.say(stream, stream.status)

    def _build(self, stream: Stream, state: str, reason: str) -> Status:
        now = self._client.read_clock()
        return Status(EXCHANGE, stream.instrument, stream.epoch, 0, 0, now, state, reason, self._name)


def _is_due(stream: Stream, part: int) -> bool:
    """Whether a topic's status is said again in this part of REPEAT."""
    return hash(stream.topic) % REPEAT == part
