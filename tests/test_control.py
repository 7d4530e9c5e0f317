"""The control channel of a running collector: each op, each code, and what is known to go wrong with such a thing."""

import os
import random
import re
import signal
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import psutil
import pytest
import zmq

from collector.messages import ControlError, decode_reply, encode
from collector.supervisor.commands import explain_forbidden, is_sendable
from collector.supervisor.control import MAX_PENDING
from tests.collected import MANY, PATIENT, QUICK, Collected, collected, give_up_unheard, held_at_start
from tests.support import wait_until

SLOW = {**QUICK, "url": "practice?faults=slow:public/get_currencies=3", "channels": []}
"""A connection on which public/get_currencies takes 3 s."""


@pytest.fixture(scope="module")
def shared() -> Iterator[Collected]:
    """A collector that these tests leave as they found it: `a` with data, `slow` with a slow method."""
    with collected({"a": QUICK, "slow": SLOW}) as run:
        run.wait_state("a")
        run.wait_state("slow")
        yield run
        assert run.stop() == 0, run.program.text()
        assert "a fault of" not in run.program.text()


@contextmanager
def connected(run: Collected, kind: int = zmq.DEALER) -> Iterator[Any]:
    """A socket of any kind on the control endpoint."""
    context = zmq.Context()
    try:
        client = context.socket(kind)
        client.setsockopt(zmq.RCVTIMEO, 10_000)
        client.connect(run.control)
        yield client
    finally:
        context.destroy(linger=0)


def read_code(reply: bytes) -> str:
    try:
        decode_reply(reply)
    except ControlError as error:
        return error.code
    return "ok"


# what comes in


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "bad_request"),
        (b"\xc1", "bad_request"),
        (b"hello", "bad_request"),
        (encode([1, 2]), "bad_request"),
        (encode({}), "bad_request"),
        (encode({"op": 5}), "bad_request"),
        (encode({"op": "reboot"}), "unknown_op"),
        (encode({"op": "close"}), "bad_request"),
        (encode({"op": "close", "connection": "nobody"}), "unknown_connection"),
        (encode({"op": "subscribe", "connection": "a"}), "bad_request"),
        (encode({"op": "subscribe", "connection": "a", "channels": [1]}), "bad_request"),
        (encode({"op": "send", "connection": "a", "method": 1}), "bad_request"),
        (encode({"op": "send", "connection": "a", "method": "public/test", "params": []}), "bad_request"),
        (encode({"op": "get_state", "deadline": "soon"}), "bad_request"),
        (encode({"op": "get_state", "deadline": 1}), "expired"),
        (b"\x82\xa2op\xa9get_state\xdf\xff\xff\xff\xff", "bad_request"),
        (b"x" * 10_000_000, "bad_request"),
        (encode({"op": "get_state", "padding": "x" * 10_000_000}), "bad_request"),
    ],
)
def test_a_wrong_request_is_answered_with_its_code(shared: Collected, body: bytes, code: str) -> None:
    with connected(shared, zmq.REQ) as client:
        client.send(body)
        assert read_code(client.recv()) == code
    assert shared.get_state("a")["state"] == "live"


@pytest.mark.parametrize(
    "frames",
    [
        [b"no delimiter"],
        [b"a", b"b", b"c"],
        [b""],
        [b"", b""],
        [b"", b"a", b"b"],
        [b"", encode({"op": "get_state"}), b""],
        [b"id", b"", b"\xc1"],
        [b"", b"", encode({"op": "get_state"})],
    ],
)
def test_a_message_without_the_form_of_a_request_is_answered_too(shared: Collected, frames: list[bytes]) -> None:
    with connected(shared) as client:
        client.send_multipart(frames)
        assert read_code(client.recv_multipart()[-1]) == "bad_request"
    assert shared.get_state("a")["state"] == "live"


def test_a_flood_of_garbage_holds_up_nobody(shared: Collected) -> None:
    chance = random.Random(7)
    with connected(shared) as client:
        for _ in range(5000):
            client.send_multipart([chance.randbytes(chance.randrange(40)) for _ in range(chance.randrange(1, 4))])
        assert shared.get_state("a")["state"] == "live"
        client.recv_multipart()  # they were seen, and answered
    assert shared.get_state("a")["restarts"] == 0


def test_any_req_client_is_served_also_one_that_correlates(shared: Collected) -> None:
    with connected(shared, zmq.REQ) as client:
        client.setsockopt(zmq.REQ_RELAXED, 1)
        client.setsockopt(zmq.REQ_CORRELATE, 1)
        # It loses patience with the slow one and asks another: the late reply must not be taken for the second's.
        client.send(encode({"op": "send", "connection": "slow", "method": "public/get_currencies"}))
        client.send(encode({"op": "get_state", "connection": "a"}))
        assert decode_reply(client.recv())["name"] == "a"
        client.send(encode({"op": "send", "connection": "slow", "method": "public/test"}))
        assert "version" in decode_reply(client.recv())


# get_state and send


def test_get_state_tells_what_the_design_lists(shared: Collected) -> None:
    states = shared.ask("get_state")
    assert list(states) == ["a", "slow"]
    state = states["a"]
    wanted = (
        "name state since url publish pid epoch restarts reconnects attempts authenticated channels messages bytes "
        "rate last_message_ts lag latency clock_offset clock_error gaps resyncs dropped last_error cpu memory"
    )
    assert [key for key in wanted.split() if key not in state] == []
    assert list(state)[:3] == ["name", "state", "since"]
    assert state["channels"]["asked"] == state["channels"]["confirmed"] == ["quote.BTC-PERPETUAL"]
    assert psutil.pid_exists(state["pid"])
    assert 0 <= state["cpu"] <= 4
    assert state["memory"] > 1 << 20


def test_a_channel_is_free_only_once_the_worker_that_had_it_knows() -> None:
    """Else two workers would feed one topic."""
    channel = "quote.BTC-PERPETUAL"
    with collected({"a": QUICK, "b": QUICK | {"channels": []}}, first=PATIENT) as run:
        run.wait_state("b")
        worker = give_up_unheard(run, "a", channel)
        (told,) = run.ask("subscribe", connection="b", channels=[channel])["channels"].values()
        assert "of a feeds the same topics" in told["message"]
        soon = time.time_ns() + 300_000_000
        assert run.refuse("connect", connection=QUICK | {"name": "c"}, deadline=soon).code == "timeout"
        assert run.get_state("c")["pid"] is None
        worker.resume()
        run.wait_state("c")
        assert run.get_state("a")["channels"]["confirmed"] == []
        run.ask("close", connection="c")
        assert run.ask("subscribe", connection="b", channels=[channel])["channels"] == {channel: True}


def test_to_give_up_what_another_connection_has_makes_it_not_free() -> None:
    """Where the worker that is to give it up, and never had it, does not hear that yet."""
    channel = "quote.BTC-PERPETUAL"
    with collected({"b": QUICK, "a": QUICK | {"channels": []}}, first=PATIENT) as run:
        run.wait_state("b")
        give_up_unheard(run, "a", channel)
        (told,) = run.ask("subscribe", connection="a", channels=[channel])["channels"].values()
        assert "of b feeds the same topics" in told["message"]
        assert run.ask("connect", connection=QUICK | {"name": "c", "channels": []})["state"] == "live"


def test_the_channels_of_a_connection_that_has_failed_for_good_are_free() -> None:
    """It is still shown with them."""
    channel = "quote.BTC-PERPETUAL"
    failing = {"url": "ws://127.0.0.1:9/", "channels": [channel], "retry_count": 1, "retry_delay": 0.01}
    with collected({"a": failing, "b": QUICK | {"channels": []}}) as run:
        run.wait_state("b")
        run.program.wait_line("a: .*never live in .* given up")
        assert run.get_state("a")["channels"]["asked"] == [channel]
        assert run.ask("subscribe", connection="b", channels=[channel])["channels"] == {channel: True}


def test_a_channel_that_overlaps_one_which_is_being_left_may_follow_it_on_the_same_connection() -> None:
    """The worker is told both in order."""
    narrow, wide = "trades.BTC-PERPETUAL.100ms", "trades.future.BTC.100ms"
    with collected({"a": QUICK | {"channels": [narrow]}}, first=PATIENT) as run:
        worker = give_up_unheard(run, "a", narrow)
        soon = time.time_ns() + 300_000_000
        assert run.refuse("subscribe", connection="a", channels=[wide], deadline=soon).code == "timeout"
        # Others are held to it meanwhile, and only to what they want themselves.
        b = QUICK | {"name": "b", "channels": [narrow]}
        assert f"would feed the same topics as {wide} of connection a" in run.refuse("connect", connection=b).message
        b["channels"] = ["quote.ETH-PERPETUAL"]
        assert run.ask("connect", connection=b)["state"] == "live"
        worker.resume()
        wait_until(lambda: run.get_state("a")["channels"]["confirmed"] == [wide], "the other channel")


def test_what_was_given_up_before_a_worker_started_is_free_while_it_starts() -> None:
    channel = "quote.BTC-PERPETUAL"
    with collected(
        {"a": {**QUICK, "channels": [channel, *MANY], "retry_delay": 3}, "b": QUICK | {"channels": []}}
    ) as run:
        pid = run.wait_state("a")["pid"]
        run.wait_state("b")
        os.kill(pid, signal.SIGKILL)
        run.program.wait_line("a: .*started again in")
        assert run.ask("unsubscribe", connection="a", channels=[channel])["channels"] == {channel: True}
        assert run.ask("subscribe", connection="b", channels=[channel])["channels"] == {channel: True}
        wait_until(lambda: run.get_state("a")["pid"] not in (None, pid), "the next life")
        table = QUICK | {"name": "c", "channels": ["quote.ETH-PERPETUAL"]}
        assert run.ask("connect", connection=table)["state"] == "live"


def test_send_returns_the_exchanges_result_raw(shared: Collected) -> None:
    assert abs(shared.ask("send", connection="a", method="public/get_time") / 1000 - time.time()) < 60
    currencies = shared.ask("send", connection="a", method="public/get_instruments", params={"currency": "any"})
    assert len(currencies) > 10
    assert "instrument_name" in currencies[0]


def test_the_exchanges_error_comes_through_unchanged(shared: Collected) -> None:
    error = shared.refuse("send", connection="a", method="public/no_such_method")
    assert error.code == "exchange_error"
    assert error.data["code"] == -32601
    error = shared.refuse("send", connection="a", method="private/get_positions")
    assert (error.code, error.data["code"]) == ("exchange_error", 13009)


@pytest.mark.parametrize(
    "method",
    [
        "private/buy", "private/logout", "public/subscribe", "public/unsubscribe_all", "public/auth",
        "public/set_heartbeat", "private/subscribe", "public/get_time ", "PUBLIC/test", "public/../private/buy", "",
        "public/" + "x" * 101, "private/get_" + "x" * 101, "private/get_",
    ],
)  # fmt: skip
def test_other_methods_are_forbidden(shared: Collected, method: str) -> None:
    assert shared.refuse("send", connection="a", method=method).code == "forbidden"


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("ticker", "'ticker' lacks its first part; write public/ticker or private/ticker"),
        ("private/buy", "'private/buy' is none of public/*, private/get_*; send_allow in the connection's table names"),
        ("public/subscribe", "the ops subscribe and unsubscribe keep account of the channels"),
        ("private/unsubscribe_all", "the ops subscribe and unsubscribe keep account of the channels"),
        ("public/auth", "'public/auth' would change what the collector keeps itself; send_allow in its table can"),
    ],
)
def test_a_forbidden_method_is_told_what_is_allowed(shared: Collected, method: str, said: str) -> None:
    assert said in shared.refuse("send", connection="a", method=method).message


def test_what_send_allow_names_is_told_as_allowed() -> None:
    assert not is_sendable("private/sell", ["private/buy"])
    words = explain_forbidden("private/sell", ["private/buy"])
    assert words.startswith("'private/sell' is none of public/*, private/get_*, private/buy; ")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("x" * 30_001, "Deribit takes 30000 in a request"),
        (msgpack.Timestamp(1), "cannot be written as JSON"),
        (b"x", "cannot be written as JSON"),
        (float("nan"), "cannot be written as JSON"),
    ],
    ids=["too long", "extension", "bytes", "not a number"],
)
def test_params_that_no_request_can_hold_are_refused_at_once(shared: Collected, value: Any, words: str) -> None:
    error = shared.refuse("send", connection="a", method="public/ticker", params={"instrument_name": value})
    assert error.code == "bad_request"
    assert words in error.message


# time


def test_a_slow_command_holds_up_nobody(shared: Collected) -> None:
    with connected(shared, zmq.REQ) as client:
        client.send(encode({"op": "send", "connection": "slow", "method": "public/get_currencies"}))
        for _ in range(3):
            shared.ask("send", connection="a", method="public/test")
            assert shared.get_state("slow")["state"] == "live"
        assert client.poll(0) == 0, "others had to wait"
        assert isinstance(decode_reply(client.recv()), list)


def test_a_deadline_is_kept(shared: Collected) -> None:
    asked = time.monotonic()
    deadline = time.time_ns() + 300_000_000
    error = shared.refuse("send", connection="slow", method="public/get_currencies", deadline=deadline)
    assert error.code == "timeout"  # else the answer would have come
    assert time.monotonic() - asked > 0.2


def test_more_requests_than_a_worker_may_owe_are_refused_at_once() -> None:
    slow = encode({"op": "send", "connection": "slow", "method": "public/get_currencies"})
    with collected({"a": QUICK, "slow": SLOW}) as run, connected(run) as client:
        run.wait_state("a")
        run.wait_state("slow")
        for _ in range(80):
            client.send_multipart([b"", slow])
        codes = [read_code(client.recv_multipart()[-1]) for _ in range(10)]
        assert codes == ["not_connected"] * 10
        assert "version" in run.ask("send", connection="a", method="public/test")


def test_more_requests_than_are_worked_on_at_a_time_are_refused_at_once_and_that_is_logged_once() -> None:
    close = encode({"op": "close", "connection": "a"})
    with collected({"a": QUICK, "b": QUICK | {"channels": []}}) as run, connected(run) as client:
        psutil.Process(run.wait_state("a")["pid"]).suspend()  # else it would be closed before there are so many
        for _ in range(MAX_PENDING + 20):
            client.send_multipart([b"", close])
        codes = [read_code(client.recv_multipart()[-1]) for _ in range(20)]
        assert codes == ["internal"] * 20
        run.program.wait_line(f"WARNING supervisor: {MAX_PENDING} control requests are waiting", stream="err")
        assert run.program.text().count("control requests are waiting") == 1
        assert read_code(client.recv_multipart()[-1]) == "ok"


def test_an_old_request_is_never_carried_out_by_a_worker_that_was_stopped() -> None:
    allowed = {**QUICK, "send_allow": ["public/unsubscribe_all"]}
    with collected({"a": allowed}, first=PATIENT) as run:
        worker = psutil.Process(run.wait_state("a")["pid"])
        worker.suspend()
        deadline = time.time_ns() + 500_000_000
        error = run.refuse("send", connection="a", method="public/unsubscribe_all", deadline=deadline)
        assert error.code == "timeout"
        worker.resume()  # it finds the request in its link, too late
        run.program.wait_line("a: a late answer: expired")
        before = run.get_state("a")
        assert before["pid"] == worker.pid
        wait_until(lambda: run.get_state("a")["bytes"] > before["bytes"] + 2000, "data, since nothing was unsubscribed")


# workers that die


def test_a_request_that_a_dying_worker_owes_is_answered_at_once_and_not_by_the_next_life() -> None:
    allowed = {**QUICK, "send_allow": ["public/unsubscribe_all"]}
    with collected({"a": allowed}, first=PATIENT) as run, connected(run, zmq.REQ) as client:
        worker = psutil.Process(run.wait_state("a")["pid"])
        worker.suspend()
        deadline = time.time_ns() + 60_000_000_000
        request = {"op": "send", "connection": "a", "method": "public/unsubscribe_all", "deadline": deadline}
        client.send(encode(request))
        # The answer to get_state, asked for after it on the same loop, shows that the first one has been passed on.
        assert run.get_state("a")["pid"] == worker.pid
        worker.kill()
        assert read_code(client.recv()) == "not_connected"
        before = run.wait_state("a", restarts=1)
        wait_until(lambda: run.get_state("a")["bytes"] > before["bytes"] + 2000, "data, since nothing was unsubscribed")


def test_a_command_to_a_dead_worker_is_answered_at_once() -> None:
    with collected({"a": {**QUICK, "retry_delay": 60.0}}) as run:
        psutil.Process(run.wait_state("a")["pid"]).kill()
        run.wait_state("a", "backoff", pid=None)
        assert run.refuse("send", connection="a", method="public/test").code == "not_connected"  # no timeout
        run.program.wait_line("a: killed by SIGKILL; started again in")


def test_channels_added_and_taken_at_run_time_outlive_the_worker() -> None:
    with collected() as run:
        pid = run.wait_state("a")["pid"]
        answer = run.ask("subscribe", connection="a", channels=["quote.ETH-PERPETUAL", "quote.NOBODY"])
        assert answer["channels"]["quote.ETH-PERPETUAL"] is True
        assert answer["channels"]["quote.NOBODY"]["code"] == "exchange_error"
        misspelt = run.ask("subscribe", connection="a", channels=["trads.ETH-PERPETUAL.raw"])["channels"]
        assert "did you mean trades?" in misspelt["trads.ETH-PERPETUAL.raw"]["message"]
        assert "trads.ETH-PERPETUAL.raw" not in run.get_state("a")["channels"]["asked"]
        assert run.ask("unsubscribe", connection="a", channels=["quote.BTC-PERPETUAL"]) == {
            "channels": {"quote.BTC-PERPETUAL": True}
        }
        psutil.Process(pid).kill()
        run.wait_state("a", restarts=1)
        wait_until(
            lambda: run.get_state("a")["channels"]["confirmed"] == ["quote.ETH-PERPETUAL"], "the channels of before"
        )


def test_a_wish_while_there_is_no_worker_is_kept() -> None:
    with collected({"a": {**QUICK, "retry_delay": 3.0}}) as run:
        psutil.Process(run.wait_state("a")["pid"]).kill()
        run.wait_state("a", "backoff", pid=None)
        answer = run.ask("subscribe", connection="a", channels=["quote.ETH-PERPETUAL"])
        assert answer["channels"]["quote.ETH-PERPETUAL"]["code"] == "not_connected"
        wanted = ["quote.BTC-PERPETUAL", "quote.ETH-PERPETUAL"]
        assert run.get_state("a")["channels"] == {"asked": wanted, "confirmed": [], "refused": {}, "mute": []}
        run.wait_state("a", restarts=1)
        wait_until(lambda: run.get_state("a")["channels"]["confirmed"] == wanted, "both channels")


def test_what_is_wished_while_the_worker_starts_is_carried_out_by_it() -> None:
    with collected({"a": {**QUICK, "channels": [*QUICK["channels"], *MANY]}}) as run:
        with held_at_start(run, "a"):
            answer = run.ask("subscribe", connection="a", channels=["quote.ETH-PERPETUAL"])["channels"]
            assert answer["quote.ETH-PERPETUAL"]["code"] == "not_connected"
            answer = run.ask("unsubscribe", connection="a", channels=["quote.BTC-PERPETUAL"])["channels"]
            assert answer == {"quote.BTC-PERPETUAL": True}

        def find_quotes() -> list[str]:
            return [name for name in run.get_state("a")["channels"]["confirmed"] if name.startswith("quote.")]

        wait_until(lambda: "quote.ETH-PERPETUAL" in find_quotes(), "the channel that was asked for")
        assert find_quotes() == ["quote.ETH-PERPETUAL"]


def test_a_wish_that_a_worker_cannot_be_asked_since_it_owes_answers_is_kept() -> None:
    request = encode({"op": "send", "connection": "a", "method": "public/test"})
    with collected(first=PATIENT) as run, connected(run) as client:
        worker = psutil.Process(run.wait_state("a")["pid"])
        worker.suspend()
        for _ in range(80):
            client.send_multipart([b"", request])
        assert [read_code(client.recv_multipart()[-1]) for _ in range(16)] == ["not_connected"] * 16
        answer = run.ask("subscribe", connection="a", channels=["quote.ETH-PERPETUAL"])["channels"]
        assert "kept" in answer["quote.ETH-PERPETUAL"]["message"]
        worker.resume()
        wait_until(lambda: "quote.ETH-PERPETUAL" in run.get_state("a")["channels"]["confirmed"], "the channel")
        assert run.get_state("a")["pid"] == worker.pid


@pytest.mark.parametrize(
    ("op", "confirmed"), [("subscribe", ["quote.BTC-PERPETUAL", "quote.ETH-PERPETUAL"]), ("unsubscribe", [])]
)
def test_a_wish_that_a_stopped_worker_sees_too_late_is_kept(op: str, confirmed: list[str]) -> None:
    with collected(first=PATIENT) as run:
        worker = psutil.Process(run.wait_state("a")["pid"])
        worker.suspend()
        channel = "quote.ETH-PERPETUAL" if op == "subscribe" else "quote.BTC-PERPETUAL"
        deadline = time.time_ns() + 300_000_000
        assert run.refuse(op, connection="a", channels=[channel], deadline=deadline).code == "timeout"
        worker.resume()
        run.program.wait_line("a: a late answer: expired")
        wait_until(lambda: run.get_state("a")["channels"]["confirmed"] == confirmed, "what was wished")
        assert run.get_state("a")["pid"] == worker.pid


# subscribe


def test_a_channel_that_would_feed_the_topic_of_another_is_refused_and_the_rest_taken(shared: Collected) -> None:
    trades = {"a": ["trades.BTC-PERPETUAL.100ms"], "slow": ["trades.future.BTC.100ms", "trades.ETH-PERPETUAL.100ms"]}
    assert shared.ask("subscribe", connection="a", channels=trades["a"])["channels"][trades["a"][0]] is True
    answer = shared.ask("subscribe", connection="slow", channels=[*trades["slow"], "quote.BTC-PERPETUAL", "nonsense"])
    codes = {name: value if value is True else value["code"] for name, value in answer["channels"].items()}
    assert codes["trades.future.BTC.100ms"] == "bad_request"
    assert codes["quote.BTC-PERPETUAL"] == "bad_request"
    assert codes["trades.ETH-PERPETUAL.100ms"] is True
    for name, channels in trades.items():
        shared.ask("unsubscribe", connection=name, channels=channels)
    # Once the one is gone the other may come.
    again = shared.ask("subscribe", connection="slow", channels=["trades.future.BTC.100ms"])
    assert again["channels"]["trades.future.BTC.100ms"] is True
    shared.ask("unsubscribe", connection="slow", channels=["trades.future.BTC.100ms", "nonsense"])


@pytest.mark.parametrize("op", ["subscribe", "unsubscribe"])
def test_patterns_are_not_taken_for_channels(shared: Collected, op: str) -> None:
    channels = ["quote.BTC-*", "ticker.{kind=option}.100ms", "quote.SOL_USDC-PERPETUAL"]
    answer = shared.ask(op, connection="a", channels=channels)["channels"]
    assert list(answer) == channels
    assert [answer[name]["code"] for name in channels[:2]] == ["bad_request"] * 2
    assert "patterns stand in the file" in answer["quote.BTC-*"]["message"]
    assert answer["quote.SOL_USDC-PERPETUAL"] is True
    shared.ask("unsubscribe", connection="a", channels=channels[2:])


def test_channels_that_need_a_login_are_refused_without_one_as_in_the_file(shared: Collected) -> None:
    private, raw = channels = ["user.orders.any.any.raw", "book.ETH-PERPETUAL.raw"]
    answer = shared.ask("subscribe", connection="a", channels=channels)["channels"]
    assert answer == {
        private: {"code": "bad_request", "message": f"{private} is private; write credentials = ... or leave it out"},
        raw: {"code": "bad_request", "message": f"{raw} needs a login; write {raw[:-3]}100ms, or credentials = ..."},
    }
    assert not {*channels} & {*shared.get_state("a")["channels"]["asked"]}


# connect and close


def test_connect_and_close_and_connect_again(shared: Collected) -> None:
    table = {**QUICK, "name": "c", "channels": ["quote.ETH-PERPETUAL"]}
    first = shared.ask("connect", connection=table)
    assert (first["name"], first["state"]) == ("c", "live")
    assert shared.refuse("connect", connection=table).code == "exists"
    final = shared.ask("close", connection="c")
    assert (final["state"], final["pid"]) == ("closed", None)
    assert not psutil.pid_exists(first["pid"])
    assert shared.refuse("get_state", connection="c").code == "unknown_connection"
    second = shared.ask("connect", connection=table)
    assert second["epoch"] > first["epoch"]
    shared.ask("close", connection="c")
    assert list(shared.ask("get_state")) == ["a", "slow"]
    assert not (shared.runtime_dir / "c.pub").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "C"}, "name"),
        ({"url": None}, "url"),
        ({"colour": "red"}, "colour"),
        ({"channels": ["quote.BTC-PERPETUAL"]}, "quote.BTC-PERPETUAL"),
        ({"publish": "tcp://0.0.0.0:5000"}, "publish"),
        ({"publish": "ipc:///nowhere/c.pub"}, "publish ipc:///nowhere/c.pub lies in no directory"),
        ({"credentials": "NOBODY"}, "NOBODY_CLIENT_ID"),
        ({"timeout": 5000}, "milliseconds"),
    ],
)
def test_connect_checks_the_table_as_the_file_is_checked(shared: Collected, change: dict[str, Any], words: str) -> None:
    error = shared.refuse("connect", connection={"name": "c", "url": "practice", "channels": [], **change})
    assert error.code == "bad_request"
    assert words in error.message
    assert list(shared.ask("get_state")) == ["a", "slow"]


def test_requests_with_very_many_channels_are_answered(shared: Collected) -> None:
    """Each within the ten seconds that a client of these tests waits: comparing each pair takes minutes."""
    many = [f"quote.X{number}" for number in range(20_001)]
    table = {**QUICK, "name": "c", "url": "ws://127.0.0.1:9/", "retry_count": 1000}
    error = shared.refuse("connect", connection={**table, "channels": many})
    assert (error.code, error.message) == ("bad_request", "c: 20001 channels; ask for at most 20000")
    deadline = time.time_ns() + 1_000_000_000
    assert shared.refuse("connect", connection={**table, "channels": many[1:]}, deadline=deadline).code == "timeout"
    answer = shared.ask("subscribe", connection="a", channels=many[1:])["channels"]
    assert all(value["message"] == f"{name} of c feeds the same topics" for name, value in answer.items())
    answer = shared.ask("subscribe", connection="c", channels=[many[1], "quote.ETH-PERPETUAL"])["channels"]
    assert answer[many[1]]["code"] == "not_connected"
    assert answer["quote.ETH-PERPETUAL"]["message"] == "20000 channels are asked for on c already"
    assert shared.ask("close", connection="c")["state"] == "closed"


def test_connect_checks_the_publish_endpoint_against_those_that_run(shared: Collected) -> None:
    table = {"name": "c", "url": "practice", "channels": [], "publish": shared.get_state("a")["publish"]}
    assert shared.refuse("connect", connection=table).code == "bad_request"


def test_connect_says_that_it_is_still_tried_when_time_is_up(shared: Collected) -> None:
    table = {**QUICK, "name": "c", "url": "ws://127.0.0.1:9/", "channels": [], "retry_count": 1000}
    error = shared.refuse("connect", connection=table, deadline=time.time_ns() + 700_000_000)
    assert error.code == "timeout"
    assert "still being tried" in error.message
    assert shared.get_state("c")["state"] in ("connecting", "backoff", "starting")
    assert shared.ask("close", connection="c")["state"] == "closed"


def test_connect_says_what_went_wrong_for_good(shared: Collected) -> None:
    table = {**QUICK, "name": "c", "url": "ws://127.0.0.1:9/", "channels": [], "retry_count": 1, "retry_delay": 0.01}
    error = shared.refuse("connect", connection=table, deadline=time.time_ns() + 20_000_000_000)
    assert error.code == "not_connected"
    assert re.fullmatch("c: gave up after retry_count attempts: Cannot connect to host .*", error.message)
    assert list(shared.ask("get_state")) == ["a", "slow"]


def test_a_worker_that_does_not_close_in_time_is_killed_and_its_name_is_free_again() -> None:
    with collected({"a": QUICK, "b": {**QUICK, "channels": []}}) as run:
        psutil.Process(run.wait_state("a")["pid"]).suspend()
        error = run.refuse("close", connection="a", deadline=time.time_ns() + 300_000_000)
        assert (error.code, "still closing" in error.message) == ("timeout", True)
        for op in ("subscribe", "unsubscribe"):
            error = run.refuse(op, connection="a", channels=["quote.ETH-PERPETUAL"])
            assert (error.code, "a is being closed" in error.message) == ("not_connected", True)
        error = run.refuse("connect", connection={**QUICK, "name": "a"})
        assert (error.code, "a is being closed; try again" in error.message) == ("exists", True)
        wait_until(lambda: list(run.ask("get_state")) == ["b"], "the end of a")
        assert run.ask("connect", connection={**QUICK, "name": "a"})["state"] == "live"


def test_the_collector_goes_on_without_connections() -> None:
    with collected() as run:
        run.wait_state("a")
        assert run.ask("close", connection="a")["state"] == "closed"
        assert run.ask("get_state") == {}
        assert run.ask("connect", connection={**QUICK, "name": "b"})["state"] == "live"
        assert run.stop() == 0
        run.wait_gone()


def test_a_connect_while_the_collector_stops_is_refused_at_once_and_does_not_keep_it() -> None:
    with collected() as run:
        psutil.Process(run.wait_state("a")["pid"]).suspend()  # else it would be over before the request comes
        run.find_processes()
        run.program.process.send_signal(signal.SIGINT)
        run.program.wait_line("SIGINT: stopping")
        error = run.refuse("connect", connection={**QUICK, "name": "b", "channels": []})
        assert (error.code, error.message) == ("not_connected", "the collector is stopping")
        wish = run.refuse("subscribe", connection="a", channels=["quote.ETH-PERPETUAL"])
        assert (wish.code, wish.message) == (error.code, error.message)
        assert "did not stop" not in run.program.text(), "they waited for the end"
        assert run.program.wait_exit() == 0
        run.wait_gone()


@pytest.mark.parametrize("channels", [[], ["quote.*"]])
def test_a_connection_that_is_closed_while_connect_waits_for_it_is_answered_at_once(channels: list[str]) -> None:
    with collected() as run, connected(run, zmq.REQ) as client:
        run.wait_state("a")
        table = {"name": "c", "url": "ws://127.0.0.1:9/", "channels": channels, "retry_count": 1000}
        client.send(encode({"op": "connect", "connection": table, "deadline": time.time_ns() + 20_000_000_000}))
        wait_until(lambda: "c" in run.ask("get_state"), "the new connection")
        run.ask("close", connection="c")
        with pytest.raises(ControlError, match="not_connected: c was closed before it was live"):
            decode_reply(client.recv())
        assert list(run.ask("get_state")) == ["a"]
        assert "a control request failed" not in run.program.text()


def test_a_failing_connect_does_not_end_a_collector_whose_connections_were_closed() -> None:
    with collected() as run:
        run.wait_state("a")
        run.ask("close", connection="a")
        table = {"name": "c", "url": "ws://127.0.0.1:9/", "channels": [], "retry_count": 1, "retry_delay": 0.01}
        assert "gave up" in run.refuse("connect", connection=table, deadline=time.time_ns() + 20_000_000_000).message
        assert run.ask("get_state") == {}
        assert run.stop() == 0


def test_nor_does_it_where_one_of_the_file_had_failed_but_was_connected_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}/"
        dead = {"url": url, "channels": [], "retry_count": 1, "retry_delay": 0.01}
        with collected({"a": dead | {"channels": ["quote.*"], "timeout": 60.0}}) as run:
            silent.settimeout(20)
            with silent.accept()[0]:  # it waits for the list
                soon = time.time_ns() + 60_000_000_000
                run.ask("connect", connection=QUICK | {"name": "b"}, deadline=soon)
                silent.close()
            run.wait_state("a", "failed")
            run.ask("connect", connection=QUICK | {"name": "a", "channels": []}, deadline=soon)
            for name in ("a", "b"):
                run.ask("close", connection=name)
            assert "gave up" in run.refuse("connect", connection=dead | {"name": "c"}, deadline=soon).message
            assert run.ask("get_state") == {}
            assert run.stop() == 0


def test_a_url_is_shown_without_what_may_be_secret(shared: Collected) -> None:
    table = {**QUICK, "name": "c", "url": "ws://127.0.0.1:9/path?hidden=hunter2", "channels": [], "retry_count": 1000}
    shared.refuse("connect", connection=table, deadline=time.time_ns() + 300_000_000)
    assert shared.get_state("c")["url"] == "ws://127.0.0.1:9/path"
    shared.ask("close", connection="c")


def test_the_control_socket_is_for_its_owner_alone(shared: Collected) -> None:
    mode = stat.S_IMODE((shared.runtime_dir / "control").stat().st_mode)
    assert mode & 0o077 == 0
    assert (shared.runtime_dir / "control").stat().st_uid == os.getuid()


def test_replies_to_clients_that_left_do_no_harm(shared: Collected) -> None:
    for _ in range(20):
        with connected(shared, zmq.REQ) as client:
            client.send(encode({"op": "send", "connection": "a", "method": "public/get_instruments"}))
            client.poll(1)
    assert msgpack.unpackb(encode(shared.get_state("a")))["state"] == "live"


def test_a_stop_with_requests_under_way_is_in_order() -> None:
    with collected({"slow": SLOW}) as run, connected(run, zmq.REQ) as client:
        run.wait_state("slow")
        client.send(encode({"op": "send", "connection": "slow", "method": "public/get_currencies"}))
        assert run.get_state("slow")["state"] == "live"
        assert run.stop(signal.SIGTERM) == 0, run.program.text()
        assert "Traceback" not in run.program.text()
        run.wait_gone()
