"""Whether `collector plan` is right: its estimate for many channels against the time that subscribing really takes."""

import json
import subprocess
from functools import partial

from tests.bench.lab import Lab, Measure, Results, Scale, read_time
from tests.bench.parts.many import KINDS, list_instruments
from tests.pipeline import write_config
from tests.support import collector, wait_until


def list_cases(scale: Scale) -> dict[str, Measure]:
    """As many as Deribit's credits allow at once, and more."""
    counts = (500,) if scale.quick else (3000, 12_000)
    return {f"worker {count:,} channels": partial(measure_plan, count=count) for count in counts}


def measure_plan(lab: Lab, count: int) -> Results:
    """Subscribe one connection to so many channels of a practice exchange that keeps Deribit's credits.

    The real time runs from the opened WebSocket to live, when every channel is confirmed; in seconds.
    """
    with lab.open_run() as run:
        url = run.exchange("--options", f"{count // len(KINDS)}", "--rate", "20").url
        instruments = list_instruments(url)
        channels = [kind.format(name) for name in instruments for kind in KINDS][:count]
        assert len(channels) == count
        connection = {"url": url, "publish": run.endpoint, "channels": channels, "timeout": 30.0}
        config = write_config(run.folder, {"bench": connection}, collector=lab.settings)
        planned = subprocess.run(collector("plan", "--json", f"{config}"), check=True, capture_output=True)
        (pool,) = json.loads(planned.stdout)["pools"]
        collecting = run.collect({"bench": connection}, log_level="info")
        real = read_time(collecting, "bench: live") - read_time(collecting, "bench: bootstrapping")
        states = wait_until(lambda: collecting.ask("get_state", connection="bench"), "the state")
    found = {"calls": float(pool["calls"]), "plan_s": pool["seconds"], "real_s": real / 1000}
    found["confirmed"] = float(len(states["channels"]["confirmed"]))
    return found | ({"real_plan": found["real_s"] / found["plan_s"]} if found["plan_s"] else {})
