"""A PUB socket that sends from the loop's own thread, where ZeroMQ's would hand each message to a thread of its own.

Waking that thread was what a worker cost beyond a mere relay (measured, see docs/performance.md: 55 against 50 us a
message at 5,000/s, 5.2 against 4.6 at full speed), and its queue was out of sight: here it is known, and said, when a
subscriber is too slow. On the wire it is ZeroMQ's own XPUB (see zmtp), for this host only.
"""

import errno
import logging
import os
import resource
import selectors
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from collector.sockets import is_socket, remove_socket
from workers.deribit.publishing.peer import Peer, name_peer
from workers.deribit.publishing.zmtp import GREETING, SHORT, NoSubscriber, Wish, encode_size, encode_topic

SEND_BUFFER = 4 << 20
"""Bytes that the system may take ahead of a subscriber, where it allows as many."""

HEAR_AT_ONCE = 1 << 13
"""Bytes that are taken in of what all subscribers say, before the loop goes on: 4 ms of work at the worst."""

RESERVE = 16
"""File descriptors that no subscriber gets: without one the worker could not connect to the exchange again."""

GREET_WITHIN = 30.0
"""Seconds for a peer to say what it is."""

CLOSING_STEP = 0.01
"""Seconds after which it is looked at again whether all is taken: nothing else tells."""

READ = selectors.EVENT_READ
READ_AND_WRITE = selectors.EVENT_READ | selectors.EVENT_WRITE

T = TypeVar("T")

log = logging.getLogger("deribit")


class Route:
    """One topic, and who wants it: found anew after each change (`round`) of what subscribers wish for.

    It is kept here, and not in a map of the socket: who sends has the topic's own state at hand, in the cache.
    `peers` is the socket's list, one for all topics with the same subscribers.
    """

    __slots__ = ("head", "peers", "round", "topic")

    def __init__(self, topic: bytes) -> None:
        self.topic = topic
        self.head = encode_topic(topic)
        self.peers: list[Peer] = []
        self.round: object = None


class PubSocket:
    """Listens at one endpoint. `queue` messages may wait for one subscriber (0: any number); what is more it misses.

    Nothing here blocks, and nothing happens by itself: call `poll` when `fileno` can be read.
    """

    def __init__(self, queue: int, patience: float = GREET_WITHIN) -> None:
        self._queue = queue
        self._patience = patience
        self._peers: list[Peer] = []
        self._round = object()
        self._groups: dict[tuple[Peer, ...], list[Peer]] = {}
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._endpoint = ""
        self._is_full = False
        self._strangers = 0

    def bind(self, endpoint: str) -> str:
        """Listen; return the endpoint really bound. Raises OSError if it is taken."""
        scheme, _, place = endpoint.partition("://")
        try:
            self._listener = listen_ipc(place) if scheme == "ipc" else listen_tcp(place)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), endpoint) from None
        self._selector.register(self._listener, READ)
        if scheme == "tcp":
            endpoint = "tcp://{}:{}".format(*self._listener.getsockname())
        self._endpoint = endpoint
        return endpoint

    def restore(self) -> None:
        """Make room for who comes where others do not greet, let them in if there is room again, and listen anew if
        somebody removed the file of an ipc endpoint: they would find nobody. Raises OSError.
        """
        self._leave_silent()
        self._attend()
        scheme, _, path = self._endpoint.partition("://")
        if self._listener is None or scheme != "ipc" or os.path.lexists(path):
            return
        listener = listen_ipc(path)
        self._selector.unregister(self._listener)
        self._listener.close()
        self._listener = listener
        self._selector.register(listener, READ)
        log.warning("%s was removed: listens there again", path)

    @property
    def subscriptions(self) -> int:
        """How many prefixes are wanted now, each counted for each subscriber."""
        return sum(len(peer.prefixes) for peer in self._peers)

    @property
    def is_served(self) -> bool:
        """Whether all that was sent comes even if this ends now."""
        return all(peer.is_served for peer in self._peers)

    def fileno(self) -> int:
        """Can be read when there is something to do for `poll`."""
        return self._selector.fileno()  # epoll's, or kqueue's

    def poll(self, timeout: float = 0.0) -> list[Wish]:
        """Take in who comes and goes and what they wish for, and go on sending to those that are behind."""
        wishes: list[Wish] = []
        ready = self._selector.select(timeout)
        for key, events in ready:
            if key.data is None:
                self._accept()
                continue
            peer: Peer = key.data
            if events & READ and (heard := self._let(peer, peer.hear, 1 + HEAR_AT_ONCE // len(ready))):
                self._begin_round()
                wishes += heard
            if events & selectors.EVENT_WRITE and peer in self._peers:
                self._let(peer, peer.write_more)
        return wishes

    # -- who comes and goes -------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._listener is not None
        self._leave_silent()
        try:
            end, address = self._listener.accept()
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            if end.fileno() >= limit - RESERVE:  # it is the lowest that was free; Linux has no limit below 0
                end.close()
                raise OSError(errno.EMFILE, "the last file descriptors are kept for the worker itself")
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # it would be asked for again at once
                if not self._is_full:
                    log.error("no more subscribers until there is room: %s", error)
                self._is_full = True
                self._selector.unregister(self._listener)
            return
        self._is_full = False
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if end.family == socket.AF_INET:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = Peer(end, name_peer(end, address), self._queue, time.monotonic())
        self._peers.append(peer)
        self._selector.register(end, READ, peer)
        self._let(peer, peer.write, GREETING, 0)

    def _leave_silent(self) -> None:
        """Let those go that take up room and do not say what they are."""
        now = time.monotonic()
        for peer in list(self._peers):
            if not peer.conversation.is_ready and now - peer.since > self._patience:
                self._leave(peer, "it did not say what it is")

    def _let(self, peer: Peer, act: Callable[..., T], *arguments: Any) -> T | None:
        """Let a peer do something. One that is gone, or no subscriber, leaves; one that is behind is watched."""
        try:
            done = act(*arguments)
        except NoSubscriber as error:
            with suppress(OSError):
                peer.write(error.farewell, 0)
            self._leave(peer, str(error))
        except OSError:
            self._leave(peer)
        else:
            if bool(peer.unsent) != peer.is_behind:
                peer.is_behind = not peer.is_behind
                self._selector.modify(peer.socket, READ_AND_WRITE if peer.is_behind else READ, peer)
            return done
        return None

    def _leave(self, peer: Peer, reason: str = "") -> None:
        if peer not in self._peers:
            return
        if reason:
            self._strangers += 1
            if self._strangers <= 10 or self._strangers % 1000 == 0:  # some come again and again
                log.warning(
                    "a peer (%s) is no subscriber, and is let go: %s; %d so far", peer.name, reason, self._strangers
                )
        self._peers.remove(peer)
        self._selector.unregister(peer.socket)
        peer.socket.close()
        self._begin_round()
        self._attend()

    def _attend(self) -> None:
        """Let in who comes, also after a time without room."""
        if self._listener is not None and self._listener not in self._selector.get_map():
            self._selector.register(self._listener, READ)

    # -- what they get ------------------------------------------------------------------------------------------------

    def send(self, messages: Iterable[tuple[Route, bytes]]) -> None:
        """Send each message, by its topic's route, to all who want it."""
        if not self._peers:
            return
        current = self._round
        for route, payload in messages:
            if route.round is not current:
                self._find_peers(route)
            if peers := route.peers:
                size = len(payload)
                frames = route.head, SHORT[size] if size < 256 else encode_size(size), payload
                for peer in peers:
                    peer.batch += frames
        for peer in list(self._peers):
            if batch := peer.batch:
                peer.batch = []
                self._let(peer, peer.write, b"".join(batch), len(batch) // 3)

    def _find_peers(self, route: Route) -> None:
        peers = tuple(peer for peer in self._peers if peer.wants(route.topic))
        route.peers = self._groups.setdefault(peers, list(peers))
        route.round = self._round

    def _begin_round(self) -> None:
        self._round = object()
        for group in self._groups.values():
            group.clear()  # a topic on which nothing more is said would hold those that are gone for ever
        self._groups.clear()

    def close(self, linger: float) -> None:
        """Wait until all are served, for `linger` seconds at most, then close."""
        if self._listener is not None:
            if self._listener in self._selector.get_map():
                self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
            remove_socket(self._endpoint)
        end = time.monotonic() + linger
        while not self.is_served and (left := end - time.monotonic()) > 0:
            self.poll(min(left, CLOSING_STEP))
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
    """Listen at a path; the file of one that listens no more is replaced. Raises OSError if it is taken."""
    remove_socket(f"ipc://{path}")
    if os.path.lexists(path) and not is_socket(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
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
