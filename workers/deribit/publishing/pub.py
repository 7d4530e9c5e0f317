"""A PUB socket that sends from the loop's own thread, where ZeroMQ's would hand each message to a thread of its own.

The waking of that thread was what kept a worker from the cost of a mere relay (measured, see docs/performance.md: 55
against 50 us a message at 5,000/s, 5.2 against 4.5 at full speed), and its queue was out of sight: here it is known,
and said, when a subscriber is too slow. On the wire it is ZeroMQ's own XPUB (see zmtp), for this host only.
"""

import errno
import logging
import os
import selectors
import socket
import time
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import suppress

from collector.sockets import remove_socket
from workers.deribit.publishing.zmtp import GREETING, Conversation, Refused, Wish, encode_size

SEND_BUFFER = 4 << 20
"""Bytes that the system may take ahead of a subscriber, where it allows as many."""

STEP = 1 << 20
"""Bytes that are sent at once to a subscriber that is behind: the loop must not be held up."""

GREET_WITHIN = 30.0
"""Seconds for a peer to say what it is."""

MAX_PREFIXES = 100_000
"""Prefixes of one subscriber."""

MAX_ROUTES = 200_000
"""Topics of which it is kept in mind who wants them."""

log = logging.getLogger("deribit")


class Peer:
    """One subscriber. `unsent` is what the system has not yet taken of it, `marks` where its messages end in that."""

    __slots__ = (
        "batch",
        "conversation",
        "dropped",
        "lengths",
        "marks",
        "prefixes",
        "sent",
        "since",
        "socket",
        "unsent",
        "waiting",
    )

    def __init__(self, end: socket.socket, now: float) -> None:
        self.socket = end
        self.since = now
        self.conversation = Conversation()
        self.prefixes: set[bytes] = set()
        self.lengths: Counter[int] = Counter()
        self.batch: list[bytes] = []
        self.unsent = bytearray()
        self.marks: deque[tuple[int, int]] = deque()
        self.sent = 0
        self.waiting = 0
        self.dropped = 0

    def wants(self, topic: bytes) -> bool:
        """Whether it has subscribed to a prefix of this topic."""
        return any(topic[:length] in self.prefixes for length in self.lengths)

    def take_wish(self, wish: Wish) -> None:
        """A prefix is wanted or not: libzmq tells of each subscription to it, but of the last unsubscription only."""
        if (wish.prefix in self.prefixes) == wish.is_wanted:
            return
        if wish.is_wanted and len(self.prefixes) >= MAX_PREFIXES:
            raise Refused(f"it has subscribed to {MAX_PREFIXES} prefixes")
        length = len(wish.prefix)
        if wish.is_wanted:
            self.prefixes.add(wish.prefix)
            self.lengths[length] += 1
        else:
            self.prefixes.remove(wish.prefix)
            self.lengths[length] -= 1
            if not self.lengths[length]:
                del self.lengths[length]


class PubSocket:
    """Listens at one endpoint. `queue` messages may wait for one subscriber (0: any number); what is more it misses.

    Nothing here blocks, and nothing happens by itself: call `poll` when `fileno` can be read.
    """

    def __init__(self, queue: int, patience: float = GREET_WITHIN) -> None:
        self._queue = queue
        self._patience = patience
        self._peers: list[Peer] = []
        self._routes: dict[bytes, list[Peer]] = {}
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._endpoint = ""

    def bind(self, endpoint: str) -> str:
        """Listen; return the endpoint really bound. Raises OSError if it is taken."""
        scheme, _, place = endpoint.partition("://")
        try:
            self._listener = listen_ipc(place) if scheme == "ipc" else listen_tcp(place)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), endpoint) from None
        self._selector.register(self._listener, selectors.EVENT_READ)
        if scheme == "tcp":
            endpoint = "tcp://{}:{}".format(*self._listener.getsockname())
        self._endpoint = endpoint
        return endpoint

    @property
    def subscriptions(self) -> int:
        """How many prefixes are wanted now, each counted for each subscriber."""
        return sum(len(peer.prefixes) for peer in self._peers)

    def fileno(self) -> int:
        """Can be read when there is something to do for `poll`."""
        return self._selector.fileno()  # epoll's, or kqueue's

    def poll(self, timeout: float = 0.0) -> list[Wish]:
        """Take in who comes and goes and what they wish for, and go on sending to those that are behind."""
        wishes: list[Wish] = []
        for key, events in self._selector.select(timeout):
            if key.data is None:
                self._accept()
                continue
            if events & selectors.EVENT_READ:
                wishes += self._hear(key.data)
            if events & selectors.EVENT_WRITE and key.data in self._peers:
                self._send_more(key.data)
        return wishes

    # -- who comes and goes -------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._listener is not None
        now = time.monotonic()
        for peer in list(self._peers):
            if not peer.conversation.is_ready and now - peer.since > self._patience:
                self._leave(peer, "it did not say what it is")
        try:
            end, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # it would be asked for again at once
                log.error("no more subscribers until one leaves: %s", error)
                self._selector.unregister(self._listener)
            return
        end.setblocking(False)
        with suppress(OSError):  # it may be gone already
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            if end.family == socket.AF_INET:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = Peer(end, now)
        self._peers.append(peer)
        self._selector.register(end, selectors.EVENT_READ, peer)
        self._write(peer, GREETING, 0)

    def _hear(self, peer: Peer) -> list[Wish]:
        wishes: list[Wish] = []
        try:
            data = peer.socket.recv(1 << 16)
            if not data:
                self._leave(peer)
                return []
            wishes, answer = peer.conversation.hear(data)
            for wish in wishes:
                peer.take_wish(wish)
        except BlockingIOError:
            return []
        except OSError:
            self._leave(peer)
            return []
        except Refused as error:
            self._leave(peer, str(error))
            return []
        if wishes:
            self._routes.clear()
        if answer:
            self._write(peer, answer, 0)
        return wishes

    def _leave(self, peer: Peer, reason: str = "") -> None:
        if peer not in self._peers:
            return
        if reason:
            log.warning("a peer is no subscriber, and is let go: %s", reason)
        self._peers.remove(peer)
        self._selector.unregister(peer.socket)
        peer.socket.close()
        self._routes.clear()
        if self._listener is not None and self._listener not in self._selector.get_map():
            self._selector.register(self._listener, selectors.EVENT_READ)

    # -- what they get ------------------------------------------------------------------------------------------------

    def send(self, messages: Iterable[tuple[bytes, bytes]]) -> None:
        """Send each message, its topic's frame (see encode_topic) and its payload, to all who want it."""
        if not self._peers:
            return
        routes = self._routes
        for head, payload in messages:
            peers = routes.get(head)
            if peers is None:
                peers = self._find_route(head)
            if peers:
                frames = head, encode_size(len(payload)), payload
                for peer in peers:
                    peer.batch += frames
        for peer in list(self._peers):
            if batch := peer.batch:
                peer.batch = []
                self._write(peer, b"".join(batch), len(batch) // 3)

    def _find_route(self, head: bytes) -> list[Peer]:
        if len(self._routes) > MAX_ROUTES:
            self._routes.clear()
        topic = head[9:] if len(head) > 2 + 255 else head[2:]
        self._routes[head] = peers = [peer for peer in self._peers if peer.wants(topic)]
        return peers

    def _write(self, peer: Peer, data: bytes, count: int) -> None:
        """Send whole messages, `count` of them (0: an answer); what the system does not take waits."""
        sent = 0
        if not peer.unsent:
            try:
                sent = peer.socket.send(data)
            except BlockingIOError:
                pass
            except OSError:
                return self._leave(peer)
            if sent == len(data):
                return
        elif self._queue and peer.waiting >= self._queue and count:
            if not peer.dropped:
                log.warning("a subscriber is too slow, %d messages wait for it: it will miss some", peer.waiting)
            peer.dropped += count
            return
        elif not count and len(peer.unsent) > STEP:
            return  # who reads nothing needs no answers, and must not pile them up
        if not peer.unsent:
            self._selector.modify(peer.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, peer)
        peer.unsent += memoryview(data)[sent:]
        peer.waiting += count
        peer.marks.append((peer.sent + len(peer.unsent), count))

    def _send_more(self, peer: Peer) -> None:
        try:
            with memoryview(peer.unsent) as unsent, unsent[:STEP] as step:
                sent = peer.socket.send(step)
        except BlockingIOError:
            return
        except OSError:
            return self._leave(peer)
        del peer.unsent[:sent]
        peer.sent += sent
        while peer.marks and peer.marks[0][0] <= peer.sent:
            peer.waiting -= peer.marks.popleft()[1]
        if not peer.unsent:
            self._selector.modify(peer.socket, selectors.EVENT_READ, peer)
            if peer.dropped:
                log.warning("the slow subscriber is up to date again; it missed %d messages", peer.dropped)
                peer.dropped = 0

    def close(self, linger: float) -> None:
        """Send what waits, for `linger` seconds at most, then close."""
        if self._listener is not None:
            if self._listener in self._selector.get_map():
                self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
            remove_socket(self._endpoint)
        end = time.monotonic() + linger
        while any(peer.unsent for peer in self._peers) and (left := end - time.monotonic()) > 0:
            self.poll(left)
        for peer in list(self._peers):
            self._leave(peer)
        self._selector.close()


def listen_tcp(place: str) -> socket.socket:
    """Listen at `host:port`, any free port for `*`. Raises OSError."""
    host, _, port = place.rpartition(":")
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return _listen(listener, (host, 0 if port == "*" else int(port)))


def listen_ipc(path: str) -> socket.socket:
    """Listen at a path; the file of one that listens no more is replaced. Raises OSError if somebody listens there."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            remove_socket(f"ipc://{path}")
        else:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    return _listen(socket.socket(socket.AF_UNIX), path)


def _listen(listener: socket.socket, address: str | tuple[str, int]) -> socket.socket:
    try:
        listener.bind(address)
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    listener.setblocking(False)
    return listener
