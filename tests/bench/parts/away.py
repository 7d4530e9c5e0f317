"""How long a connection is away: from a cut to the first data of the next one, in round trips.

A proxy stands between the worker and the practice exchange. It takes connections at once, and holds back what it
passes on: what is waited for after connecting is round trips. The backoff before connecting is shown by itself.
"""

from functools import partial
from typing import Any

from tests.bench.lab import Lab, Measure, Results, Scale
from tests.bench.load import proxy
from tests.certificate import HAS_OPENSSL, make_certificate

DELAY = 0.05
"""Seconds each way."""

KINDS = ("book", "trades", "ticker")
LOGIN = {"PRACTICE_CLIENT_ID": "practice", "PRACTICE_CLIENT_SECRET": "practice"}


def list_cases(scale: Scale) -> dict[str, Measure]:
    """Without delay, with it, and with all that makes it longer."""
    far = partial(measure_away, delay=DELAY)
    if scale.quick:
        return {"worker 50 ms": far}
    cases: dict[str, Measure] = {"worker": partial(measure_away, delay=0.0), "worker 50 ms": far}
    cases["worker 50 ms, login"] = partial(far, login=True)
    if HAS_OPENSSL:
        cases["worker 50 ms, TLS"] = partial(far, tls=True)
        cases["worker 50 ms, TLS, login"] = partial(far, tls=True, login=True)
    return cases


def measure_away(lab: Lab, delay: float, tls: bool = False, login: bool = False) -> Results:
    """Cut a live connection; measure until data comes again. With a login the channels are raw, and need it."""
    with lab.open_run() as run:
        own = make_certificate(run.folder) if tls else ""
        url = run.exchange(*(("--certificate", own) if own else ())).url
        port = int(url.rpartition(":")[2].partition("/")[0])
        between = run.start(proxy.serve, lab.place.others, port, delay)
        near = url.replace(f":{port}/", f":{between.wait_facts('listening')['port']}/")
        follower = run.follow()
        environment = (LOGIN if login else {}) | ({"SSL_CERT_FILE": own} if own else {})
        run.collect({"bench": make_connection(near, run.endpoint, login)}, env=environment)
        follower.wait_facts("first")
        between.drain()
        between.order("cut")
        cut = between.wait_facts("cut")["time"]
        accepted = between.wait_facts("accepted")["time"]
        first = 0
        while first < accepted:  # what comes before is the answer to a late subscriber
            first = follower.wait_facts("first")["time"]
    found = {"away_ms": (first - cut) / 1e6, "backoff_ms": (accepted - cut) / 1e6, "ready_ms": (first - accepted) / 1e6}
    return found | ({"trips": found["ready_ms"] / (2000 * delay)} if delay else {})


def make_connection(url: str, endpoint: str, login: bool) -> dict[str, Any]:
    """The connection's table: the two perpetuals."""
    interval = "raw" if login else "100ms"
    channels = [f"{kind}.{coin}-PERPETUAL.{interval}" for kind in KINDS for coin in ("BTC", "ETH")]
    table = {"url": url, "publish": endpoint, "channels": channels}
    return table | ({"credentials": "PRACTICE"} if login else {})
