"""The plan: calls cut to Deribit's limits, their time by its credits, and the command that prints it."""

import json
import os
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import to_builtins

from collector.cli.plan import write_plan
from collector.config import ConfigError, load_config
from collector.config.patterns import Instrument
from collector.limits import (
    MAX_CHANNELS,
    MAX_FRAME,
    chunk_channels,
    measure_call,
)
from collector.planning.plan import Listing, PlannedPattern, make_plan, plan_calls
from tests.pipeline import exchange, find_port
from tests.support import REPOSITORY, collector
from workers.deribit.connection.bootstrap import build_first_requests
from workers.deribit.connection.subscriptions import Subscriptions

METHOD = "public/subscribe"
CHANNELS = st.lists(st.text("ABC-123.", min_size=1, max_size=200), max_size=300)


def write_call(channels: list[str], method: str) -> bytes:
    """The frame in the widest spelling that a JSON writer of ours could choose."""
    request = {"jsonrpc": "2.0", "id": 2**63, "method": method, "params": {"channels": channels}}
    return json.dumps(request).encode()


@given(CHANNELS)
def test_chunks_hold_every_channel_in_order_within_both_limits(channels: list[str]) -> None:
    channels *= 5
    chunks = chunk_channels(channels, METHOD)
    assert [channel for chunk in chunks for channel in chunk] == channels
    for chunk in chunks:
        assert 1 <= len(chunk) <= MAX_CHANNELS
        assert len(write_call(chunk, METHOD)) <= measure_call(chunk, METHOD) <= MAX_FRAME
    for chunk, following in pairwise(chunks):
        assert len(chunk) == MAX_CHANNELS or measure_call([*chunk, following[0]], METHOD) > MAX_FRAME


def test_long_names_are_cut_by_bytes_and_short_ones_by_count() -> None:
    short = [f"quote.BTC-{number}" for number in range(1_200)]
    assert [len(chunk) for chunk in chunk_channels(short, METHOD)] == [500, 500, 200]
    long = [f"book.BTC-CCOND-27MAR26-80000_90000_110000_120000-{number:04}.none.10.100ms" for number in range(1_300)]
    chunks = chunk_channels(long, METHOD)
    assert all(len(chunk) < MAX_CHANNELS and len(write_call(chunk, METHOD)) < MAX_FRAME for chunk in chunks)
    assert len(chunks) == 4


def test_what_needs_a_login_is_asked_for_after_it_by_calls_of_its_own_as_a_worker_does() -> None:
    names = ["user.portfolio.any", "book.X.raw", "quote.X", "user.lock"]
    calls = [(call.method, call.channels) for call in plan_calls(names)]
    assert calls == [("public/subscribe", 1), ("public/subscribe", 1), ("private/subscribe", 2)]
    worker = Subscriptions()
    worker.ask(names)
    sent = worker.plan_calls(logged_in=False, awaits_login=True) + worker.plan_calls(logged_in=True)
    assert [(call.method, len(call.channels)) for call in sent] == calls


def write_file(folder: Path, text: str) -> str:
    path = folder / "desk.toml"
    path.write_text(text)
    return str(path)


def write_connection(name: str, channels: list[str], more: str = "") -> str:
    url = "wss://www.deribit.com/ws/api/v2"
    return f'[[connection]]\nname = "{name}"\nurl = "{url}"\nchannels = {channels}\n{more}\n'


def test_a_plan_counts_calls_time_and_login(tmp_path: Path) -> None:
    environ = {"DESK_CLIENT_ID": "anna", "DESK_CLIENT_SECRET": "hush"}
    login = 'credentials = "DESK"\ncancel_on_disconnect = true'
    first = write_connection("a", [f"quote.A-{number}" for number in range(3_000)], login)
    second = write_connection("b", [f"quote.B-{number}" for number in range(3_000)], login)
    plan = make_plan(load_config(write_file(tmp_path, first + second), environ))
    assert [len(connection.calls) for connection in plan.connections] == [6, 6]
    assert [connection.seconds for connection in plan.connections] == [0.0, 0.0]
    assert plan.connections[0].login == "DESK"
    assert plan.connections[0].bootstrap == (
        "public/auth", "public/hello", "public/set_heartbeat", "public/get_time", "private/enable_cancel_on_disconnect",
    )  # fmt: skip
    sent = {*build_first_requests(30.0, {}), "private/enable_cancel_on_disconnect"}  # what a worker really sends
    assert set(plan.connections[0].bootstrap) == sent
    (pool,) = plan.pools
    assert (pool.host, pool.login, pool.connections, pool.calls) == ("www.deribit.com", "DESK", ("a", "b"), 12)
    assert pool.seconds == pytest.approx(0.9)
    assert any("2 connections share one pool" in note for note in plan.notes)
    assert "hush" not in json.dumps(to_builtins(plan))
    lines = list(write_plan(plan))
    largest = max(call.bytes for call in plan.connections[0].calls)
    assert re.search(rf"^a +\S+/a\.pub +3000 \(3000 quote\) +\d+/s +6 +{largest} B +DESK$", "\n".join(lines), re.M)
    assert "subscribed   a, b at www.deribit.com as DESK: 12 calls, 0.9 s and the round trips" in lines


def test_connections_with_other_keys_draw_on_other_pools(tmp_path: Path) -> None:
    environ = {f"{who}_CLIENT_{part}": who for who in ("ANNA", "BERT") for part in ("ID", "SECRET")}
    text = "".join(
        write_connection(who.lower(), [f"quote.{who}"], f'credentials = "{who}"') for who in ("ANNA", "BERT")
    ) + write_connection("none", [])
    plan = make_plan(load_config(write_file(tmp_path, text), environ))
    assert [(pool.login, pool.connections) for pool in plan.pools] == [
        ("ANNA", ("anna",)), ("BERT", ("bert",)), ("", ("none",)),
    ]  # fmt: skip
    assert set(plan.connections[2].bootstrap) == set(build_first_requests(30.0, None))
    assert any(note.startswith("none has no channels") for note in plan.notes)


def test_one_key_at_one_host_is_one_pool_however_they_are_written(tmp_path: Path) -> None:
    environ = {"ANNA_CLIENT_ID": "x", "ANNA_CLIENT_SECRET": "x", "BERT_CLIENT_ID": "x", "BERT_CLIENT_SECRET": "y"}
    text = write_connection("anna", [], 'credentials = "ANNA"')
    text += write_connection("bert", [], 'credentials = "BERT"').replace("www.deribit.com", "WWW.deribit.com:443")
    text += write_connection("port", [], 'credentials = "BERT"').replace("www.deribit.com", "www.deribit.com:80")
    plan = make_plan(load_config(write_file(tmp_path, text), environ))
    assert [(pool.host, pool.login, pool.connections) for pool in plan.pools] == [
        ("www.deribit.com", "ANNA, BERT", ("anna", "bert")), ("www.deribit.com:80", "BERT", ("port",)),
    ]  # fmt: skip


def run_plan(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DERIBIT_TEST_")}
    command = collector("plan", *arguments)
    return subprocess.run(command, cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=30)


def test_the_command_prints_a_table_for_people() -> None:
    done = run_plan("configs/deribit.toml")
    assert (done.returncode, done.stderr) == (0, "")
    assert "configs/deribit.toml: 3 of 32 connections (REST requests in flight count too)\n" in done.stdout
    assert "tcp://127.0.0.1:5602" in done.stdout
    assert "subscribed   futures, options, reference at www.deribit.com without login: 3 calls, at once" in done.stdout


def test_the_command_prints_json_for_programs() -> None:
    done = run_plan("configs/demo.toml", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    plan = json.loads(done.stdout)
    assert [connection["name"] for connection in plan["connections"]] == ["futures", "options"]
    assert plan["connections"][0]["calls"] == [{"method": METHOD, "channels": 9, "bytes": 359}]
    assert plan["connections_limit"] == 32


def test_the_command_refuses_in_one_line_and_ends_with_2(tmp_path: Path) -> None:
    path = write_file(tmp_path, write_connection("a", ["book.BTC-PERPETUAL.50ms"]))
    done = run_plan(path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"collector: {path}: [[connection]] a: channels: 'book.BTC-PERPETUAL.50ms': "
        "interval '50ms' is not offered (raw, 100ms, agg2)\n"
    )
    assert run_plan("configs/testnet.toml").returncode == 2


# patterns


def write_practice_port(port: int) -> str:
    channels = ["book.*.100ms", "ticker.{kind=option,expiry<9999d}.100ms", "quote.NONE-*"]
    return write_connection("options", channels).replace("wss://www.deribit.com", f"ws://127.0.0.1:{port}")


def test_patterns_are_planned_as_they_expand(tmp_path: Path) -> None:
    text = write_connection("a", ["quote.A-*", "quote.B"], 'publish = "tcp://127.0.0.1:5610"') + write_connection(
        "b", []
    )
    config = load_config(write_file(tmp_path, text), {})
    (url,) = {connection.url for connection in config.connections}
    listed = {name: Instrument(name, "option") for number in range(700) if (name := f"A-{number}")}
    plan = make_plan(config, Listing(0, {url: listed}))
    assert plan.patterns == (PlannedPattern("a", "quote.A-*", 700),)
    assert [connection.name for connection in plan.connections] == ["a-1", "a-2", "b"]
    assert sum(len(connection.channels) for connection in plan.connections) == 701
    first, second, _ = plan.connections
    assert (first.publish, second.publish) == ("tcp://127.0.0.1:5610", "tcp://127.0.0.1:5611")
    assert first.rate == pytest.approx(second.rate, rel=0.25)
    assert not any("unexpanded" in note for note in plan.notes)
    # Each of them asks for the two channels by which it hears of instruments, too.
    asked = [sum(call.channels for call in connection.calls) for connection in plan.connections]
    assert asked == [len(first.channels) + 2, len(second.channels) + 2, 0]
    unknown = make_plan(config, Listing(0, {}, {url: "nobody is there"}))
    assert unknown.patterns == (PlannedPattern("a", "quote.A-*", None),)
    assert "a stays unexpanded: nobody is there" in unknown.notes


def test_what_another_connection_names_is_left_to_it(tmp_path: Path) -> None:
    text = write_connection("a", ["quote.A-*"]) + write_connection("b", ["quote.A-1", "quote.B"])
    config = load_config(write_file(tmp_path, text), {})
    listed = {name: Instrument(name, "option") for name in ("A-1", "A-2", "B")}
    plan = make_plan(config, Listing(0, {config.connections[0].url: listed}))
    assert [connection.channels for connection in plan.connections] == [("quote.A-2",), ("quote.A-1", "quote.B")]
    assert plan.patterns == (PlannedPattern("a", "quote.A-*", 1),)
    assert "a leaves to others what they name, 1 channel: quote.A-1" in plan.notes


CLASHES = {
    "a shard's port": (
        write_connection("a", ["quote.A-*"], 'publish = "tcp://127.0.0.1:5610"')
        + write_connection("b", [], 'publish = "tcp://127.0.0.1:5611"'),
        r"desk.toml: \[\[connection\]\] b: publish tcp://127.0.0.1:5611 is also publish of a-2; write another port",
    ),
    "a shard's name": (
        write_connection("a", ["quote.A-*"]) + write_connection("a-2", []),
        r"desk.toml: \[\[connection\]\] a-2: name is used twice",
    ),
    "patterns that meet": (
        write_connection("a", ["quote.A-*"]) + write_connection("b", ["quote.*-7"]),
        r"desk.toml: \[\[connection\]\] b: channels: quote.A-7 stands in connection a-[12] too; write it once",
    ),
    "a wide channel": (
        write_connection("a", ["trades.option.any.100ms"]) + write_connection("b", ["trades.*.100ms"]),
        r"b-[12]: channels: trades.A-.*-C.100ms would feed the same topics as trades.option.any.100ms of connection a;",
    ),
    "a wide channel of its own": (
        write_connection("b", ["trades.option.any.100ms", "trades.*.100ms"]),
        r"b-[12]: channels: trades.* would feed the same topics as trades.*100ms of connection b-[12];",
    ),
    "too many": (
        write_connection("a", ["quote.*", *(f"chart.trades.*.{each}" for each in (1, 3, 5, 10, 15, 30, 60, 120, 180))])
        + write_connection("b", ["trades.*.100ms", "trades.*.agg2", "book.*.100ms", "book.*.agg2", "ticker.*.100ms"])
        + "".join(write_connection(f"c{number}", []) for number in range(15)),
        r"desk.toml: 3\d connections, Deribit takes 32 from one address",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CLASHES)
def test_what_clashes_once_expanded_is_refused(case: str, tmp_path: Path) -> None:
    text, words = CLASHES[case]
    config = load_config(write_file(tmp_path, text), {})
    listed = {name: Instrument(name, "option") for number in range(700) if (name := f"A-{number}")}
    listed |= {name: Instrument(name, "option") for name in ("A-25DEC26-1-C",)}
    with pytest.raises(ConfigError, match=words):
        make_plan(config, Listing(0, {config.connections[0].url: listed}))


def test_the_command_asks_the_exchange_for_its_instruments(tmp_path: Path) -> None:
    port = find_port()
    path = write_file(tmp_path, write_practice_port(port))
    with exchange(port, "--options", "600"):
        done = run_plan(path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"\nticker\.\{kind=option,expiry<9999d\}\.100ms  options +600\n", done.stdout)
    assert re.search(r"\nquote\.NONE-\* +options +none now\n", done.stdout)
    rows = re.findall(r"\n(options-\d) +ipc://\S+/\1\.pub +(\d+) \(.*?\) +(\d+)/s", done.stdout)
    heading, note = re.findall(r"^.*quiet market.*$", done.stdout, re.MULTILINE)
    assert heading.split("  ")[0] == "connection"
    assert note.startswith("quiet market messages a second, estimated; a busy market has many times that")
    assert [name for name, _, _ in rows] == ["options-1", "options-2", "options-3"]
    assert all(300 < int(number) <= 500 and 40 < int(rate) < 120 for _, number, rate in rows)


def test_the_command_says_what_stays_unexpanded_and_ends_with_1(tmp_path: Path) -> None:
    port = find_port()
    done = run_plan(write_file(tmp_path, write_practice_port(port)))
    assert done.returncode == 1
    assert re.search(r"book\.\*\.100ms +options +not known yet", done.stdout)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"collector: patterns stay unexpanded: 127.0.0.1:{port} cannot be reached (")


def test_patterns_at_the_practice_exchange_wait_for_run(tmp_path: Path) -> None:
    done = run_plan(
        write_file(tmp_path, '[exchange]\n[[connection]]\nname = "a"\nurl = "practice"\nchannels = ["quote.*"]\n')
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "note         a stays unexpanded: the practice exchange starts with the collector" in done.stdout
    assert re.search(r"^exchange     \S+, the practice exchange$", done.stdout, re.MULTILINE)
