"""The practice exchange speaks Deribit's protocol: envelope, errors, logins, subscriptions, HTTP, limits."""

import asyncio
import hashlib
import hmac
import json
import re
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.certificate import HAS_OPENSSL, make_certificate, trusted
from tests.exchange_client import KEYS, Client, connect, exchange, fetch, get
from tests.support import collector, in_loop, running, wait_until
from workers.exchange.exchange import Counts, Exchange, Settings, find_failure
from workers.exchange.protocol.auth import DEFAULT_KEYS
from workers.exchange.server import Server


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with exchange() as (address, _):
        yield address


@in_loop
async def test_answers_have_the_envelope_and_its_key_order(url: str) -> None:
    async with connect(url) as client:
        answer = await client.ask("public/hello", client_name="test", client_version="1")
        assert list(answer) == ["jsonrpc", "id", "result", "usIn", "usOut", "usDiff", "testnet"]
        assert answer["result"] == {"version": "1.2.26"}
        assert answer["usDiff"] == answer["usOut"] - answer["usIn"] > 0
        assert abs(answer["usIn"] / 1e6 - time.time()) < 60
        assert answer["testnet"] is False
        clock = await client.ask("public/get_time")
        assert abs(clock["result"] / 1e3 - time.time()) < 60


@in_loop
async def test_ids_come_back_as_they_were(url: str) -> None:
    async with connect(url) as client:
        for number, shown in enumerate((7, "auth_1.0", None)):
            request: dict[str, Any] = {"jsonrpc": "2.0", "method": "public/test"}
            await client.send(json.dumps(request if shown is None else {**request, "id": shown}))
            await client.wait(partial(lambda wanted: len(client.texts) > wanted, number), "an answer")
        first, second, third = client.messages()
        assert first["id"] == 7
        assert second["id"] == "auth_1.0"
        assert "id" not in third
        assert third["result"] == {"version": "1.2.26"}


ERRORS = [
    ("public/nope", {}, {"code": -32601, "message": "Method not found"}),
    (
        "public/get_index_price", {},
        {"code": -32602, "data": {"reason": "value required", "param": "index_name"}, "message": "Invalid params"},
    ),
    (
        "public/get_order_book", {"instrument_name": "NOPE"},
        {
            "code": -32602, "data": {"reason": "instrument not found", "param": "instrument_name"},
            "message": "Invalid params",
        },
    ),
    (
        "public/get_instruments", {"currency": "PESO"},
        {"code": -32602, "data": {"reason": "invalid currency", "param": "currency"}, "message": "Invalid params"},
    ),
    ("private/get_positions", {}, {"code": 13009, "data": {"reason": "invalid_token"}, "message": "unauthorized"}),
    (
        "public/subscribe", {"channels": ["book.BTC-PERPETUAL.raw", "quote.BTC-PERPETUAL"]},
        {"code": 13778, "message": "raw_subscriptions_not_available_for_unauthorized"},
    ),
    ("public/auth", {**KEYS, "client_secret": "wrong"}, {"code": 13004, "message": "invalid_credentials"}),
    ("public/auth", {**KEYS, "client_id": "nobody"}, {"code": 13004, "message": "invalid_credentials"}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "params", "error"), ERRORS)
@in_loop
async def test_errors_have_deribits_codes_words_and_key_order(
    url: str, method: str, params: dict[str, Any], error: dict[str, Any]
) -> None:
    async with connect(url) as client:
        answer = await client.ask(method, params)
        assert json.dumps(answer["error"]) == json.dumps(error)
        assert list(answer) == ["jsonrpc", "id", "error", "usIn", "usOut", "usDiff", "testnet"]


HUGE = "9" * 400
LAST = "public/get_last_trades_by_instrument"
ODD_PARAMETERS = [
    ("public/hello", {"client_name": "test"}, "client_version"),
    ("public/test", {"expected_result": "exception"}, "expected_result"),
    ("public/get_instrument", {}, "instrument_name"),
    ("public/auth", {}, "grant_type"),
    ("public/auth", {"grant_type": "password"}, "grant_type"),
    ("public/set_heartbeat", {}, "interval"),
    ("public/set_heartbeat", {"interval": True}, "interval"),
    ("public/subscribe", {}, "channels"),
    ("public/unsubscribe", {"channels": "quote.BTC-PERPETUAL"}, "channels"),
    ("private/get_account_summary", {"currency": "PESO"}, "currency"),
    ("private/cancel", {}, "order_id"),
    (LAST, {"instrument_name": "BTC-PERPETUAL", "start_seq": "\u00b2"}, "start_seq"),
    (LAST, {"instrument_name": "BTC-PERPETUAL", "start_seq": "9" * 5000}, "start_seq"),
    (LAST, {"instrument_name": "BTC-PERPETUAL", "count": int(HUGE)}, "count"),
    ("public/get_last_trades_by_currency", {"currency": "BTC", "start_id": "\u00b2"}, "start_id"),
    ("public/get_last_trades_by_currency", {"currency": "BTC", "end_id": "9" * 5000}, "end_id"),
    ("public/set_heartbeat", {"interval": int(HUGE)}, "interval"),
    ("private/buy", {"instrument_name": "BTC-PERPETUAL", "amount": int(HUGE)}, "amount"),
    ("private/sell", {"instrument_name": "BTC-PERPETUAL", "amount": 10, "price": int(HUGE)}, "price"),
]


@pytest.mark.parametrize(("method", "params", "name"), ODD_PARAMETERS)
@in_loop
async def test_parameters_that_are_missing_or_cannot_be_are_refused(
    url: str, method: str, params: dict[str, Any], name: str
) -> None:
    async with connect(url) as client:
        await client.log_in()
        error = (await client.ask(method, params))["error"]
        assert (error["code"], error["data"]["param"]) == (-32602, name)


def test_lives_and_times_of_odd_spelling_are_no_error(url: str) -> None:
    for scope in ("expires:\u00b2", f"expires:{HUGE}"):
        assert get(url, "public/auth", {"method": "public/auth", "params": {**KEYS, "scope": scope}})[0] == 200
    named = {"instrument_name": "BTC-PERPETUAL", "count": 1}

    def find_first(**start: Any) -> Any:
        return get(url, LAST, **named, **start)[1]["result"]

    first = wait_until(lambda: (page := find_first(start_seq=1))["has_more"] and page, "a first page that stays")
    for odd in ({"start_seq": -5}, {"start_timestamp": "1.0"}, {"start_timestamp": f"{time.time() * 1e3 - 3.6e6:.1f}"}):
        assert find_first(**odd) == first


@in_loop
async def test_text_that_is_no_json_and_frames_that_are_too_big_leave_the_socket_open(url: str) -> None:
    async with connect(url) as client:
        await client.send("hello {")
        await client.wait(lambda: client.texts, "the error")
        body = client.messages()[0]
        assert body["error"] == {"code": 11050, "data": "invalid json", "message": "bad_request"}
        assert "id" not in body
        await client.send(
            json.dumps({"jsonrpc": "2.0", "id": 1, "method": "public/test", "params": {"x": "y" * 33_000}})
        )
        await client.wait(lambda: len(client.texts) > 1, "the refusal")
        assert client.messages()[1]["error"] == {"code": -32600, "message": "request entity too large"}
        assert "id" not in client.messages()[1]
        for odd in ("[]", "5", '{"id":9}', '{"id":9,"method":"public/test","params":[1]}', "[" * 30_000):
            await client.send(odd)
        assert (await client.ask("public/test"))["result"] == {"version": "1.2.26"}
        assert client.closed is None


@in_loop
async def test_the_ack_lists_what_is_subscribed_in_descending_order_and_comes_first(url: str) -> None:
    async with connect(url) as client:
        asked = ["book.BTC_USDC-PERPETUAL.100ms", "book.NOPE.100ms", "ticker.BTC-PERPETUAL.100ms"]
        asked += [
            "book.ETH-PERPETUAL.100ms",
            "book.BTC-PERPETUAL.50ms",
            "book.BTC-PERPETUAL.none.50.100ms",
            "perpetual.BTC_USDC.100ms",
        ]
        answer = await client.ask("public/subscribe", channels=asked)
        wanted = ["ticker.BTC-PERPETUAL.100ms", "book.ETH-PERPETUAL.100ms", "book.BTC_USDC-PERPETUAL.100ms"]
        assert answer["result"] == wanted
        assert client.messages()[0]["id"] == answer["id"]
        for channel in wanted:
            await client.wait_data(channel)
        firsts = [m["params"]["channel"] for m in client.messages()[1:4]]
        assert firsts == wanted
        assert (await client.ask("public/subscribe", channels=["book.NOPE.raw2", "nonsense"]))["result"] == []


@in_loop
async def test_a_duplicate_is_acked_without_a_second_snapshot_and_a_new_subscription_has_one(url: str) -> None:
    async with connect(url) as client:
        channel = "book.BTC-PERPETUAL.100ms"
        await client.ask("public/subscribe", channels=[channel])
        await client.wait_data(channel, 2)
        again = await client.ask("public/subscribe", channels=[channel])
        assert again["result"] == [channel]
        await client.wait_data(channel, len(client.data(channel)) + 2)
        assert [data["type"] for data in client.data(channel)].count("snapshot") == 1
        dropped = await client.ask("public/unsubscribe", channels=[channel, "quote.BTC-PERPETUAL"])
        assert dropped["result"] == [channel]
        count = len(client.data(channel))
        await client.ask("public/subscribe", channels=[channel])
        fresh = await client.wait_data(channel, count + 2)
        assert fresh[count]["type"] == "snapshot"
        assert fresh[count + 1]["prev_change_id"] == fresh[count]["change_id"]


@in_loop
async def test_raw_is_for_logged_in_sockets_and_users_channels_only_by_private_subscribe(url: str) -> None:
    async with connect(url) as client:
        channels = ["book.BTC-PERPETUAL.raw", "user.portfolio.BTC"]
        refused = await client.ask("private/subscribe", channels=channels)
        assert refused["error"]["code"] == 13009
        await client.log_in()
        public = await client.ask("public/subscribe", channels=channels)
        assert public["result"] == ["book.BTC-PERPETUAL.raw"]
        private = await client.ask("private/subscribe", channels=channels, label="mine" * 10)
        assert private["result"] == ["user.portfolio.BTC", "book.BTC-PERPETUAL.raw"]
        await client.wait_data("user.portfolio.BTC")
        labels = [m["params"].get("label") for m in client.messages() if m.get("method") == "subscription"]
        assert {label for label in labels if label} == {("mine" * 10)[:16]}
        assert (await client.ask("public/unsubscribe_all"))["result"] == "ok"


def sign(secret: str, timestamp: int, nonce: str, data: str = "") -> str:
    return hmac.new(secret.encode(), f"{timestamp}\n{nonce}\n{data}".encode(), hashlib.sha256).hexdigest()


@in_loop
async def test_signed_logins_are_checked_and_nonces_count_once(url: str) -> None:
    assert sign("AMANDASECRECT", 1576074319000, "1iqt2wls").startswith("56590594f97921b09b18f166befe0d13")
    async with connect(url) as client:
        now = int(time.time() * 1000)
        params = {"grant_type": "client_signature", "client_id": "practice", "timestamp": now, "nonce": f"n{now}"}
        good = {
            **params,
            "signature": sign("practice", now, f"n{now}", "x"),
            "data": "x",
            "state": "s",
            "scope": "session:a",
        }
        result = (await client.ask("public/auth", good))["result"]
        assert result["state"] == "s"
        assert "session:a" in result["scope"].split()
        assert result["token_type"] == "bearer"
        assert result["expires_in"] == 31_536_000
        assert int(result["access_token"].split(".")[0]) > now + 31_535_000_000
        assert (await client.ask("public/auth", good))["error"]["code"] == 13009
        bad = {**params, "signature": sign("wrong", now, "m"), "nonce": "m"}
        assert (await client.ask("public/auth", bad))["error"]["code"] == 13004
        old = {**params, "timestamp": now - 61_000, "nonce": "o", "signature": sign("practice", now - 61_000, "o")}
        assert (await client.ask("public/auth", old))["error"]["code"] == 13009


def test_http_takes_logins_by_header(url: str) -> None:
    base, path = url.replace("ws", "http", 1).removesuffix("/ws/api/v2"), "/api/v2/private/get_account_summary"
    stamp = int(time.time() * 1000)
    body = b'{"method":"private/get_account_summary","params":{"currency":"BTC"}}'

    def ask(target: str, header: str, data: bytes | None = None) -> int:
        answer = fetch(urllib.request.Request(f"{base}{target}", data, {"Authorization": header}))[1]
        if "result" in answer:
            assert answer["result"]["currency"] == "BTC"
            return 0
        code: int = answer["error"]["code"]
        return code

    def sign_request(method: str, target: str, nonce: str, data: str = "", secret: str = "practice") -> str:
        signature = sign(secret, stamp, nonce, f"{method}\n{target}\n{data}\n")
        return f"deri-hmac-sha256 id=practice,ts={stamp},nonce={nonce},sig={signature}"

    target = f"{path}?currency=BTC&extended=true"
    assert ask(target, sign_request("GET", target, "a")) == 0
    assert ask(path, sign_request("POST", path, "b", body.decode()), body) == 0
    assert ask(target, "Basic cHJhY3RpY2U6cHJhY3RpY2U=") == 0
    assert ask(target, "Basic =") == 13004
    token = get(url, "public/auth", {"params": {**KEYS, "scope": "session:web"}})[1]["result"]["access_token"]
    assert ask(target, f"Bearer {token}") == 0
    assert ask(target, f"Bearer {token}x") == 13009
    assert ask(target, sign_request("GET", target, "a")) == 13009  # a nonce counts once
    assert ask(target, sign_request("GET", path, "c")) == 13004
    assert ask(target, sign_request("GET", target, "d", secret="other")) == 13004
    assert ask(target, "deri-hmac-sha256 id=practice") == -32602


@in_loop
async def test_tokens_renew_and_belong_to_their_connection_unless_they_have_a_session(url: str) -> None:
    async with connect(url) as client, connect(url) as other:
        own = await client.log_in()
        foreign = await other.ask("private/get_positions", access_token=own["access_token"])
        assert foreign["error"] == {"code": 13009, "data": {"reason": "invalid_token"}, "message": "unauthorized"}
        renewed = (await client.ask("public/auth", grant_type="refresh_token", refresh_token=own["refresh_token"]))[
            "result"
        ]
        assert renewed["access_token"] != own["access_token"]
        spent = await client.ask("private/get_positions", access_token=own["access_token"])
        assert spent["error"]["code"] == 13009
        again = await client.ask("public/auth", grant_type="refresh_token", refresh_token=own["refresh_token"])
        assert again["error"] == spent["error"]
        shared = (await client.ask("public/auth", {**KEYS, "scope": "session:both trade:read"}))["result"]
        assert set(shared["scope"].split()) == {"session:both", "trade:read", "mainaccount"}
        assert "result" in await other.ask("private/get_positions", access_token=shared["access_token"])
        await client.send('{"id":99,"method":"private/logout"}')
        await client.wait(lambda: client.closed, "the end")
        ended = await other.ask("private/get_positions", access_token=shared["access_token"])
        assert ended["error"]["code"] == 13009


def test_what_clients_make_up_is_not_remembered_without_end() -> None:
    held = Exchange(Settings(faults="error:*=10001", options=0, keys=DEFAULT_KEYS), 0)
    counts: Counts = Counter()
    for number in range(10_100):
        held.draw_faults(f"seed:{number},first:1")
        held.find_credits("address ::1", number, 0.0)
        assert find_failure(held.faults, "error", f"public/{number}", counts)
        held.authority.grant(KEYS, number, 0, 60.0)
    kept = (held._named, held._credits, counts, held.authority._access, held.authority._refresh)
    assert all(0 < len(each) <= 10_001 for each in kept)


@in_loop
async def test_the_account_orders_and_cancel_on_disconnect(url: str) -> None:
    async def place(client: Client) -> str:
        order = (await client.ask("private/buy", instrument_name="BTC-PERPETUAL", amount=10, label="l", price=100.5))[
            "result"
        ]
        identity: str = order["order"]["order_id"]
        return identity

    async with connect(url) as watcher:
        await watcher.log_in()
        summary = (await watcher.ask("private/get_account_summary", currency="BTC"))["result"]
        assert summary["limits"]["non_matching_engine"] == {"rate": 20, "burst": 100}
        summaries = (await watcher.ask("private/get_account_summaries"))["result"]["summaries"]
        assert [each["currency"] for each in summaries] == ["BTC", "ETH", "USDC"]
        await watcher.ask("private/subscribe", channels=["user.orders.any.any.raw"])
        async with connect(url) as trader:
            await trader.log_in()
            kept = await place(trader)
            assert (await trader.ask("private/cancel", order_id=kept))["result"]["order_state"] == "cancelled"
            assert (await trader.ask("private/cancel", order_id=kept))["error"]["code"] == 11044
            assert (await trader.ask("private/enable_cancel_on_disconnect"))["result"] == "ok"
            state = await trader.ask("private/get_cancel_on_disconnect")
            assert state["result"] == {"scope": "connection", "enabled": True}
            resting = await place(trader)
        await watcher.wait(
            lambda: any(
                order["order_id"] == resting and order["order_state"] == "cancelled"
                for order in watcher.data("user.orders.any.any.raw")
            ),
            "the cancelled order",
        )
        async with connect(url) as leaver:
            await leaver.log_in()
            await leaver.ask("private/enable_cancel_on_disconnect")
            staying = await place(leaver)
            await leaver.send('{"jsonrpc":"2.0","id":99,"method":"private/logout","params":{}}')
            await leaver.wait(lambda: leaver.closed, "the end")
            assert not [m for m in leaver.messages() if m.get("id") == 99]
        orders = (await watcher.ask("private/get_open_orders"))["result"]
        assert [order["order_id"] for order in orders] == [staying]
        assert (await watcher.ask("private/cancel_all"))["result"] == 1


@in_loop
async def test_a_login_over_the_environments_keys() -> None:
    with exchange(env={"PRACTICE_KEYS": "me:hidden"}) as (url, _):
        async with connect(url) as client:
            own = {**KEYS, "client_id": "me", "client_secret": "hidden"}
            assert "result" in await client.ask("public/auth", own)
            assert (await client.ask("public/auth", KEYS))["error"]["code"] == 13004


@in_loop
async def test_requests_of_one_socket_are_carried_out_in_order(url: str) -> None:
    async with connect(url) as client:
        calls = [("public/auth", KEYS), ("private/subscribe", {"channels": ["book.BTC-PERPETUAL.raw"]})]
        calls += [("public/test", {})] * 5
        for number, (method, params) in enumerate(calls):
            body = {"jsonrpc": "2.0", "id": str(number), "method": method, "params": params}
            await client.send(json.dumps(body))
        await client.wait(lambda: len([m for m in client.messages() if "id" in m]) == len(calls), "all answers")
        assert [m["id"] for m in client.messages() if "id" in m] == [str(n) for n in range(len(calls))]


@in_loop
async def test_the_credits_run_out_with_10028_and_the_socket_is_cut(url: str) -> None:
    async with connect(url) as client:
        body = {"jsonrpc": "2.0", "id": 5, "method": "public/subscribe", "params": {"channels": ["announcements"]}}
        for _ in range(20):
            await client.send(json.dumps(body))
        await client.wait(lambda: client.closed, "the cut")
        answers = client.messages()
        assert answers[-1]["error"] == {"code": 10028, "message": "too_many_requests"}
        earned = (answers[-1]["usIn"] - answers[0]["usIn"]) / 300_000  # 10,000 credits a second; a call costs 3,000
        assert 10 <= len([a for a in answers if "result" in a]) <= 11 + earned


@in_loop
async def test_the_33rd_connection_gets_429() -> None:
    with exchange() as (url, _):
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            sockets = [await session.ws_connect(url) for _ in range(32)]
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await session.ws_connect(url)
            assert refused.value.status == 429
            for socket in sockets:
                await socket.close()
            assert await (await session.ws_connect(url)).close()


@in_loop
async def test_the_limit_holds_also_for_upgrades_that_come_at_once_and_for_each_address() -> None:
    with exchange("--faults", "connections:3") as (url, _):

        async def open_one(session: aiohttp.ClientSession) -> int:
            try:
                await session.ws_connect(f"{url}?faults=slow_open:0.3")
            except aiohttp.WSServerHandshakeError as error:
                return error.status
            return 0

        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            seen = await asyncio.gather(*(open_one(session) for _ in range(9)))
            assert sorted(seen) == [0, 0, 0, 429, 429, 429, 429, 429, 429]
            other = aiohttp.TCPConnector(local_addr=("127.0.0.2", 0))
            async with aiohttp.ClientSession(connector=other) as elsewhere:
                assert await open_one(elsewhere) == 0


@in_loop
async def test_who_does_not_become_a_websocket_was_no_connection(tmp_path: Path) -> None:
    told = tmp_path / "oracle.jsonl"
    with exchange("--oracle", str(told)) as (url, program):
        async with aiohttp.ClientSession() as session:
            async with session.get(url.replace("ws", "http", 1)) as answer:
                assert answer.status == 400
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(session.ws_connect(f"{url}?faults=slow_open:1"), 0.2)
            async with session.ws_connect(f"{url}?faults=slow_open:2"):
                pass
        program.process.send_signal(signal.SIGTERM)
        assert program.wait_exit() == 0
        assert program.err == []
        events = [json.loads(line) for line in told.read_text().splitlines()]
        assert [e["connection"] for e in events if e["event"] in ("opened", "ended")] == [1, 1]


@in_loop
async def test_heartbeats_follow_deribits_rhythm_and_silence_is_closed_with_4000(url: str) -> None:
    async with connect(url, "heartbeat_floor:0.2") as client:
        assert (await client.ask("public/set_heartbeat", interval=0.1))["error"]["code"] == -32602
        assert (await client.ask("public/set_heartbeat", interval=0.5))["result"] == "ok"
        wanted = '{"params":{"type":"test_request"},"method":"heartbeat","jsonrpc":"2.0"}'
        await client.wait(lambda: wanted in client.texts, "a test_request")
        await client.wait(lambda: wanted.replace("test_request", "heartbeat") in client.texts, "a heartbeat beside it")
        for round_number in (2, 3, 4):
            assert "result" in await client.ask("public/test")
            await client.wait(partial(lambda n: client.texts.count(wanted) >= n, round_number), "the next one")
        assert client.closed is None
        await client.wait(lambda: client.closed, "the close")
        assert client.closed == (4000, "heartbeat close")

    async with connect(url) as client:
        assert (await client.ask("public/set_heartbeat", interval=9.9))["error"]["code"] == -32602
        assert (await client.ask("public/set_heartbeat", interval=10))["result"] == "ok"
        assert (await client.ask("public/disable_heartbeat"))["result"] == "ok"


@in_loop
async def test_an_idle_socket_is_dropped_without_a_close_frame_but_not_a_subscribed_one(url: str) -> None:
    async with connect(url, "idle:2") as quiet, connect(url, "idle:2") as listening:
        await listening.ask("public/subscribe", channels=["announcements"])
        await quiet.wait(lambda: quiet.closed, "the drop")
        assert quiet.closed is not None
        assert quiet.closed[0] in (1006, None)
        assert "result" in await listening.ask("public/test")


@in_loop
async def test_pings_are_answered_and_deflate_is_offered_if_asked(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(url, compress=15) as socket:
            assert socket.compress
            await socket.send_str(
                '{"jsonrpc":"2.0","id":1,"method":"public/subscribe","params":{"channels":["quote.BTC-PERPETUAL"]}}'
            )
            for _ in range(10):
                assert (await socket.receive(timeout=10)).type is aiohttp.WSMsgType.TEXT
        async with session.ws_connect(url, autoping=False) as socket:
            assert not socket.compress
            await socket.ping(b"x")
            pong = await socket.receive(timeout=10)
            assert (pong.type, pong.data) == (aiohttp.WSMsgType.PONG, b"x")


HTTP_ERRORS = [
    ("public/subscribe", {"channels": "x"}, 10030),
    ("public/hello", {}, 10030),
    ("private/get_positions", {}, 13009),
    ("public/nope", {}, -32601),
    ("public/get_order_book", {"instrument_name": "NOPE"}, -32602),
    ("public/get_order_book", {"instrument_name": "BTC-PERPETUAL", "depth": "7"}, -32602),
]


@pytest.mark.parametrize(("method", "query", "code"), HTTP_ERRORS)
def test_http_errors_have_the_same_body_and_status_400(url: str, method: str, query: dict[str, Any], code: int) -> None:
    status, body = get(url, method, **query)
    assert status == 400
    assert body["error"]["code"] == code
    assert "usDiff" in body


def test_http_takes_get_and_post_on_the_method_and_on_the_root(url: str) -> None:
    body = {
        "jsonrpc": "2.0",
        "id": 42,
        "method": "public/get_instruments",
        "params": {"currency": "any", "kind": "future"},
    }
    status, posted = get(url, "", body)
    assert status == 200
    assert posted["id"] == 42
    assert {row["kind"] for row in posted["result"]} == {"future"}
    assert get(url, "public/get_instruments", body)[1]["result"] == posted["result"]
    everything = get(url, "public/get_instruments")[1]
    assert "id" not in everything
    assert {row["kind"] for row in everything["result"]} == {"future", "option", "spot", "future_combo", "option_combo"}
    assert get(url, "public/get_instruments", currency="USDT", kind="future")[1]["result"] == []
    row = get(url, "public/get_instrument", instrument_name="BTC-PERPETUAL")[1]["result"]
    assert row["settlement_period"] == "perpetual"
    assert row["expiration_timestamp"] == 32503708800000
    spot = next(row for row in everything["result"] if row["kind"] == "spot")
    assert "settlement_period" not in spot
    assert any(re.search(r"-\dd\d+-C$", row["instrument_name"]) for row in everything["result"])


def test_http_answers_the_other_questions(url: str) -> None:
    assert get(url, "public/status")[1]["result"] == {"locked": "false"}
    assert get(url, "public/test")[1]["result"] == {"version": "1.2.26"}
    assert {row["currency"] for row in get(url, "public/get_currencies")[1]["result"]} >= {"BTC", "ETH", "USDC"}
    names = get(url, "public/get_index_price_names")[1]["result"]
    assert "btc_usd" in names
    assert get(url, "public/get_index_price", index_name="btc_usd")[1]["result"]["index_price"] > 0
    expirations = get(url, "public/get_expirations", currency="any", kind="any")[1]["result"]
    assert "PERPETUAL" in expirations["future"]
    assert expirations["option"]
    grouped = get(url, "public/get_expirations", currency="grouped", kind="future")[1]["result"]
    assert {coin: dates["future"][-1] for coin, dates in grouped.items()} == dict.fromkeys(
        ("btc", "eth", "usdc"), "PERPETUAL"
    )
    summary = get(url, "public/get_book_summary_by_currency", currency="BTC")[1]["result"]
    assert any(row["instrument_name"] == "BTC-PERPETUAL" for row in summary)
    book = get(url, "public/get_order_book", instrument_name="BTC-PERPETUAL", depth=10)[1]["result"]
    assert len(book["bids"]) == 10
    assert book["best_bid_price"] == book["bids"][0][0] < book["asks"][0][0] == book["best_ask_price"]
    assert book["bids"] == sorted(book["bids"], reverse=True)
    assert book["asks"] == sorted(book["asks"])
    combos = get(url, "public/get_combos", currency="BTC")[1]["result"]
    assert combos
    assert all(len(combo["legs"]) == 2 for combo in combos)


@in_loop
async def test_trades_are_paged_by_sequence_time_and_currency() -> None:
    with exchange("--rate", "2000") as (url, _):
        async with connect(url) as client:
            channel = "trades.BTC-PERPETUAL.100ms"
            await client.ask("public/subscribe", channels=[channel])
            await client.wait(lambda: sum(map(len, client.data(channel))) >= 30, "30 trades")
            trades = [trade for data in client.data(channel) for trade in data]
        first, last = trades[0]["trade_seq"], trades[-1]["trade_seq"]
        assert [trade["trade_seq"] for trade in trades] == list(range(first, last + 1))
        named = {"instrument_name": "BTC-PERPETUAL", "start_seq": first, "end_seq": last}
        page = get(url, "public/get_last_trades_by_instrument", **named, count=1000)[1]["result"]
        assert page == {"trades": trades, "has_more": False}
        page = get(url, "public/get_last_trades_by_instrument", **named, count=7)[1]["result"]
        assert page == {"trades": trades[:7], "has_more": True}
        page = get(url, "public/get_last_trades_by_instrument", **named, count=7, sorting="desc")[1]["result"]
        assert page == {"trades": trades[:-8:-1], "has_more": True}
        newest = get(url, "public/get_last_trades_by_instrument", instrument_name="BTC-PERPETUAL")[1]["result"]
        assert len(newest["trades"]) == 10
        assert newest["trades"][0]["trade_seq"] >= last
        span = {"start_timestamp": trades[0]["timestamp"], "end_timestamp": trades[-1]["timestamp"], "count": 1000}
        timed = get(url, "public/get_last_trades_by_instrument_and_time", instrument_name="BTC-PERPETUAL", **span)
        assert [trade for trade in timed[1]["result"]["trades"] if trade in trades] == trades
        wide = get(
            url, "public/get_last_trades_by_currency_and_time", currency="BTC", kind="future", sorting="asc", **span
        )
        assert [trade for trade in wide[1]["result"]["trades"] if trade in trades] == trades
        ids = {"start_id": trades[3]["trade_id"], "end_id": trades[5]["trade_id"], "count": 1000}
        by_id = get(url, "public/get_last_trades_by_currency", currency="BTC", **ids)[1]["result"]["trades"]
        assert [trade for trade in by_id if trade["instrument_name"] == "BTC-PERPETUAL"] == trades[3:6]
        bad = get(url, "public/get_last_trades_by_instrument", instrument_name="BTC-PERPETUAL", count=1001)
        assert bad[1]["error"]["data"]["param"] == "count"


@pytest.mark.skipif(not HAS_OPENSSL, reason="no openssl here to make a certificate with")
@in_loop
async def test_tls_with_a_certificate_of_ones_own(tmp_path: Path) -> None:
    own = make_certificate(tmp_path)
    with exchange("--certificate", own) as (url, _), trusted(own):
        assert url.startswith("wss://")
        assert get(url, "public/get_time")[0] == 200
        async with connect(url) as client:
            await client.ask("public/subscribe", channels=["book.BTC-PERPETUAL.100ms"])
            await client.wait_data("book.BTC-PERPETUAL.100ms", 3)


def test_the_url_holds_an_ipv6_address_in_brackets() -> None:
    for host, shown in (("::1", "[::1]"), ("127.0.0.1", "127.0.0.1"), ("localhost", "localhost")):
        assert Server(Exchange(Settings(host=host, options=0), 0)).url == f"ws://{shown}:0/ws/api/v2"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@in_loop
async def test_the_command_ends_in_order(number: signal.Signals) -> None:
    with exchange() as (url, program):
        async with connect(url) as client:
            await client.ask("public/subscribe", channels=["book.BTC-PERPETUAL.100ms"])
            program.process.send_signal(number)
            await client.wait(lambda: client.closed, "the close")
            assert client.closed == (1001, "the exchange stops")
        assert program.wait_exit() == 0
        assert program.err == []


def test_a_port_that_is_taken_is_refused() -> None:
    with exchange() as (url, _), running(*collector("exchange", "--port", url.split(":")[2].split("/")[0])) as second:
        assert second.wait_exit() == 1
        assert "address already in use" in second.text()
        assert "Traceback" not in second.text()


@pytest.mark.parametrize(
    ("option", "value", "code", "words"),
    [
        ("--faults", "nope:1", 2, "no fault 'nope'"),
        ("--port", "99999", 2, "0<=x<=65535"),
        ("--rate", "-1", 2, "0<=x<=100000"),
        ("--rate", "inf", 2, "inf is not in the range 0<=x<=100000"),
        ("--speed", "inf", 2, "inf is not in the range 0<=x<=100000"),
        ("--certificate", "/no/such.pem", 1, "certificate /no/such.pem: No such file"),
        ("--certificate", __file__, 1, f"certificate {__file__}: "),
        ("--replay", "/no/such.jsonl", 2, "File '/no/such.jsonl' does not exist"),
    ],
)
def test_what_it_cannot_run_with_is_refused_in_words(option: str, value: str, code: int, words: str) -> None:
    with running(*collector("exchange", option, value)) as program:
        assert program.wait_exit() == code
        assert words in program.text()
        assert "Traceback" not in program.text()


@in_loop
async def test_a_connection_that_names_no_fault_is_refused_and_logged() -> None:
    with exchange() as (url, program):
        with pytest.raises(aiohttp.WSServerHandshakeError, match="400"):
            async with connect(url, "gapp:3"):
                pass
        program.wait_line("a connection refused: no fault 'gapp'", stream="err")
