"""Many workers on one machine: whether they keep up with the practice exchange's market, and what they cost idle."""

import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from tests.bench.lab import Lab, Measure, Results, Run, Scale
from tests.bench.load import subscriber
from tests.bench.load.process import Process
from tests.bench.parts.speed import describe_latencies
from tests.bench.place import read_usage, read_uss
from tests.collected import Collected
from tests.exchange_client import get
from tests.support import wait_until

A_FILE = 25
"""Workers of one collector at most; the configuration takes 32."""

KINDS = ("book.{}.100ms", "trades.{}.100ms", "ticker.{}.100ms", "quote.{}")
"""The channels of each instrument."""

USUAL, BUSY = 200, 1000
"""Book events a second of the whole market: the practice exchange's default, and five times that."""

QUIET = 32
"""Idle workers of one collector. From these and from a single one those of a hundred are reckoned."""


def list_cases(scale: Scale) -> dict[str, Measure]:
    """Few and all with the market, and some with nothing to do."""
    if scale.quick:
        return {"workers 4": partial(measure_market, workers=4, slices=4, every=0.25)}
    cases: dict[str, Measure] = {
        f"workers {workers}": partial(measure_market, workers=workers, slices=30) for workers in (10, scale.workers)
    }
    busy = partial(measure_market, workers=scale.workers, slices=30, rate=BUSY)
    return cases | {f"workers {scale.workers}, busy market": busy, "workers idle": partial(measure_idle, seconds=30)}


def measure_market(lab: Lab, workers: int, slices: int, every: float = 1.0, rate: int = USUAL) -> Results:
    """Collectors that each take the whole market of one practice exchange, spread over their workers; one subscriber
    to all of them."""
    files = -(-workers // A_FILE)
    with lab.open_run(pinned=False) as run:
        practice = run.exchange("--rate", f"{rate}")
        instruments = list_instruments(practice.url)
        shares = [instruments[place :: workers // files] for place in range(workers // files)]
        collectings = [
            run.collect(dict(name_workers(run, practice.url, f"{number}", shares)), f"run-{number}", log_level="info")
            for number in range(files)
        ]
        pids = {pid for collecting in collectings for pid in wait_live(collecting)}
        follower = run.start(subscriber.watch, [f"ipc://{path}" for path in run.folder.glob("*.pub")], every)
        supervisors = {collecting.program.pid for collecting in collectings}
        groups = {"workers": pids, "supervisor": supervisors, "exchange": {practice.pid}}
        found = watch_market(follower, groups, slices)
        states = [state for collecting in collectings for state in collecting.ask("get_state").values()]
        totals = {key: float(sum(state[key] for state in states)) for key in ("reconnects", "restarts", "gaps")}
        live = float(sum(state["state"] == "live" for state in states))
        return found | totals | {"live": live, "uss_mb": statistics.median(map(read_uss, pids))}


def list_instruments(url: str) -> list[str]:
    """All instruments, those of a kind together: dealt out in turn, each worker gets of each kind."""
    rows = get(url, "public/get_instruments", currency="any")[1]["result"]
    return [row["instrument_name"] for row in sorted(rows, key=lambda row: (row["kind"], row["instrument_name"]))]


def name_workers(run: Run, url: str, prefix: str, shares: list[list[str]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The connections of one collector."""
    for number, share in enumerate(shares):
        name = f"w-{prefix}-{number}"
        channels = [kind.format(instrument) for instrument in share for kind in KINDS]
        yield name, {"url": url, "publish": f"ipc://{run.folder}/{name}.pub", "channels": channels}


def wait_live(collecting: Collected) -> list[int]:
    """Wait until all connections are live and have their channels; return the pids of their workers."""
    collecting.program.wait_line("control on")

    def look() -> list[int]:
        states = collecting.ask("get_state").values()
        ready = [
            state["state"] == "live" and len(state["channels"]["confirmed"]) == len(state["channels"]["asked"])
            for state in states
        ]
        return [state["pid"] for state in states] if all(ready) else []

    pids: list[int] = wait_until(look, "all workers to be live", timeout=120)
    return pids


def watch_market(follower: Process, groups: dict[str, set[int]], slices: int) -> Results:
    """What comes in so many slices, and the CPU that each group of processes uses for it, in percent of a core."""
    follower.wait_facts("slice")
    follower.drain()  # joins
    begin = follower.wait_facts("slice")
    before = {name: read_all(pids) for name, pids in groups.items()}
    passed = [follower.wait_facts("slice") for _ in range(slices)]
    end, ages = passed[-1], describe_latencies(b"".join(each["latencies"] for each in passed))
    elapsed = end["time"] - begin["time"]
    used = {f"{name}_cpu": 100 * (read_all(pids) - before[name]) / elapsed for name, pids in groups.items()}
    count = sum(end["counts"].values()) - sum(begin["counts"].values())
    return {"rate": count / elapsed * 1e9, "missed": end["missed"], **used} | {f"age_{k}": v for k, v in ages.items()}


def read_all(pids: set[int]) -> int:
    """CPU that processes have used together, in ns."""
    return sum(read_usage(pid).cpu for pid in pids)


def measure_idle(lab: Lab, seconds: int) -> Results:
    """One collector with one and with many workers, each with one channel on which nothing comes."""
    one, many = (measure_quiet(lab, count, seconds) for count in (1, QUIET))
    each = (many["supervisor_cpu"] - one["supervisor_cpu"]) / (QUIET - 1)
    return {
        "supervisor_1": one["supervisor_cpu"],
        f"supervisor_{QUIET}": many["supervisor_cpu"],
        "supervisor_100": one["supervisor_cpu"] + 99 * each,
        "idle_cpu": many["workers_cpu"] / QUIET,
        "uss_idle_mb": many["uss_idle_mb"],
    }


def measure_quiet(lab: Lab, workers: int, seconds: int) -> Results:
    """CPU in percent of a core, all workers together, and the memory of the median worker."""
    with lab.open_run(pinned=False) as run:
        practice = run.exchange("--rate", "0")
        names = list_instruments(practice.url)[:workers]
        connections = {
            f"q-{number}": {"url": practice.url, "channels": [f"trades.{name}.100ms"]}
            for number, name in enumerate(names)
        }
        collecting = run.collect(connections, log_level="info")
        groups = {"workers": set(wait_live(collecting)), "supervisor": {collecting.program.pid}}
        time.sleep(2.0)
        began, before = time.monotonic_ns(), {name: read_all(pids) for name, pids in groups.items()}
        time.sleep(seconds)
        elapsed = time.monotonic_ns() - began
        used = {f"{name}_cpu": 100 * (read_all(pids) - before[name]) / elapsed for name, pids in groups.items()}
        return used | {"uss_idle_mb": statistics.median(map(read_uss, groups["workers"]))}
