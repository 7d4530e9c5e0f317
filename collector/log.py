"""The log of every process: one line a record on stderr, with the time (UTC), the level and who says it.

A thread writes the lines: whoever should read them may have stopped (a terminal that is held with Ctrl-S, a pager, a
stuck log service), and the data must not wait for that.
"""

import logging
import os
import queue
import select
import threading
import time
from typing import Any

from collector.words import say_count

MAX_WAITING = 10_000
"""Lines that wait to be written; what comes beyond them is counted, and said later."""

LINGER = 0.5
"""Seconds that the end of a process waits for its last lines to be taken."""

PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
"""What syslog calls the levels: systemd's journal takes it from <N> before a line (sd-daemon(3))."""


class _Line(logging.Formatter):
    """`is_journal`: each line begins with its priority, which the journal takes off again."""

    is_journal = False
    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self.is_journal:
            return text
        priority = f"<{PRIORITIES.get(record.levelno, 6)}>"
        return priority + text.replace("\n", f"\n{priority}")

    def formatMessage(self, record: logging.LogRecord) -> str:
        # What the exchange or a client wrote may stand in a record; it must not look like a record of its own.
        record.message = _make_printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        # So may it in an error's own text: what is indented is no record.
        return "\n".join(f"  {_make_printable(line)}" for line in super().formatException(ei).split("\n"))


def _make_printable(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class _Aside(logging.Handler):
    """Has a thread write each line to a file. `close` is its end, and waits for LINGER at most."""

    def __init__(self, file: int) -> None:
        super().__init__()
        self._file = file
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_WAITING)
        self._missing = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Hand the line over (logging calls this, for one thread at a time)."""
        try:
            if self._missing:
                self._lines.put_nowait(self.format(_say_missing(self._missing)))
                self._missing = 0
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._missing += 1

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                write_all(self._file, f"{line}\n".encode(errors="backslashreplace"))
            except OSError:  # the disk is full, say
                assert self.lock is not None  # logging has made it
                with self.lock:
                    self._missing += 1

    def close(self) -> None:
        """Let the thread write what waits, and end."""
        try:
            self._lines.put(None, timeout=LINGER)
        except queue.Full:
            return  # nobody reads
        self._thread.join(LINGER)
        super().close()


def write_all(file: int, text: bytes) -> None:
    """Write all of it, however long that takes, also where another program has made the file non-blocking."""
    left = memoryview(text)
    while left:
        try:
            left = left[os.write(file, left) :]
        except BlockingIOError:
            select.select((), (file,), ())


def _say_missing(number: int) -> logging.LogRecord:
    message = "%s missing here: could not be written"
    return logging.LogRecord(__name__, logging.WARNING, "", 0, message, (say_count(number, "line"),), None)


def _is_journal(file: int) -> bool:
    """Whether it is systemd's journal: that is named by device and inode (systemd.exec(5))."""
    if name := os.environ.get("JOURNAL_STREAM"):
        status = os.fstat(file)
        return name == f"{status.st_dev}:{status.st_ino}"
    return False


def start_log(name: str, level: str, file: int = 2) -> None:
    """Send this process's log to a file under `name`, from `level` (debug, info, warning, error) upwards.

    `logging.shutdown` writes what is still to be written: for a process whose end does not call that by itself.
    """
    writer, line = _Aside(file), _Line(f"%(asctime)s %(levelname)-7s {name}: %(message)s")
    line.is_journal = _is_journal(file)
    writer.setFormatter(line)
    logging.basicConfig(level=level.upper(), handlers=[writer], force=True)
