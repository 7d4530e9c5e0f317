"""Results as Markdown tables: one row a measurement, each cell minimum, median and maximum of its rounds."""

import statistics
from collections.abc import Callable

from tests.bench.lab import Results

Rounds = list[Results]
Write = Callable[[float], str]

WHOLE: Write = "{:,.0f}".format
TENTHS: Write = "{:,.1f}".format
HUNDREDTHS: Write = "{:,.2f}".format

COLUMNS: dict[str, tuple[str, Write]] = {
    "cpu_us": ("CPU us", HUNDREDTHS),
    "rate": ("messages/s", WHOLE),
    "p50_us": ("p50 us", WHOLE),
    "p99_us": ("p99 us", WHOLE),
    "p999_us": ("p99.9 us", WHOLE),
    "worst_p99_us": ("worst p99 us", WHOLE),
    "switches": ("switches", HUNDREDTHS),
    "first_ms": ("first message ms", WHOLE),
    "start_ms": ("later start ms", WHOLE),
    "live_ms": ("later live ms", WHOLE),
    "answer_ms": ("connect answered ms", WHOLE),
    "uss_idle_mb": ("USS idle MB", TENTHS),
    "uss_first_mb": ("USS first MB", TENTHS),
    "uss_mb": ("USS after MB", TENTHS),
    "slope_kb_h": ("slope KB/h", WHOLE),
    "peak_rss_mb": ("RSS peak MB", TENTHS),
    "help_ms": ("--help CPU ms", WHOLE),
    "state_ms": ("state CPU ms", WHOLE),
    "away_ms": ("away ms", WHOLE),
    "backoff_ms": ("of it backoff ms", WHOLE),
    "ready_ms": ("from connecting ms", WHOLE),
    "trips": ("round trips", HUNDREDTHS),
    "before_p99_us": ("p99 before us", WHOLE),
    "after_p99_us": ("p99 after us", WHOLE),
    "before_max_us": ("max before us", WHOLE),
    "after_max_us": ("max after us", WHOLE),
    "joins": ("joins", WHOLE),
    "answered_ms": ("all answered ms", WHOLE),
    "live": ("live", WHOLE),
    "age_p50_us": ("age p50 us", WHOLE),
    "age_p99_us": ("age p99 us", WHOLE),
    "age_max_us": ("age max us", WHOLE),
    "workers_cpu": ("workers CPU %", TENTHS),
    "exchange_cpu": ("exchange CPU %", TENTHS),
    "supervisor_cpu": ("supervisors CPU %", HUNDREDTHS),
    "idle_cpu": ("a worker CPU %", HUNDREDTHS),
    "supervisor_1": ("supervisor CPU % of 1", HUNDREDTHS),
    "supervisor_32": ("of 32", HUNDREDTHS),
    "supervisor_100": ("of 100, reckoned", HUNDREDTHS),
    "reconnects": ("reconnects", WHOLE),
    "restarts": ("restarts", WHOLE),
    "gaps": ("gaps", WHOLE),
    "calls": ("calls", WHOLE),
    "plan_s": ("plan s", HUNDREDTHS),
    "real_s": ("real s", HUNDREDTHS),
    "real_plan": ("real / plan", HUNDREDTHS),
    "missed": ("missed", WHOLE),
    "others": ("others %", WHOLE),
}
"""What is printed; all else is in the JSON only. CPU us and switches are per message, CPU % of one core."""


def print_results(name: str, results: dict[str, Rounds]) -> None:
    """Print one part, then its ratios. Wide parts with few rows are printed on their side."""
    keys = [key for key in COLUMNS if any(key in found for rounds in results.values() for found in rounds)]
    rows = [[name, *(COLUMNS[key][0] for key in keys)]]
    for label, rounds in results.items():
        cells = [[found[key] for found in rounds if key in found] for key in keys]
        rows.append(
            [label, *(show_spread(cell, COLUMNS[k][1]) if cell else "" for k, cell in zip(keys, cells, strict=True))]
        )
    if len(keys) > 2 * len(results):
        rows = [list(column) for column in zip(*rows, strict=True)]
    print_rows(rows)
    ratios = [[label, show_spread(values, HUNDREDTHS)] for label, values in compare(results).items()]
    if ratios:
        print_rows([["ratio", "min / median / max"], *ratios])


def print_rows(rows: list[list[str]]) -> None:
    """Print the rows of a Markdown table, aligned, and an empty line; the first row is its head."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
    print(flush=True)


def show_spread(values: list[float], write: Write) -> str:
    """Minimum, median and maximum; the value alone if there is one."""
    spread = (min(values), statistics.median(values), max(values)) if len(values) > 1 else values
    return " / ".join(map(write, spread))


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


def divide(over: Rounds, under: Rounds, key: str) -> list[float]:
    """The ratio of each round: what ran in the same minute is compared."""
    return [a[key] / b[key] for a, b in zip(over, under, strict=True) if key in a and key in b]
