"""The view of `collector run --watch`: in a thread of the supervisor, an ordinary subscriber like any other."""

import logging
import os
import sys
import threading
from collections import deque
from contextlib import suppress
from typing import TextIO

from collector.cli.options import drop_output
from collector.cli.tail import choose_view, draw_live, read
from collector.client.subscriber import Subscriber
from collector.log import write_all
from collector.messages import ControlError

NOTES = ["subscribe with any ZeroMQ SUB socket, or: collector tail deribit.trade.", "Ctrl-C stops everything"]
"""What stands above the view."""

MAX_HELD = 500
"""Lines of the log that are kept while the view has the terminal: the last ones."""

LINGER = 2.0
"""Seconds that the end of the collector waits for the view's; a terminal that is held, or dead, takes nothing more."""

log = logging.getLogger(__name__)


class View:
    """Watches from its creation to `close`. Where it takes the whole terminal, the log is held back until then."""

    def __init__(self, control: str) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(control,), name="view", daemon=True)
        self._log = HeldLog() if choose_view() is draw_live and sys.stderr.isatty() else None
        self._thread.start()

    def _watch(self, control: str) -> None:
        try:
            watch(control, self._stop)
        finally:
            if self._log is not None:
                self._log.release()

    def leave(self) -> None:
        """Have the view end, give the terminal back, and print the log that was held."""
        self._stop.set()

    def close(self) -> bool:
        """Leave, and wait until that is done; return whether it came to its end."""
        self.leave()
        self._thread.join(LINGER)
        return not self._thread.is_alive()


def watch(control: str, stop: threading.Event) -> None:
    """Show what the collector at `control` publishes, once it is up, until `stop` is set (see View)."""
    while not stop.is_set():
        try:
            with Subscriber(control=control, on_loss="report", timeout=1.0) as subscriber:
                choose_view()(subscriber, read(subscriber, stop.is_set), NOTES)
        except ControlError:
            stop.wait(0.05)  # not up yet
        except BrokenPipeError:  # nobody reads on
            return drop_output()
        except OSError as error:
            drop_output()
            return log.error("the view has ended, its output cannot be written: %s", error.strerror or error)


class HeldLog:
    """Takes what this process, and those that it starts from now on, write to stderr; keeps the last lines."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=MAX_HELD)
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
                    _print(line)
                else:
                    self._lines.append(line)

    def release(self) -> None:
        """Print what was kept; what still comes from processes that are ending goes straight through."""
        sys.stderr.flush()
        os.dup2(self._terminal, 2)
        os.close(self._terminal)
        with self._lock:
            self._released = True
            _print("".join(self._lines))


def _print(text: str) -> None:
    with suppress(OSError):  # the terminal is gone
        write_all(2, text.encode())
