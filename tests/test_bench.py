"""A smoke run of the bench: it runs, and its numbers make sense. No test asserts a time."""

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.support import running


def measure(folder: Path, *parts: str) -> tuple[dict[str, Any], str]:
    """The results of a smoke run of some parts, and what it printed."""
    chosen = [argument for part in parts for argument in ("--only", part)]
    results = folder / "results.json"
    with running(sys.executable, "-m", "tests.bench", "--quick", "--json", str(results), *chosen) as bench:
        assert bench.wait_exit(110) == 0, bench.text()
        return json.loads(results.read_text())["sections"], bench.text()


def test_worker_and_yardsticks_under_a_load(tmp_path: Path) -> None:
    parts, printed = measure(tmp_path, "speed", "tls", "paced", "stall")
    assert "| worker/receive mix CPU us" in printed
    assert set(parts["speed"]) == {"receive mix", "relay mix", "plain mix", "worker mix"}
    for rounds in parts["speed"].values():
        assert rounds[0]["cpu_us"] > 0
        assert rounds[0]["rate"] > 0
    (worker,) = parts["speed"]["worker mix"]
    assert worker["missed"] == 0
    assert worker["received"] >= 1, "fewer messages came out than went in"
    for rounds in parts.get("tls", {}).values():  # there is none without openssl
        assert (rounds[0]["missed"], rounds[0]["received"] >= 1) == (0, True)
    (paced,) = parts["paced"]["worker mix 2k/s"]
    assert 0 < paced["p50_us"] <= paced["p99_us"] <= paced["p999_us"]
    (stall,) = parts["stall"]["worker join storm"]
    assert stall["joins"] == 80, "not every topic was answered"
    assert min(stall["before_max_us"], stall["after_max_us"]) > 0


def test_starts_cuts_and_many_workers(tmp_path: Path) -> None:
    parts, _ = measure(tmp_path, "away", "start", "many", "plan3000")
    (away,) = parts["away"]["worker 50 ms"]
    assert 0 < away["backoff_ms"] < away["away_ms"]
    assert away["trips"] >= 2, "the upgrade takes a round trip, and what is asked for another one"
    (start,) = parts["start"]["worker 1 channel"]
    assert 0 < start["start_ms"] <= start["live_ms"]
    (many,) = parts["many"]["workers 4"]
    assert many["live"] == 4
    assert not any(many[trouble] for trouble in ("reconnects", "restarts", "gaps", "missed"))
    (plan,) = parts["plan3000"]["worker 500 channels"]
    assert (plan["calls"], plan["confirmed"]) == (1, 500)


def test_steady_leaves_its_samples_and_a_drawing(tmp_path: Path) -> None:
    parts, _ = measure(tmp_path, "steady")
    (steady,) = parts["steady"]["worker"]
    assert steady["missed"] == 0
    samples = json.loads((tmp_path / "steady.json").read_text())
    assert all(sample["uss_mb"] > 0 and sample["p50_us"] <= sample["p99_us"] for sample in samples)
    drawn = ElementTree.parse(tmp_path / "steady.svg").getroot()
    lines = [element.get("points", "").split() for element in drawn.iter() if element.tag.endswith("polyline")]
    assert [len(line) for line in lines] == [len(samples)] * 4
