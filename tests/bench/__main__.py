"""`python -m tests.bench`: run the cases of each section in alternation, print tables, write JSON."""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.bench.measure import Case, Lab, Place, Results

Rounds = list[Results]

SECTIONS: dict[str, list[Case]] = {
    "speed": [Case(program) for program in ("receive", "relay", "plain", "worker")],
    "types": [
        Case(program, load=load) for load in ("book", "trade", "ticker", "quote") for program in ("receive", "worker")
    ],
    "paced": [
        Case(program, rate=rate, count=50_000)
        for rate in (1000, 5000, 20_000)
        for program in ("receive", "relay", "plain", "worker")
    ],
    "bursts": [
        Case(program, rate=20_000, burst=burst, count=50_000) for burst in (20, 200) for program in ("relay", "worker")
    ],
    "instruments": [
        Case(program, instruments=instruments, count=100_000)
        for instruments in (1, 20, 500, 5000)
        for program in ("receive", "worker")
    ],
    "subscribers": [
        Case(program, subscribers=subscribers, count=50_000)
        for subscribers in (1, 2, 5, 10)
        for program in ("relay", "worker")
    ],
    "away": [Case("worker", count=50_000)],
}
"""What is run, in alternation within a section. Sections that compare hold the yardstick before the worker."""

QUICK: dict[str, list[Case]] = {
    "speed": [Case(program, count=5000) for program in ("receive", "relay", "plain", "worker")],
    "paced": [Case(program, count=5000, rate=2000, seconds=0.5) for program in ("relay", "worker")],
    "away": [Case("worker", count=5000)],
}

COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "cpu_us": ("CPU us", "{:.2f}".format),
    "rate": ("messages/s", "{:,.0f}".format),
    "p50_us": ("p50 us", "{:,.0f}".format),
    "p99_us": ("p99 us", "{:,.0f}".format),
    "p999_us": ("p99.9 us", "{:,.0f}".format),
    "switches": ("switches", "{:.2f}".format),
    "uss_idle_mb": ("USS idle MB", "{:.1f}".format),
    "uss_mb": ("USS after MB", "{:.1f}".format),
    "peak_rss_mb": ("RSS peak MB", "{:.1f}".format),
    "start_ms": ("start ms", "{:,.0f}".format),
    "away_ms": ("away ms", "{:,.0f}".format),
    "backoff_ms": ("of it backoff ms", "{:,.0f}".format),
    "jumps": ("seq jumps", "{:.0f}".format),
    "others": ("others %", "{:.0f}".format),
}
"""What is printed, each as min/median/max; all else is in the JSON only. CPU and switches are per message."""


def label_case(case: Case) -> str:
    """A case's name in tables and JSON."""
    parts = [case.program, case.load]
    if case.rate:
        parts.append(f"{case.rate // 1000 or case.rate / 1000:g}k/s" + (f" by {case.burst}" if case.burst > 1 else ""))
    if case.instruments != 20:
        parts.append(f"{case.instruments} instruments")
    if case.subscribers != 1:
        parts.append(f"{case.subscribers} subscribers")
    return " ".join(parts)


def run_section(lab: Lab, name: str, cases: list[Case], rounds: int) -> dict[str, Rounds]:
    """Run all cases of a section in turn, as often as asked."""
    results: dict[str, Rounds] = {label_case(case): [] for case in cases}
    for number in range(rounds):
        for case in cases:
            label = label_case(case)
            found = lab.run_cut(case) if name == "away" else lab.run(case)
            results[label].append(found)
            shown = " ".join(f"{key}={value:,.2f}" for key, value in found.items())
            print(f"{name} {number + 1}/{rounds} {label}: {shown}", file=sys.stderr, flush=True)
    return results


def divide(over: Rounds, under: Rounds, key: str) -> list[float]:
    """The ratio of each round: what ran in the same minute is compared."""
    return [a[key] / b[key] for a, b in zip(over, under, strict=True) if key in a and key in b]


def compare(results: dict[str, Rounds]) -> dict[str, list[float]]:
    """The ratios that are quoted: the worker's cost over each yardstick's under the same load, and plain's over it."""
    ratios: dict[str, list[float]] = {}
    for label, rounds in results.items():
        program, _, load = label.partition(" ")
        for yardstick in ("receive", "relay", "plain"):
            other = results.get(f"{yardstick} {load}")
            if program != "worker" or other is None:
                continue
            for key in ("cpu_us", "p50_us", "p99_us") if yardstick == "relay" else ("cpu_us",):
                name, over, under = (
                    ("plain/worker", other, rounds) if yardstick == "plain" else (f"worker/{yardstick}", rounds, other)
                )
                found = divide(over, under, key)
                if found:
                    ratios[f"{name} {load} {COLUMNS[key][0]}"] = found
    return ratios


def show_spread(values: list[float], write: Callable[[float], str]) -> str:
    """Minimum, median and maximum."""
    return " / ".join(write(value) for value in (min(values), statistics.median(values), max(values)))


def print_table(name: str, results: dict[str, Rounds]) -> None:
    """Print one section as a Markdown table, then its ratios."""
    keys = [key for key in COLUMNS if any(key in found for rounds in results.values() for found in rounds)]
    rows = [[name, *(COLUMNS[key][0] for key in keys)], ["---"] * (len(keys) + 1)]
    for label, rounds in results.items():
        cells = [[found[key] for found in rounds if key in found] for key in keys]
        rows.append(
            [label, *(show_spread(cell, COLUMNS[k][1]) if cell else "" for k, cell in zip(keys, cells, strict=True))]
        )
    ratios = [[label, show_spread(values, "{:.2f}".format)] for label, values in compare(results).items()]
    print_rows(rows)
    if ratios:
        print_rows([["ratio", "min / median / max"], ["---", "---"], *ratios])


def print_rows(rows: list[list[str]]) -> None:
    """Print the rows of a Markdown table, aligned, and an empty line."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    print(flush=True)


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
    parser.add_argument("--runs", type=int, default=5, help="rounds of each section (default 5)")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="run this section only (may be repeated)")
    parser.add_argument("--programs", nargs="+", help="run the cases of these programs only")
    parser.add_argument("--quick", action="store_true", help="a smoke run: one short round")
    parser.add_argument("--no-pin", action="store_true", help="leave the processes to the system's scheduler")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="a line for the worker's [collector] table")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the bench."""
    options = parse_arguments(arguments)
    pinned = (os.cpu_count() or 1) >= 2 and not options.no_pin
    place = Place(0, 1) if pinned else Place(None, None)
    sections = QUICK if options.quick else SECTIONS
    written: dict[str, Any] = {"machine": describe_machine(place), "settings": options.set or [], "sections": {}}
    lab = Lab(place, options.set)
    try:
        for name in options.only or sections:
            cases = [case for case in sections[name] if not options.programs or case.program in options.programs]
            results = run_section(lab, name, cases, 1 if options.quick else options.runs)
            written["sections"][name] = results
            print_table(name, results)
            lab.close()
    finally:
        lab.close()
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()
