"""One load for a long time: what memory, CPU and latency do over it, as numbers and as a drawing."""

import json
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.lab import Lab, Load, Measure, Results, Scale
from tests.bench.load.process import Process
from tests.bench.load.tape import MIX
from tests.bench.parts.speed import describe_latencies
from tests.bench.place import read_usage, read_uss
from tests.bench.plot import Panel, write_plot

SLICE = 5.0
"""Seconds between samples."""

WARM = 0.5
"""Share of the time at the beginning that is left out of the memory's slope: buffers grow with the first bursts."""


def list_cases(scale: Scale) -> dict[str, Measure]:
    """One long case."""
    if scale.quick:
        return {"worker": partial(measure_steady, minutes=0.02, rate=1000, every=0.25)}
    return {f"worker {scale.minutes:g} min": partial(measure_steady, minutes=scale.minutes, rate=scale.rate)}


def measure_steady(lab: Lab, minutes: float, rate: int, every: float = SLICE) -> Results:
    """Run a paced load; the middle of all samples, and how they change. Writes steady.json and steady.svg."""
    load = lab.find_load(10_000, 20, MIX)
    with lab.open_run() as run:
        follower = run.follow(slices=every)
        pid = run.collect_load(load).find_process("bench").pid
        run.settle(load, len(load.channels), pid, [follower])
        follower.drain()
        samples = list(take_samples(load, follower, pid, minutes, rate))
    samples = [sample for sample in samples if "p50_us" in sample]
    if lab.folder is not None:
        write_samples(lab.folder, samples)
    return sum_up(samples)


def take_samples(load: Load, follower: Process, pid: int, minutes: float, rate: int) -> Iterator[Results]:
    """One sample for each slice of the load."""
    load.server.order("paced", rate=rate, burst=1, seconds=minutes * 60)
    before, then, start = read_usage(pid).cpu, 0, 0
    name = "slice"
    while name != "last":
        name, facts = follower.wait_for("slice", "last")
        used = read_usage(pid).cpu
        count = len(facts["latencies"]) // 8
        sample = {"minute": (facts["time"] - start) / 60e9, "missed": facts["missed"], "uss_mb": read_uss(pid)}
        if start and count:
            spent = {"cpu_us": (used - before) / count / 1000, "rate": count / (facts["time"] - then) * 1e9}
            yield sample | spent | describe_latencies(facts["latencies"])
        before, then, start = used, facts["time"], start or facts["time"]


def sum_up(samples: list[Results]) -> Results:
    """The medians, the worst, and the slope of the memory in KB an hour once it is warm."""
    middle = {key: statistics.median(s[key] for s in samples) for key in ("cpu_us", "rate", "p50_us", "p99_us")}
    warm = samples[int(len(samples) * WARM) :]
    hours, memory = [s["minute"] / 60 for s in warm], [s["uss_mb"] * 1024 for s in warm]
    return middle | {
        "worst_p99_us": max(s["p99_us"] for s in samples),
        "uss_first_mb": samples[0]["uss_mb"],
        "uss_mb": samples[-1]["uss_mb"],
        "slope_kb_h": statistics.linear_regression(hours, memory).slope,
        "missed": samples[-1]["missed"],
    }


def write_samples(folder: Path, samples: list[dict[str, Any]]) -> None:
    """Leave all samples as JSON, and drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "steady.json").write_text(json.dumps(samples, indent=1))
    panels = [
        Panel("memory of its own, MB", {"USS": [s["uss_mb"] for s in samples]}),
        Panel("CPU, us a message", {"CPU": [s["cpu_us"] for s in samples]}),
        Panel("latency, us", {"p99": [s["p99_us"] for s in samples], "p50": [s["p50_us"] for s in samples]}, True),
    ]
    write_plot(folder / "steady.svg", [s["minute"] for s in samples], panels)
