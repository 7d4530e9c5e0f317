"""A smoke run of the bench: it runs, and its numbers make sense. No test asserts a time."""

import json
import sys
from pathlib import Path

from tests.support import running


def test_quick_bench_measures_worker_and_yardsticks(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    with running(sys.executable, "-m", "tests.bench", "--quick", "--json", str(results)) as bench:
        assert bench.wait_exit(110) == 0, bench.text()
        assert "| worker/receive mix CPU us" in bench.text()
    sections = json.loads(results.read_text())["sections"]
    assert set(sections["speed"]) == {"receive mix", "relay mix", "plain mix", "worker mix"}
    for rounds in sections["speed"].values():
        assert rounds[0]["cpu_us"] > 0
        assert rounds[0]["rate"] > 0
    (worker,) = sections["speed"]["worker mix"]
    assert worker["jumps"] == 0, "a topic's sequence jumped"
    assert worker["received"] >= 1, "fewer messages came out than went in"
    (paced,) = sections["paced"]["worker mix 2k/s"]
    assert 0 < paced["p50_us"] <= paced["p99_us"] <= paced["p999_us"]
    (away,) = sections["away"]["worker mix"]
    assert 0 < away["backoff_ms"] < away["away_ms"]
