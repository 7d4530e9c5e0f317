"""One running collector as a process, with the practice exchange behind it, and what tests ask and see of it."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from collector.messages import ControlError
from tests.pipeline import Subscriber, ask, exchange, find_port, short_directory, subscribed, write_config
from tests.support import Program, collector, wait_until

QUICK: dict[str, Any] = {"url": "practice", "retry_delay": 0.05, "channels": ["quote.BTC-PERPETUAL"]}
"""A connection that is soon live, and soon back."""

MANY = [f"other.channel.{number}" for number in range(2000)]
"""Channels enough for the start of their worker to take a moment."""

PATIENT = "from collector.supervisor import keeper; keeper.BEATS_MISSED = 60.0"
"""What may run `first`: a worker that a test stops is not killed before the test lets it go on."""


class Collected:
    """A `collector run` of some connections; its runtime directory is `directory`/run.

    `first`: Python that its process runs before, to set a time that no test could wait for; `under`: the command that
    runs it.
    """

    def __init__(
        self, directory: Path, connections: dict[str, dict[str, Any]], *options: str, log_level: str = "debug",
        env: dict[str, str] | None = None, cwd: Path | None = None, first: str = "", under: tuple[str, ...] = (),
        **sections: Any,
    ) -> None:  # fmt: skip
        self.directory = directory
        self.runtime_dir = directory / "run"
        self.config = write_config(directory, connections, **sections)
        self.control = f"ipc://{self.runtime_dir}/control"
        command = collector("--log-level", log_level, "run", str(self.config), *options)
        if first:
            code = f"{first}; import runpy; runpy.run_module('collector', run_name='__main__', alter_sys=True)"
            command = (command[0], "-c", code, *command[3:])
        self.program = Program(*under, *command, env={"TMPDIR": str(directory), **(env or {})}, cwd=cwd)
        self.seen: dict[int, psutil.Process] = {}

    def ask(self, op: str, **arguments: Any) -> Any:
        """Make a control request; return the result."""
        return ask(self.control, op, **arguments)

    def refuse(self, op: str, **arguments: Any) -> ControlError:
        """Make a control request that must be refused; return the error."""
        try:
            result = self.ask(op, **arguments)
        except ControlError as error:
            return error
        raise AssertionError(f"{op} was not refused: {result}")

    def get_state(self, name: str) -> dict[str, Any]:
        """The state map of a connection."""
        state: dict[str, Any] = self.ask("get_state", connection=name)
        return state

    def wait_state(self, name: str, word: str = "live", **more: Any) -> dict[str, Any]:
        """Wait until a connection's state has that word, and the other values."""

        def look() -> dict[str, Any] | None:
            state = self.get_state(name)
            wanted = {"state": word, **more}
            return state if all(state.get(key) == value for key, value in wanted.items()) else None

        self.program.wait_line("control on")
        found: dict[str, Any] = wait_until(look, f"{name} {word} {more}")
        return found

    def find_processes(self) -> list[psutil.Process]:
        """All processes of this collector, itself included; they are remembered for `wait_gone`."""
        own = psutil.Process(self.program.pid)
        processes = [own, *own.children(recursive=True)]
        self.seen |= {process.pid: process for process in processes}
        return processes

    def find_process(self, title: str) -> psutil.Process:
        """The worker process of that name, as soon as it is there."""

        def look() -> psutil.Process | None:
            return next((each for each in self.find_processes() if each.cmdline()[:1] == [f"collector: {title}"]), None)

        try:
            found: psutil.Process = wait_until(look, f"the worker {title}")
        except AssertionError as error:
            raise AssertionError(f"{error}; the collector printed:\n{self.program.text()[:3000]}") from None
        return found

    def wait_gone(self) -> None:
        """Wait until every process that was ever seen is gone."""
        for process in self.seen.values():
            wait_until(partial(lambda each: not is_alive(each), process), f"the end of {process}")

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """End it in order; return the exit code."""
        self.find_processes()
        self.program.process.send_signal(number)
        return self.program.wait_exit()


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that only waits for its parent to look does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def collected(connections: dict[str, dict[str, Any]] | None = None, *options: str, **more: Any) -> Iterator[Collected]:
    """Run a collector for the length of a `with` block, with a practice exchange unless `exchange=None`."""
    sections = {"exchange": {}} | {key: more.pop(key) for key in ("exchange",) if key in more}
    with short_directory() as directory:
        wanted = {key: value for key, value in sections.items() if value is not None}
        running = Collected(directory, connections or {"a": QUICK}, *options, **more, **wanted)
        try:
            yield running
        finally:
            if running.program.process.poll() is None:
                running.find_processes()
            running.program.end()
            for process in running.seen.values():
                if is_alive(process):
                    process.kill()


@contextmanager
def overheard(channels: list[str], faults: str = "", *options: str) -> Iterator[tuple[Collected, Subscriber]]:
    """A collector on one connection, `a`, and a subscriber; rules of the wire are kept but for times.

    The exchange, of these options, comes when the subscriber hears already: nothing has to be caught up with.
    """
    port, publish = find_port(), f"tcp://127.0.0.1:{find_port()}"
    connection = {
        "url": f"ws://127.0.0.1:{port}/ws/api/v2?faults={faults}", "channels": channels, "publish": publish,
        "retry_count": 100, "retry_delay": 0.2, "credentials": "PRACTICE",
    }  # fmt: skip
    keys = {"PRACTICE_CLIENT_ID": "practice", "PRACTICE_CLIENT_SECRET": "practice"}
    with collected({"a": connection}, exchange=None, env=keys) as run, subscribed(publish) as ear:
        ear.wait_for("deribit.heartbeat.a.1s")
        with exchange(port, *options):
            yield run, ear
            assert run.stop(signal.SIGTERM) == 0, run.program.text()
            ear.check("time")


def hold_next(run: Collected, name: str) -> psutil.Process:
    """Kill a worker, and stop the next one as soon as there is one."""
    before = run.wait_state(name)["pid"]
    psutil.Process(before).kill()
    pid = wait_until(lambda: (pid := run.get_state(name)["pid"]) != before and pid, "the next worker")
    worker = psutil.Process(pid)
    worker.suspend()
    wait_until(lambda: worker.status() == psutil.STATUS_STOPPED, "its stop")
    return worker


def give_up_unheard(run: Collected, name: str, channel: str) -> psutil.Process:
    """Stop a worker, and give up a channel there, which it does not hear until it goes on."""
    worker = psutil.Process(run.wait_state(name)["pid"])
    worker.suspend()
    soon = time.time_ns() + 300_000_000
    assert run.refuse("unsubscribe", connection=name, channels=[channel], deadline=soon).code == "timeout"
    return worker


@contextmanager
def held_at_start(run: Collected, name: str) -> Iterator[None]:
    """Kill a worker, and hold the next one up before it is ready."""
    worker = hold_next(run, name)
    # Its state does not show whether it has said already that it is ready: it has not before its endpoint is bound.
    while any(each.laddr for each in worker.net_connections("all")):
        worker.resume()
        worker = hold_next(run, name)
    yield
    assert run.get_state(name)["state"] == "starting"
    worker.resume()
    assert run.wait_state(name)["pid"] == worker.pid
