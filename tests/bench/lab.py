"""Where measurements are made: load servers that stay, and for each run a folder with all the processes in it."""

import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench.load import server, subscriber
from tests.bench.load.process import Process
from tests.bench.place import Place, pin, read_usage, read_uss
from tests.certificate import make_certificate, trusted
from tests.collected import Collected
from tests.exchange_client import exchange
from tests.support import wait_until

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
        self.settings = tomllib.loads("\n".join(settings or []))
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

    def __init__(self, place: Place, settings: dict[str, Any], folder: Path, stack: ExitStack) -> None:
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
    ) -> Collected:  # fmt: skip
        """Run the collector on these connections, in a directory of that name."""
        (self.folder / name).mkdir()
        tables = {key: {"retry_delay": 0.1, **table} for key, table in connections.items()}
        collecting = Collected(self.folder / name, tables, log_level=log_level, env=env, collector=self._settings)
        self._stack.callback(collecting.program.end)
        pin(self.place.others, collecting.program.pid)
        return collecting

    def collect_load(self, load: Load, *channels: str, log_level: str = "warning") -> Collected:
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


def read_time(collecting: Collected, pattern: str) -> float:
    """When it logged such a line, in ms since 1970; waits for it. The log's times are whole ms."""
    line = collecting.program.wait_line(rf"(\d\S+Z) +\S+ +(?:supervisor: )?{pattern}", timeout=60)
    return 1000 * datetime.fromisoformat(line[1]).timestamp()


def is_at_rest(pid: int) -> bool:
    """Whether a process does next to nothing; looks for 0.1 s."""
    before = read_usage(pid).cpu
    time.sleep(0.1)
    return read_usage(pid).cpu - before < REST_NS
