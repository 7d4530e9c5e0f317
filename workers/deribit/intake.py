"""The way of each frame: what is read becomes messages here. What each step costs: docs/performance.md."""

import logging
import re
import time
from collections.abc import Callable

from workers.deribit.channels import Channels
from workers.deribit.connection.session import Session
from workers.deribit.feeds.feed import Feed
from workers.deribit.publishing.payloads import Book
from workers.deribit.publishing.publisher import Publisher
from workers.deribit.publishing.streams import Published
from workers.deribit.rpc.codec import START, Data, decode_frame
from workers.deribit.watching.lag import Samples
from workers.deribit.watching.patrol import Patrol

log = logging.getLogger("deribit")

_CHANNEL = re.compile(rb'"channel"\s*:\s*"([^"\\]{1,200})"')
"""The channels that a frame names which is no JSON: Deribit's own spelling but for spaces."""

LOG_ALL, LOG_EVERY = 10, 60.0
"""Malformed frames that are all logged; of further ones one in so many seconds is."""

FIRST_VALUES = 1.0
"""Seconds in which what a channel says first may come, once the exchange has confirmed it; what is no older counts."""

SAMPLE_EVERY = 20_000_000
"""Time between samples of latency and lag, in ns."""

FIRST_PART, GROWTH = 32, 3
"""Frames of a burst that are sent first, and how many times as many each later part has (measured; see cut_burst)."""


def cut_burst(frames: list[bytes]) -> list[list[bytes]]:
    """The frames of one read in parts that are sent one after the other, each longer than the one before.

    The first of a burst need not wait for the last; where more has come than can be kept up with, sends are few.
    """
    parts, length = [], FIRST_PART
    while len(frames) > length:
        parts.append(frames[:length])
        frames = frames[length:]
        length *= GROWTH
    parts.append(frames)
    return parts


class Intake:
    """Takes the frames of one connection. `attend(feed)` is called where a feed says that more is to be done.

    `first_until` is the (monotonic) time until which what comes may be the first of its channel, of whatever age.
    """

    malformed = 0
    _log_at = 0.0
    unknown = 0
    first_until = 0.0

    def __init__(
        self,
        channels: Channels,
        publisher: Publisher,
        patrol: Patrol,
        session: Session,
        attend: Callable[[Feed], None],
    ) -> None:
        self.latency = Samples()
        self._channels = channels
        self._publisher = publisher
        self._patrol = patrol
        self._session = session
        self._attend = attend
        self._sampled = 0
        self._newest: Published = []

    def take_frames(self, frames: list[bytes], receive_ts: int) -> None:
        """Take the frames of one read, and a sample of what they say of latency and lag: no more often than needed."""
        for part in cut_burst(frames):
            self._take_part(part, receive_ts)
        if abs(receive_ts - self._sampled) > SAMPLE_EVERY:  # the clock may have been set back
            self._sample(receive_ts)

    def _take_part(self, frames: list[bytes], receive_ts: int) -> None:
        """The path of each message: find the feed by the channel in the bytes, normalise, publish.

        `partition`, since of bytes it is cheaper than `find` with a start (measured).
        """
        find_feed, publish = self._channels.feeds.get, self._publisher.publish
        self._publisher.is_gathering = True
        newest: Published = []
        for frame in frames:
            feed = find_feed(frame[START:].partition(b'"')[0]) or self._find_feed(frame)
            if feed is None:
                continue
            try:
                published = feed.take(frame, receive_ts)
            except ValueError as error:
                self._note_malformed(frame, f"{feed.channel.name}: {error}")
                feed.skip(frame, receive_ts)
            else:
                if published:
                    publish(published, receive_ts)
                    newest, feed.last_ts = published, receive_ts
            if feed.changed:
                self._attend(feed)
        self._publisher.flush()
        if newest:
            self._newest, self._patrol.last_ts = newest, receive_ts

    def _find_feed(self, frame: bytes) -> Feed | None:
        """The feed of a frame with its keys in another order, or its channel in other letters.

        None, counted, for a channel that nobody asked for.
        """
        try:
            found = decode_frame(frame)
        except ValueError as error:
            self.take_malformed(frame, str(error))
            return None
        feed = self._channels.find_feed(found.channel) if isinstance(found, Data) else None
        if feed is None:
            self.unknown += 1
            log.debug("data of a channel that was not asked for: %.200r", frame)
        return feed

    def take_malformed(self, frame: bytes, reason: str) -> None:
        """Count a frame that is not what it should be. It may have held data of the channels that it names."""
        self._note_malformed(frame, reason)
        with self._publisher.gather():
            for feed in filter(None, map(self._channels.feeds.get, set(_CHANNEL.findall(frame)))):
                feed.skip(frame, time.time_ns())
                if feed.changed:
                    self._attend(feed)

    def _note_malformed(self, frame: bytes, reason: str) -> None:
        """Count and log it; the log is kept short when many come."""
        self.malformed += 1
        now = time.monotonic()
        if self.malformed <= LOG_ALL or now >= self._log_at:
            self._log_at = now + LOG_EVERY
            log.warning("malformed frame %d: %.300s: %.120r", self.malformed, reason, frame)

    def _sample(self, receive_ts: int) -> None:
        self._sampled = receive_ts
        self.latency.add(time.time_ns() - receive_ts)
        if self._newest:
            message = self._newest[-1][1]
            exchange_ts = message["exchange_ts"] if isinstance(message, dict) else message.exchange_ts
            lag = receive_ts + self._session.clock_offset - exchange_ts
            # What was asked for bears the time of its last change, which may be any.
            is_old = lag > FIRST_VALUES * 1e9 and time.monotonic() < self.first_until
            is_old |= isinstance(message, Book) and message.reason in ("subscribe", "resync")
            # On `other` it may mean anything: so do prices of an index's sources, some of which are quiet for hours.
            is_old |= isinstance(message, dict) and message["type"] == "other"
            if exchange_ts and not is_old:
                self._patrol.take_lag(lag)
            self._newest = []
