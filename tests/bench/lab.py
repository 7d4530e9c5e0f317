"""Where measurements are made: load servers that stay, and for each run a folder with all the processes in it."""

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.bench.load import server, subscriber
from tests.bench.load.process import Process
from tests.bench.place import Place, pin, read_usage, read_uss
from tests.certificate import make_certificate, trusted
from tests.exchange_client import exchange
from tests.pipeline import ask
from tests.support import Program, collector, running, wait_until

Results = dict[str, float]
"""What one measurement found, by name; `tables.COLUMNS` says how it is shown."""

Measure = Callable[["Lab"], Results]

REST_NS = 3_000_000
"""A process is at rest that uses less CPU than this in 0.1 s."""


class Scale(NamedTuple):
    """How much is measured: a smoke run or all of it; minutes and messages/s of `steady`, workers of `many`."""

    quick: bool
    minutes: float
    rate: int
    workers: int


class Load(NamedTuple):
    """A load server, the channels of its tape and where it listens."""

    server: Process
    channels: list[str]
    url: str


class Practice(NamedTuple):
    """A practice exchange: where it listens, and its process."""

    url: str
    pid: int


class Lab:
    """The bench: one load server for each tape, kept between runs.

    `settings` are lines for the [collector] table; what a part draws or lists beside its results goes into `folder`.
    """

    def __init__(self, place: Place, settings: list[str] | None = None, folder: Path | None = None) -> None:
        self.place = place
        self.settings = settings or []
        self.folder = folder
        self._loads: dict[str, Load] = {}
        self._certificate = ""
        self._stack = ExitStack()

    def close(self) -> None:
        """End the load servers."""
        for load in self._loads.values():
            load.server.end()
        self._loads.clear()
        self._stack.close()
        self._certificate = ""

    def find_load(self, count: int, instruments: int, mix: dict[str, int], tls: bool = False) -> Load:
        """The server of a tape of `count` frames; started if there is none yet."""
        tape = (count, instruments, mix)
        key = f"{tape} {tls}"
        if key not in self._loads:
            process = Process(server.serve, self.place.others, tape, self._find_certificate() if tls else "")
            facts = process.wait_facts("listening")
            url = f"{'wss' if tls else 'ws'}://127.0.0.1:{facts['port']}/ws/api/v2"
            self._loads[key] = Load(process, facts["channels"], url)
        load = self._loads[key]
        load.server.drain()
        return load

    def _find_certificate(self) -> str:
        """The path of our own certificate, which all that is started from now on trusts."""
        if not self._certificate:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
            self._certificate = make_certificate(Path(folder))
            self._stack.enter_context(trusted(self._certificate))
        return self._certificate

    @contextmanager
    def open_run(self, pinned: bool = True) -> Iterator["Run"]:
        """A run; at its end all that was started in it is gone. Not `pinned`: the system places its processes."""
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            yield Run(self.place if pinned else Place(None, None), self.settings, folder, stack)


class Run:
    """The processes of one measurement. Those that are not measured run on the others' CPU."""

    def __init__(self, place: Place, settings: list[str], folder: Path, stack: ExitStack) -> None:
        self.place = place
        self.folder = folder
        self.endpoint = f"ipc://{folder}/publish"
        self._settings = settings
        self._stack = stack

    def start(self, target: Any, *arguments: Any) -> Process:
        """Start a process of the bench."""
        process = Process(target, *arguments)
        self._stack.callback(process.end)
        return process

    def follow(self, raw: bool = False, slices: float = 0.0) -> Process:
        """Start a subscriber; it reports each `slices` seconds, or only at the end."""
        return self.start(subscriber.follow, self.endpoint, raw, slices, self.place.others)

    def exchange(self, *options: str) -> "Practice":
        """Run the practice exchange. Any number of connections may come."""
        url, program = self._stack.enter_context(exchange("--faults", "connections:0", *options))
        pin(self.place.others, program.pid)
        return Practice(url, program.pid)

    def collect(
        self, connections: dict[str, dict[str, Any]], name: str = "run", *,
        env: dict[str, str] | None = None, log_level: str = "warning",
    ) -> "Collecting":  # fmt: skip
        """Run the collector on these connections, in a runtime directory of that name."""
        config = write_config(self.folder / f"{name}.toml", self.folder / name, connections, self._settings)
        command = collector("--log-level", log_level, "run", str(config))
        program = self._stack.enter_context(running(*command, env=env))
        pin(self.place.others, program.pid)
        return Collecting(program, f"ipc://{self.folder}/{name}/control")

    def collect_load(self, load: Load, *channels: str, log_level: str = "warning") -> "Collecting":
        """Run the collector on one connection, `bench`, that takes a load, or only these channels of it."""
        connection = {"url": load.url, "publish": self.endpoint, "channels": channels or load.channels}
        return self.collect({"bench": connection}, log_level=log_level)

    def settle(self, load: Load, channels: int, pid: int, followers: Iterable[Process]) -> Results:
        """Wait until all is subscribed, on both sides, and the measured program has come to rest on its CPU."""
        for follower in followers:
            follower.wait_facts("connected")
        while load.server.wait_facts("subscribed")["count"] < channels:
            pass
        pin(self.place.measured, pid)
        wait_until(lambda: is_at_rest(pid), "the program to come to rest", timeout=60)
        return {"uss_idle_mb": read_uss(pid)}


class Collecting:
    """One `collector run`."""

    def __init__(self, program: Program, control: str) -> None:
        self.program = program
        self.control = control

    def find(self, name: str = "bench") -> int:
        """The process id of a worker, as soon as it is there."""
        try:
            found: int = wait_until(lambda: _find_worker(self.program.pid, name), f"the worker {name}")
        except AssertionError as error:
            raise AssertionError(f"{error}; the collector printed:\n{self.program.text()[:3000]}") from None
        return found

    def ask(self, op: str, **arguments: Any) -> Any:
        """Make a control request; return the result."""
        return ask(self.control, op, **arguments)

    def read_time(self, pattern: str) -> float:
        """When it logged such a line, in ms since 1970; waits for it. The log's times are whole ms."""
        line = self.program.wait_line(rf"(\d\S+Z) +\S+ +(?:supervisor: )?{pattern}", timeout=60)
        return 1000 * datetime.fromisoformat(line[1]).timestamp()


def write_config(path: Path, runtime_dir: Path, connections: dict[str, dict[str, Any]], settings: list[str]) -> Path:
    """Write a collector's file; return its path. JSON's strings, numbers, booleans and lists are TOML's as well."""
    lines = ["[collector]", f'runtime_dir = "{runtime_dir}"', *settings]
    for name, table in connections.items():
        keys = {"name": name, "retry_delay": 0.1, **table}
        lines += ["", "[[connection]]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def _find_worker(pid: int, name: str) -> int | None:
    for child in psutil.Process(pid).children(recursive=True):
        if child.cmdline()[:1] == [f"collector: {name}"]:
            return child.pid
    return None


def is_at_rest(pid: int) -> bool:
    """Whether a process does next to nothing; looks for 0.1 s."""
    before = read_usage(pid).cpu
    time.sleep(0.1)
    return read_usage(pid).cpu - before < REST_NS
