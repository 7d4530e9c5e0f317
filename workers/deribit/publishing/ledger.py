"""What a worker's successor must know of its life: for each topic, when and what was last said.

It lies in a mapped file, so that it outlives a worker that is killed: a store in memory is all that a message costs,
and the kernel keeps it. A successor that dies too loses nothing of it. The supervisor's own start begins a fresh one.

Layout, in native byte order: records of 512 bytes; the first is the header (epoch, subscriptions), each later one
belongs to a topic (receive_ts in ns, change_id or trade_seq, length of the topic, first trade_seq of what is being
healed or 0, first trade_seq that was ever said or 0, the topic).
"""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

RECORD = 512
WORDS = RECORD // 8
TEXT = 40
"""Where a record's topic begins, in bytes."""

TOPICS = 65_535
"""Topics that one ledger holds; the file is sparse, only what is used takes room."""


class Entry(NamedTuple):
    """The last word of an earlier life on one topic."""

    topic: str
    last_ts: int
    last_id: int
    unhealed: int
    first_id: int


class Ledger:
    """One mapped ledger.

    Of a topic are `cells[slot]`: receive_ts, `+ 1`: its id, `+ 3`: the first id being healed, `+ 4`: the first of all.
    Slot 0 belongs to nobody: it is the header's, in which `+ 2` and `+ 5` are the epoch and the subscriptions.
    """

    def __init__(self, path: Path, fresh: bool) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if fresh else 0)
        file = os.open(path, flags, 0o600)
        try:
            os.ftruncate(file, RECORD * (TOPICS + 1))
            self._map = mmap.mmap(file, RECORD * (TOPICS + 1))
        finally:
            os.close(file)
        self.cells = memoryview(self._map).cast("q")
        self._slots = {entry.topic: slot for slot, entry in self._read()}
        self._records = sum(1 for _ in self._read())
        self._had = frozenset(self._slots)
        self._free: list[int] = []
        self.earlier = [entry for _, entry in self._read() if entry.last_ts]

    def _read(self) -> Iterator[tuple[int, Entry]]:
        for number in range(1, TOPICS + 1):
            start = number * RECORD
            length = self.cells[number * WORDS + 2]
            if not 0 < length <= RECORD - TEXT:
                return
            topic = self._map[start + TEXT : start + TEXT + length].decode("utf-8", "replace")
            slot = number * WORDS
            yield slot, Entry(topic, self.cells[slot], self.cells[slot + 1], self.cells[slot + 3], self.cells[slot + 4])

    def had(self, topic: str) -> bool:
        """Whether an earlier life had this topic (or channel)."""
        return topic in self._had

    def find_slot(self, topic: str) -> int:
        """The slot of a topic, taken at need; 0 where the ledger is full or the topic too long."""
        slot = self._slots.get(topic)
        if slot is None:
            slot = self._slots[topic] = self._take_slot(topic.encode())
        return slot

    def free_slot(self, topic: str) -> None:
        """Nothing will be said on this topic any more: another may have its place."""
        slot = self._slots.pop(topic, 0)
        if slot:
            for place in (0, 1, 3, 4):  # all but the length: what is left of a topic would be taken for the next one's
                self.cells[slot + place] = 0
            self._free.append(slot // WORDS)

    def _take_slot(self, topic: bytes) -> int:
        if len(topic) > RECORD - TEXT:
            return 0
        number = self._free.pop() if self._free else self._records + 1
        if number > TOPICS:
            return 0
        self._records = max(self._records, number)
        start = number * RECORD
        self._map[start + TEXT : start + TEXT + len(topic)] = topic
        self.cells[number * WORDS + 2] = len(topic)  # last: it makes the record count
        return number * WORDS

    @property
    def epoch(self) -> int:
        """When the latest life that wrote here began, in ns; 0 if there was none."""
        return self.cells[2]

    @epoch.setter
    def epoch(self, value: int) -> None:
        self.cells[2] = value

    @property
    def subscriptions(self) -> int:
        """How many subscriptions the latest life had."""
        return self.cells[5]

    @subscriptions.setter
    def subscriptions(self, value: int) -> None:
        self.cells[5] = value

    def close(self) -> None:
        """Let go of the file; it stays."""
        self.cells.release()
        self._map.close()
