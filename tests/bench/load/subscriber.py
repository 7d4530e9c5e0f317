"""The subscribers: each a process with one SUB socket and a blocking receive.

`follow` counts, checks each topic's sequence and takes the latency; `join` comes late and asks for many topics at once.
"""

import re
import time
from array import array
from collections import Counter
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import zmq

from tests.bench.load.tape import DEEP_SIZE, LAST_CHANNEL, LAST_SIZE, MARK
from tests.bench.place import pin

FIRST_TOPIC = b"deribit.book.BTC-PERPETUAL."
"""Its snapshots are reported as they come: with them the data begins, or begins again."""

LAST_TOPIC = b"deribit.%s.raw" % LAST_CHANNEL.encode()
DATA = frozenset({"book", "trade", "ticker", "quote"})
HEARTBEAT = b"deribit.heartbeat."
JOINED = b"\xa4join\xc3"
"""`join: true` in MessagePack."""


class Message(msgspec.Struct, gc=False):
    """What is looked at in a message of the collector."""

    type: str
    epoch: int = 0
    seq: int = 0
    exchange_ts: int = 0
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
    """What one subscriber has seen: messages by type, how many its topics' sequences lack, latencies in ns."""

    def __init__(self, socket: zmq.Socket[bytes], pipe: Connection) -> None:
        self.socket = socket
        self.pipe = pipe
        self.counts: Counter[str] = Counter()
        self.missed = 0
        self.latencies = array("q")

    def follow_messages(self, slices: float) -> None:
        """Follow two-frame MessagePack messages until the last; report each so many seconds, unless 0."""
        receive, decode = self.socket.recv, msgspec.msgpack.Decoder(Message).decode
        sequence: dict[bytes, int] = {}
        topic, kind = b"", ""
        length = int(slices * 1e9)
        due = time.monotonic_ns() + length
        while topic != LAST_TOPIC or kind != "quote":
            topic, payload = receive(), receive()
            now = time.monotonic_ns()
            if length and now >= due:
                due = now + length
                self.report("slice", now)
            if len(payload) >= DEEP_SIZE:  # decoding it would hold up this process, and look like the worker's doing
                self.counts["deep"] += 1
                continue
            message = decode(payload)
            kind = message.type
            if message.kind == "snapshot" and topic.startswith(FIRST_TOPIC):
                self.pipe.send(("first", {"time": now}))
            if message.join:
                self.counts["join"] += 1
                continue
            self.missed += abs(message.seq - 1 - sequence.get(topic, message.seq - 1))  # one too many is no better
            sequence[topic] = message.seq
            self.counts[kind] += 1
            if kind in DATA:
                mark = message.read_mark()
                if mark > MARK:
                    self.latencies.append(now + MARK - int(mark))

    def follow_market(self, slices: float) -> None:
        """Follow many workers of a practice exchange, for ever; a latency is the age of a quote, which is sent at once.

        The market moves each 20 ms, so half of that is no delay.
        """
        decode, length = msgspec.msgpack.Decoder(Message).decode, int(slices * 1e9)
        sequence: dict[tuple[bytes, int], int] = {}
        due = time.monotonic_ns() + length
        while True:
            topic, payload = self.socket.recv_multipart()
            message = decode(payload)
            if time.monotonic_ns() >= due:
                due += length
                self.report("slice", time.monotonic_ns())
            if message.join:
                continue
            key = topic, message.epoch
            self.missed += abs(message.seq - 1 - sequence.get(key, message.seq - 1))
            sequence[key] = message.seq
            self.counts[message.type] += 1
            if message.type == "quote":
                self.latencies.append(time.time_ns() - message.exchange_ts)

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

    def report(self, event: str, now: int) -> None:
        """Tell what has come so far; the latencies since the report before, which are then forgotten."""
        facts = {"time": now, "counts": dict(self.counts), "missed": self.missed, "latencies": self.latencies.tobytes()}
        self.pipe.send((event, facts))
        del self.latencies[:]


def open_socket(endpoints: list[str], *prefixes: bytes) -> zmq.Socket[bytes]:
    """A SUB socket that keeps all that comes, and is soon back."""
    socket = zmq.Context().socket(zmq.SUB)
    socket.rcvhwm = 0
    socket.sndhwm = 0  # upstream go the subscriptions: ZeroMQ drops what is more than 1,000 of them at once
    socket.reconnect_ivl = 5
    socket.reconnect_ivl_max = 20
    for prefix in prefixes:
        socket.subscribe(prefix)
    for endpoint in endpoints:
        socket.connect(endpoint)
    return socket


def connect(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Connect and wait until that is done: to a publisher that begins before, none of its messages would come."""
    monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    socket.connect(endpoint)
    monitor.recv_multipart()
    socket.disable_monitor()


def follow(pipe: Connection, endpoint: str, raw: bool, slices: float, cpu: int | None) -> None:
    """Entry of the process: follow one load, then tell what came."""
    pin(cpu)
    socket = open_socket([], b"")
    connect(socket, endpoint)
    pipe.send(("connected", {}))
    subscriber = Subscriber(socket, pipe)
    if raw:
        subscriber.follow_frames()
    else:
        subscriber.follow_messages(slices)
    subscriber.report("last", time.monotonic_ns())


def watch(pipe: Connection, endpoints: list[str], slices: float) -> None:
    """Entry of the process: follow many workers until it is ended."""
    Subscriber(open_socket(endpoints, b""), pipe).follow_market(slices)


def join(pipe: Connection, endpoint: str, cpu: int | None) -> None:
    """Entry of a late subscriber: once it is connected, subscribe to all topics that it is told, as fast as it can."""
    pin(cpu)
    socket = open_socket([endpoint], HEARTBEAT)
    socket.recv_multipart()
    pipe.send(("connected", {}))
    _, arguments = pipe.recv()
    topics: set[bytes] = set(arguments["topics"])
    began = time.monotonic_ns()
    for topic in topics:
        socket.subscribe(topic)
    asked = time.monotonic_ns()
    answered: set[bytes] = set()
    facts: dict[str, Any] = {"asking_ms": (asked - began) / 1e6}
    while True:  # to the end of the process: a subscriber that has joined stays
        topic, payload = socket.recv_multipart()
        if topic in topics and topic not in answered and JOINED in payload:
            answered.add(topic)
            if len(answered) == len(topics):
                pipe.send(("answered", facts | {"answered_ms": (time.monotonic_ns() - began) / 1e6}))
