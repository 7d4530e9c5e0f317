"""How soon a worker is there, and what it weighs; how much CPU the commands take that people type."""

import os
import statistics
import subprocess
import time
from functools import partial

from tests.bench.lab import Lab, Load, Measure, Results, Scale, is_at_rest, read_time
from tests.bench.load.tape import MIX
from tests.bench.parts.speed import Case, measure_case
from tests.bench.place import read_uss
from tests.collected import Collected
from tests.support import collector, wait_until

LATER = 8
"""Workers that are started one by one after the first."""


def list_cases(scale: Scale) -> dict[str, Measure]:
    """One channel each; a hundred channels, before and after a load."""
    if scale.quick:
        return {"worker 1 channel": partial(measure_starts, later=1)}
    return {
        "worker 1 channel": partial(measure_starts, later=LATER),
        "worker 101 channels": measure_weight,
    }


def measure_starts(lab: Lab, later: int) -> Results:
    """Start a collector with one worker, then more while it runs. `first_ms`: from the command to the first message."""
    load = lab.find_load(5000, 20, MIX)
    with lab.open_run() as run:
        follower = run.follow()
        began = time.monotonic_ns()
        collecting = run.collect_load(load, load.channels[0], log_level="debug")
        first = follower.wait_facts("first")["time"] - began
        names = [f"later-{number}" for number in range(1, later + 1)]
        lives = [start_later(collecting, name, load, load.channels[n]) for n, name in enumerate(names, 1)]
        pids = [collecting.find_process(name).pid for name in names]
        wait_until(lambda: all(map(is_at_rest, pids)), "the workers to come to rest", timeout=60)
        return {
            "first_ms": first / 1e6,
            **{key: statistics.median(life[key] for life in lives) for key in lives[0]},
            "uss_idle_mb": statistics.median(map(read_uss, pids)),
            "help_ms": read_command("--help"),
            "state_ms": read_command("state", "--control", collecting.control),
        }


def start_later(collecting: Collected, name: str, load: Load, channel: str) -> Results:
    """Have one more worker started: ms from the decision to its `ready` and to live, and from the request to its
    answer."""
    asked = time.monotonic_ns()
    collecting.ask("connect", connection={"name": name, "url": load.url, "channels": [channel]})
    answer = (time.monotonic_ns() - asked) / 1e6
    began, ready, live = (read_time(collecting, f"{name}: {word}") for word in ("process start", "ready", "live"))
    return {"start_ms": ready - began, "live_ms": live - began, "answer_ms": answer}


def measure_weight(lab: Lab) -> Results:
    """The memory of a worker with a hundred channels, at rest and after a load."""
    found = measure_case(lab, Case("worker", instruments=25, count=100_000))
    return {key: found[key] for key in ("uss_idle_mb", "uss_mb", "peak_rss_mb", "missed")}


def read_command(*arguments: str) -> float:
    """CPU of one command, in ms."""
    process = subprocess.Popen(collector(*arguments), stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{arguments} ended with {process.returncode}"
    return 1000 * (used.ru_utime + used.ru_stime)
