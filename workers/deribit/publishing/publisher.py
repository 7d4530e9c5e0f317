"""The PUB side: numbers each topic's messages, encodes them, and hands them to the socket.

The socket is what ZeroMQ calls an XPUB (on the wire the same as PUB): new subscriptions can be seen and answered.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from msgspec import UNSET

from workers.deribit.publishing.ledger import LAST_ID, LAST_TS, SUBSCRIPTIONS, Ledger
from workers.deribit.publishing.payloads import Book, ConnectionHeartbeat, Gap, Payload, Repair, Status, Trade
from workers.deribit.publishing.pub import PubSocket
from workers.deribit.publishing.streams import Message, Published, Stream

LINGER = 1.0
"""Seconds: what subscribers have not yet taken is kept this long when the worker stops."""

MAX_HELD = 50_000
"""Messages that may wait for the subscribers of an earlier life."""

NO_DATA = frozenset({Gap, Repair, Status, ConnectionHeartbeat})
"""Payloads from which a later life need not go on."""


class Publisher:
    """One bound socket. `published` counts messages of this life.

    While `is_gathering` is set, messages wait for `flush`: what was gathered goes out by one call of the system for
    each subscriber. `is_holding` is set while they wait for the subscribers of an earlier life to come back.
    Each takes its number as it goes out.
    """

    def __init__(self, endpoint: str, queue: int, ledger: Ledger) -> None:
        self.endpoint = endpoint
        self.published = 0
        self._ledger = ledger
        self._expected = ledger.cells[SUBSCRIPTIONS]
        self._waiting: Published = []
        self._socket = PubSocket(queue)
        self.is_holding = self._expected > 0
        self.is_gathering = False
        self._encode = msgspec.msgpack.Encoder().encode

    def bind(self) -> str:
        """Bind; return the endpoint really bound. Raises OSError if it is taken."""
        self.endpoint = self._socket.bind(self.endpoint)
        return self.endpoint

    def restore(self) -> None:
        """Make anew what somebody has removed of the files: the endpoint's and the ledger's. Raises OSError."""
        try:
            self._socket.restore()
        finally:
            self._ledger.restore()

    def fileno(self) -> int:
        """Can be read when there is something to do for `take_subscriptions`."""
        return self._socket.fileno()

    def publish(self, published: Published, receive_ts: int, is_fetched: bool = False) -> None:
        """Send data, each message after the gap that is due before it.

        What `is_fetched` does not count as the last data: the next loss began when the stream itself last spoke.
        """
        waiting = self._waiting
        for said in published:
            stream, message = said
            if stream.lost and message.__class__ is not Gap:
                gap = stream.resume(message, receive_ts)
                if gap is not None:
                    waiting.append((stream, gap))
            if not stream.last_ts:
                stream.last_ts = receive_ts
                self._note_first(stream, message, receive_ts)
            elif not is_fetched:
                stream.last_ts = receive_ts
            waiting.append(said)
        if not self.is_gathering:
            self.flush()

    def say(self, stream: Stream, message: Message) -> None:
        """Send one message as the next of its topic."""
        self._waiting.append((stream, message))
        if not self.is_gathering:
            self.flush()

    def repeat(self, stream: Stream, message: Message) -> None:
        """Send a join answer: it carries the last seq used and does not count."""
        body = msgspec.to_builtins(message) if isinstance(message, Payload) else message
        self.say(stream, body | {"join": True})

    @contextmanager
    def gather(self) -> Iterator[None]:
        """What is said meanwhile goes out together at the end."""
        is_first, self.is_gathering = not self.is_gathering, True
        try:
            yield
        finally:
            if is_first:
                self.flush()

    def flush(self) -> None:
        """Send what has been gathered: the end of each message's path, and much of its cost."""
        self.is_gathering = False
        waiting = self._waiting
        if not waiting or (self.is_holding and len(waiting) < MAX_HELD):
            return
        self.is_holding = False
        self._waiting = []  # whatever happens, nothing is sent twice
        encode = self._encode
        messages: list[tuple[Stream, bytes]] = []
        joins = 0
        for stream, message in waiting:
            if message.__class__ is not dict:
                stream.seq = message.seq = stream.seq + 1  # type: ignore[union-attr]
            elif "join" in message:  # it takes no number, and does not count
                message["seq"], joins = stream.seq, joins + 1
            else:
                message["seq"] = stream.seq = stream.seq + 1
            messages.append((stream, encode(message)))
        self._socket.send(messages)
        self._note_all(waiting)
        self.published += len(messages) - joins

    def _note_first(self, stream: Stream, message: Message, receive_ts: int) -> None:
        """Note the first data of a topic before they go out: were this killed in between, a later life would know
        nothing of the topic, and tell no gap on it.
        """
        self._ledger.cells[stream.slot + LAST_TS] = receive_ts
        if isinstance(message, Trade):
            self._ledger.cells[stream.slot + LAST_ID] = message.trade_seq

    def _note_all(self, waiting: list[tuple[Stream, Any]]) -> None:
        """Note in the ledger what is out: a later life goes on from there, and what is not noted it says again.

        `cells[slot]` is LAST_TS, which is 0: on the path of every message.
        """
        cells = self._ledger.cells
        for stream, message in waiting:
            kind, slot = message.__class__, stream.slot
            if kind is Book:  # as most are
                cells[slot] = message.receive_ts
                cells[slot + LAST_ID] = message.change_id
            elif kind is dict:
                if "join" not in message:
                    cells[slot] = message["receive_ts"]
            elif kind is Trade:
                if message.backfilled is UNSET:  # what was lost may lie before one that came late
                    cells[slot] = message.receive_ts
                if cells[slot + LAST_ID] < message.trade_seq:
                    cells[slot + LAST_ID] = message.trade_seq
            elif kind not in NO_DATA:
                cells[slot] = message.receive_ts
            elif kind is Gap and stream.type == "trade" and message.missing_from is UNSET:
                cells[slot + LAST_ID] = 0  # the exchange may count from a lower number now

    def take_subscriptions(self) -> list[bytes]:
        """The prefixes that were subscribed to since the last call; those that are behind get more."""
        prefixes = [wish.prefix for wish in self._socket.poll() if wish.is_wanted]
        if self.is_holding:
            if self.subscriptions >= self._expected:
                self.release()
        else:
            self._ledger.cells[SUBSCRIPTIONS] = self.subscriptions
        return prefixes

    @property
    def subscriptions(self) -> int:
        """How many subscriptions there are now."""
        return self._socket.subscriptions

    @property
    def is_out(self) -> bool:
        """Whether all that was said has left this process."""
        return not self._waiting and self._socket.is_served

    def release(self) -> None:
        """Send what was held, and hold no more."""
        self.is_holding = False
        self.flush()

    def close(self) -> None:
        """Drain for LINGER at most, then close."""
        self.release()
        self._socket.close(LINGER)
