"""How long the stream is held up by what else a worker has to do: answer many who come late, take a deep book."""

from collections.abc import Callable
from functools import partial
from typing import Any

from collector.channels import parse_channel
from tests.bench.lab import Lab, Measure, Results, Scale
from tests.bench.load import subscriber
from tests.bench.load.process import Process
from tests.bench.load.tape import DEEP_CHANNEL, MIX
from tests.bench.parts.speed import describe_latencies
from tests.collected import Collected

SLICE = 0.1
"""Seconds of latencies that are looked at together."""

SPAN = 1.5
"""Seconds before the cause that are compared with as many after it."""

Cause = Callable[[Collected, Process, list[str]], Results]


def do_nothing(collecting: Collected, late: Process, channels: list[str]) -> Results:
    """The noise."""
    return {}


def join_all(collecting: Collected, late: Process, channels: list[str]) -> Results:
    """One late subscriber subscribes to each topic by name, as fast as it can."""
    late.order("join", topics=[f"{parse_channel(name).topic}".encode() for name in channels])
    facts: Results = late.wait_facts("answered")
    return {"joins": len(channels), "answered_ms": facts["answered_ms"], "asking_ms": facts["asking_ms"]}


def take_deep_book(collecting: Collected, late: Process, channels: list[str]) -> Results:
    """The snapshot of a deep book comes."""
    collecting.ask("subscribe", connection="bench", channels=[DEEP_CHANNEL])
    return {}


def join_deep_book(collecting: Collected, late: Process, channels: list[str]) -> Results:
    """One late subscriber asks for the deep book, which the worker has had for a while."""
    return join_all(collecting, late, [DEEP_CHANNEL])


def list_cases(scale: Scale) -> dict[str, Measure]:
    """Each cause, and none."""
    if scale.quick:
        return {"worker join storm": partial(measure_stall, cause=join_all, instruments=20, rate=2000, seconds=1.0)}
    causes: dict[str, Cause] = {
        "undisturbed": do_nothing,
        "join storm": join_all,
        "deep snapshot": take_deep_book,
        "deep join": join_deep_book,
    }
    return {f"worker {name}": partial(measure_stall, cause=cause) for name, cause in causes.items()}


def measure_stall(lab: Lab, cause: Cause, instruments: int = 250, rate: int = 5000, seconds: float = 5.0) -> Results:
    """Latency of the messages of a paced load before something happens in the middle of it, and from then on."""
    load = lab.find_load(10_000, instruments, MIX)
    channels = load.channels[:-1]  # a thousand, each with a topic of its own
    with lab.open_run() as run:
        follower = run.follow(slices=SLICE)
        late = run.start(subscriber.join, run.endpoint, lab.place.others)
        collecting = run.collect_load(load)
        run.settle(load, len(load.channels), collecting.find_process("bench").pid, [follower])
        late.wait_facts("connected")
        if cause is join_deep_book:
            take_deep_book(collecting, late, [])
        follower.drain()
        load.server.order("paced", rate=rate, burst=1, seconds=seconds)
        slices = [follower.wait_facts("slice") for _ in range(int(seconds / 2 / SLICE))]
        began = follower.wait_facts("slice")["time"]
        found = cause(collecting, late, channels)
        name = "slice"
        while name != "last":
            name, facts = follower.wait_for("slice", "last")
            slices.append(facts)
    deep = slices[-1]["counts"].get("deep", 0)
    assert deep or cause not in (take_deep_book, join_deep_book), "the deep book never came"
    return found | compare_slices(slices, began) | {"deep": deep}


def compare_slices(slices: list[dict[str, Any]], began: int) -> Results:
    """Latencies before and after the moment `began`, in us."""
    span = SPAN * 1e9
    before = [each["latencies"] for each in slices if began - span < each["time"] <= began]
    after = [each["latencies"] for each in slices if began < each["time"] <= began + span]
    spreads = {"before": describe_latencies(b"".join(before)), "after": describe_latencies(b"".join(after))}
    return {f"{when}_{key}": value for when, spread in spreads.items() for key, value in spread.items()}
