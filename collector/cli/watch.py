"""The view of `collector run --watch`: in a thread of the supervisor, an ordinary subscriber like any other."""

import os
import sys
import threading
from collections import deque
from typing import TextIO

from collector.cli.tail import choose_view, draw_live, watch


class View:
    """Watches from its creation to `close`. Where it takes the whole terminal, the log is held back until then."""

    def __init__(self, control: str) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=watch, args=(control, self._stop), name="view", daemon=True)
        self._log = HeldLog() if choose_view() is draw_live and sys.stderr.isatty() else None
        self._thread.start()

    def close(self) -> None:
        """End the view, give the terminal back, and print the log that was held."""
        self._stop.set()
        self._thread.join(3)
        if self._log is not None:
            self._log.release()


class HeldLog:
    """Takes what this process, and those that it starts from now on, write to stderr; keeps the last lines."""

    def __init__(self, lines: int = 500) -> None:
        self._lines: deque[str] = deque(maxlen=lines)
        self._terminal = os.dup(2)
        reading, writing = os.pipe()
        os.dup2(writing, 2)
        os.close(writing)
        self._released = False
        self._lock = threading.Lock()
        threading.Thread(
            target=self._read, args=(os.fdopen(reading, errors="replace"),), name="log", daemon=True
        ).start()

    def _read(self, pipe: TextIO) -> None:
        for line in pipe:
            with self._lock:
                if self._released:
                    os.write(2, line.encode())
                else:
                    self._lines.append(line)

    def release(self) -> None:
        """Print what was kept; what still comes from processes that are ending goes straight through."""
        sys.stderr.flush()
        os.dup2(self._terminal, 2)
        os.close(self._terminal)
        with self._lock:
            self._released = True
            os.write(2, "".join(self._lines).encode())
