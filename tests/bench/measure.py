"""One run of one case: a load server, a measured program, its subscribers; what it used, read from outside."""

import json
import multiprocessing
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.bench import server, subscriber, yardsticks
from tests.bench.place import pin, read_busy, read_peak_rss, read_usage, read_uss
from tests.bench.tape import MIX
from tests.support import collector, running, wait_until

spawn = multiprocessing.get_context("spawn")

Results = dict[str, float]


class Place(NamedTuple):
    """CPUs: one for the measured program, one for load server and subscribers; None leaves them to the system."""

    measured: int | None
    others: int | None


@dataclass(frozen=True)
class Case:
    """A program under a load: `count` messages at full speed, or `seconds` of `rate` a second in writes of `burst`."""

    program: str
    load: str = "mix"
    instruments: int = 20
    rate: int = 0
    burst: int = 1
    subscribers: int = 1
    count: int = 200_000
    seconds: float = 3.0

    @property
    def tape(self) -> tuple[int, int, dict[str, int]]:
        """The tape it plays: length, instruments, percent of each type. A paced load goes round and round."""
        return self.count, self.instruments, MIX if self.load == "mix" else {self.load: 100}

    @property
    def order(self) -> tuple[str, dict[str, Any]]:
        """What the load server is told."""
        if self.rate:
            return "paced", {"rate": self.rate, "burst": self.burst, "seconds": self.seconds}
        return "full", {"count": self.count}


class Process:
    """A process of the bench, and the pipe to it."""

    def __init__(self, target: Any, *arguments: Any) -> None:
        self.pipe, theirs = spawn.Pipe()
        self.process: BaseProcess = spawn.Process(target=target, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self.process.pid is not None
        return self.process.pid

    def wait_for(self, event: str, timeout: float = 60.0) -> dict[str, Any]:
        """The facts of the next such event; others before it are dropped. Raises AssertionError if it cannot come."""
        end = time.monotonic() + timeout
        while self.pipe.poll(max(0.0, end - time.monotonic())):
            name, facts = self.pipe.recv()
            if name == "broken":
                raise AssertionError(facts["reason"])
            if name == event:
                found: dict[str, Any] = facts
                return found
        raise AssertionError(f"waited {timeout:.0f} s in vain for {event!r} from process {self.pid}")

    def drain(self) -> None:
        """Drop what it has said so far."""
        while self.pipe.poll():
            self.pipe.recv()

    def end(self) -> None:
        """Make sure that it is gone."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Lab:
    """The bench: load servers, one for each tape and kept between runs, and all else for the length of a run."""

    def __init__(self, place: Place, settings: list[str] | None = None) -> None:
        """`settings` are lines for the [collector] table of the worker's configuration."""
        self.place = place
        self.settings = settings or []
        self._loads: dict[str, tuple[Process, dict[str, Any]]] = {}

    def close(self) -> None:
        """End the load servers."""
        for load, _ in self._loads.values():
            load.end()
        self._loads.clear()

    def run(self, case: Case) -> Results:
        """Run a case; return what was measured, by name (their meaning: docs/performance.md)."""
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            load, channels, url = self._find_load(case)
            endpoint = f"ipc://{folder}/publish"
            followers = [self._follow(stack, case, endpoint) for _ in range(case.subscribers)]
            started = time.monotonic_ns()
            if case.program == "worker":
                pid = stack.enter_context(self._run_worker(folder, url, channels, endpoint))
                end = followers[0]
            else:
                program = self._start_yardstick(stack, case, url, channels, endpoint)
                pid, end = program.pid, program if case.program == "receive" else followers[0]
            results = self._wait_ready(load, len(channels), pid)
            if case.program == "worker" and "book" in case.tape[2]:
                results["start_ms"] = (followers[0].wait_for("first")["time"] - started) / 1e6
            return results | self._measure(case, load, end, pid)

    def run_cut(self, case: Case) -> Results:
        """Cut a live worker's connection; measure until data comes again."""
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            load, channels, url = self._find_load(case)
            endpoint = f"ipc://{folder}/publish"
            follower = self._follow(stack, case, endpoint)
            pid = stack.enter_context(self._run_worker(folder, url, channels, endpoint))
            self._wait_ready(load, len(channels), pid)
            follower.wait_for("first")
            follower.drain()
            load.pipe.send(("cut", {}))
            cut = load.wait_for("cut")["time"]
            accepted = load.wait_for("accepted")["time"]
            first = follower.wait_for("first")["time"]
            return {"away_ms": (first - cut) / 1e6, "backoff_ms": (accepted - cut) / 1e6}

    def _find_load(self, case: Case) -> tuple[Process, list[str], str]:
        key = str(case.tape)
        if key not in self._loads:
            load = Process(server.serve, self.place.others, case.tape)
            self._loads[key] = load, load.wait_for("listening")
        load, facts = self._loads[key]
        load.drain()
        return load, facts["channels"], f"ws://127.0.0.1:{facts['port']}/ws/api/v2"

    def _follow(self, stack: ExitStack, case: Case, endpoint: str) -> Process:
        follower = Process(subscriber.follow, endpoint, case.program == "relay", self.place.others)
        stack.callback(follower.end)
        return follower

    def _start_yardstick(self, stack: ExitStack, case: Case, url: str, channels: list[str], endpoint: str) -> Process:
        # The worker's own default; without it ZeroMQ's thread interrupts the loop after each send.
        batch = case.program == "relay" and 'scheduling = "normal"' not in self.settings
        program = Process(yardsticks.run, case.program, url, channels, endpoint, batch)
        stack.callback(program.end)
        return program

    @contextmanager
    def _run_worker(self, folder: Path, url: str, channels: list[str], endpoint: str) -> Iterator[int]:
        config, settings = folder / "bench.toml", "\n".join(self.settings)
        config.write_text(
            f'[collector]\nruntime_dir = "{folder}"\n{settings}\n[[connection]]\nname = "bench"\nurl = "{url}"\n'
            f'publish = "{endpoint}"\nretry_delay = 0.1\nchannels = {json.dumps(channels)}\n'
        )
        with running(*collector("--log-level", "warning", "run", str(config))) as program:
            pin(self.place.others, program.pid)
            try:
                yield wait_until(lambda: _find_worker(program.pid), "the worker process")
            except AssertionError as error:
                raise AssertionError(f"{error}; the collector printed:\n{program.text()[:3000]}") from None

    def _wait_ready(self, load: Process, channels: int, pid: int) -> Results:
        """Wait until all is subscribed and the program has come to rest."""
        while load.wait_for("subscribed")["count"] < channels:
            pass
        pin(self.place.measured, pid)
        wait_until(lambda: _is_idle(pid), "the program to come to rest", timeout=60)
        return {"uss_idle_mb": read_uss(pid)}

    def _measure(self, case: Case, load: Process, end: Process, pid: int) -> Results:
        busy, before = read_busy(self.place.measured), read_usage(pid)
        load.pipe.send(case.order)
        sent = load.wait_for("sent")
        last = end.wait_for("last")
        after, elapsed = read_usage(pid), last["time"]
        busy = read_busy(self.place.measured) - busy
        count = sent["count"]
        elapsed -= sent["start"]
        results = {
            "cpu_us": (after.cpu - before.cpu) / count / 1000,
            "rate": count / elapsed * 1e9,
            "switches": (after.switches - before.switches) / count,
            "others": 100 * max(0, busy - (after.cpu - before.cpu)) / elapsed,
            "uss_mb": read_uss(pid),
            "peak_rss_mb": read_peak_rss(pid),
            "jumps": last.get("jumps", 0),
            "received": sum(last.get("counts", {}).values()) / count,
        }
        if case.rate and end is not None and case.program != "receive":
            results |= _describe_latencies(end.pipe.recv_bytes())
        return results


def _find_worker(pid: int) -> int | None:
    for child in psutil.Process(pid).children(recursive=True):
        if child.cmdline()[:1] == ["collector: bench"]:
            return child.pid
    return None


def _is_idle(pid: int) -> bool:
    before = read_usage(pid).cpu
    time.sleep(0.1)
    return read_usage(pid).cpu - before < 3_000_000


def _describe_latencies(packed: bytes) -> Results:
    """Percentiles of the time from socket to subscriber, in microseconds."""
    ordered = sorted(array("q", packed))
    return {
        f"{name}_us": ordered[int(len(ordered) * share)] / 1000
        for name, share in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999))
    }
