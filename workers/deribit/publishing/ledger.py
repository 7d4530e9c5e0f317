"""What a worker's successor must know of its life: for each topic, when and what was last said.

It lies in a mapped file, so that it outlives a worker that is killed: a store in memory is all that a message costs,
and the kernel keeps it. A successor that dies too loses nothing of it. The supervisor's own start begins a fresh one.

Layout, in native byte order: records of 512 bytes; the first is the header, each later one belongs to a topic or a
channel: some words, then its name. The file is as long as it may ever become, but used only as far as it was filled
with zeroes before: a store into a place for which a full disk has no room would kill the worker without a word.
"""

import logging
import mmap
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

RECORD = 512
WORDS = RECORD // 8
NAME_AT = 136
"""Where a record's name begins, in bytes."""

MAX_NAMES = 131_071
"""Names that one ledger holds: topics, and channels of trades."""

SIZE = RECORD * (MAX_NAMES + 1)
"""Bytes of the file."""

STEP = 32
"""Records for which room is made at a time: 16 KiB; an idle worker holds all of the first in memory."""

# The words of a record; 0 stands for none.
LAST_TS = 0  # receive_ts (ns) of the topic's last data
LAST_ID = 1  # its change_id or trade_seq
LENGTH = 2  # of the name, in bytes
UNHEALED = 3  # topic: first trade_seq that is being healed; channel: since when (ns) it may lack trades
FIRST = 4  # topic: first trade_seq that ever came or was said to be missing; channel: since when (ns) it came
NEWEST = 5  # topic: the exchange's time (ms) of the newest trade
AWAY = 5  # channel: when (ns) the connection stood last before it lost what the channel may lack
KNOWN = range(6, 14)  # pairs: LAST_ID and NEWEST before losses in which the exchange may have begun to count anew
BEGUN, BEFORE = 14, 15  # the trade_seq at which a gap told that it had, and NEWEST before that
EPOCH = 16  # the topic's

# Further words of the header.
SUBSCRIPTIONS = 17  # of the latest life
ROOM = 18  # records for which there is room
HEARD = 19  # when (ns) the latest life's connection stood last
LAYOUT = 20  # THIS_LAYOUT
OUT = 21  # when (ns) all that the latest life had said was last seen to have left it

THIS_LAYOUT = int.from_bytes(b"ledger 2", sys.byteorder)
"""What says that a file is a ledger of the layout above: another layout bears another number."""

HAS_ENDED = -1
"""LAST_TS of a topic that was left because its instrument had ended."""

EMPTY = struct.pack(f"{LAYOUT + 1}q", *[0] * ROOM, STEP, 0, THIS_LAYOUT).ljust(STEP * RECORD, b"\0")
"""What a ledger begins with: a header that says what it is and for how many records there is room, and these."""

_WORDS = (LAST_TS, LAST_ID, UNHEALED, FIRST, BEGUN, BEFORE, EPOCH)
"""Those that make an Entry, in its order."""

_ZEROS = memoryview(bytes(8 * (EPOCH + 1))).cast("q")
"""What is known of a topic of which nothing is."""

log = logging.getLogger("deribit")


class Entry(NamedTuple):
    """The last word of an earlier life on one topic."""

    topic: str
    last_ts: int
    last_id: int
    unhealed: int
    first_id: int
    begun: int
    before: int
    epoch: int


class Ledger:
    """One mapped ledger; `cells[slot + LAST_ID]` is a word of the record at a slot.

    Slot 0 is the header's: all that has no place of its own writes there, and no later life reads it.
    Raises OSError if it cannot be opened, or if there is no room for it.
    """

    def __init__(self, path: Path, fresh: bool) -> None:
        self._path = path
        if fresh or not self._find():
            self._make(EMPTY)
            if not fresh:
                lost = "nothing is known of earlier lives, and what was lost since then is not told"
                log.error("%s is gone: %s", path, lost)
        self._records = 0
        self._is_full = False
        self._free: list[int] = []
        entries = dict(self._read())
        self._slots = {entry.topic: slot for slot, entry in entries.items()}
        self.earlier = [entry for entry in entries.values() if entry.last_ts]

    def _find(self) -> bool:
        """Map the file if it is there, and is a ledger; return whether it is."""
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        if os.fstat(file).st_size != SIZE:
            os.close(file)
            return False
        self._map_file(file)
        if not (is_sound := self._is_sound()):
            self.close()
        return is_sound

    def _is_sound(self) -> bool:
        """Whether the mapped file is what a life has left, not something else of that length."""
        cells, room = self.cells, self.cells[ROOM]
        if cells[LAYOUT] != THIS_LAYOUT or not 0 < room <= MAX_NAMES + 1:
            return False
        return all(0 <= cells[number * WORDS + LENGTH] <= RECORD - NAME_AT for number in range(1, room))

    def _make(self, content: bytes) -> None:
        """Make the file, with records that are in use. Raises OSError.

        It is made beside its place, and put there once it is whole: a later life may need it at any moment. Whatever
        lay there stays as it is for who has it mapped still: the worker of a supervisor that was killed.
        """
        draft = self._path.with_name(f"{self._path.name}.new")
        draft.unlink(missing_ok=True)
        file = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _write(file, 0, content)
            os.ftruncate(file, SIZE)
            draft.rename(self._path)
        except OSError as error:
            os.close(file)
            draft.unlink(missing_ok=True)
            raise OSError(error.errno, f"no room for the ledger: {error.strerror}", str(self._path)) from None
        self._map_file(file)

    def _map_file(self, file: int) -> None:
        try:
            mapped = mmap.mmap(file, SIZE)
        except OSError as error:
            os.close(file)
            raise OSError(error.errno, f"the ledger cannot be mapped: {error.strerror}", str(self._path)) from None
        self._file, self._map, self.cells = file, mapped, memoryview(mapped).cast("q")

    def restore(self) -> None:
        """Write the file again if somebody removed it: a later life would know nothing. Raises OSError.

        Another file in its place is that of a new collector, whose killed predecessor we belong to.
        """
        if self._path.exists():
            return
        file, mapped, cells = self._file, self._map, self.cells
        self._make(mapped[: cells[ROOM] * RECORD])
        _close(file, mapped, cells)
        log.warning("%s was removed: written again", self._path)

    def _read(self) -> Iterator[tuple[int, Entry]]:
        cells = self.cells
        for number in range(1, cells[ROOM]):
            slot, start = number * WORDS, number * RECORD + NAME_AT
            length = cells[slot + LENGTH]
            if not length:
                return
            self._records = number
            if not any(cells[slot + cell] for cell in _WORDS if cell != EPOCH):
                self._free.append(number)  # nothing was said there, or it was left or freed
                continue
            topic = self._map[start : start + length].decode("utf-8", "replace")
            yield slot, Entry(topic, *(cells[slot + cell] for cell in _WORDS))

    def find_slot(self, name: str) -> int:
        """The slot of a topic or channel, taken at need; 0 where there is no room for it, or it is too long."""
        slot = self._slots.get(name)
        if slot is None:
            slot = self._slots[name] = self._take_slot(name.encode())
        return slot

    def lower(self, slot: int, cell: int, value: int) -> int:
        """Keep the least value that a word has been given since it was 0, and return it."""
        if slot:
            value = self.cells[slot + cell] = min(self.cells[slot + cell] or value, value)
        return value

    def clear(self, slot: int) -> None:
        """Forget what was said on a topic; its place stays its own."""
        self.cells[slot : slot + LENGTH] = _ZEROS[:LENGTH]
        self.cells[slot + LENGTH + 1 : slot + EPOCH + 1] = _ZEROS[LENGTH + 1 :]

    def free_slot(self, name: str) -> None:
        """Nothing will be said of this any more: another may have its place."""
        slot = self._slots.pop(name, 0)
        if slot:
            self.clear(slot)
            self._free.append(slot // WORDS)

    def _take_slot(self, name: bytes) -> int:
        if len(name) > RECORD - NAME_AT:
            return 0
        number = self._free.pop() if self._free else self._records + 1
        if not self._has_room(number):
            return 0
        self._records = max(self._records, number)
        start = number * RECORD + NAME_AT
        self._map[start : start + len(name)] = name
        self.cells[number * WORDS + LENGTH] = len(name)  # last: it makes the record count
        return number * WORDS

    def _has_room(self, number: int) -> bool:
        """Whether a record can be used; room is made for it at need."""
        if number < self.cells[ROOM]:
            return True
        try:
            if number > MAX_NAMES:
                raise OSError(f"it holds {MAX_NAMES}")
            _write(self._file, number * RECORD, bytes(STEP * RECORD))
        except OSError as error:
            if not self._is_full:
                log.error("no room for more topics in the ledger; a restart will tell no gaps on them: %s", error)
            self._is_full = True
            return False
        self.cells[ROOM] = number + STEP
        return True

    def close(self) -> None:
        """Let go of the file; it stays."""
        _close(self._file, self._map, self.cells)


def _write(file: int, place: int, data: bytes) -> None:
    """Write bytes at a place of a file: all of them. Raises OSError."""
    while data:  # what is nearly full takes a part at first
        done = os.pwrite(file, data, place)
        place, data = place + done, data[done:]


def _close(file: int, mapped: mmap.mmap, cells: memoryview) -> None:
    cells.release()
    mapped.close()
    os.close(file)
