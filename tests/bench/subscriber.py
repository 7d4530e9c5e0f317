"""The subscriber: one process, one SUB socket, a blocking receive. Counts, checks the sequence, takes the latency."""

import re
import time
from array import array
from collections import Counter
from multiprocessing.connection import Connection

import msgspec
import zmq

from tests.bench.place import pin
from tests.bench.tape import LAST_CHANNEL, LAST_SIZE, MARK

FIRST_TOPIC = b"deribit.book.BTC-PERPETUAL.100ms"
"""Its snapshots are reported as they come: with them the data begins, or begins again."""

LAST_TOPIC = b"deribit.%s.raw" % LAST_CHANNEL.encode()
DATA = frozenset({"book", "trade", "ticker", "quote"})


class Message(msgspec.Struct, gc=False):
    """What is looked at in a message of the collector."""

    type: str
    seq: int = 0
    join: bool = False
    kind: str = ""
    amount: float = 0.0
    best_bid_amount: float | None = 0.0
    bids: list[tuple[float, float]] = []
    asks: list[tuple[float, float]] = []

    def read_mark(self) -> float:
        """The time of sending, as the tape wrote it."""
        if self.type == "book":
            return (self.bids or self.asks or [(0.0, 0.0)])[0][1]
        return self.amount if self.type == "trade" else self.best_bid_amount or 0.0


class Subscriber:
    """What one subscriber has seen: messages by type, jumps of a topic's sequence, latencies in ns."""

    def __init__(self, endpoint: str, pipe: Connection) -> None:
        self.socket = zmq.Context().socket(zmq.SUB)
        self.socket.rcvhwm = 0
        self.socket.reconnect_ivl = 5
        self.socket.reconnect_ivl_max = 20
        self.socket.subscribe(b"")
        self.socket.connect(endpoint)
        self.pipe = pipe
        self.counts: Counter[str] = Counter()
        self.jumps = 0
        self.latencies = array("q")

    def follow_messages(self) -> None:
        """Follow two-frame MessagePack messages until the last."""
        receive, decode = self.socket.recv, msgspec.msgpack.Decoder(Message).decode
        sequence: dict[bytes, int] = {}
        topic, kind = b"", ""
        while topic != LAST_TOPIC or kind != "quote":
            topic, payload = receive(), receive()
            now = time.monotonic_ns()
            message = decode(payload)
            kind = message.type
            if message.kind == "snapshot" and topic == FIRST_TOPIC:
                self.pipe.send(("first", {"time": now}))
            if message.join:
                self.counts["join"] += 1
                continue
            self.jumps += message.seq != sequence.get(topic, message.seq - 1) + 1
            sequence[topic] = message.seq
            self.counts[kind] += 1
            if kind in DATA:
                mark = message.read_mark()
                if mark > MARK:
                    self.latencies.append(now + MARK - int(mark))

    def follow_frames(self) -> None:
        """Follow the exchange's messages, passed on unchanged, until the last."""
        receive, search = self.socket.recv, re.compile(rb"[,:](\d{16})[,}\]]").search
        size = LAST_SIZE + 1
        while size > LAST_SIZE:
            payload = receive()
            now = time.monotonic_ns()
            size = len(payload)
            self.counts["frame"] += 1
            found = search(payload)
            if found and int(found[1]) > MARK:
                self.latencies.append(now + MARK - int(found[1]))


def follow(pipe: Connection, endpoint: str, raw: bool, cpu: int | None) -> None:
    """Entry of the process: follow one load, then tell what came."""
    pin(cpu)
    subscriber = Subscriber(endpoint, pipe)
    if raw:
        subscriber.follow_frames()
    else:
        subscriber.follow_messages()
    end = time.monotonic_ns()
    pipe.send(("last", {"time": end, "counts": dict(subscriber.counts), "jumps": subscriber.jumps}))
    pipe.send_bytes(subscriber.latencies.tobytes())
