"""`python -m tests.bench`: measure the cases of each part in alternation, print tables, write JSON."""

import argparse
import json
import os
import platform
import signal
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.bench.lab import Lab, Measure, Scale
from tests.bench.parts import away, many, plan3000, speed, stall, start, steady
from tests.bench.place import Place
from tests.bench.tables import Rounds, print_results

PARTS: dict[str, Callable[[Scale], dict[str, Measure]]] = {
    **{section: partial(speed.list_cases, section) for section in speed.SECTIONS},
    "away": away.list_cases,
    "stall": stall.list_cases,
    "start": start.list_cases,
    "many": many.list_cases,
    "plan3000": plan3000.list_cases,
    "steady": steady.list_cases,
}
"""By name, in the order in which they run."""

ONCE = ("many", "plan3000", "steady")
"""Parts that take long by themselves: one round unless --runs says otherwise."""


def list_cases(part: str, options: argparse.Namespace) -> dict[str, Measure]:
    """The measurements of a part that were asked for, by label."""
    cases = PARTS[part](Scale(options.quick, options.minutes, options.rate, options.workers))
    wanted = tuple(options.programs or [""])
    return {label: case for label, case in cases.items() if label.startswith(wanted)}


def run_part(lab: Lab, name: str, cases: dict[str, Measure], rounds: int) -> dict[str, Rounds]:
    """Measure all cases of a part in turn, as often as asked."""
    results: dict[str, Rounds] = {label: [] for label in cases}
    for number in range(rounds):
        for label, measure in cases.items():
            found = measure(lab)
            results[label].append(found)
            shown = " ".join(f"{key}={value:,.2f}" for key, value in found.items())
            print(f"{name} {number + 1}/{rounds} {label}: {shown}", file=sys.stderr, flush=True)
    return results


def describe_machine(place: Place) -> dict[str, Any]:
    """What the numbers depend on."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    packages = ("aiohttp", "uvloop", "msgspec", "msgpack", "pyzmq")
    return {
        "cpu": model.partition(": ")[2],
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in packages},
        "measured_on_cpu": place.measured,
        "others_on_cpu": place.others,
    }


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parts: dict[str, Any] = {"action": "append", "choices": PARTS, "metavar": "PART"}
    parser.add_argument("--only", **parts, help=f"run this part only (may be repeated): {', '.join(PARTS)}")
    parser.add_argument("--skip", **parts, default=[], help="leave this part out (may be repeated)")
    parser.add_argument("--runs", type=int, help="rounds of each part (default 5; 1 of many, plan3000 and steady)")
    parser.add_argument("--programs", nargs="+", help="run only the cases whose label begins with one of these")
    parser.add_argument("--quick", action="store_true", help="a smoke run: one short round")
    parser.add_argument("--minutes", type=float, default=60.0, help="length of steady (default 60)")
    parser.add_argument("--rate", type=int, default=20_000, help="messages a second of steady (default 20000)")
    parser.add_argument("--workers", type=int, default=100, help="workers of many (default 100)")
    parser.add_argument("--no-pin", action="store_true", help="leave the processes to the system's scheduler")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="a line for the worker's [collector] table")
    parser.add_argument("--json", type=Path, help="write all results to this file; steady's samples go beside it")
    return parser.parse_args(arguments)


def find_rounds(part: str, options: argparse.Namespace) -> int:
    """How often the cases of a part are measured."""
    if options.quick:
        return 1
    return options.runs or (1 if part in ONCE else 5)


def main(arguments: list[str] | None = None) -> None:
    """Run the bench."""
    options = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all that runs is ended in order
    pinned = (os.cpu_count() or 1) >= 2 and not options.no_pin
    place = Place(0, 1) if pinned else Place(None, None)
    written: dict[str, Any] = {"machine": describe_machine(place), "settings": options.set or [], "sections": {}}
    lab = Lab(place, options.set, options.json.parent if options.json else None)
    try:
        for part in options.only or [part for part in PARTS if part not in options.skip]:
            cases = list_cases(part, options)
            if not cases:
                continue
            results = run_part(lab, part, cases, find_rounds(part, options))
            written["sections"][part] = results
            print_results(part, results)
            lab.close()
    finally:
        lab.close()
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(written, indent=1))
