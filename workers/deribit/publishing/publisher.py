"""The PUB side: numbers each topic's messages, encodes them, and hands them to ZeroMQ.

The socket is an XPUB (on the wire the same as PUB), so that new subscriptions can be seen and answered.
"""

import errno
import os
import socket
from typing import Any

import msgspec
import zmq
from msgspec import UNSET

from workers.deribit.publishing.ledger import LAST_ID, Ledger
from workers.deribit.publishing.payloads import Book, ConnectionHeartbeat, Gap, Payload, Repair, Status, Trade
from workers.deribit.publishing.streams import Message, Published, Stream

LINGER_MS = 1000
"""What subscribers have not yet taken is kept this long when the worker stops."""

MAX_HELD = 50_000
"""Messages that may wait for the subscribers of an earlier life."""

SEND_BUFFER = 4 << 20
"""Bytes that the system may take ahead of a subscriber; with its default, ZeroMQ's thread has to come back for each
200 KB (ipc), and falls behind where it shares a core with this loop. The system's own limit holds as well."""

MANY = 64
"""Messages sent at once after which ZeroMQ's thread is let onto the core before more are made."""

MORE, LAST = int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.NOBLOCK)

NO_DATA = frozenset({Gap, Repair, Status, ConnectionHeartbeat})
"""Payloads that a later life has not to go on from."""


class Publisher:
    """One bound XPUB socket. `published` counts messages of this epoch.

    While `is_gathering` is set, messages wait for `flush`: sent one by one, each would wake ZeroMQ's thread anew
    (measured at full speed: 13.9 against 8.2 us of CPU a message). `is_holding` is set while they wait for the
    subscribers of an earlier life to come back. Each takes its number as it goes out.
    """

    def __init__(self, endpoint: str, queue: int, ledger: Ledger) -> None:
        self.endpoint = endpoint
        self.published = 0
        self.subscriptions = 0
        self._ledger = ledger
        self._expected = ledger.subscriptions
        self._waiting: Published = []
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.XPUB)
        self._socket.setsockopt(zmq.SNDHWM, queue)
        self._socket.setsockopt(zmq.SNDBUF, SEND_BUFFER)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.XPUB_VERBOSER, 1)  # also repeated ones, and each unsubscription
        self._socket.setsockopt(zmq.MAXMSGSIZE, 4096)  # upstream come subscriptions, nothing longer
        # The backend's own send: the wrapper's checks cost more than the send (measured: 3.5 against 1.9 us a pair).
        self._send = super(zmq.Socket, self._socket).send
        self.is_holding = self._expected > 0
        self.is_gathering = False
        self._encode = msgspec.msgpack.Encoder().encode

    def bind(self) -> str:
        """Bind; return the endpoint really bound. Raises OSError if it is taken."""
        if self.endpoint.startswith("ipc://"):
            claim_ipc(self.endpoint)
        self._socket.bind(self.endpoint)
        bound = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        self.endpoint = bound.rstrip(b"\0").decode()
        return self.endpoint

    def publish(self, published: Published, receive_ts: int) -> None:
        """Send data, each message after the gap that is due before it."""
        waiting = self._waiting
        for said in published:
            stream, message = said
            if stream.lost and message.__class__ is not Gap:
                gap = stream.resume(message, receive_ts)
                if gap is not None:
                    waiting.append((stream, gap))
            stream.last_ts = receive_ts
            waiting.append(said)
        if not self.is_gathering:
            self.flush()

    def say(self, stream: Stream, message: Message) -> None:
        """Send one message as the next of its topic."""
        self._waiting.append((stream, message))
        if not self.is_gathering:
            self.flush()

    def repeat(self, stream: Stream, message: Payload | dict[str, Any]) -> None:
        """Send a join answer: it carries the last seq used and does not count."""
        body = msgspec.to_builtins(message) if isinstance(message, Payload) else dict(message)
        self.say(stream, body | {"join": True})

    def flush(self) -> None:
        """Send what has been gathered: the end of each message's path, and much of its cost."""
        self.is_gathering = False
        waiting = self._waiting
        if not waiting or (self.is_holding and len(waiting) < MAX_HELD):
            return
        self.is_holding = False
        self._waiting = []  # whatever happens, nothing is sent twice
        encode, send = self._encode, self._send
        payloads: list[bytes] = []
        for stream, message in waiting:
            if message.__class__ is dict:
                self._count_map(stream, message)
            else:
                stream.seq = message.seq = stream.seq + 1  # type: ignore[union-attr]
            payloads.append(encode(message))
        # All at once: a send that finds ZeroMQ's thread asleep wakes it, and this thread may lose the core to it
        # (measured with the encoding between the sends: 8.2 against 7.3 us a message).
        for (stream, _), payload in zip(waiting, payloads, strict=True):
            send(stream.topic, MORE, True, False)
            send(payload, LAST, True, False)
        self._note_all(waiting)
        self.published += len(payloads)
        if len(payloads) > MANY:
            os.sched_yield()

    def _note_all(self, waiting: list[tuple[Stream, Any]]) -> None:
        """Note in the ledger what is out: a later life goes on from there, and what is not noted it says again."""
        cells = self._ledger.cells
        for stream, message in waiting:
            kind, slot = message.__class__, stream.slot
            if kind is dict:
                if "join" not in message:
                    cells[slot] = message["receive_ts"]
            elif kind not in NO_DATA:
                cells[slot] = message.receive_ts
                if kind is Book:
                    cells[slot + LAST_ID] = message.change_id
                elif kind is Trade and cells[slot + LAST_ID] < message.trade_seq:
                    cells[slot + LAST_ID] = message.trade_seq
            elif kind is Gap and stream.type == "trade" and message.missing_from is UNSET:
                cells[slot + LAST_ID] = 0  # the exchange may count from a lower number now

    def _count_map(self, stream: Stream, message: dict[str, Any]) -> None:
        if "join" in message:
            self.published -= 1
        else:
            stream.seq += 1
        message["seq"] = stream.seq

    def take_subscriptions(self) -> list[bytes]:
        """The prefixes that were subscribed to since the last call; anything else that came upstream is ignored."""
        prefixes = []
        while self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # type: ignore[arg-type, operator]
            frame = self._socket.recv(zmq.NOBLOCK)
            if frame[:1] == b"\x01":
                prefixes.append(frame[1:])
            self.subscriptions += {b"\x01": 1, b"\x00": -1}.get(frame[:1], 0)
        if self.is_holding:
            if self.subscriptions >= self._expected:
                self.release()
        else:
            self._ledger.subscriptions = max(0, self.subscriptions)
        return prefixes

    def release(self) -> None:
        """Send what was held, and hold no more."""
        self.is_holding = False
        self.flush()

    def close(self) -> None:
        """Drain for LINGER_MS at most, then close."""
        self.release()
        self._socket.close()
        self._context.term()


def claim_ipc(endpoint: str) -> None:
    """Make sure that nobody listens on an ipc endpoint: ZeroMQ would let a second bind succeed and steal it.

    Raises OSError (EADDRINUSE) if somebody does. A socket file that nobody listens on is left to ZeroMQ to replace.
    """
    path = endpoint.removeprefix("ipc://")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(f"\0{path[1:]}" if path.startswith("@") else path)
        except OSError:
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), endpoint)
