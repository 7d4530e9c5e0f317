"""What a message costs under a load: full speed, everyday rates, bursts, many instruments, many subscribers."""

from array import array
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from tests.bench.lab import Lab, Load, Measure, Results, Run, Scale
from tests.bench.load import yardsticks
from tests.bench.load.process import Process
from tests.bench.load.tape import MIX
from tests.bench.place import read_busy, read_peak_rss, read_usage, read_uss
from tests.certificate import HAS_OPENSSL

ALL = ("receive", "relay", "plain", "worker")
"""The programs; where they are compared the yardsticks come before the worker."""


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
    tls: bool = False

    @property
    def label(self) -> str:
        """Its name in tables and JSON."""
        parts = [self.program, self.load, *(["TLS"] if self.tls else [])]
        if self.rate:
            rate = f"{self.rate // 1000 or self.rate / 1000:g}k/s"
            parts.append(rate + (f" by {self.burst}" if self.burst > 1 else ""))
        if self.instruments != 20:
            parts.append(f"{self.instruments} instruments")
        if self.subscribers != 1:
            parts.append(f"{self.subscribers} subscribers")
        return " ".join(parts)

    @property
    def mix(self) -> dict[str, int]:
        """Percent of each type on its tape."""
        return MIX if self.load == "mix" else {self.load: 100}

    @property
    def order(self) -> tuple[str, dict[str, Any]]:
        """What the load server is told. A paced load goes round and round the tape."""
        if self.rate:
            return "paced", {"rate": self.rate, "burst": self.burst, "seconds": self.seconds}
        return "full", {"count": self.count}


SECTIONS: dict[str, list[Case]] = {
    "speed": [Case(program) for program in ALL],
    "tls": [
        *(Case(p, tls=True) for p in ALL if HAS_OPENSSL),
        *(Case(p, tls=True, rate=5000, count=50_000) for p in ("relay", "worker") if HAS_OPENSSL),
    ],
    "types": [Case(p, load=load) for load, p in product(("book", "trade", "ticker", "quote"), ("receive", "worker"))],
    "paced": [Case(p, rate=rate, count=50_000) for rate, p in product((1000, 5000, 20_000), ALL)],
    "bursts": [Case(p, rate=20_000, burst=n, count=50_000) for n, p in product((20, 200), ("relay", "worker"))],
    "instruments": [
        Case(p, instruments=n, count=100_000) for n, p in product((1, 20, 500, 5000), ("receive", "worker"))
    ],
    "subscribers": [Case(p, subscribers=n, count=50_000) for n, p in product((1, 2, 5, 10), ("relay", "worker"))],
}

QUICK: dict[str, list[Case]] = {
    "speed": [Case(program, count=5000) for program in ALL],
    "tls": [Case("worker", count=5000, tls=True)] if HAS_OPENSSL else [],
    "paced": [Case("worker", count=5000, rate=2000, seconds=0.5)],
}


def list_cases(section: str, scale: Scale) -> dict[str, Measure]:
    """The measurements of one section; none if the smoke run leaves it out."""
    cases = (QUICK if scale.quick else SECTIONS).get(section, [])
    return {case.label: partial(measure_case, case=case) for case in cases}


def measure_case(lab: Lab, case: Case) -> Results:
    """Run a case; return what was measured, by name (their meaning: docs/performance.md)."""
    load = lab.find_load(case.count, case.instruments, case.mix, case.tls)
    with lab.open_run() as run:
        followers = [run.follow(raw=case.program == "relay") for _ in range(case.subscribers)]
        end = followers[0]
        if case.program == "worker":
            pid = run.collect_load(load).find_process("bench").pid
        else:
            program = _start_yardstick(run, lab, case.program, load)
            pid, end = program.pid, program if case.program == "receive" else end
        results = run.settle(load, len(load.channels), pid, followers)
        return results | _measure_load(lab, case, load, end, pid)


def _start_yardstick(run: Run, lab: Lab, program: str, load: Load) -> Process:
    # Without it ZeroMQ's thread interrupts the loop after each send; the worker avoids that in its own way.
    batch = program == "relay" and lab.settings.get("scheduling") != "normal"
    return run.start(yardsticks.run, program, load.url, load.channels, run.endpoint, batch)


def _measure_load(lab: Lab, case: Case, load: Load, end: Process, pid: int) -> Results:
    measured = lab.place.measured
    busy, before = read_busy(measured), read_usage(pid)
    verb, arguments = case.order
    load.server.order(verb, **arguments)
    sent = load.server.wait_facts("sent")
    last = end.wait_facts("last")
    after, busy = read_usage(pid), read_busy(measured) - busy
    count, elapsed = sent["count"], last["time"] - sent["start"]
    results = {
        "cpu_us": (after.cpu - before.cpu) / count / 1000,
        "rate": count / elapsed * 1e9,
        "switches": (after.switches - before.switches) / count,
        "others": 100 * max(0, busy - (after.cpu - before.cpu)) / elapsed,
        "uss_mb": read_uss(pid),
        "peak_rss_mb": read_peak_rss(pid),
        "missed": _count_missed(count, last) if case.program == "relay" else last.get("missed", 0),
        "received": sum(last.get("counts", {}).values()) / count,
    }
    return results | describe_latencies(last.get("latencies", b""))


def _count_missed(sent: int, last: dict[str, Any]) -> int:
    """Frames that were sent and did not come; the last of all is not among those sent, and some came before them."""
    came: int = last["counts"]["frame"]
    return max(0, sent + 1 - came)


def describe_latencies(packed: bytes) -> Results:
    """Percentiles of the time from socket to subscriber, in microseconds; empty without any."""
    ordered = sorted(array("q", packed))
    shares = {"p50": 0.5, "p99": 0.99, "p999": 0.999} if ordered else {}
    found = {f"{name}_us": ordered[int(len(ordered) * share)] / 1000 for name, share in shares.items()}
    return found | ({"max_us": ordered[-1] / 1000} if ordered else {})
