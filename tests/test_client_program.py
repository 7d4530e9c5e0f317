"""The commands and the Python clients against a running collector, with the practice exchange behind it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import psutil
import pytest
import zmq

from collector import Control, ControlError, Subscriber, __version__
from collector.cli import COMMANDS
from collector.cli.facts import print_facts, print_table, show_fact
from collector.cli.options import read_duration
from collector.client.orderbook import NotInSync, OrderBook
from collector.client.stream import Loss, Message, read_envelope
from collector.client.verify import RULES, Finding, Verifier
from collector.messages import encode, encode_reply
from tests.collected import QUICK, collected
from tests.support import REPOSITORY, collector, running, wait_until

PERPETUAL = ["trades.BTC-PERPETUAL.100ms", "book.BTC-PERPETUAL.100ms", "ticker.BTC-PERPETUAL.100ms", *QUICK["channels"]]


@pytest.fixture(scope="module")
def control() -> Iterator[str]:
    """The control endpoint of a collector whose connections are live."""
    tables = {
        "futures": {**QUICK, "channels": PERPETUAL},
        "index": {**QUICK, "channels": ["deribit_price_index.btc_usd"]},
    }
    with collected(tables) as run:
        for name in tables:
            run.wait_state(name)
        yield run.control
        assert run.stop() == 0, run.program.text()


def call(control: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end; it finds the collector by its environment."""
    return subprocess.run(
        collector(*arguments), capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        env={**os.environ, "COLLECTOR_CONTROL": control, **env},
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        ("state",), ("connect",), ("subscribe", "c"), ("unsubscribe", "c"), ("send", "public/test"), ("close",),
        ("run",), ("plan",),
    ],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_an_empty_name_is_no_name(control: str, arguments: tuple[str, ...]) -> None:
    """A shell variable that is not set must not mean all connections, nor the working directory."""
    done = call(control, arguments[0], "", *arguments[1:])
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(r"Invalid value for '(\[?NAME\]?|FILE)': it is empty", done.stderr)


def get_output(control: str, *arguments: str) -> str:
    done = call(control, *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def test_state_is_a_table_for_people_and_a_map_for_programs(control: str) -> None:
    lines = get_output(control, "state").splitlines()
    assert lines[0].split()[:4] == ["NAME", "STATE", "SINCE", "CHANNELS"]
    assert [line.split()[:2] for line in lines[1:]] == [["futures", "live"], ["index", "live"]]
    states = json.loads(get_output(control, "state", "--json"))
    assert sorted(states["futures"]["channels"]["confirmed"]) == sorted(states["futures"]["channels"]["asked"])
    facts = get_output(control, "state", "futures")
    assert facts.startswith("name ")
    assert "    book.BTC-PERPETUAL.100ms\n" in facts
    below = facts.partition("\nchannels\n")[2].splitlines()
    short = ["  refused  -", "  mute     -", "  asked (4)", "  confirmed (4)"]
    assert [line for line in below if not line.startswith("    ")] == short


def test_last_error_stands_near_the_top_of_a_state(capsys: pytest.CaptureFixture[str]) -> None:
    exchanges = {"code": 13004, "message": "invalid_credentials"}
    for error, shown in (({"message": "gone"}, "gone"), (exchanges, json.dumps(exchanges)), (None, "-")):
        print_facts({"name": "a", "state": "backoff", "gaps": 0, "last_error": error})
        assert capsys.readouterr().out.splitlines()[2] == f"last_error  {shown}"


def test_a_table_of_connections_tells_what_is_wrong_with_each_and_that_there_are_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_table({})
    assert capsys.readouterr().out == "no connections (`collector connect` adds one)\n"
    channels = {"asked": ["x", "y"], "confirmed": ["x"], "refused": {"y": "no such", "z": "nor such"}, "mute": ["x"]}
    away = {
        "name": "a",
        "state": "backoff",
        "rate": 1234.5,
        "last_error": {"message": "no route"},
        "channels": channels,
    }
    print_table({"b": {"name": "b", "state": "live", "lag": {"p50": 0.0123, "p99": 12.0}, "gaps": 2}, "a": away})
    head, *rows = capsys.readouterr().out.splitlines()
    assert re.split("  +", head)[:7] == ["NAME", "STATE", "SINCE", "CHANNELS", "MSG/S", "LAG P50 / P99", "GAPS"]
    assert re.split("  +", rows[0])[:7] == ["a", "backoff", "-", "1/2", "1,234", "-", "-"]
    assert re.split("  +", rows[1])[:7] == ["b", "live", "-", "0/0", "0", "12.3 ms / 12.0 s", "2"]
    assert rows[2:] == ["a: last error: no route", "a: 2 channels refused: y: no such", "a: 1 channel mute: x"]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("since", 0, "-"),
        ("last_message_ts", 1, r"1970-01-01 00:00:00 UTC  \(\d+d \d+h ago\)"),
        ("clock_offset", -1_500_000, r"-1\.5 ms"),
        ("memory", 2_000_000_000, r"2,000\.0 MB"),
        ("rate", 1234.5, r"1,234\.5 messages/s"),
        ("cpu", 0.256, r"25\.6% of a core"),
        ("latency", {"p50": 0.001, "p99": 20.0}, r"1\.0 ms median, 20\.0 s 99th percentile"),
        ("last_error", {"code": 1, "message": "no"}, r'\{"code": 1, "message": "no"\}'),
        ("authenticated", False, "False"),
        ("refused", {}, "-"),
    ],
)
def test_each_fact_has_its_unit(key: str, value: Any, said: str) -> None:
    assert re.fullmatch(said, show_fact(key, value))


def test_channels_come_and_go(control: str) -> None:
    channel, topic = "ticker.ETH-PERPETUAL.100ms", "deribit.ticker.ETH-PERPETUAL.100ms"
    assert get_output(control, "subscribe", "index", channel) == f"{channel}  subscribed\n"
    message = json.loads(get_output(control, "tail", "--count", "1", topic))
    assert message["topic"] == topic
    assert message["instrument"] == "ETH-PERPETUAL"
    assert json.loads(get_output(control, "unsubscribe", "index", channel, "--json")) == {"channels": {channel: True}}
    assert channel not in json.loads(get_output(control, "state", "index", "--json"))["channels"]["asked"]


def test_refused_channel_is_named_and_ends_with_1(control: str) -> None:
    good = "quote.ETH-PERPETUAL"
    done = call(control, "subscribe", "index", good, "book.BTC-PERPETUAL.50ms")
    assert done.returncode == 1
    assert done.stdout == f"{good}  subscribed\n"
    assert done.stderr.startswith("collector: book.BTC-PERPETUAL.50ms: bad_request: ")
    assert "still asked for" not in done.stderr
    get_output(control, "unsubscribe", "index", good)


def test_giving_up_what_was_not_asked_for_is_said(control: str) -> None:
    good, bad = "quote.ETH-PERPETUAL", "quote.ETH-PERPETAUL"
    get_output(control, "subscribe", "index", good)
    done = call(control, "unsubscribe", "index", bad, good)
    assert (done.returncode, done.stdout) == (1, f"{good}  unsubscribed\n")
    assert done.stderr == f"collector: {bad}: was not asked for; what is, says: collector state index\n"
    done = call(control, "unsubscribe", "index", good, "--json")
    assert (done.returncode, json.loads(done.stdout)) == (1, {"channels": {good: True}})
    assert f"{good}: was not asked for" in done.stderr


def test_state_names_a_channel_that_the_exchange_refuses(control: str) -> None:
    done = call(control, "subscribe", "index", "quote.NOBODY")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("; still asked for; to give it up: collector unsubscribe index quote.NOBODY\n")
    last = get_output(control, "state").splitlines()[-1]
    assert last.startswith("index: 1 channel refused: quote.NOBODY: the exchange left it out")
    get_output(control, "unsubscribe", "index", "quote.NOBODY")
    assert "refused" not in get_output(control, "state")


def test_send_prints_the_exchanges_result(control: str) -> None:
    params = json.dumps({"instrument_name": "BTC-PERPETUAL"})
    assert (
        json.loads(get_output(control, "send", "futures", "public/ticker", params))["instrument_name"]
        == "BTC-PERPETUAL"
    )
    assert isinstance(json.loads(get_output(control, "send", "futures", "public/get_time")), int)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("state", "nobody"), 1, "collector: unknown_connection: no connection 'nobody'; there are: futures, index\n"),
        (("send", "futures", "private/buy"), 1, "collector: forbidden: "),
        (("send", "futures", "public/nonsense"), 1, "collector: exchange_error: -32601 Method not found\n"),
        (("send", "futures", "public/test", "{"), 2, "Invalid value for PARAMS: write a JSON object, like '{"),
        (("send", "futures", "public/test", "[1]"), 2, "(this is a list)\n"),
        (
            ("connect", "futures", "quote.ETH-PERPETUAL", "--url", "ws://127.0.0.1:1/ws/api/v2"),
            1,
            "collector: exists: futures runs already; close it first, or choose another name\n",
        ),
        (("connect", "x", "quote.ETH-PERPETUAL"), 2, "x has no URL to connect to; add --url wss://"),
        (
            ("connect", "x", "--url", "practice", "--set", "timeout=5000"),
            1,
            "write 5.0\n",
        ),
        (
            ("connect", "x", "trades.BTC-PERPETUAL.raw", "--url", "practice"),
            1,
            "or credentials = ... (any key of the table can be given: --set KEY=VALUE)\n",
        ),
        (
            (
                "connect",
                "x",
                "--url",
                "practice?faults=refuse:503",
                "--set",
                "retry_count=1",
                "--set",
                "retry_delay=0.01",
            ),
            1,
            "HTTP 503 instead of a WebSocket: refused on request\n",
        ),
        (
            ("connect", "x", "--url", "practice", "--set", "url=wss://y"),
            2,
            "--set url: that is given beside it already; leave one",
        ),
        (
            ("connect", "x", "--url", "practice", "--set", "name=y"),
            2,
            "--set name: that is given beside it already; leave one",
        ),
        (("connect", "x", "--set", "nonsense"), 2, "write KEY=VALUE"),
        (("connect", "x", "--from", "configs/deribit.toml"), 2, "there is no [[connection]] 'x'; there are "),
        (("connect", "x", "--url", "practice", "--set", "timeout=2026-01-01"), 2, "cannot be sent: can not serialize"),
        (("connect", "x", "--url", "practice", "--set", f"timeout={10**20}"), 2, "cannot be sent: "),
        (("connect", "x", "--url", "practice", "--set", f"timeout={'[' * 9999}"), 1, "timeout must be a number"),
        (("send", "futures", "public/test", f'{{"a": {10**20}}}'), 2, "cannot be sent: "),
        (("send", "futures", "public/test", f'{{"a": {"[" * 9999}'), 2, "PARAMS: write a JSON object"),
        (("connect", "x", "quote.ETH-PERPETUAL", "--url", "nonsense"), 1, "collector: bad_request: "),
        (("subscribe", "futures"), 2, "Missing argument 'CHANNEL...'"),
        (("tail", "--for", "soon"), 2, "write for example 60s"),
        (("verify", "--for", "0s"), 2, "write for example 60s"),
        (("tail", "--endpoint", "nonsense"), 2, "write ipc:///path or tcp://host:port"),
    ],
)
def test_errors_say_what_and_what_to_do(control: str, arguments: tuple[str, ...], code: int, said: str) -> None:
    done = call(control, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "seconds"), [("60", 60), ("60s", 60), (" 1.5m ", 90), ("2h", 7200), ("0.1s", 0.1), ("8784h", 366 * 86_400)]
)
def test_a_length_of_time_has_a_unit_or_is_in_seconds(text: str, seconds: float) -> None:
    assert read_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "0", "-1s", "1d", ".5s", "1e3", "1 s", "1s2", "\u0663s", "8785h"])
def test_what_is_no_length_of_time_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="write for example 60s, 5m or 2h"):
        read_duration(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[connection]]\nname = "\xe4"', "byte 23 is not UTF-8"),
        (f"a = {'[' * 9999}", "not TOML: "),
        ("connection = 5", "connections are [[connection]] tables, each with a name"),
        ("[[connection]]\nname = 5\n[[connection]]\nname = 'b'", "there is no [[connection]] 'x'; there are 5, b"),
        ("", "there is no [[connection]] 'x'; there are none"),
    ],
)
def test_a_file_without_the_table_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "file.toml").write_text(text, encoding="latin-1")
    done = call(f"ipc://{tmp_path}/none", "connect", "x", "--from", str(tmp_path / "file.toml"))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"collector: {tmp_path}/file.toml: .*{re.escape(said)}.*\n", done.stderr)


@pytest.mark.parametrize("command", ["state", "tail", "verify", "subscribe a b", "unsubscribe a b"])
def test_nobody_there_is_said_at_once(tmp_path: Path, command: str) -> None:
    done = call(f"ipc://{tmp_path}/none", *command.split())
    assert (done.returncode, done.stdout) == (1, "")
    words = (
        f"collector: no collector runs at ipc://{tmp_path}/none: there is no such socket file; start one (collector run"
    )
    assert done.stderr.startswith(words)
    assert "the wish is kept" not in done.stderr


def answer_in_turn(endpoint: str, command: str, *replies: bytes) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command to which a socket gives these replies."""
    context = zmq.Context()
    with context.socket(zmq.REP) as socket:
        socket.bind(endpoint)
        with running(*collector(*command.split(), "--control", endpoint)) as program:
            for reply in replies:
                assert socket.poll(20_000), "it has asked"
                socket.recv()
                socket.send(reply)
            code = program.wait_exit()
    context.term()
    return code, "\n".join(program.out), "\n".join(program.err)


ESCAPE = "\x1b]0;ours\x07"
HOSTILE = {"name": ESCAPE, "state": ESCAPE, "publish": ESCAPE, "last_error": ESCAPE, ESCAPE: ESCAPE, "x": {ESCAPE: [1]}}


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        ("state", encode_reply({ESCAPE: HOSTILE})),
        ("state a", encode_reply(HOSTILE)),
        ("state a", encode_reply(error=ControlError(ESCAPE, ESCAPE, ESCAPE))),
        ("subscribe a b", encode_reply({"channels": {ESCAPE: True}})),
        ("subscribe a b", encode_reply({"channels": {ESCAPE: {"code": ESCAPE, "message": ESCAPE}}})),
        ("tail --for 0.1s", encode_reply({"a": {"publish": f"ipc:///nowhere/{ESCAPE}"}})),
    ],
)
def test_what_others_wrote_does_not_steer_the_terminal(tmp_path: Path, command: str, reply: bytes) -> None:
    _, out, err = answer_in_turn(f"ipc://{tmp_path}/control", command, reply)
    assert "?]0;ours?" in out + err
    assert "\x1b" not in out + err


def test_a_channel_named_like_a_fact_is_no_fact(capsys: pytest.CaptureFixture[str]) -> None:
    """The practice exchange refuses them; each of these words has a unit where it is a key of the state."""
    words = ("rate", "since", "cpu", "bytes", "clock_offset", "x_ts")
    print_facts({"channels": {"refused": dict.fromkeys(words, "not confirmed")}})
    shown = capsys.readouterr().out.splitlines()
    assert sorted(line.split(maxsplit=1) for line in shown[2:]) == [[word, "not confirmed"] for word in sorted(words)]


def test_a_wish_is_said_to_be_kept_only_where_it_was_heard(tmp_path: Path) -> None:
    late = encode_reply(error=ControlError("timeout", "late"))
    state = encode_reply({"channels": {"asked": ["b"]}})
    kept = "collector: timeout: late (the wish is kept; collector state NAME shows what comes of it)"
    endpoint = f"ipc://{tmp_path}/control"
    assert answer_in_turn(endpoint, "subscribe a b", late) == (1, "", kept)
    assert answer_in_turn(endpoint, "unsubscribe a b", late) == (1, "", "collector: timeout: late")
    assert answer_in_turn(endpoint, "unsubscribe a b", state, late) == (1, "", kept)


def test_a_channel_may_be_given_up_while_its_worker_has_not_told_yet_what_it_has(tmp_path: Path) -> None:
    replies = encode_reply({"name": "a"}), encode_reply({"channels": {"b": True}})
    assert answer_in_turn(f"ipc://{tmp_path}/control", "unsubscribe a b", *replies) == (0, "b  unsubscribed", "")


@pytest.mark.parametrize(
    "command",
    [
        "state",
        "connect a --url practice --timeout 5s",  # a signal just before it waits is heeded when it has waited
        "subscribe a b",
        "unsubscribe a b",
        "send a public/test",
        "close a",
        "verify",
    ],
)
def test_what_is_interrupted_while_it_asks_does_not_end_as_if_done(tmp_path: Path, command: str) -> None:
    context = zmq.Context()
    with context.socket(zmq.ROUTER) as silent:
        silent.bind(f"ipc://{tmp_path}/control")
        with running(*collector(*command.split(), "--control", f"ipc://{tmp_path}/control")) as program:
            assert silent.poll(20_000), "it has asked"
            program.process.send_signal(signal.SIGINT)
            assert program.wait_exit() == 130
            assert program.text() == ""
    context.term()


@pytest.mark.parametrize("command", ["run", "plan"])
def test_what_is_interrupted_before_it_has_begun_does_not_end_as_if_done(tmp_path: Path, command: str) -> None:
    os.mkfifo(tmp_path / "collector.toml")
    with (
        running(*collector(command, str(tmp_path / "collector.toml"))) as program,
        open(tmp_path / "collector.toml", "w"),  # returns when it reads the file
    ):
        program.process.send_signal(signal.SIGINT)
        try:
            program.process.wait(5)
        except subprocess.TimeoutExpired:  # it came between the last bytecode and the reading, which it does not end
            program.process.send_signal(signal.SIGINT)
        assert program.wait_exit() == 130
        assert program.text() == ""


@pytest.mark.parametrize("command", ["plan", "plan --json"])
def test_a_plan_that_nobody_reads_to_its_end_is_no_failure(command: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(collector(*command.split(), "configs/demo.toml"), stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


PATTERNED = """
[[connection]]
name = "a"
url = "ws://127.0.0.1:9/ws/api/v2"
channels = ["book.BTC-*.100ms"]
"""


@pytest.mark.parametrize(
    "command", ["verify --for 0.1s --endpoint tcp://127.0.0.1:9", "unsubscribe index quote.X --json", "plan {}"]
)
def test_what_was_found_wrong_ends_with_1_though_nobody_reads_it(control: str, tmp_path: Path, command: str) -> None:
    (tmp_path / "patterned.toml").write_text(PATTERNED)
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        collector(*command.format(tmp_path / "patterned.toml").split()), stdout=writing, stderr=subprocess.DEVNULL,
        timeout=60, env={**os.environ, "COLLECTOR_CONTROL": control},
    )  # fmt: skip
    os.close(writing)
    assert done.returncode == 1


@pytest.mark.parametrize(
    "command",
    [
        "plan configs/demo.toml", "state", "state --json", "send futures public/test", "tail", "exchange",
        "exchange --list-faults", "--help", "--version", *(f"{name} --help" for name in COMMANDS),
    ],
)  # fmt: skip
def test_output_that_cannot_be_written_is_told_in_one_line(control: str, command: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            collector(*command.split()), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, cwd=REPOSITORY,
            env={**os.environ, "COLLECTOR_CONTROL": control},
        )  # fmt: skip
    assert done.returncode == 1
    assert re.fullmatch("collector: the output cannot be written: No space left on device.*\n", done.stderr)


@pytest.mark.parametrize("command", ["--help", "state --json", "plan configs/demo.toml"])
def test_a_closed_stdout_is_as_one_that_nobody_reads(control: str, command: str) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *collector(*command.split())], stderr=subprocess.PIPE, timeout=60,
        cwd=REPOSITORY, env={**os.environ, "COLLECTOR_CONTROL": control},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")


def test_connections_come_and_go(control: str, tmp_path: Path) -> None:
    url = json.loads(get_output(control, "state", "futures", "--json"))["url"]
    settings = ("--set", "timeout = 3", "--set", "retry_count=1")
    added = get_output(control, "connect", "extra", "quote.ETH-PERPETUAL", "--url", url, *settings)
    assert added.startswith("name ")
    lines = get_output(control, "tail", "--count", "5", "deribit.quote.ETH-PERPETUAL.").splitlines()
    assert "quote" in {json.loads(line)["type"] for line in lines}  # after what a late subscriber is told
    assert get_output(control, "close", "extra").startswith("name ")
    assert "extra" not in json.loads(get_output(control, "state", "--json"))
    file = tmp_path / "more.toml"
    file.write_text(
        f'[[connection]]\nname = "extra"\nurl = "{url}"\npublish = "tcp://127.0.0.1:1"\n'
        'channels = ["quote.ETH-PERPETUAL"]\n'
    )
    publish = f"ipc://{tmp_path}/given"  # what is given beside a file goes before it
    state = json.loads(get_output(control, "connect", "extra", "--from", str(file), "--publish", publish, "--json"))
    assert (state["state"], state["publish"]) == ("live", publish)
    assert state["channels"]["asked"] == ["quote.ETH-PERPETUAL"]
    get_output(control, "close", "extra")


def test_a_connection_that_is_long_in_coming_is_said_to_be_tried_on(control: str) -> None:
    done = call(control, "connect", "late", "--url", "practice?faults=slow_open:60", "--timeout", "1s")
    assert done.returncode == 1
    assert done.stderr.endswith(" still being tried (collector state late shows what comes of it)\n")
    get_output(control, "close", "late")


def test_verify_finds_nothing_wrong_with_a_running_collector(control: str) -> None:
    printed = get_output(control, "verify", "--for", "3s")
    assert printed.endswith("Every rule holds.\n")
    printed = get_output(control, "verify", "--for", "2s", "deribit.quote.")
    marks = dict(re.findall(r"^(\w+) +[\d,]+ checked +(.*?)  ", printed, re.MULTILINE))
    assert (marks["sequence"], marks["heartbeat"]) == ("ok", "ok")
    unchecked = ["chain", "crossed", "duplicate", "hole", "repair"]
    assert [rule for rule, mark in marks.items() if mark == "not checked"] == unchecked
    assert printed.endswith(f"\nEvery rule that could be checked holds. Nothing came for: {', '.join(unchecked)}.\n")
    verdict = json.loads(get_output(control, "verify", "--for", "2s", "--json", "deribit.book."))
    assert verdict["ok"]
    assert verdict["rules"]["chain"]["checked"] > 0
    assert verdict["rules"]["heartbeat"]["checked"] > 0
    assert verdict["unchecked"] == ["duplicate", "hole", "repair"]


def test_verify_says_at_ctrl_c_what_it_has_found_so_far() -> None:
    with zmq.Context() as context, context.socket(zmq.XPUB) as publisher:
        publisher.bind("tcp://127.0.0.1:*")
        endpoint = publisher.getsockopt_string(zmq.LAST_ENDPOINT)
        with running(*collector("verify", "--endpoint", endpoint, "--for", "1h", "--json")) as program:
            assert publisher.poll(20_000)
            wait_until(lambda: psutil.Process(program.pid).status() == psutil.STATUS_SLEEPING, "it to listen")
            program.process.send_signal(signal.SIGINT)
            assert program.wait_exit() == 1, program.text()  # nothing came
            assert set(json.loads(program.out[0])["rules"]) == set(RULES)


def test_verify_says_when_nothing_came(control: str) -> None:
    done = call(control, "verify", "--for", "1.5s", "deribit.nonsense.")
    assert done.returncode == 1
    assert "nothing came on topics that begin with 'deribit.nonsense.'" in done.stderr


@pytest.mark.parametrize("option", ["", "--json"])
def test_verify_ends_with_1_on_a_broken_stream(option: str) -> None:
    context = zmq.Context()
    publisher = context.socket(zmq.XPUB)
    publisher.bind("tcp://127.0.0.1:*")
    endpoint = publisher.getsockopt_string(zmq.LAST_ENDPOINT)
    try:
        with running(*collector("verify", "--endpoint", endpoint, "--for", "3s", *option.split())) as program:
            assert publisher.poll(20_000)
            now = time.time_ns()
            stamps = {"exchange": "deribit", "epoch": 1, "exchange_ts": 0, "receive_ts": now}
            index = {**stamps, "type": "index", "instrument": "btc_usd", "price": 1.0}
            for seq in (1, 2, 4, 6, 8, 10, 12, 14):
                publisher.send_multipart([b"deribit.index.btc_usd.raw", encode({**index, "seq": seq})])
            gap = {**stamps, "type": "gap", "seq": 1, "id": 1, "reason": "restart", "from_ts": now, "to_ts": now}
            for instrument, healing in (("A", False), ("B", True)):
                named = {"instrument": instrument, "healing": healing, "missing_from": 2, "missing_to": 4}
                publisher.send_multipart([f"deribit.trade.{instrument}.raw".encode(), encode({**gap, **named})])
            publisher.send_multipart([b"three", b"frames", b"here"])
            assert program.wait_exit() == 1
        first = [f"message {seq} was lost on the way to this subscriber" for seq in (3, 5, 7, 9, 11)]
        if option:
            verdict = json.loads(program.out[0])
            broken = {rule: counts["broken"] for rule, counts in verdict["rules"].items() if counts["broken"]}
            assert broken == {"envelope": 1, "sequence": 6}
            texts = [finding["text"] for finding in verdict["findings"]]
            assert texts == [*first, "3 frames instead of topic and payload"]
            assert [verdict[key] for key in ("ok", "messages", "topics", "healing", "missing")] == [False, 11, 3, 1, 3]
            assert 3 <= verdict["seconds"] < 60
        else:
            at = next(at for at, line in enumerate(program.out) if line.startswith("sequence "))
            assert re.match(r"sequence +10 checked +6 broken  ", program.out[at])
            assert program.out[at + 1 : at + 6] == [f"    deribit.index.btc_usd.raw: {text}" for text in first]
            assert program.out[at + 6].startswith("epoch ")
            assert re.fullmatch(r"11 messages in \d+\.\d s on 3 topics \(1 index, 2 trade\)", program.out[-2])
            told = "3 trades missing for good, 1 gap without repair so far"
            assert program.out[-1] == f"Announced, so no fault: {told}."
            assert program.err == ["collector: 2 rules broken, 7 times"]
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_verify_that_is_ended_early_gives_its_verdict(tmp_path: Path, number: signal.Signals) -> None:
    context = zmq.Context()
    with context.socket(zmq.REP) as socket:
        socket.bind(f"ipc://{tmp_path}/control")
        with running(*collector("verify", "--control", f"ipc://{tmp_path}/control")) as program:
            assert socket.poll(20_000), "it has asked where to read"
            socket.recv()
            socket.send(encode_reply({"a": {"publish": f"ipc://{tmp_path}/a"}}))
            assert socket.poll(20_000), "it reads: it asks again"
            program.process.send_signal(number)
            assert program.wait_exit() == 1
    context.term()
    assert program.out[-1].startswith("0 messages in ")
    assert program.err == ["collector: nothing came; does a collector publish at these endpoints?"]


@pytest.mark.parametrize(("pid", "broken"), [(None, 0), (1, 1)])
def test_verify_waits_for_no_heartbeat_where_no_worker_lives(tmp_path: Path, pid: int | None, broken: int) -> None:
    context = zmq.Context()
    with context.socket(zmq.REP) as socket:
        socket.bind(f"ipc://{tmp_path}/control")
        command = collector("verify", "--control", f"ipc://{tmp_path}/control", "--for", "5s", "--json")
        with running(*command) as program:
            while program.process.poll() is None:
                if socket.poll(10):
                    socket.recv()
                    socket.send(encode_reply({"a": {"publish": f"ipc://{tmp_path}/a", "pid": pid}}))
            assert program.wait_exit() == 1  # nothing came
    context.term()
    assert json.loads(program.out[-1])["rules"]["heartbeat"]["broken"] == broken


def test_subscriber_keeps_the_exchanges_book(control: str) -> None:
    seen: dict[int, Any] = {}
    book = OrderBook()
    with Control(control) as asked, Subscriber(prefixes="deribit.book.BTC-PERPETUAL.", control=control) as subscriber:

        def compare() -> bool:
            """Whether the exchange's own answer names a change that the book has been at; then they must be equal."""
            answer = asked.send(
                "futures", "public/get_order_book", {"instrument_name": "BTC-PERPETUAL", "depth": 10000}
            )
            while answer["change_id"] > book.change_id or not book.in_sync:
                message = subscriber.receive(10)
                assert isinstance(message, Message)
                book.apply(message)
                if book.in_sync:
                    seen[book.change_id] = book.get_depth(None)
            if answer["change_id"] not in seen:
                return False
            bids, asks = ([(price, amount) for price, amount in answer[side]] for side in ("bids", "asks"))
            assert seen[answer["change_id"]] == (bids, asks)
            return True

        wait_until(compare, "a change that both sides name")


def test_a_misspelt_command_is_hinted_at() -> None:
    ended = subprocess.run(collector("stat"), capture_output=True, text=True, cwd=REPOSITORY)
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (
        2,
        "Error: No such command 'stat'. Did you mean 'state'?",
    )


def test_a_shell_that_completes_the_words_behind_a_misspelt_command_hears_of_no_error() -> None:
    words = {"_COLLECTOR_COMPLETE": "bash_complete", "COMP_WORDS": "collector stat ", "COMP_CWORD": "2"}
    program = "from collector.cli import main; main(prog_name='collector')"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | words)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_commands_start_without_what_they_do_not_need() -> None:
    program = (
        "import sys, collector.cli.control as c; "
        "print(*{'asyncio', 'aiohttp', 'rich', 'workers', 'tomllib', 'collector.config'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"


def test_it_says_its_version() -> None:
    told = subprocess.run(collector("--version"), capture_output=True, text=True, check=True).stdout
    assert told == f"collector, version {__version__}\n"


def test_python_client_asks_by_name(control: str) -> None:
    with Control(control) as asked:
        assert asked.send("futures", "public/test")["version"]
        assert asked.subscribe("index", ["quote.BTC_USDC-PERPETUAL"]) == {
            "channels": {"quote.BTC_USDC-PERPETUAL": True}
        }
        assert asked.unsubscribe("index", ["quote.BTC_USDC-PERPETUAL"]) == {
            "channels": {"quote.BTC_USDC-PERPETUAL": True}
        }
        with pytest.raises(ControlError) as raised:
            asked.send("futures", "public/ticker", {"instrument_name": "NONE"})
        assert raised.value.code == "exchange_error"
        assert raised.value.data["code"] == -32602
        with pytest.raises(ControlError, match="unknown_connection: no connection ''"):
            asked.get_state("")


def test_book_is_in_sync_again_after_messages_were_lost_on_the_way(control: str) -> None:
    book, losses = OrderBook(), []
    with Subscriber(control=control, prefixes="deribit.book.", on_loss="report") as subscriber:

        def take() -> bool:
            item = subscriber.receive(5)
            assert item is not None
            losses.extend([item] if isinstance(item, Loss) else [])
            book.apply(item)
            return book.in_sync

        wait_until(take, "the first snapshot")
        assert subscriber.receive_frames(5)  # this one the subscriber never sees
        wait_until(lambda: not take(), "the loss")
        wait_until(take, "the book as it is now")
    assert len(losses) == 1
    assert book.best()[0] is not None


def test_a_book_that_began_amid_its_topic_is_in_sync_once_its_snapshot_is_asked_for(control: str) -> None:
    book = OrderBook()
    with Subscriber(control=control, prefixes="deribit.book.BTC-PERPETUAL.", on_loss="report") as subscriber:

        def take() -> Message:
            item = subscriber.receive(5)
            assert isinstance(item, Message)
            return item

        wait_until(lambda: take().get("kind") == "snapshot", "the last of what a late subscriber is told")
        wait_until(lambda: book.apply(item := take()) or item.get("kind") == "delta", "a change after it")
        with pytest.raises(NotInSync, match=r"waiting for a snapshot \(Subscriber.ask_again "):
            book.best()
        topic = book.topic
        assert topic is not None

        def ask_and_take() -> bool:
            subscriber.ask_again(topic)
            return book.apply(take())

        wait_until(ask_and_take, "the book as it is now")
    assert book.in_sync


def test_connection_whose_port_is_not_known_yet_holds_up_nobody() -> None:
    waiting = {**QUICK, "url": "ws://127.0.0.1:9/ws/api/v2", "retry_count": 1000, "publish": "tcp://127.0.0.1:*"}
    with collected({"a": QUICK, "b": {**waiting, "channels": ["book.*.100ms"]}}) as run:
        run.wait_state("a")
        assert run.get_state("b")["publish"] == "tcp://127.0.0.1:*"
        with Subscriber(control=run.control, prefixes="deribit.quote.") as subscriber:
            assert subscriber.receive(5)
            assert subscriber.found.keys() == {"a"}


@pytest.mark.parametrize("how", ["unsubscribe", "close"])
def test_a_topic_goes_on_for_its_readers_where_an_older_connection_takes_it_up(how: str) -> None:
    quote, verifier = QUICK["channels"], Verifier()
    found: list[Finding] = []
    losses: list[str] = []
    with collected({"a": {**QUICK, "channels": ["deribit_price_index.btc_usd"]}}) as run:
        run.wait_state("a")
        run.ask("connect", connection={**QUICK, "name": "b"})
        of_a, of_b = (run.get_state(name)["epoch"] for name in ("a", "b"))
        assert of_a < of_b
        with (
            Subscriber(control=run.control, prefixes="deribit.quote.", on_loss="report") as reader,
            Subscriber(control=run.control) as watcher,
        ):

            def read(later_than: int, **keys: str) -> bool:
                item = reader.receive(1)
                losses.extend([item.reason] if isinstance(item, Loss) else [])
                return isinstance(item, Message) and item.epoch > later_than and keys.items() <= item.items()

            def check(later_than: int, **keys: str) -> bool:
                if (frames := watcher.receive_frames(1)) is None:
                    return False
                found.extend(verifier.check(*frames, now_ns=time.time_ns()))
                message = read_envelope(*frames)
                return message.epoch > later_than and keys.items() <= message.items()

            def read_and_check(later_than: int, **keys: str) -> None:
                for look in (read, check):
                    wait_until(partial(look, later_than, **keys), f"{keys}")

            read_and_check(of_a, type="quote")
            given = {"channels": quote} if how == "unsubscribe" else {}
            run.ask(how, connection="b", **given)
            read_and_check(of_a, type="status", state="closed", instrument="BTC-PERPETUAL")
            assert run.ask("subscribe", connection="a", channels=quote)["channels"] == dict.fromkeys(quote, True)
            for _ in range(3):
                read_and_check(of_b, type="quote")
        assert (found, losses) == ([], ["anew"])  # between the two connections quotes may have come
