"""The channels of one connection and their feeds: taken over from an earlier life, taken up, given up."""

from typing import Any

from collector.channels import Channel, parse_channel, share_topic
from workers.deribit.connection.subscriptions import EXPIRED, OWN, Subscriptions, is_same
from workers.deribit.feeds.feed import Feed
from workers.deribit.feeds.listings import ListingFeed
from workers.deribit.feeds.normalise import EventFeed, create_feed
from workers.deribit.feeds.trades.feed import TradeFeed
from workers.deribit.healing.heal import Healer
from workers.deribit.publishing.streams import Topics
from workers.deribit.watching.statuses import OVER, UNSUBSCRIBED, Statuses


class Channels:
    """`feeds` are found by the name of their channel, in bytes as it stands in frames.

    `events` is what listings and channels have to tell the supervisor (see take_events).
    """

    def __init__(self, subscriptions: Subscriptions, topics: Topics, statuses: Statuses, healer: Healer) -> None:
        self.feeds: dict[bytes, Feed] = {}
        self.events: list[dict[str, Any]] = []
        self._subscriptions = subscriptions
        self._topics = topics
        self._statuses = statuses
        self._healer = healer

    def find_feed(self, name: str) -> Feed | None:
        """The feed of a channel by the name that the exchange gives it."""
        feed = self.feeds.get(name.encode())
        if feed is None and name.startswith(OWN):
            return next((feed for feed in self.feeds.values() if is_same(feed.channel.name, name)), None)
        return feed

    def take_events(self) -> list[dict[str, Any]]:
        """The events since the last call."""
        events, self.events[:] = self.events[:], []
        return events

    # -- taken over, taken up -----------------------------------------------------------------------------------------

    def add(self, names: list[str], is_asked: bool = True) -> list[Feed]:
        """Ask for these channels; those that are new get a feed, which is returned. Raises ValueError for no channel.

        Without `is_asked` nobody but the supervisor wants to hear what they tell of instruments.
        """
        added: dict[bytes, Feed] = {}
        for name in names:
            if (key := name.encode()) in self.feeds:
                continue
            channel = parse_channel(name)
            if channel.type == "instrument":
                again = self._subscriptions.note_listed
                added[key] = ListingFeed(channel, self._topics, self.events, again, is_asked)
            else:
                added[key] = create_feed(channel, self._topics)
        self._subscriptions.ask(names)
        self.feeds.update(added)
        return list(added.values())

    def take_over(self) -> None:
        """Go on from what an earlier life had said: on each of its topics a gap is due."""
        recalled = self._topics.recall()
        for feed in self.feeds.values():
            feed.adopt(recalled)
            if isinstance(feed, TradeFeed):
                feed.losses.recall()
            feed.lose("restart", self._topics.epoch)
        held = {stream for feed in self.feeds.values() for stream in feed.streams.values()}
        for stream, epoch in recalled.items():
            if stream not in held:  # given up while no worker was there to say so
                self._topics.go_back(stream, epoch)
                self._statuses.end(stream)
                self._statuses.leave(stream)

    def take_up(self, names: list[str], epoch: int) -> None:
        """Somebody asks for these. Raises ValueError for text that is no channel.

        Where a topic was said to be `closed` or `expired`, that it is asked for must be said before its next data.
        """
        channels = [parse_channel(name) for name in names]
        over = [name for name in names if self._subscriptions.refused.get(name) == EXPIRED]
        self._subscriptions.drop(over)
        self.leave(over, OVER)
        self._give_up_leaving(channels)
        self._topics.begin_epoch(epoch)
        for feed in self.add(names):
            feed.adopt(self._topics.match(b""))
            self._statuses.tell_first(feed)
        for name in names:
            if isinstance(feed := self.feeds[name.encode()], ListingFeed):
                feed.is_asked = True

    # -- given up -----------------------------------------------------------------------------------------------------

    def leave(self, names: list[str], condition: tuple[str, str]) -> None:
        """Nobody asks for these any more, but for those that somebody wants again by now."""
        for name in names:
            if name not in self._subscriptions.asked:
                self._give_up(name, condition)

    def _give_up_leaving(self, taken_up: list[Channel]) -> None:
        """What shares a topic with these, and whose unsubscribe is under way still, ends here."""
        single = {(one.type, one.instrument, one.interval) for one in taken_up if one.instrument}
        wide, asked = [one for one in taken_up if not one.instrument], self._subscriptions.asked
        leaving = [feed.channel for feed in self.feeds.values() if feed.channel.name not in asked]
        for one in leaving:  # there may be thousands, and this is done for each slice of those that are taken up
            others = wide if one.instrument else taken_up
            if (one.type, one.instrument, one.interval) in single or any(share_topic(one, other) for other in others):
                self._give_up(one.name, UNSUBSCRIBED)

    def _give_up(self, name: str, condition: tuple[str, str]) -> None:
        if (feed := self.feeds.pop(name.encode(), None)) is None:
            return
        self._leave_shared(feed)
        self.say_last(feed, condition)
        for stream in feed.streams.values():
            self._statuses.leave(stream, is_over=condition == OVER)
        if isinstance(feed, TradeFeed):
            self._topics.ledger.free_slot(name)  # it has a place of its own

    def _leave_shared(self, feed: Feed) -> None:
        """Topics that another channel of this connection feeds as well go on (see collector.config.clashes)."""
        if isinstance(feed, EventFeed):
            fed = {stream for other in self.feeds.values() for stream in other.streams.values()}
            feed.streams = {key: stream for key, stream in feed.streams.items() if stream not in fed}

    def say_last(self, feed: Feed, condition: tuple[str, str]) -> None:
        """Nothing will come of this channel any more: what was to be healed stays missing."""
        if isinstance(feed, TradeFeed):
            self._healer.end(feed)
        self._statuses.tell(feed, *condition)
