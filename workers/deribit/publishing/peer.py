"""One subscriber of a PUB socket: what it wants, and what waits for it when it is slower than we are."""

import fcntl
import logging
import socket
import struct
import termios
from collections import Counter, deque
from typing import Any

from collector.words import say_count
from workers.deribit.publishing.zmtp import Conversation, NoSubscriber, Wish

BLOCK = 1 << 20
"""Bytes that are sent at once to a subscriber that is behind, and about those of one block that waits for it: the loop
must not be held up."""

MAX_UNSENT = 256 << 20
"""Bytes that may wait for one subscriber, however few messages they are: one that was stopped must not eat the memory.
"""

MAX_PREFIXES = 100_000
"""Prefixes of one subscriber."""

MAX_LENGTH = 512
"""Bytes of a prefix; no topic is as long, so a longer one is passed over. For each length topics are looked up once."""

log = logging.getLogger("deribit")


def name_peer(end: socket.socket, address: Any) -> str:
    """Who has connected, as a person can look for it: the process at an ipc endpoint, the address at a tcp one."""
    if end.family == socket.AF_UNIX:
        pid, _, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return f"pid {pid}"
    return "{}:{}".format(*address)


class Peer:
    """One subscriber. `queue` messages may wait for it (0: any number), and MAX_UNSENT bytes; what is more it misses.

    `name` is what the log calls it. `batch` (what is to be written) and `is_behind` (whether room is waited for)
    belong to the one who holds it. `unsent` counts the bytes that the system has not yet taken. They lie in `blocks`:
    of one long bytearray Python would move all that is left from time to time. `marks` says where messages end in
    them. Each method that reads or sends raises OSError once the other end is gone.
    """

    __slots__ = (
        "batch", "blocks", "conversation", "dropped", "is_behind", "lengths", "marks", "name", "prefixes", "queue",
        "sent", "since", "socket", "unsent", "waiting",
    )  # fmt: skip

    def __init__(self, end: socket.socket, name: str, queue: int, now: float) -> None:
        self.socket = end
        self.name = name
        self.queue = queue
        self.since = now
        self.conversation = Conversation()
        self.prefixes: set[bytes] = set()
        self.lengths: Counter[int] = Counter()
        self.batch: list[bytes] = []
        self.blocks: deque[bytearray] = deque()
        self.unsent = 0
        self.marks: deque[tuple[int, int]] = deque()
        self.sent = 0
        self.waiting = 0
        self.dropped = 0
        self.is_behind = False

    # -- what it wants ------------------------------------------------------------------------------------------------

    def wants(self, topic: bytes) -> bool:
        """Whether it has subscribed to a prefix of this topic."""
        return any(topic[:length] in self.prefixes for length in self.lengths)

    def hear(self, size: int) -> list[Wish]:
        """Read `size` bytes of what it says, and answer. Raises NoSubscriber if it can be no subscriber."""
        try:
            data = self.socket.recv(size)
        except BlockingIOError:
            return []
        if not data:
            raise ConnectionResetError
        wishes, answer = self.conversation.hear(data)
        for wish in wishes:
            self._take_wish(wish)
        if answer:
            self.write(answer, 0)
        return wishes

    def _take_wish(self, wish: Wish) -> None:
        """A prefix is wanted or not: libzmq tells of each subscription to it, but of the last unsubscription only."""
        if (wish.prefix in self.prefixes) == wish.is_wanted or len(wish.prefix) > MAX_LENGTH:
            return
        if wish.is_wanted and len(self.prefixes) >= MAX_PREFIXES:
            raise NoSubscriber(f"it has subscribed to {MAX_PREFIXES} prefixes")
        length = len(wish.prefix)
        if wish.is_wanted:
            self.prefixes.add(wish.prefix)
            self.lengths[length] += 1
        else:
            self.prefixes.remove(wish.prefix)
            self.lengths[length] -= 1
            if not self.lengths[length]:
                del self.lengths[length]

    # -- what it gets -------------------------------------------------------------------------------------------------

    def write(self, data: bytes, count: int) -> None:
        """Send whole messages, `count` of them (0: an answer); what the system does not take waits."""
        sent = 0 if self.unsent else self._send(data)
        if sent == len(data):
            return
        if count and (self.waiting >= self.queue > 0 or self.unsent >= MAX_UNSENT):
            if not self.dropped:
                waiting = say_count(self.waiting, "message")
                log.warning(
                    "a subscriber (%s) is too slow, with %s waiting for it: it will miss some", self.name, waiting
                )
            self.dropped += count
            return
        if not count and self.unsent > BLOCK:
            return  # who reads nothing needs no answers, and must not pile them up
        if not self.blocks or len(self.blocks[-1]) >= BLOCK:
            self.blocks.append(bytearray())
        self.blocks[-1] += memoryview(data)[sent:]
        self.unsent += len(data) - sent
        self.waiting += count
        self.marks.append((self.sent + self.unsent, count))

    def write_more(self) -> None:
        """Send some of what waits."""
        block = self.blocks[0]
        with memoryview(block) as whole, whole[:BLOCK] as step:
            sent = self._send(step)
        del block[:sent]
        if not block:
            self.blocks.popleft()
        self.unsent -= sent
        self.sent += sent
        while self.marks and self.marks[0][0] <= self.sent:
            self.waiting -= self.marks.popleft()[1]
        if self.dropped and not self.unsent:
            missed = say_count(self.dropped, "message")
            log.warning("the slow subscriber (%s) is up to date again; it missed %s", self.name, missed)
            self.dropped = 0

    @property
    def is_served(self) -> bool:
        """Whether all that was written comes even if this end closes now. What TCP still holds may not: it drops that
        for one that then says something more.
        """
        if self.unsent or self.socket.family == socket.AF_UNIX:
            return not self.unsent
        return fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)) == bytes(4)

    def _send(self, data: bytes | memoryview) -> int:
        """How many of these bytes the system takes."""
        try:
            return self.socket.send(data)
        except BlockingIOError:
            return 0
