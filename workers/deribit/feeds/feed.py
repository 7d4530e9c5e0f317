"""What every channel's feed is: frames go in, wire messages come out. No I/O, no clock; times are arguments."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

from collector.channels import Channel, share_topic
from collector.limits import Credits
from workers.deribit.feeds.rhythm import Rhythm, is_never_quiet
from workers.deribit.publishing.streams import Published, Stream, Topics


class Feed(ABC):
    """One channel: takes its frames, gives messages.

    - `is_complete` is false while the channel waits for its first full state; `changed` is set when that changes.
    - `is_ended` is set when nobody asks for the channel any more.
    - `condition` is the (state, reason) last said on its topics.
    - `last_ts` is when data came last (ns).
    - `waiting_since` is when a wait for its snapshot began last (s, monotonic): the exchange gave the channel, or was
      asked for it anew; `allowance` is how often it still may be (None: it never was), `is_rationed` is set once that
      has been used up.
    - `dropped` and `duplicates` count oddities.
    """

    is_complete = True
    is_ended = False
    is_rationed = False
    dropped = 0
    duplicates = 0

    def __init__(self, channel: Channel, topics: Topics) -> None:
        self.channel = channel
        self.changed = False
        self.topics = topics
        self.condition = ("recovering", "subscribe")
        self.rhythm = Rhythm(is_never_quiet(channel))
        self.last_ts = 0
        self.waiting_since = 0.0
        self.allowance: Credits | None = None
        self.streams: dict[str, Stream] = {}
        if channel.instrument:
            self.stream = self.find_stream(channel.instrument)

    def find_stream(self, instrument: str) -> Stream:
        """The stream of one instrument on this channel, made at need. Raises Malformed for a bad name."""
        stream = self.streams.get(instrument)
        if stream is None:
            stream = self.topics.find(self.channel.type, instrument, self.channel.interval)
            self.streams[instrument] = stream
        return stream

    def adopt(self, streams: Iterable[Stream]) -> None:
        """Take on those streams, of an earlier life or left since, that are this channel's. One of one has its own."""
        channel = self.channel
        if channel.instrument:
            return
        for stream in streams:
            if stream.type != channel.type or stream.interval != channel.interval:
                continue
            if share_topic(channel, Channel("", stream.type, stream.instrument, stream.interval)):
                self.find_stream(stream.instrument)

    def forget(self, stream: Stream) -> None:
        """Its instrument expired long ago: whoever speaks of it once more begins a new one."""
        del self.streams[stream.instrument]

    @abstractmethod
    def take(self, frame: bytes, receive_ts: int) -> Published:
        """What a frame of this channel says. Raises Malformed if it is not one."""

    def skip(self, frame: bytes, now: int) -> None:
        """A frame could not be read: announced."""
        for stream in self.streams.values():
            stream.lose("sequence", self.topics, now)

    def lose(self, reason: str, now: int) -> None:
        """All that was on its way has been lost (`now` in ns)."""
        for stream in self.streams.values():
            stream.lose(reason, self.topics, now)
