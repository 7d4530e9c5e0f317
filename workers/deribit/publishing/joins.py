"""Answers late subscribers in the stream: who subscribes gets a topic's last gap, its status and its full value."""

import asyncio
import time
from itertools import islice

from workers.deribit.publishing.publisher import Publisher
from workers.deribit.publishing.streams import Stream, Topics

GATHER = 0.005
"""Seconds in which joins are gathered to share one answer."""

SLICE_EVERY, SLICE_TOPICS, SLICE_TIME = 0.010, 200, 0.0025
"""Seconds from one slice of answers to the next, and what one slice may hold: topics, and seconds of looking for those
that a prefix means, and as many of answering: neither must wait for the end of the other."""

TOGETHER = 20
"""Topics whose answers go out by one call of the system for each subscriber."""

ONCE_IN = 0.250
"""Seconds in which a topic is answered at most once."""

HOLD = 0.5
"""Seconds that the first messages wait for the subscribers of an earlier life."""

MAX_WAITING = 1000
"""Prefixes that wait to be matched; one more, and all topics are answered instead."""


class Joins:
    """The subscriptions that wait for an answer. Bounded by the topics that there are."""

    def __init__(self, publisher: Publisher, topics: Topics) -> None:
        self._publisher = publisher
        self._topics = topics
        self._prefixes: dict[bytes, None] = {}
        self._waiting: dict[Stream, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._hold: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """See each subscription from now on."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._publisher.fileno(), self.notice)
        self._hold = loop.call_later(HOLD, self._publisher.release)

    def end(self) -> None:
        """Answer no more."""
        asyncio.get_running_loop().remove_reader(self._publisher.fileno())
        for timer in (self._hold, self._timer):
            if timer is not None:
                timer.cancel()

    def notice(self) -> None:
        """Take in new subscriptions and see to it that they are answered soon."""
        self._prefixes.update(dict.fromkeys(self._publisher.take_subscriptions()))
        if len(self._prefixes) > MAX_WAITING:
            self._prefixes = {b"": None}
        if self._prefixes and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHER, self._answer)

    def _answer(self) -> None:
        """Answer one slice; come back for the rest."""
        self._timer = None
        self._match()
        self._repeat_all()
        if self._prefixes or self._waiting:
            self._timer = asyncio.get_running_loop().call_later(SLICE_EVERY, self._answer)

    def _match(self) -> None:
        """Find the topics that some of the prefixes mean."""
        end = time.monotonic() + SLICE_TIME
        while self._prefixes and time.monotonic() < end:
            prefix = next(iter(self._prefixes))
            del self._prefixes[prefix]
            self._waiting.update(dict.fromkeys(self._topics.match(prefix)))

    def _repeat_all(self) -> None:
        """Answer some of the topics that wait for it. To send takes time too, with each subscriber more."""
        end = time.monotonic() + SLICE_TIME
        streams = list(islice(self._waiting, SLICE_TOPICS))
        for start in range(0, len(streams), TOGETHER):
            with self._publisher.gather():
                for stream in streams[start : start + TOGETHER]:
                    if time.monotonic() > end:
                        return
                    self._repeat_once(stream)

    def _repeat_once(self, stream: Stream) -> None:
        """Answer a topic, unless it was answered just now: then it waits on."""
        now = time.monotonic()
        if now - stream.answered < ONCE_IN:
            return
        del self._waiting[stream]
        stream.answered = now
        for message in (stream.gap, stream.status, stream.describe()):
            if message is not None:
                self._publisher.repeat(stream, message)
