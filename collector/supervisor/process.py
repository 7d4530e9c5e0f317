"""One child process over one life: start it, talk with it, kill it, know when it is really gone and why.

Children come from a forkserver: a helper process that has the workers' modules loaded, so that a new worker
starts in some 10 ms and shares that memory. It has no secrets (they were taken out of the environment before)
and knows nothing of the command line.
"""

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing import resource_tracker
from multiprocessing.context import ForkServerProcess
from multiprocessing.forkserver import _forkserver
from multiprocessing.process import _children  # type: ignore[attr-defined]
from types import ModuleType
from typing import Any

from collector.aside import run_aside
from collector.lifecycle import Exit
from collector.link import Link, open_link

PRELOAD = (
    "encodings.idna",  # each first connection would load it by itself
    "collector.supervisor.process", "workers.actor", "workers.deribit.worker", "workers.exchange.worker",
    "workers.rehearsal",  # last: it uses what the others load
)  # fmt: skip
"""What the forkserver loads once for all workers."""

UNKNOWN_EXIT = 255
"""The exit code of a child whose forkserver died before it: nobody could ask for the real one."""

NOT_STARTED = 256
"""What stands for the exit code of a child that could not be started."""

_MAX_TMPDIR = 75
"""Bytes of TMPDIR, as a whole path, that leave room for a socket of the forkserver there: 107 less two names of
multiprocessing."""

_CODE_WAIT = 1.0
"""Seconds that the forkserver has to tell the exit code of a child that is gone, and the link to run dry."""

_TOO_FEW = " (too few processes or threads? see ulimit -u, TasksMax=)"
"""What to look at where a process ends without a word: libuv and libzmq abort it if they get no thread."""

log = logging.getLogger(__name__)


def enter(kind: str, end: socket.socket) -> None:
    """Where a child begins: the one place that knows of the workers, by name and kind only."""
    import_module("workers.actor").main(kind, end)


def _leave_long_tmpdir() -> None:
    """Go to /tmp if the forkserver's socket would not fit in; from Python 3.14 on multiprocessing does so by itself."""
    with suppress(FileNotFoundError):  # there is none at all: the start of each worker says so
        if len(os.fsencode(tempfile.gettempdir())) > _MAX_TMPDIR:
            for name in ("TMPDIR", "TEMP", "TMP"):
                os.environ.pop(name, None)
            tempfile.tempdir = None  # it is looked for again


class Spawner:
    """Starts children from a forkserver, off the event loop. It restarts a forkserver that died.

    One at a time: who starts one has the `turn`.
    """

    def __init__(self) -> None:
        # A directory that happens to hold a `workers` package must not stand before ours.
        os.environ["PYTHONSAFEPATH"] = "1"
        _leave_long_tmpdir()
        # Who started us may have had it ignored: then a dead forkserver cannot be waited for, nor replaced. Or blocked,
        # and others with it: then the forkserver knows no exit codes, and SIGTERM stops nothing.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOAD))
        self.turn = asyncio.Lock()

    async def spawn(self, kind: str, end: socket.socket) -> ForkServerProcess:
        """Start a child of that kind at one end of a link. Raises OSError if the forkserver fails."""
        try:
            return await run_aside(lambda: self._start(kind, end), "spawner")
        except RuntimeError as error:  # no thread can be started
            end.close()
            raise OSError(str(error)) from None
        except EOFError:
            raise OSError(f"the forkserver has ended{_TOO_FEW}") from None

    def _start(self, kind: str, end: socket.socket) -> ForkServerProcess:
        # Ctrl-C reaches the whole group. Children inherit the mask of this thread, so not even one that is just
        # starting can be struck. The resource tracker is started before, since that clears the mask again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        child = self._context.Process(target=enter, args=(kind, end), daemon=True)
        _leave_lost_directory()
        try:
            with end, _hidden_main():
                child.start()
            _children.discard(child)  # the next start would ask for its exit code, which can be read only once
        except (FileNotFoundError, ConnectionRefusedError):
            if not kill_forkserver():
                raise
            # Programs that clear out /tmp have removed its socket, or the directory of that: nobody can reach it.
            multiprocessing.current_process()._config["tempdir"] = tempfile.tempdir = None  # type: ignore[attr-defined]
            raise OSError("the socket of the forkserver was removed; the next start has a new one") from None
        return child


def kill_forkserver() -> bool:
    """Kill the forkserver: the next start makes a new one. False if there is none."""
    if (pid := getattr(_forkserver, "_forkserver_pid", None)) is None:
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # our child: the number is no other's before it was waited for
    return True


def _leave_lost_directory() -> None:
    """Go to / if the working directory was removed, or is closed to us: each child is told to go where we are."""
    try:
        os.chdir(os.getcwd())
    except OSError:
        os.chdir("/")


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Keep multiprocessing from having each child import our main program again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Child:
    """One life of one child. Made by `start_child`; ends with `wait`."""

    def __init__(self, process: ForkServerProcess, receive: Callable[[dict[str, Any]], None]) -> None:
        assert process.pid is not None
        self.pid = process.pid
        self._process = process
        self._pidfd = os.pidfd_open(process.pid)
        self._receive = receive
        self._link: Link
        self._is_gone = False
        self._unlinked = asyncio.Event()

    async def connect(self, end: socket.socket) -> None:
        """Take our end of the link into the loop."""
        self._link = await open_link(end, self._receive, self._lose_link)

    def send(self, message: dict[str, Any]) -> bool:
        """Send a message down the link; False if it cannot be."""
        return self._link.send(message)

    def pause(self) -> None:
        """Leave what it says unread until `resume`; what one that is gone has said is read to its end."""
        if not self._is_gone:
            self._link.pause()

    def resume(self) -> None:
        """Receive what it has said, and what it will."""
        self._link.resume()

    def kill(self) -> None:
        """Kill it, whatever it does. By pidfd: a number that went to another process is never hit."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _lose_link(self, reason: str) -> None:
        if "garbage" in reason:
            log.error("pid %d: %s", self.pid, reason)
            self.kill()
        self._unlinked.set()

    async def wait(self) -> int:
        """Wait until it is really gone and all that it said has been received; return its exit code.

        The forkserver's word is not enough: if it dies, it says 255 of children that are alive and well.
        """
        await _readable(self._pidfd)
        self._is_gone = True
        self._link.resume()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CODE_WAIT):
                await self._unlinked.wait()
                await _readable(self._process.sentinel)
        code = self._process.exitcode
        self._link.close()
        os.close(self._pidfd)
        if code is not None:
            self._process.close()
        return UNKNOWN_EXIT if code is None else code


async def start_child(spawner: Spawner, kind: str, receive: Callable[[dict[str, Any]], None]) -> Child:
    """Start a child of that kind; `receive` gets what it says. Raises OSError if it cannot be started."""
    ours, theirs = socket.socketpair()
    try:
        child = Child(await spawner.spawn(kind, theirs), receive)
        await child.connect(ours)
    except BaseException:
        ours.close()  # the end of file is the end of the child as well
        raise
    return child


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


_REASONS = {
    Exit.STOPPED: "stopped in order",
    Exit.CRASHED: "crashed (see its log)",
    Exit.BAD_SPEC: "cannot run as configured",
    Exit.CREDENTIALS: "the exchange refused the credentials",
    Exit.BANNED: "the exchange refuses this host or account",
    Exit.GAVE_UP: "gave up after retry_count attempts",
    Exit.ORPHANED: "lost its link to the supervisor",
    UNKNOWN_EXIT: "ended for an unknown reason (the forkserver was gone)",
    NOT_STARTED: "was not started",
}


def describe_exit(code: int) -> str:
    """Say in words why a child ended."""
    if code < 0:
        return f"killed by {_SIGNALS.get(-code, f'signal {-code}')}{_TOO_FEW if code == -signal.SIGABRT else ''}"
    return _REASONS.get(code, f"ended with exit code {code}")


_SIGNALS = {int(each): each.name for each in signal.Signals}
