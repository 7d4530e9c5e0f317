"""What a collector needs of the system: open files, and a directory of its own, locked and free of stale sockets."""

import errno
import fcntl
import logging
import os
import resource
import stat
import time
from contextlib import suppress
from pathlib import Path

from collector.config import ConfigError
from collector.defaults import default_runtime_dir
from collector.words import say_count

log = logging.getLogger(__name__)


MAX_FILES = 65_536
"""Open files that we ask the system for, at most: what is usual (1,024) is meant for programs that use select(2)."""

FILES, FILES_EACH = 256, 4
"""Open files of a supervisor (some 20, and all clients of its control endpoint: libzmq aborts the program that has none
left for one more), and for each of its workers."""


EPOCH_AT = 11
"""Where the newest epoch stands in the lock file, behind the pid: it outlives the collector."""

STEP = 1_000_000
"""From one epoch to the next at least, in ns: between them lie those of topics that begin anew within a life."""


class Unavailable(Exception):
    """The system does not give us what we need just now; the text says what, and what to do."""


def allow_files(workers: int) -> None:
    """Have this process, and all that it starts, open as many files as the system lets us.

    Raises Unavailable if that is too few for so many workers.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    needed = FILES + FILES_EACH * workers
    if limit < needed:
        fewer = ", or run fewer connections" if limit >= FILES + FILES_EACH else ""
        raise Unavailable(
            f"a collector with {say_count(workers, 'worker')} needs {needed} open files, and only {limit} are allowed; "
            f"allow more (ulimit -n, or LimitNOFILE of a systemd unit){fewer}"
        )


class RuntimeDir:
    """The directory of one running collector, made if need be: ours alone, and locked until this process ends.

    Raises Unavailable, naming the pid that holds it; ConfigError, beginning with `where`, if it can never be used.
    """

    def __init__(self, path: Path, where: str) -> None:
        self._path = path
        self._where = where
        self._lock = _lock(path, where)
        self._epoch = _read_epoch(self._lock)

    def begin_epoch(self) -> int:
        """The time (ns); if the clock was set back, later all the same than all epochs that were ever given here."""
        self._epoch = max(time.time_ns(), self._epoch + STEP)
        self._note_epoch()
        return self._epoch

    def _note_epoch(self) -> None:
        with suppress(OSError):  # it is noted with the next one
            os.pwrite(self._lock, f"{self._epoch}\n".encode(), EPOCH_AT)

    def restore(self) -> None:
        """Make the directory and its lock anew if somebody has removed them. Raises what making it raises."""
        with suppress(OSError):
            if os.path.samestat(os.lstat(self._path / "lock"), os.fstat(self._lock)):
                return
        lock = _lock(self._path, self._where)
        os.close(self._lock)
        self._lock = lock
        self._note_epoch()
        log.error("%s was removed, or its lock: made again; do not clear it out while the collector runs", self._path)

    def refresh(self) -> None:
        """Make all that lies in it look new: what is old is removed by programs that clear out /tmp."""
        with suppress(OSError):  # no descriptor is left: the next time will do
            for path in self._path.glob("*"):
                with suppress(OSError):  # it was removed just now
                    os.utime(path, follow_symlinks=False)


def check_runtime_dir(path: Path, where: str) -> None:
    """Raise ConfigError where something stands at the path that RuntimeDir would refuse; nothing is made.

    What belongs to another user may do for who will run the collector.
    """
    if os.path.lexists(path) and not (os.path.isdir(path) and path.stat().st_uid != os.getuid()):
        os.close(_open_private(path, where))


def _lock(path: Path, where: str) -> int:
    directory = _open_private(path, where)
    try:
        lock = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
    except OSError as error:
        _refuse_full(f"{path}/lock cannot be made", error)
        cure = "remove it, or " if os.path.lexists(path / "lock") and error.errno != errno.EROFS else ""
        raise ConfigError(
            f"{where}: runtime_dir {path}: {path}/lock cannot be opened ({error.strerror}); {cure}{_name_another(path)}"
        ) from None
    finally:
        os.close(directory)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.pwrite(lock, f"{os.getpid():<{EPOCH_AT - 1}}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(lock, EPOCH_AT, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise Unavailable(f"a collector runs on {path} already (pid {holder}); stop it, or set runtime_dir") from None
    except OSError as error:
        os.close(lock)
        _refuse_full(f"{path}/lock cannot be written", error)
        raise Unavailable(f"{path}/lock cannot be written ({error.strerror}); set another runtime_dir") from None
    return lock


def _refuse_full(what: str, error: OSError) -> None:
    """Raise Unavailable if the disk has no room for data or files: it may have again, nothing is misconfigured."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise Unavailable(f"{what} ({error.strerror}); make room, or set another runtime_dir") from None


def _read_epoch(lock: int) -> int:
    try:
        return int(os.pread(lock, 20, EPOCH_AT))
    except ValueError:
        return 0  # there has been none


def _name_another(path: Path) -> str:
    example = default_runtime_dir({})
    return f'write another directory, for example "{example}{"-2" if path == example else ""}"'


def _open_private(path: Path, where: str) -> int:
    where, another = f"{where}: runtime_dir {path}", _name_another(path)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        _refuse_full(f"{path} cannot be made", error)
        cause = "it is a symbolic link" if os.path.islink(path) else error.strerror
        raise ConfigError(f"{where} cannot be used ({cause}); {another}") from None
    facts = os.fstat(directory)
    fault = ""
    if facts.st_uid != os.getuid():
        fault = f"belongs to user {facts.st_uid}; remove it, or {another}"
    elif facts.st_mode & 0o077:
        mode = f"{stat.S_IMODE(facts.st_mode):o}"
        # It may be /tmp or /run: for root to close these to all others would be a disaster.
        fault = f"is open to others (mode {mode}); if it is yours alone, close it (chmod 700), else {another}"
    if fault:
        os.close(directory)
        raise ConfigError(f"{where} {fault}")
    return directory
