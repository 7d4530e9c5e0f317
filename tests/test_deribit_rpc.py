"""The pure parts of the protocol: requests and frames, the bootstrap's steps, the table of errors."""

import asyncio
import json
import logging
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector import __version__
from collector.lifecycle import CONNECTION, PROCESS, Machine, Table
from collector.limits import Credits
from collector.messages import decode, encode
from workers.deribit import Client
from workers.deribit.connection.bootstrap import Login, build_auth, build_first_requests, build_refresh, sign
from workers.deribit.connection.session import Session
from workers.deribit.rpc.codec import DATA_PREFIX, Data, Heartbeat, Reply, decode_frame, encode_request
from workers.deribit.rpc.errors import MAX_WORDS, PAUSES, REACTIONS, ExchangeError, Reaction, find_reaction
from workers.deribit.watching.lag import Samples

# -- requests and frames ----------------------------------------------------------------------------------------------


def test_a_request_is_json_rpc() -> None:
    text = encode_request(7, "public/subscribe", {"channels": ["a.b"]})
    assert json.loads(text) == {
        "jsonrpc": "2.0",
        "id": 7,
        "method": "public/subscribe",
        "params": {"channels": ["a.b"]},
    }


NO_METHOD = {"code": -32601, "message": "Method not found"}


@pytest.mark.parametrize(
    ("frame", "wanted"),
    [
        ({"jsonrpc": "2.0", "id": 3, "result": "ok", "usIn": 1, "usOut": 2, "usDiff": 1, "testnet": False}, (3, "ok")),
        ({"id": 3, "result": None}, (3, None)),
        ({"result": {"version": "1"}}, (None, {"version": "1"})),
        ({"id": "auth", "result": 5}, (None, 5)),
        ({"id": 0, "result": [], "unknown": {"deep": [1]}}, (0, [])),
        ({"id": 3, "result": 1.5e3}, (3, 1500.0)),
    ],
)
def test_an_answer_is_read_with_its_number_and_result(frame: dict[str, Any], wanted: tuple[int | None, Any]) -> None:
    reply = decode_frame(json.dumps(frame).encode())
    assert isinstance(reply, Reply)
    assert (reply.number, reply.result, reply.error) == (*wanted, None)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (NO_METHOD, -32601, "-32601 Method not found"),
        ({"code": 11050, "data": "invalid json", "message": "bad_request"}, 11050, "11050 bad_request (invalid json)"),
        ({"code": 13009, "data": {"reason": "x"}, "message": "unauthorized"}, 13009, "unauthorized (reason: x)"),
        ({"code": 1, "data": {}, "message": "empty"}, 1, "1 empty"),
        ({"message": "no code"}, 0, "0 no code"),
        ({"code": "10028"}, 0, "0 "),
        ({}, 0, "0 "),
    ],
)
def test_an_error_is_kept_as_it_came(error: dict[str, Any], code: int, words: str) -> None:
    reply = decode_frame(json.dumps({"jsonrpc": "2.0", "id": 9, "error": error}).encode())
    assert isinstance(reply, Reply)
    assert reply.number == 9
    assert isinstance(reply.error, ExchangeError)
    assert (reply.error.raw, reply.error.code) == (error, code)
    assert str(reply.error).endswith(words)


LONG, SECRET = "x" * (MAX_WORDS - 20), "hush-0123456789-0123456789"


@pytest.mark.parametrize(
    ("secret", "text", "said"),
    [
        (SECRET, f'{{"code":13004,"message":"{LONG}","data":[{1 << 64},"{SECRET}"]}}', f"13004 {LONG}"),
        (SECRET, f'{{"code":{1 << 64},"message":"{LONG}{SECRET}"}}', f"0 {LONG}***"),
        (SECRET, '{"code":13004,"message":"\\u0068ush-0123456789-0123456789"}', "13004 ***"),
        (SECRET, '{"code":13004,"message":"m"}', "13004 m"),
        ("13004", '{"code":13004,"message":"m"}', "13004 (not shown"),
        ("code", '{"code":13004,"message":"m"}', "13004 (not shown"),
        ("e", '{"code":13004,"message":"m"}', "13004 (not shown"),
    ],
)
def test_a_secret_is_hidden_whole_and_the_code_is_kept(secret: str, text: str, said: str) -> None:
    reply = decode_frame(b'{"id":1,"error":%s}' % text.encode())
    assert isinstance(reply, Reply)
    assert reply.error is not None
    hidden = reply.error.hide([secret.encode()])
    assert hidden.code == reply.error.code
    assert str(hidden).startswith(said)
    assert "hush" not in f"{hidden} {hidden!r} {hidden.raw} {hidden.told}"


@pytest.mark.parametrize("error", [{"message": "x" * 10_000}, {"data": ["x"] * 10_000}])
def test_of_a_long_error_no_more_is_told_than_one_can_read(error: dict[str, Any]) -> None:
    assert len(str(ExchangeError(error))) == MAX_WORDS
    assert ExchangeError(error).told == {"code": 0, "message": str(ExchangeError(error))}
    assert ExchangeError(short := {"code": 1, "message": "m", "data": [1]}).told is short


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (b'{"code":5,"message":"big","data":{"n":18446744073709551616}}', 5, "5 big (n: 18446744073709551616)"),
        (b'{"code":5,"message":-9223372036854775809}', 5, "5 -9223372036854775809"),
        (b'{"code":18446744073709551616,"message":"m"}', 0, "0 m"),
    ],
    ids=["beyond 64 bits", "below them", "such a code"],
)
def test_of_an_error_that_messagepack_cannot_hold_there_are_words(text: bytes, code: int, words: str) -> None:
    reply = decode_frame(b'{"jsonrpc":"2.0","id":9,"error":' + text + b"}")
    assert isinstance(reply, Reply)
    assert reply.error is not None
    assert str(reply.error).startswith(words)
    assert reply.error.raw == reply.error.told == {"code": code, "message": str(reply.error)}
    state = {"result": {"a": {"last_error": reply.error.told}}}
    assert decode(encode(state)) == state


def test_notifications_are_told_apart_whatever_the_order_of_their_keys() -> None:
    frame = DATA_PREFIX + b'quote.BTC-PERPETUAL","data":{"price":1}}}'
    assert decode_frame(frame) == Data("quote.BTC-PERPETUAL")
    turned = b'{"params":{"data":[1,{"channel":"no"}],"channel":"a.b","label":"x"},"method":"subscription"}'
    assert decode_frame(turned) == Data("a.b")
    assert decode_frame(b'{"params":{"type":"test_request"},"method":"heartbeat"}') == Heartbeat("test_request")
    assert decode_frame(b'{"method":"heartbeat","params":{"type":"heartbeat"}}') == Heartbeat("heartbeat")


@pytest.mark.parametrize(
    "frame",
    [
        b"", b"x", b"null", b"5", b"[]", b"{}", b'{"id":1}', b'{"id":1.5,"result":1}', b'{"id":[],"result":1}',
        b'{"method":"subscription"}', b'{"method":"subscription","params":{}}',
        b'{"method":"subscription","params":[]}',
        b'{"method":"subscription","params":{"channel":5}}', b'{"method":"heartbeat","params":{"type":null}}',
        b'{"id":1,"error":"words"}', b'{"id":1,"error":[]}', b'{"id":1,"error":null}', b'{"id":1,"result":}',
        b'{"method":7}', b'{"id":true,"result":1}',
        b'{"jsonrpc":"2.0","method":"subscription","params":{"channel":"', b"\xff\xfe", b'{"id":1,"result":"\xff"}',
        b"[" * 100_000, b'{"id":1,"result":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)  # fmt: skip
def test_anything_else_is_refused(frame: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        decode_frame(frame)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_but_value_error(frame: bytes) -> None:
    for text in (frame, b'{"id":1,"result":' + frame + b"}", DATA_PREFIX + frame):
        try:
            decode_frame(text)
        except ValueError:
            continue


# -- bootstrap --------------------------------------------------------------------------------------------------------

LOGIN = Login("AMANDA", "AMANDASECRECT")


def test_the_signature_is_that_of_deribits_documents() -> None:
    wanted = "56590594f97921b09b18f166befe0d1319b198bbcdad7ca73382de2f88fe9aa1"
    assert sign("AMANDASECRECT", 1576074319000, "1iqt2wls") == wanted


def test_a_signed_login_never_sends_the_secret() -> None:
    params = build_auth(LOGIN, 1576074319000, "1iqt2wls")
    assert params["signature"] == sign("AMANDASECRECT", 1576074319000, "1iqt2wls")
    assert params == {
        "grant_type": "client_signature", "client_id": "AMANDA", "timestamp": 1576074319000, "nonce": "1iqt2wls",
        "data": "", "signature": params["signature"],
    }  # fmt: skip
    assert "AMANDASECRECT" not in repr(params)
    assert "AMANDASECRECT" not in repr(LOGIN)


def test_other_grants() -> None:
    plain = build_auth(LOGIN._replace(signed=False), 0, "")
    assert plain == {"grant_type": "client_credentials", "client_id": "AMANDA", "client_secret": "AMANDASECRECT"}
    assert build_refresh("t") == {"grant_type": "refresh_token", "refresh_token": "t"}


def test_a_connection_says_who_it_is_logs_in_and_asks_for_heartbeats_and_the_time() -> None:
    assert list(build_first_requests(30.0, None)) == ["public/hello", "public/set_heartbeat", "public/get_time"]
    first = build_first_requests(30.0, {"grant_type": "..."})
    assert list(first) == ["public/hello", "public/auth", "public/set_heartbeat", "public/get_time"]
    assert first["public/hello"] == {"client_name": "collector", "client_version": __version__}
    assert json.dumps(first["public/set_heartbeat"]) == '{"interval": 30}'


def test_the_longest_pause_that_is_asked_for_is_made() -> None:
    """Answers that are read together may ask for different ones."""

    async def take_errors() -> float:
        client, began = Client("ws://127.0.0.1:9"), time.monotonic()
        for code in (12998, 11051):
            client.traffic._take_reply(Reply(None, None, ExchangeError({"code": code, "message": ""})), b"{}")
        return client._not_before - began

    assert asyncio.run(take_errors()) >= PAUSES[Reaction.LOCK_OUT]


def test_an_answer_under_a_number_that_no_request_had_is_a_bad_frame() -> None:
    async def take_answers() -> int:
        traffic = Client("ws://127.0.0.1:9").traffic
        traffic.requests = 3
        for number in (None, -1, 0, 1, 3, 4):
            traffic._take_reply(Reply(number, "ok", None), b"{}")
        return traffic.malformed

    assert asyncio.run(take_answers()) == 4


def test_how_far_our_clock_was_off_is_known_until_what_was_lost_by_it_is_healed() -> None:
    async def lose_twice(*offsets: int) -> Session:
        session = Session(answer_nothing, Credits(), None, 30.0, False)
        session.end()
        assert session.earlier_offset is None  # lost before it was measured
        for offset in offsets:
            session.measured_offset, session._error = offset, 1
            session.end()
        return session

    async def answer_nothing(method: str, params: dict[str, Any] | None) -> Any:
        return None

    assert asyncio.run(lose_twice(0, 3600)).earlier_offset == 0  # it was right, and set back by an hour
    session = asyncio.run(lose_twice(-3600, 0))  # it was an hour ahead, and set right
    assert session.earlier_offset == -3600
    session._sync_at = 0.0
    asyncio.run(session.keep_up(1.0))
    assert session.earlier_offset is None


def test_the_exchange_s_clock_goes_on_though_ours_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    hour = 3600 * 1_000_000_000
    theirs = time.time_ns() + 24 * hour

    async def answer_time(method: str, params: dict[str, Any] | None) -> Any:
        return theirs // 1_000_000

    session = Session(answer_time, Credits(), None, 30.0, False)
    assert session.clock_offset == 0
    session._sync_at = 0.0
    asyncio.run(session.keep_up(1.0))
    measured = session.clock_offset
    for step in (hour, -hour):
        ours = time.time_ns() + step
        with monkeypatch.context() as system:
            system.setattr(time, "time_ns", lambda ours=ours: ours)
            assert abs(session.read_exchange_clock() - theirs) < hour / 2
            assert abs(session.clock_offset - (measured - step)) < hour / 2
            assert abs(session.measured_offset - measured) < hour / 2


@pytest.mark.parametrize("since_ms", [0, 999_999])
def test_the_exchange_s_clock_is_as_far_off_as_is_told_and_may_be_more_with_time(since_ms: int) -> None:
    """It tells whole ms, of which so many ns have passed."""
    offset = 0

    async def answer_time(method: str, params: dict[str, Any] | None) -> Any:
        nonlocal offset
        now = time.time_ns()
        told = now // 1_000_000 + 7_000
        offset = told * 1_000_000 + since_ms - now
        return told

    session = Session(answer_time, Credits(), None, 30.0, False)
    session._sync_at = 0.0
    asyncio.run(session.keep_up(1.0))
    error = session.clock_error
    assert abs(session.measured_offset - offset) <= error
    assert session._synced_at is not None
    session._synced_at -= 1_000 * 1_000_000_000
    assert session.clock_error >= error + 100_000_000


@pytest.mark.parametrize("told", [-1, 10**14, 1e300, float("nan"), True, "1", None, []])
def test_a_time_that_cannot_be_is_not_taken(told: Any) -> None:
    async def answer_time(method: str, params: dict[str, Any] | None) -> Any:
        return told

    session = Session(answer_time, Credits(), None, 30.0, False)
    session._sync_at = 0.0
    asyncio.run(session.keep_up(1.0))
    assert session._sync_at > 0.0, "it has been asked for"
    assert (session.clock_offset, session.clock_error) == (0, 0)


def test_an_answer_about_the_time_that_came_late_does_not_spoil_what_is_known() -> None:
    waits = [0.0, 0.5, 0.0, 0.5]

    async def answer_time(method: str, params: dict[str, Any] | None) -> Any:
        asked = time.time_ns()
        await asyncio.sleep(waits.pop(0))  # on the way back, behind data that are late
        return asked // 1_000_000

    async def sync(session: Session) -> int:
        session._sync_at = 0.0
        await session.keep_up(1.0)
        return session.measured_offset

    async def run() -> None:
        session = Session(answer_time, Credits(), None, 30.0, False)
        first, late = await sync(session), await sync(session)
        assert (late, len(waits)) == (first, 2)
        assert session.clock_error < 250_000_000
        session.end()  # the next connection begins anew, with whatever it can have
        await sync(session)
        session.end()
        assert await sync(session) < first - 200_000_000
        assert session.clock_error >= 250_000_000

    asyncio.run(run())


def test_a_wrong_clock_is_told_again_once_it_has_changed_and_to_agree_once_that_is_sure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answers = [(1200, 0.0), (1200, 0.6), (0, 0.0), (-2200, 0.0), (-3000, 0.0), (-3500, 0.0), (0, 0.0)]

    async def answer_time(method: str, params: dict[str, Any] | None) -> Any:
        ahead, wait = answers.pop(0)
        told = time.time_ns() // 1_000_000 + ahead
        await asyncio.sleep(wait)
        return told

    async def measure_each() -> list[int]:
        session, counts = Session(answer_time, Credits(), None, 30.0, False), []
        while answers:
            session._sync_at = 0.0
            await session.keep_up(1.0)
            counts.append(len(caplog.messages))
            session.end()  # the next connection begins anew, with whatever it can have
        return counts

    with caplog.at_level(logging.INFO, "deribit"):
        assert asyncio.run(measure_each()) == [1, 1, 2, 3, 3, 4, 5]
    heard = [re.findall(r"1\.2 s behind|[23]\.\d s ahead of|agrees", line) for line in caplog.messages]
    assert heard == [["1.2 s behind"], ["agrees"], ["2.2 s ahead of"], ["3.5 s ahead of"], ["agrees"]]


# -- tables -----------------------------------------------------------------------------------------------------------

DOCUMENTED = {
    Reaction.RETRY: [10001, 10040, 10041, 11094, 13008, 13888],
    Reaction.REFRESH: [10000, 13009],
    Reaction.BACK_OFF: [10028, 10047, 10066, 11051, 13025, 13028, 13503],
    Reaction.LOCK_OUT: [12003, 12998],
    Reaction.LOG_IN: [13778, 11056],
    Reaction.REFUSED: [11042, 13004, 13007, 13012, 13021, 13403, 13668],
    Reaction.BANNED: [11098, 12005],
    Reaction.FAULT: [-32602, -32601, -32600, 10012, 10020, 10030, 11029, 11045, 11050, 11052, 13019, 13020, 0, 99999],
}


@pytest.mark.parametrize("reaction", list(Reaction))
def test_each_error_code_has_the_reaction_that_its_documents_ask_for(reaction: Reaction) -> None:
    assert [find_reaction(code) for code in DOCUMENTED[reaction]] == [reaction] * len(DOCUMENTED[reaction])
    assert {code for code, asked in REACTIONS.items() if asked is reaction} <= set(DOCUMENTED[reaction])


@pytest.mark.parametrize("table", [CONNECTION, PROCESS])
def test_a_machine_goes_only_where_its_table_says(table: Table) -> None:
    states = {state for state, _ in table} | set(table.values())
    events = {event for _, event in table}
    for state in states:
        for event in events:
            machine = Machine(table, state)
            if machine.allows(event):
                assert machine.apply(event) == machine.state == table[state, event]
            else:
                with pytest.raises(KeyError):
                    machine.apply(event)
                assert machine.state == state


def test_a_spread_tells_median_and_tail_of_the_last_samples() -> None:
    samples = Samples()
    assert (samples.describe(), samples.newest) == ({}, 0)
    for sample in range(2000):
        samples.add(sample * 1_000_000)
    assert samples.describe() == {"p50": 1.5, "p99": 1.99}
    assert samples.newest == 1_999_000_000
