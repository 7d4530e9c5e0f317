"""What tests share: real programs started as processes, and waiting for facts instead of time."""

import asyncio
import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
FRAMES = os.environ.get("COLLECTOR_FRAMES", "")

PATIENCE = 60.0
"""Seconds that a test waits for what should come soon: on a busy machine programs take many times as long to start."""


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test; at its end no task may be left."""

    async def run(*arguments: Any, **named: Any) -> None:
        await test(*arguments, **named)
        await asyncio.sleep(0)  # what has just been cancelled ends now
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    @functools.wraps(test)
    def run_test(*arguments: Any, **named: Any) -> None:
        asyncio.run(run(*arguments, **named))

    return run_test


def wait_until(fact: Callable[[], Any], what: str, timeout: float = PATIENCE) -> Any:
    """Return fact() as soon as it is true; fail with `what` if it does not become true."""
    end = time.monotonic() + timeout
    while True:
        value = fact()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"waited {timeout:.0f} s in vain for {what}")
        time.sleep(0.01)


@contextmanager
def no_more_threads() -> Iterator[None]:
    """The system refuses each further thread of this process: there is no memory for the stack that it asks for."""
    before = threading.stack_size(1 << 62)
    try:
        yield
    finally:
        threading.stack_size(before)


class Program:
    """One real process; its output is read line by line as it comes."""

    def __init__(self, *argv: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
        self.process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}, cwd=cwd or REPOSITORY, start_new_session=True,
        )  # fmt: skip
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(pipe, lines), daemon=True)
            for pipe, lines in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: Any, lines: list[str]) -> None:
        for line in pipe:
            lines.append(line.rstrip("\n"))

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_line(self, pattern: str, timeout: float = PATIENCE, stream: str = "any") -> re.Match[str]:
        """Return the first match of the pattern in a line of stdout or stderr, when it comes."""

        def find() -> re.Match[str] | None:
            lines = {"out": self.out, "err": self.err, "any": self.out + self.err}[stream]
            return next((m for line in list(lines) if (m := re.search(pattern, line))), None)

        try:
            found: re.Match[str] = wait_until(find, f"a line like {pattern!r}", timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}; it printed:\n{self.text()[-4000:]}") from None
        return found

    def wait_exit(self, timeout: float = PATIENCE) -> int:
        """Wait for the end; return the exit code."""
        code = self.process.wait(timeout)
        for reader in self._readers:
            reader.join(5)
        return code

    def text(self) -> str:
        """All that it has printed so far, stdout first."""
        return "\n".join([*self.out, *self.err])

    def end(self) -> None:
        """Make sure that it is gone, and all that it has started."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(8)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # a shell goes without those that it runs
        self.wait_exit()


@contextmanager
def running(*argv: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> Iterator[Program]:
    """Run a program for the length of a `with` block."""
    program = Program(*argv, env=env, cwd=cwd)
    try:
        yield program
    finally:
        program.end()


def as_no_root(*argv: str) -> list[str]:
    """The command line that runs a program as a user who owns what we own, and may not open all, as root may."""
    become = ["unshare", "-r", f"--map-user={os.getpid() + 1_000_000}"]
    if subprocess.run([*become, "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody be another user")
    return [*become, *argv]


def collector(*arguments: str) -> tuple[str, ...]:
    """The command line of this checkout's `collector`."""
    return (sys.executable, "-m", "collector", *arguments)
