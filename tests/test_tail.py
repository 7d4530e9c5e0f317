"""`tail` and the view of `run --watch`, as a person on a terminal sees them and as a program reads them."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq
from rich.console import Console

from collector import Control
from collector.cli.live import GONE, Board, Row
from collector.cli.render import describe, format_line
from collector.client.stream import Loss, Message
from collector.messages import encode, parse_topic
from tests.collected import QUICK, collected
from tests.pipeline import find_port
from tests.support import REPOSITORY, collector, running, wait_until

START = 1_790_000_000_000_000_000
BEST = {"best_bid_price": 92294.5, "best_bid_amount": 10.0, "best_ask_price": 92295.0, "best_ask_amount": 2000.0}


class Market(threading.Thread):
    """A publisher of a few topics and the control endpoint that names it, on real sockets."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.control = f"ipc://{directory}/control"
        self.context = zmq.Context()
        self.ended = threading.Event()
        self.ready = threading.Event()
        self.seq: dict[str, int] = {}
        self.others: dict[str, Any] = {}
        self.answers = 0
        self.publisher: Any = None

    def run(self) -> None:
        self.publisher = self.context.socket(zmq.XPUB)
        self.publisher.bind("tcp://127.0.0.1:*")
        endpoint = self.publisher.getsockopt_string(zmq.LAST_ENDPOINT)
        replier = self.context.socket(zmq.REP)
        replier.bind(self.control)
        self.ready.set()
        while not self.ended.is_set():
            if replier.poll(10):
                replier.recv()
                replier.send(encode({"ok": True, "result": {"futures": {"publish": endpoint}, **self.others}}))
                self.answers += 1
            self.publish_all()
        self.context.destroy(linger=0)

    def publish_all(self) -> None:
        price = 92294.5
        self.say("deribit.quote.BTC-PERPETUAL.raw", **BEST)
        prices = {"price": price, "amount": 10.0, "mark_price": price, "index_price": price}
        seq = self.seq.get("deribit.trade.BTC-PERPETUAL.100ms", 0) + 1
        trade = {**prices, "side": "sell", "trade_id": str(seq), "trade_seq": seq, "tick_direction": 0}
        self.say("deribit.trade.BTC-PERPETUAL.100ms", **trade)
        book = "deribit.book.BTC-PERPETUAL.100ms"
        if book not in self.seq:
            self.say(book, type="gap", id=1, reason="restart", from_ts=0, to_ts=START)
        self.say(book, kind="snapshot", change_id=1, reason="resync", bids=[[price, 10.0]], asks=[[92295.0, 2000.0]])
        beat = {"wire": 1, "connection": "futures", "state": "live", "published": sum(self.seq.values()), "lag": 0.003}
        self.say("deribit.heartbeat.futures.1s", **beat)

    def say(self, topic: str, **keys: Any) -> None:
        self.seq[topic] = self.seq.get(topic, 0) + 1
        exchange, kind, instrument, _ = topic.split(".")
        envelope = {"type": kind, "exchange": exchange, "instrument": instrument, "epoch": START}
        times = {"seq": self.seq[topic], "exchange_ts": 0, "receive_ts": time.time_ns()}
        self.publisher.send_multipart([topic.encode(), encode({**envelope, **times, **keys})])


@pytest.fixture
def market(tmp_path: Path) -> Iterator[Market]:
    market = Market(tmp_path)
    market.start()
    market.ready.wait(10)
    yield market
    market.ended.set()
    market.join(10)


class Terminal:
    """A process on a terminal of its own (120 x 40), with all that it has written to it."""

    def __init__(self, *argv: str, term: str = "xterm-256color", **more: str) -> None:
        self.master, terminal = pty.openpty()
        env = {**os.environ, "TERM": term, "COLUMNS": "120", "LINES": "40", **more}
        self.process = subprocess.Popen(
            argv, stdin=terminal, stdout=terminal, stderr=terminal, env=env, cwd=REPOSITORY, start_new_session=True
        )
        os.close(terminal)
        self.written = ""

    def read(self) -> str:
        """Everything written so far."""
        while select.select([self.master], [], [], 0)[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                break  # the other end is closed
            if not data:
                break
            self.written += data.decode(errors="replace")
        return self.written

    def wait(self, pattern: str) -> None:
        """Wait until it has written that."""
        try:
            wait_until(lambda: re.search(pattern, self.read()), pattern)
        except AssertionError as error:
            raise AssertionError(f"{error}; it wrote {self.written[-3000:]!r}") from None

    def end(self, number: signal.Signals) -> int:
        """Send a signal and wait for the exit code; what it writes meanwhile is read."""
        self.process.send_signal(number)
        wait_until(lambda: (self.read(), self.process.poll() is not None)[1], "its end")
        self.read()
        return self.process.returncode


@contextmanager
def on_terminal(*argv: str, term: str = "xterm-256color", **more: str) -> Iterator[Terminal]:
    terminal = Terminal(*argv, term=term, **more)
    try:
        yield terminal
    finally:
        if terminal.process.poll() is None:
            terminal.process.kill()
            terminal.process.wait()
        os.close(terminal.master)


def test_piped_it_writes_one_line_of_json_a_message(market: Market) -> None:
    with running(*collector("tail", "--control", market.control, "--count", "3", "deribit.trade.")) as program:
        assert program.wait_exit() == 0
    assert program.err == []
    messages = [json.loads(line) for line in program.out]
    assert [message["topic"] for message in messages] == ["deribit.trade.BTC-PERPETUAL.100ms"] * 3
    assert [message["seq"] - messages[0]["seq"] for message in messages] == [0, 1, 2]
    assert messages[0]["price"] == 92294.5


def test_on_a_terminal_too_it_writes_json_where_that_is_asked_for(market: Market) -> None:
    argv = collector("tail", "--json", "--count", "1", "--control", market.control, "deribit.trade.")
    with on_terminal(*argv) as terminal:
        wait_until(lambda: (terminal.read(), terminal.process.poll() is not None)[1], "its end")
        (line,) = terminal.read().splitlines()
    assert json.loads(line)["type"] == "trade"


def test_a_reader_that_leaves_ends_it_quietly(market: Market) -> None:
    command = " ".join(collector("tail", "--control", market.control))
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -n 1"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["exchange"] == "deribit"


def test_a_prefix_that_nothing_begins_with_is_told(market: Market) -> None:
    done = subprocess.run(
        collector("tail", "deribit.trades.", "--control", market.control, "--for", "8s"),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == ""
    told = (
        r"collector: nothing yet on topics that begin with 'deribit.trades.' from tcp://127.0.0.1:\d+; a topic is like "
        r"deribit.trade.BTC-PERPETUAL.100ms; `collector state` shows what is collected, and where"
    )
    yet, end = done.stderr.splitlines()
    assert re.fullmatch(told, yet)
    assert end == yet.replace("nothing yet", "nothing came")


def test_reading_for_a_while_in_which_nothing_came_is_told_at_its_end() -> None:
    endpoint = f"tcp://127.0.0.1:{find_port()}"
    done = subprocess.run(
        collector("tail", "--for", "0.5s", "--endpoint", endpoint), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith(f"collector: nothing came from {endpoint}; a topic is like ")


def test_where_nothing_came_it_is_told_that_a_socket_file_cannot_be_reached(tmp_path: Path) -> None:
    shut = f"ipc://{tmp_path}/a.pub"
    done = subprocess.run(
        collector("tail", "--for", "0.5s", "--endpoint", shut), capture_output=True, text=True, timeout=60
    )
    assert done.stderr.startswith(
        f"collector: nothing came from {shut} (not there, or closed to you); a topic is like "
    )


def test_on_a_terminal_it_is_told_how_connections_are_and_that_nothing_came(market: Market) -> None:
    with on_terminal(*collector("tail", "nothing.", "--for", "2s", "--control", market.control)) as terminal:
        terminal.wait(r"futures.*live.*lag 3 ms")
        terminal.wait("collector: nothing came on topics that begin with 'nothing.' from tcp://127.0.0.1")
        assert terminal.written.rindex("\x1b[?1049l") < terminal.written.index("nothing came"), "the view hides it"


def test_losses_go_to_stderr(market: Market) -> None:
    with running(*collector("tail", "--control", market.control, "deribit.quote.")) as program:
        program.wait_line('"seq"', stream="out")
        market.seq["deribit.quote.BTC-PERPETUAL.raw"] += 5
        lost = (
            r"^collector: deribit.quote.BTC-PERPETUAL.raw: messages \d+ to \d+ were lost on the way to this subscriber$"
        )
        program.wait_line(lost, stream="err")
        program.process.send_signal(signal.SIGINT)
        assert program.wait_exit() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_on_a_terminal_it_draws_and_gives_the_terminal_back(market: Market, number: signal.Signals) -> None:
    with on_terminal(*collector("tail", "--control", market.control)) as terminal:
        terminal.wait(r"\x1b\[\?1049h")
        terminal.wait(r"messages/s on [1-9]\d* topic")
        terminal.wait(r"bid 10 @ 92,294.5  ask 2,000 @ 92,295  \(1 \+ 1 levels\)")
        terminal.wait(r"TRADES \(UTC\).*EVENTS \(UTC\)")
        terminal.wait(r"sell 10 @ 92,294.5")
        terminal.wait(r"futures.*live")
        terminal.wait("Ctrl-C leaves; the collector goes on")
        assert terminal.end(number) == 0
        assert "\x1b[?1049l" in terminal.written
        assert terminal.written.rindex("\x1b[?25h") > terminal.written.rindex("\x1b[?25l")
        assert "Traceback" not in terminal.written


LOSING = """
import os
from collector.cli import main
from collector.client.subscriber import Subscriber

receive_frames = Subscriber.receive_frames


def lose_signal(*arguments):
    Subscriber.receive_frames = receive_frames
    try:
        os.kill(os.getpid(), {number})
    except KeyboardInterrupt:
        pass
    return receive_frames(*arguments)


Subscriber.receive_frames = lose_signal
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["tail", "verify --for 1h"])
def test_a_signal_whose_exception_is_lost_ends_it_all_the_same(
    market: Market, command: str, number: signal.Signals
) -> None:
    """As pyzmq's wheels for Python 3.12 and newer lose it now and then, amid a zmq.Again that they raise."""
    losing = LOSING.format(number=int(number))
    with running(sys.executable, "-c", losing, *command.split(), "--control", market.control) as program:
        assert program.wait_exit() == 0, program.text()


def test_losses_have_their_lines_though_messages_follow_them_at_once(market: Market) -> None:
    with on_terminal(*collector("tail", "--control", market.control), term="dumb") as terminal:
        terminal.wait(r"\d  quote ")
        market.seq["deribit.quote.BTC-PERPETUAL.raw"] += 5
        market.seq["deribit.trade.BTC-PERPETUAL.100ms"] += 5
        terminal.wait(r"LOSS  .*deribit\.quote\.")
        terminal.wait(r"LOSS  .*deribit\.trade\.")
        assert terminal.end(signal.SIGINT) == 0


def test_a_terminal_whose_encoding_has_no_ellipsis_shows_what_it_can(market: Market) -> None:
    command = collector("tail", "--control", market.control)
    with on_terminal(*command, COLUMNS="60", PYTHONIOENCODING="latin-1") as terminal:
        terminal.wait(r"publishes at tcp[\w:/.]*\?")
        assert terminal.end(signal.SIGINT) == 0
        assert "\x1b[?1049l" in terminal.written


def test_verify_that_is_stopped_over_its_end_misses_no_heartbeats(market: Market) -> None:
    with running(*collector("verify", "--for", "3s", "--json", "--control", market.control)) as program:
        wait_until(lambda: market.answers > 1, "it reads, and asks for the second time")
        program.process.send_signal(signal.SIGSTOP)
        time.sleep(5)  # over its end, and longer than heartbeats may be away
        program.process.send_signal(signal.SIGCONT)
        program.wait_exit()
        assert json.loads(program.out[0])["rules"]["heartbeat"]["broken"] == 0


WISHES = """
import os, signal, time
from collector.cli.options import ONE_WISH, Ending


def is_interrupted_by(number):
    try:
        os.kill(os.getpid(), number)
    except KeyboardInterrupt:
        return True
    return False


ending = Ending()
print(ending.has_come(), is_interrupted_by(signal.SIGINT), ending.has_come(), is_interrupted_by(signal.SIGTERM))
time.sleep(ONE_WISH)
print(is_interrupted_by(signal.SIGTERM))
signal.signal(signal.SIGINT, signal.SIG_IGN)
print(Ending().has_come(), is_interrupted_by(signal.SIGINT))
"""


def test_two_signals_at_once_are_one_wish_and_one_that_the_shell_has_ignored_is_none() -> None:
    done = subprocess.run([sys.executable, "-c", WISHES], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert (done.stdout, done.stderr) == ("False True True False\nTrue\nFalse False\n", "")


def test_on_a_terminal_that_cannot_draw_it_writes_lines(market: Market) -> None:
    with on_terminal(*collector("tail", "--control", market.control), term="dumb") as terminal:
        terminal.wait(r"futures publishes at tcp://127.0.0.1:\d+")
        for kind in ("quote", "trade", "book", "heartbeat"):
            terminal.wait(rf"\d\d:\d\d:\d\d\.\d\d\d  {kind} ")
        assert terminal.end(signal.SIGINT) == 0
        assert "\x1b" not in terminal.written


@pytest.mark.parametrize("command", ["state", "verify --for 1s"])
@pytest.mark.parametrize(
    ("wish", "is_plain"), [({"NO_COLOR": ""}, False), ({"NO_COLOR": "1"}, True), ({"term": "dumb"}, True)]
)
def test_who_wants_no_colors_gets_none(market: Market, wish: dict[str, str], is_plain: bool, command: str) -> None:
    market.others = {"other": {"name": "other", "state": "live"}}
    with on_terminal(*collector(*command.split(), "--control", market.control), **{"NO_COLOR": "", **wish}) as terminal:
        wait_until(lambda: (terminal.read(), terminal.process.poll() is not None)[1], "its end")
        assert re.search("other +.*live|checked", terminal.read())
        assert ("\x1b[" not in terminal.written) == is_plain, terminal.written


@pytest.mark.parametrize("term", ["dumb", "xterm-256color"])
def test_what_others_wrote_does_not_steer_the_terminal(market: Market, term: str) -> None:
    title = "\x1b]0;ours\x07"
    market.others = {f"other{title}": {"publish": f"ipc:///nowhere/{title}"}}
    with on_terminal(*collector("tail", "--control", market.control), term=term) as terminal:
        terminal.wait(r"other\?]0;ours\?.* publishes at ipc:///nowhere/\?]0;ours\?")
        assert terminal.end(signal.SIGINT) == 0
        assert title not in terminal.written


VIEW = """
import os, sys
from collector.cli.watch import MAX_HELD, View
view = View(sys.argv[1])
workers = os.dup(2)
os.write(workers, b"the first of too many\\n" + b"one of many\\n" * MAX_HELD)
os.write(workers, b"a line of the log, no text: \\xff\\n")
sys.stdin.readline()
print("a word amid the view", file=sys.stderr, flush=True)
view.close()
print("after the end", file=sys.stderr)
os.write(workers, b"the last word of a worker\\n")
sys.stdin.readline()
"""


def test_watching_holds_the_log_back_and_prints_it_at_the_end(market: Market) -> None:
    with on_terminal(sys.executable, "-c", VIEW, market.control) as terminal:
        terminal.wait("publishes at tcp://127.0.0.1")
        terminal.wait("Ctrl-C stops everything")
        assert "a line of the log" not in terminal.read()
        os.write(terminal.master, b"\n")
        terminal.wait("after the end")
        terminal.wait("the last word of a worker")
        assert "the first of too many" not in terminal.written
        left = terminal.written.rindex("\x1b[?1049l")
        held = [left, *(terminal.written.index(word) for word in ("a line of the log", "a word amid", "after the end"))]
        assert held == sorted(held)


def test_watching_holds_no_log_back_that_goes_elsewhere(market: Market, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = ("sh", "-c", f'exec "$@" 2>{log}', "sh", sys.executable, "-c", VIEW, market.control)
    with on_terminal(*command) as terminal:
        terminal.wait("Ctrl-C stops everything")
        wait_until(lambda: b"a line of the log" in log.read_bytes(), "the log")
        os.write(terminal.master, b"\n\n")
        wait_until(lambda: (terminal.read(), terminal.process.poll() is not None)[1], "its end")
        assert terminal.process.returncode == 0


def write_watched(directory: Path) -> Path:
    """A configuration of one connection to the practice exchange."""
    directory.chmod(0o700)
    file = directory / "config.toml"
    file.write_text(
        f'[collector]\nruntime_dir = "{directory}"\n[exchange]\n[[connection]]\nname = "a"\nurl = "practice"\n'
        'channels = ["quote.BTC-PERPETUAL"]\n'
    )
    return file


@pytest.mark.parametrize("trouble", ["gone", "held"])
def test_a_terminal_that_takes_nothing_more_does_not_hinder_the_end(tmp_path: Path, trouble: str) -> None:
    with on_terminal(*collector("run", str(write_watched(tmp_path)), "--watch")) as terminal:
        terminal.wait(r"messages/s on [1-9]\d* topic")
        if trouble == "held":
            os.write(terminal.master, b"\x13")  # Ctrl-S
            assert terminal.end(signal.SIGTERM) == 0
        else:
            os.close(terminal.master)
            terminal.process.send_signal(signal.SIGHUP)
            assert terminal.process.wait(20) == 0
            terminal.master = os.open(os.devnull, os.O_RDONLY)
    assert not (tmp_path / "control").exists()


def test_watching_gives_the_terminal_back_at_once_though_a_worker_is_long_in_ending(tmp_path: Path) -> None:
    with on_terminal(*collector("run", str(write_watched(tmp_path)), "--watch")) as terminal:
        terminal.wait(r"messages/s on [1-9]\d* topic")
        with Control(f"ipc://{tmp_path}/control") as asked:
            worker = psutil.Process(asked.get_state("a")["pid"])
        worker.suspend()
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait("SIGINT: stopping")
        worker.resume()
        wait_until(lambda: (terminal.read(), terminal.process.poll() is not None)[1], "its end")
        assert terminal.process.returncode == 0
        assert "did not stop" not in terminal.written


def test_of_a_connection_that_no_worker_has_the_view_says_where_to_look() -> None:
    clashing = {**QUICK, "channels": ["trades.option.any.agg2", "trades.BTC-*.agg2"]}
    with collected({"a": QUICK, "clashing": clashing}) as run:
        run.wait_state("clashing", "failed")
        with on_terminal(*collector("tail", "--control", run.control)) as terminal:
            terminal.wait("clashing .*no worker runs: `collector state clashing` says why")


def test_watching_waits_for_the_collector_and_prints_lines_into_a_pipe(tmp_path: Path) -> None:
    market = Market(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", VIEW, market.control],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ) as viewer:
        assert viewer.stdin is not None
        assert viewer.stdout is not None
        market.start()
        try:
            lines = [viewer.stdout.readline() for _ in range(8)]
        finally:
            market.ended.set()
            market.join()
        viewer.stdin.write("\n\n")
        viewer.stdin.flush()
        assert viewer.wait(20) == 0
    assert lines[1] == "Ctrl-C stops everything\n"
    assert re.fullmatch(r"futures publishes at tcp://127.0.0.1:\d+\n", lines[3])
    assert len({line.split()[1] for line in lines[4:]}) > 1, "the same topic again and again"


ENVELOPE = {"exchange": "deribit", "instrument": "X", "epoch": 1, "seq": 1, "exchange_ts": 0, "receive_ts": START}


@pytest.mark.parametrize(
    ("type", "keys", "said"),
    [
        ("trade", {"side": "buy", "amount": 2000.0, "price": 0.00015, "liquidation": "T"},
         "buy  2,000 @ 0.00015  liquidation"),
        ("trade", {"side": "sell", "amount": 1.0, "price": "odd" * 9}, "sell 1 @ oddoddoddoddoddoddod"),
        ("book", {"kind": "delta", "change_id": 7, "bids": [[9.5, 1.0], [9.0, 0.0], [8.0, 1.0]], "asks": [[10.0, 2.0]]},
         "delta    7  bids 1 @ 9.5, bids 0 @ 9, asks 2 @ 10, 1 more"),
        ("book", {"kind": "snapshot", "change_id": 7, "bids": [], "asks": [[10.0, 2.0]] * 4},
         "snapshot 7  asks 2 @ 10, asks 2 @ 10, 2 more"),
        ("book", {"kind": "delta", "change_id": 7, "bids": [[9.5, 1.0]], "asks": []}, "delta    7  bids 1 @ 9.5"),
        ("quote", {**BEST, "best_ask_price": None, "best_ask_amount": None}, "bid 10 @ 92,294.5  ask - @ -"),
        ("index", {"price": 92294.55}, "92,294.55"),
        ("gap", {"id": 3, "reason": "disconnect", "from_ts": START, "to_ts": START + 1_500_000_000, "missing_from": 7,
                 "healing": True}, "GAP 3: disconnect, 1.500 s, trades from 7 to ?, healing"),
        ("gap", {"id": 3, "reason": "restart", "from_ts": 0, "to_ts": START, "last_change_id": 9},
         "GAP 3: restart, book after change 9"),
        ("repair", {"gap": 3, "repaired": 10, "missing": [[4, 5], [9, 9]]}, "repair of gap 3: 10 came, 3 stay missing"),
        ("status", {"state": "stale", "reason": "lag"}, "status stale (lag)"),
        ("heartbeat", {"state": "live", "published": 12345, "lag": 0.0042}, "live, 12,345 published, lag 4 ms"),
        ("heartbeat", {"state": "backoff", "published": 0, "lag": None}, "backoff, 0 published, lag 0 ms"),
        ("mark_prices", {"marks": []}, "0 options"),
        ("mark_prices", {"marks": [{"instrument": "X-C", "mark_price": 0.5}]}, "1 option, X-C 0.5"),
        ("status", {"state": "live", "reason": ""}, "status live"),
        ("platform", {"locked": False, "price_index": "btc_usd"}, "locked false"),
        ("instrument", {"state": "op\x1b[2Jen"}, "op?[2Jen"),
    ],
)  # fmt: skip
def test_each_type_is_said_in_a_few_words(type: str, keys: dict[str, Any], said: str) -> None:
    topic = parse_topic("deribit.trade.X.raw" if type in ("gap", "repair", "status") else f"deribit.{type}.X.raw")
    message = Message(topic, {"type": type, **ENVELOPE, **keys})
    assert describe(message) == said
    kind = f"trade {type}" if topic.type != type else type
    assert re.split("  +", format_line(message), maxsplit=4) == ["14:13:20.000", kind, "X", "raw", said]
    assert format_line(Message(topic, {**message.payload, "join": True})) == format_line(message) + "  (join)"


def draw(board: Board, width: int = 120, height: int = 40) -> list[str]:
    """The lines of the view on a terminal of that size."""
    console = Console(width=width, height=height, file=io.StringIO())
    with console.capture() as drawn:
        console.print(board.render(console))
    return [line.rstrip() for line in drawn.get().splitlines() if line.strip()]


def show(board: Board, topic: str, **keys: Any) -> None:
    """Have the board take one message."""
    kind = topic.split(".")[1]
    board.take(Message(parse_topic(topic), {**ENVELOPE, "type": kind, "instrument": topic.split(".")[2], **keys}))


def test_where_there_is_no_room_for_all_topics_the_busiest_are_shown() -> None:
    board = Board([])
    for number in range(1000):
        show(board, f"deribit.index.i{number % 3}.raw", price=float(number))
        if number < 20:
            show(board, f"deribit.quote.q{number}.raw", **BEST)
    show(board, "deribit.heartbeat.a.1s", state="live", lag=None)  # read besides, and no topic of the table
    lines = [line for line in draw(board, height=16) if not line.startswith("  a ")]
    assert lines[0] == "collector  0 messages/s on 23 topics, 1,020 in 0:00"
    assert [line.split()[:4] for line in lines[2:5]] == [
        ["index", "i0", "raw", "999"], ["index", "i1", "raw", "997"], ["index", "i2", "raw", "998"],
    ]  # fmt: skip
    assert lines[5].split()[:3] == ["quote", "q0", "raw"]
    shown = sum(line.startswith(("index", "quote")) for line in lines)
    assert f"and {23 - shown} more topics" in lines[2 + shown]


def test_a_topic_that_is_not_live_or_not_in_sync_says_so_before_its_value() -> None:
    board = Board([])
    show(board, "deribit.index.W.raw", type="status", state="live", reason="")
    show(board, "deribit.index.X.raw", price=5.0)
    show(board, "deribit.index.X.raw", type="status", state="stale", reason="mute")
    show(board, "deribit.book.X.raw", type="gap", id=1, reason="disconnect", from_ts=0, to_ts=START)
    board.take(Loss(parse_topic("deribit.trade.X.raw"), "sequence", 1, 3, 5))
    board.take(Loss(None, "malformed"))
    show(board, "deribit.trade.Y.raw", side="sell", amount=1.0, price=2.0)
    lines = draw(board)
    empty, *rows = (line for line in lines if line.startswith(("index", "book")))
    assert re.split("  +", empty)[:5] == ["index", "W", "raw", "0.0", "-"]
    assert re.split("  +", rows[0])[3:5] == ["stale", "5"]
    assert re.search(r" \d\.\d s$", rows[0])
    assert re.split("  +", rows[1])[3] == "not in sync"
    assert rows[1].endswith(" -"), "no data have come"
    events = [line.split("  ")[-1].strip().split(" ", 1)[1] for line in lines[-4:]]
    assert events == [
        "unknown topic: malformed", "trade X: 3 lost on the way here", "book X: GAP 1: disconnect",
        "index X: stale (mute)",
    ]  # fmt: skip
    assert any("14:13:20 Y  sell 1 @ 2 " in line for line in lines[-4:]), "not among the trades"
    snapshot = {"kind": "snapshot", "change_id": 1, "bids": [[9.5, 2.0]], "asks": []}
    show(board, "deribit.book.X.raw", seq=2, **snapshot)
    (row,) = (line for line in draw(board) if line.startswith("book"))
    assert re.split("  +", row)[3:6] == ["bid 2 @ 9.5", "ask -", "(1 + 0 levels)"]


def test_a_topic_that_was_left_goes_once_nothing_is_said_of_it_any_more() -> None:
    """Options come and go every day: a view that is open for weeks would hold, and sort, all that there ever were."""
    board = Board([])
    for name, state in (("GONE", "expired"), ("ENDED", "expired"), ("REFUSED", "refused"), ("BACK", "closed")):
        show(board, f"deribit.index.{name}.raw", price=5.0)
        show(board, f"deribit.index.{name}.raw", type="status", state=state, reason="")
    assert "on 4 topics" in draw(board)[0]
    for row in board.rows.values():
        row.said -= GONE
    show(board, "deribit.index.ENDED.raw", type="status", state="expired", reason="")  # the configuration names it
    show(board, "deribit.index.BACK.raw", type="status", state="live", reason="")
    wait_until(lambda: "on 3 topics" in draw(board)[0], "one to go")
    assert [topic.instrument for topic in board.rows] == ["ENDED", "REFUSED", "BACK"]


def test_the_rate_of_a_topic_follows_smoothly_and_repeats_do_not_count() -> None:
    row = Row(parse_topic("deribit.index.X.raw"))
    message = Message(row.topic, {**ENVELOPE, "type": "index", "price": 5.0})
    for _ in range(10):
        row.take(message, 0.0)
    row.measure(2.0)
    assert row.rate == 5.0
    for _ in range(10):
        row.take(message, 0.0)
        row.take(Message(row.topic, {**message.payload, "join": True}), 0.0)
    row.measure(1.0)
    assert row.rate == pytest.approx(0.6 * 5.0 + 0.4 * 10.0)


def test_who_has_ended_is_not_silent_and_goes_once_no_endpoint_of_it_is_named() -> None:
    board = Board([])
    for name, state in (("gone", "closed"), ("down", "failed"), ("stuck", "live")):
        topic = parse_topic(f"deribit.heartbeat.{name}.1s")
        board.take(Message(topic, {**ENVELOPE, "type": "heartbeat", "state": state, "lag": None, "receive_ts": 1}))
    lines = draw(board)
    board.endpoints = {"down": "tcp://127.0.0.1:5601", "stuck": "tcp://127.0.0.1:5602"}
    lines += draw(board)
    shown = [words[:3] for words in map(str.split, lines) if words[:1] in (["gone"], ["down"], ["stuck"])]
    assert shown[:3] == [["down", "failed"], ["gone", "closed"], ["stuck", "live", "silent"]]
    assert shown[3:] == [["down", "failed", "publishes"], ["stuck", "live", "silent"]]


def test_a_connection_that_is_not_live_says_why_in_its_line() -> None:
    board, lines = Board([]), []
    board.endpoints, board.lifeless = {"a": "tcp://127.0.0.1:5601", "dead": "tcp://127.0.0.1:5602"}, {"dead"}
    for state, reason in (
        ("backoff", "HTTP 503 instead of a WebSocket"),
        ("connecting", "attempt 2 of 3"),
        ("live", ""),
    ):
        show(board, "deribit.heartbeat.a.1s", state=state, lag=None, receive_ts=time.time_ns())
        show(board, "deribit.status.a.connection", type="status", state=state, reason=reason)
        lines += [line.split() for line in draw(board)[1:3]]
    for words in lines[0], lines[2]:
        assert words[2:] == ["lag", "0", "ms", "HTTP", "503", "instead", "of", "a", "WebSocket"]
    assert lines[4] == ["a", "live", "lag", "0", "ms", "publishes", "at", "tcp://127.0.0.1:5601"]
    assert " ".join(lines[5]) == "dead no worker runs: `collector state dead` says why"
    show(board, "deribit.heartbeat.a.1s", state="live", lag=None, receive_ts=1)
    show(board, "deribit.status.a.connection", type="status", state="failed", reason="public/auth: 13004", receive_ts=2)
    assert draw(board)[1].split() == ["a", "failed", "public/auth:", "13004"]


def test_a_connection_of_which_no_heartbeat_has_come_yet_is_not_silent() -> None:
    """Its status is said once a minute, and as old as that to who joins."""
    board = Board([])
    board.endpoints = {"a": "tcp://127.0.0.1:5601"}
    assert draw(board)[1].split()[:5] == ["a", "no", "heartbeat", "yet", "publishes"]
    show(board, "deribit.status.a.connection", type="status", state="live", reason="", receive_ts=1, join=True)
    assert draw(board)[1].split()[:3] == ["a", "live", "publishes"]


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (50, ["TYPE", "INSTRUMENT", "LAST", "AGE"]),
        (60, ["TYPE", "INSTRUMENT", "LAST", "MSG/S", "AGE"]),
        (80, ["TYPE", "INSTRUMENT", "LAST", "MSG/S", "AGE"]),
        (96, ["TYPE", "INSTRUMENT", "INTERVAL", "LAST", "MSG/S", "AGE"]),
    ],
)
def test_a_narrow_terminal_shows_the_last_value_before_all_that_tells_less(width: int, columns: list[str]) -> None:
    board = Board([])
    show(board, "deribit.trade.BTC-25DEC26-90000-C.100ms", side="sell", amount=10.0, price=0.0666)
    head, row = (line for line in draw(board, width) if line.startswith(("TYPE", "trade")))
    assert head.split() == columns
    assert "BTC-25DEC26-90000-C" in row
    assert "sell 10 @ 0." in row


def test_each_change_of_a_connection_is_an_event_and_nothing_else_is() -> None:
    board = Board([])
    for state in ("live", "live", "backoff", "bootstrapping", "live", "live"):
        show(board, "deribit.status.futures.connection", state=state)
    said = [line.split("futures: ")[1] for line in draw(board, 80) if "futures: " in line]
    assert said == ["live", "bootstrapping", "backoff"]


def test_a_loss_and_a_type_that_nobody_knows_yet_are_lines_too() -> None:
    topic = parse_topic("deribit.trade.X.raw")
    assert format_line(Message(topic, {**ENVELOPE, "type": "news"})).endswith("  7 keys")
    assert "LOSS" in format_line(Loss(topic, "sequence", 1, 3, 5))
    assert "\x1b" not in format_line(Loss(None, "malformed", detail="\x1b[2J"))
