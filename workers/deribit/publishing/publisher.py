"""The PUB side: numbers each topic's messages, encodes them, and hands them to ZeroMQ.

The socket is an XPUB (on the wire the same as PUB), so that new subscriptions can be seen and answered.
"""

import os
import socket
from typing import Any

import msgspec
import zmq

from workers.deribit.publishing.ledger import Ledger
from workers.deribit.publishing.payloads import Gap, Payload, Trade
from workers.deribit.publishing.streams import Message, Published, Stream

LINGER_MS = 1000
"""What subscribers have not yet taken is kept this long when the worker stops."""

MAX_HELD = 100_000
"""Frames that may wait for the subscribers of an earlier life."""

MAX_WAITING = 2_000
"""Frames that may wait for the end of a burst."""

SEND_BUFFER = 4 << 20
"""Bytes that the system may take ahead of a subscriber; with its default, ZeroMQ's thread has to come back for each
200 KB (ipc), and falls behind where it shares a core with this loop. The system's own limit holds as well."""

MANY = 128
"""Frames sent at once after which ZeroMQ's thread is let onto the core before more are made."""

MORE, LAST = int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.NOBLOCK)


class Publisher:
    """One bound XPUB socket. `published` counts messages of this epoch.

    While `is_gathering` is set, messages wait for `flush`: sent one by one, each would wake ZeroMQ's thread anew
    (measured at full speed: 13.9 against 8.2 us of CPU a message). `is_holding` is set while they wait for the
    subscribers of an earlier life to come back.
    """

    def __init__(self, endpoint: str, queue: int, ledger: Ledger) -> None:
        self.endpoint = endpoint
        self.published = 0
        self.subscriptions = 0
        self._ledger = ledger
        self._expected = ledger.subscriptions
        self._waiting: list[bytes] = []
        self._unsaid: dict[Stream, int] = {}
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
        """Send data, each message after the gap that is due before it. Raises ValueError for what cannot be encoded."""
        cells = self._ledger.cells
        for stream, message in published:
            if stream.lost and not isinstance(message, Gap):
                gap = stream.resume(message, receive_ts)
                if gap is not None:
                    self.say(stream, gap)
            try:
                self.say(stream, message)
            except ValueError:
                stream.current = None  # what cannot be said cannot be repeated
                raise
            stream.last_ts = receive_ts
            if self.is_holding:  # not out yet: a later life must not take it as said
                self._unsaid[stream] = receive_ts
                continue
            slot = stream.slot
            cells[slot] = receive_ts
            if message.__class__ is Trade:  # its own number: the frame may hold more that are not out yet
                cells[slot + 1] = max(cells[slot + 1], message.trade_seq)
            else:
                cells[slot + 1] = stream.last_id

    def say(self, stream: Stream, message: Message) -> None:
        """Send one message as the next of its topic. Raises ValueError for what cannot be encoded."""
        seq = stream.seq + 1
        if type(message) is dict:
            message["seq"] = seq
        else:
            message.seq = seq  # type: ignore[union-attr]
        try:
            payload = self._encode(message)
        except (TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"cannot be encoded: {error}") from None
        stream.seq = seq
        self.published += 1
        self._put(stream.topic, payload)

    def repeat(self, stream: Stream, message: Payload | dict[str, Any]) -> None:
        """Send a join answer: it carries the last seq used and does not count."""
        body = msgspec.to_builtins(message) if isinstance(message, Payload) else dict(message)
        body["seq"] = stream.seq
        body["join"] = True
        self._put(stream.topic, self._encode(body))

    def _put(self, topic: bytes, payload: bytes) -> None:
        self._waiting.append(topic)
        self._waiting.append(payload)
        if not self.is_gathering or len(self._waiting) >= MAX_WAITING:
            self._send_waiting()

    def flush(self) -> None:
        """The burst is over: send what it gave."""
        self.is_gathering = False
        self._send_waiting()

    def _send_waiting(self) -> None:
        waiting, send = self._waiting, self._send
        if self.is_holding and len(waiting) < MAX_HELD:
            return
        self.is_holding = False
        for stream, receive_ts in self._unsaid.items():
            self._ledger.cells[stream.slot], self._ledger.cells[stream.slot + 1] = receive_ts, stream.last_id
        self._unsaid.clear()
        frames = iter(waiting)
        for topic, payload in zip(frames, frames, strict=True):
            send(topic, MORE, True, False)
            send(payload, LAST, True, False)
        count = len(waiting)
        waiting.clear()
        if count > MANY:
            os.sched_yield()

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
    raise OSError(98, os.strerror(98), endpoint)
