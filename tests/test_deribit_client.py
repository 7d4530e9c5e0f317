"""The client on one WebSocket: bootstrap, login, heartbeat, loss and return, the five functions."""

import asyncio
import base64
import gc
import hashlib
import json
import logging
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from collector.lifecycle import BACKOFF_CAP, Exit, backoff_delay
from collector.planning.catalogue import Catalogue
from tests.certificate import HAS_OPENSSL, make_certificate
from tests.deribit_support import (
    BOOK,
    LOGIN,
    QUICK,
    QUOTE,
    TICKER,
    TRADES,
    Ear,
    Script,
    connected,
    name_faults,
    scripted,
    wait_for,
)
from tests.exchange_client import exchange
from tests.support import PATIENCE, in_loop
from workers.actor import new_event_loop
from workers.deribit import Client, ExchangeError, Login, Lost, NotConnected, Refused
from workers.deribit.connection.session import RENEW_LEAST
from workers.deribit.connection.socket import Socket
from workers.deribit.rpc.errors import PAUSES, Reaction

RAW, OWN = "book.BTC-PERPETUAL.raw", "user.portfolio.btc"


# -- bootstrap --------------------------------------------------------------------------------------------------------


@in_loop
async def test_a_fresh_connection_goes_through_its_states_to_live(practice: str) -> None:
    async with connected(practice, channels=[BOOK, QUOTE], login=LOGIN, cancel_on_disconnect=True) as (client, ear):
        assert [state for state, _ in ear.states] == ["connecting", "bootstrapping", "live"]
        assert sorted(ear.confirmed) == [BOOK, QUOTE]
        state = client.get_state()
        assert (state["state"], state["authenticated"], state["attempts"], state["reconnects"]) == ("live", True, 1, 0)
        assert state["channels"] == {"asked": [BOOK, QUOTE], "confirmed": [BOOK, QUOTE], "refused": {}}
        assert state["last_error"] is None
        assert state["since"] <= time.time_ns()
        assert await client.send("private/get_cancel_on_disconnect") == {"scope": "connection", "enabled": True}
        await ear.wait_frames([BOOK, QUOTE])
        assert client.traffic.bytes_read > 0, "this aiohttp has no place for the tap: frames take the slow way"
    assert [state for state, _ in ear.states[-2:]] == ["closing", "closed"]
    assert client.since > state["since"]


@in_loop
async def test_cancel_on_disconnect_is_left_alone_unless_it_is_wanted(practice: str) -> None:
    async with connected(practice, login=LOGIN) as (client, _):
        assert (await client.send("private/get_cancel_on_disconnect"))["enabled"] is False


@pytest.mark.parametrize("mute", ["public/hello", "public/set_heartbeat", "public/get_time", "public/auth"])
@in_loop
async def test_requests_that_need_no_earlier_answer_do_not_wait_for_one(practice: str, mute: str) -> None:
    """One of them is never answered: the others are sent and answered all the same, public subscriptions too."""
    login = connected(practice, f"no_reply:{mute}", live=False, channels=[QUOTE, RAW], login=LOGIN, timeout=30)
    async with login as (client, ear):
        await ear.wait_frames([QUOTE])
        if mute != "public/auth":
            await wait_for(lambda: client.session.logged_in, "the login")
        if mute != "public/get_time":
            await wait_for(lambda: client.session.clock_error, "the clock")
        assert client.machine.state == "bootstrapping"
        assert mute != "public/auth" or RAW not in ear.confirmed  # it waits for the login
        with pytest.raises(NotConnected, match="the connection is not live: bootstrapping"):
            await client.send("public/test")  # an order would be sent too early, too


@in_loop
async def test_what_needs_the_login_does_not_wait_for_public_subscriptions(practice: str) -> None:
    mute = {"public/subscribe", "private/enable_cancel_on_disconnect"}
    settings: dict[str, Any] = {"login": LOGIN, "cancel_on_disconnect": True, "channels": [QUOTE, OWN], "timeout": 30}
    async with connected(practice, ",".join(f"no_reply:{name}" for name in mute), live=False, **settings) as (
        client,
        ear,
    ):
        await wait_for(lambda: ear.confirmed == [OWN], "the private channel")
        await wait_for(lambda: set(dict(client.traffic.waiting.values())) == mute, "the two that get no answer")


@in_loop
async def test_raw_and_private_channels_come_after_the_login(practice: str) -> None:
    channels = [RAW, "trades.BTC-PERPETUAL.raw", "user.portfolio.btc", QUOTE]
    async with connected(practice, channels=channels, login=LOGIN) as (client, ear):
        assert sorted(ear.confirmed) == sorted(channels)
        assert ear.refused == {}
        await ear.wait_frames([RAW, "user.portfolio.btc", QUOTE], 1)
        assert client.get_state()["channels"]["refused"] == {}


@in_loop
async def test_a_login_is_gone_with_its_connection_and_what_is_known_of_the_clock_is_kept(practice: str) -> None:
    async with connected(practice, login=LOGIN, retry_delay=1.0) as (client, _):
        assert client.get_state()["authenticated"]
        client.cut("the test wants it so")
        await wait_for(lambda: client.machine.state != "live", "the loss")
        assert not client.get_state()["authenticated"]
        assert client.session.earlier_offset == client.session.measured_offset
        await wait_for(lambda: client.is_live, "the next connection")
        assert client.get_state()["authenticated"]


@in_loop
async def test_the_clock_of_the_exchange_is_measured(practice: str) -> None:
    async with connected(practice, "clock:7000") as (client, _):
        state = client.get_state()
        assert abs(state["clock_offset"] - 7_000_000_000) <= state["clock_error"] + 1_000_000
        assert 500_000 < state["clock_error"] < 2_000_000_000


@pytest.mark.parametrize(("off", "side"), [(-7000, "ahead of"), (7000, "behind")])
@in_loop
async def test_a_wrong_clock_of_this_host_is_told_once_and_so_is_its_end(
    practice: str, off: int, side: str, caplog: pytest.LogCaptureFixture
) -> None:
    def list_told() -> list[str]:
        return [line for line in caplog.messages if "the clock of this host" in line]

    with caplog.at_level(logging.INFO, "deribit"):
        async with connected(practice, f"clock:{off},first:2") as (client, ear):
            client.cut("the test wants it so")
            await wait_for(lambda: len(ear.find("live")) == 2, "a life that has nothing new to say")
            client.cut("the test wants it so")
            await wait_for(lambda: len(list_told()) == 2, "the end of it")
    wrong, right = list_told()
    assert re.fullmatch(rf"the clock of this host is [5-8]\.\d s {side} the exchange's: one is wrong", wrong)
    assert right == "the clock of this host agrees with the exchange's again"


@pytest.mark.parametrize(
    "fault",
    ["error:METHOD=-32601", "error:METHOD=11094", "error:METHOD=13004", "error:METHOD=13028", "no_reply:METHOD"],
)
@in_loop
async def test_data_come_without_a_greeting_and_without_the_time(practice: str, fault: str) -> None:
    faults = ",".join(fault.replace("METHOD", method) for method in ("public/hello", "public/get_time"))
    async with connected(practice, faults, channels=[QUOTE], timeout=1.0) as (client, ear):
        await ear.wait_frames([QUOTE])
        assert (client.attempts, client.get_state()["clock_offset"]) == (1, 0)
        client.session._sync_at = asked_at = time.monotonic()  # the time is asked for again
        await wait_for(lambda: client.session._sync_at > asked_at, "the next question")
        waiting = client.traffic.waiting
        await wait_for(lambda: "public/get_time" not in dict(waiting.values()), "an answer, or the end of patience")
        await ear.wait_frames([QUOTE])
        assert client.reconnects == 0


# -- login ------------------------------------------------------------------------------------------------------------


@in_loop
async def test_with_a_login_data_come_where_nothing_is_public(practice: str) -> None:
    async with connected(practice, "login_only", login=LOGIN, channels=[QUOTE, RAW]) as (client, ear):
        await ear.wait_frames([QUOTE, RAW])
        assert (client.attempts, client.reconnects) == (1, 0)


@pytest.mark.parametrize("code", [13009, 13778, 10000])
@in_loop
async def test_a_channel_that_was_judged_before_the_login_is_asked_for_again(code: int) -> None:
    """It was asked for in the same breath, and its answer came after that of the login."""
    seen: list[str] = []

    def answer(params: dict[str, Any], number: int) -> dict[str, Any] | None:
        seen.extend(key for key in ("grant_type", "channels") if key in params)
        return {"error": {"code": code, "message": "no login"}} if "channels" in params and number == 1 else None

    async with scripted("public/", answer) as url, connected(url, login=LOGIN, channels=[QUOTE]) as (client, ear):
        assert seen == ["grant_type", "channels", "channels"]
        assert (ear.confirmed, ear.refused) == ([QUOTE], {})
        assert (client.attempts, client.reconnects) == (1, 0)


@in_loop
async def test_who_asks_while_the_login_is_under_way_does_not_cost_private_channels(practice: str) -> None:
    """As a book does that breaks just then: it asks for all that is missing."""
    settings: dict[str, Any] = {"login": LOGIN, "live": False, "channels": [BOOK, OWN]}
    async with connected(practice, "slow:public/auth=1", **settings) as (client, _):
        await wait_for(lambda: client.machine.state == "bootstrapping", "the bootstrap")
        await client.reconciler.reconcile()
        await wait_for(lambda: client.is_live, "live")
        assert client.get_state()["channels"]["refused"] == {}
        assert sorted(client.reconciler.subscriptions.confirmed) == [BOOK, OWN]


@pytest.mark.parametrize("code", [13009, 13004, 10000])
@in_loop
async def test_a_refused_signature_is_followed_by_id_and_secret(practice: str, code: int) -> None:
    async with connected(practice, f"error:public/auth={code}@1", login=LOGIN, channels=[RAW]) as (client, ear):
        assert client.get_state()["authenticated"]
        assert ear.confirmed == [RAW]
        assert (client.attempts, client.reconnects) == (1, 0)


@pytest.mark.parametrize(
    ("faults", "login", "exit"),
    [
        ("", Login("practice", "wrong"), Exit.CREDENTIALS),
        ("", Login("practice", "wrong", signed=False), Exit.CREDENTIALS),
        ("", Login("nobody", "practice"), Exit.CREDENTIALS),
        ("error:public/auth=13004", LOGIN, Exit.CREDENTIALS),
        ("error:public/auth=13004@1", LOGIN._replace(signed=False), Exit.CREDENTIALS),  # never the same again
        ("error:public/auth=13009", LOGIN, Exit.CREDENTIALS),
        ("error:public/auth=10000", LOGIN, Exit.CREDENTIALS),
        ("error:public/auth=13668", LOGIN, Exit.CREDENTIALS),
        ("ban:12005", LOGIN, Exit.BANNED),
        ("ban:11098", LOGIN, Exit.BANNED),
    ],
)
@in_loop
async def test_a_no_for_good_ends_it_at_once(practice: str, faults: str, login: Login, exit: Exit) -> None:
    async with connected(practice, faults, live=False, login=login, channels=[QUOTE]) as (client, ear):
        with pytest.raises(Refused) as refused:
            await client.connect()
        assert refused.value.exit == client.exit == exit
        assert "public/auth" in str(refused.value)
        assert (client.machine.state, client.attempts) == ("failed", 1)
        assert client.get_state()["last_error"]["code"] in (13004, 13009, 10000, 13668, 12005, 11098)
        await client.close()
        assert ear.states[-1][0] == "failed"


@pytest.mark.parametrize(
    ("method", "code", "exit"),
    [
        ("public/auth", 12005, Exit.BANNED),
        ("public/auth", 13004, Exit.CREDENTIALS),
        ("public/subscribe", 11098, Exit.BANNED),
    ],
)
@in_loop
async def test_a_no_for_good_counts_also_where_the_exchange_closes_with_it(method: str, code: int, exit: Exit) -> None:
    """That the connection has ended is known sooner than what came of its last answer."""
    settings: dict[str, Any] = {"login": LOGIN._replace(signed=False), "channels": [QUOTE], "retry_count": 2}

    def refuse(params: dict[str, Any], number: int) -> dict[str, Any]:
        return {"error": {"code": code, "message": "no"}, "close": b""}

    async with scripted(method, refuse) as url, connected(url, live=False, **settings) as (client, ear):
        with pytest.raises(Refused, match=f"{method}: {code}"):
            await client.connect()
        assert (client.exit, client.attempts, ear.find("backoff")) == (exit, 1, [])
        assert client.last_error["code"] == code


@in_loop
async def test_a_signature_that_ends_the_connection_is_followed_by_id_and_secret_on_the_next() -> None:
    grants = []

    def refuse(params: dict[str, Any], number: int) -> dict[str, Any] | None:
        grants.append(params["grant_type"])
        return {"error": {"code": 13004}, "close": b""} if grants[-1] == "client_signature" else None

    settings: dict[str, Any] = {"login": LOGIN, "retry_count": 3}
    async with scripted("public/auth", refuse) as url, connected(url, **settings) as (client, _):
        assert client.get_state()["authenticated"]
        assert grants == ["client_signature", "client_credentials"]


@in_loop
async def test_after_a_login_with_id_and_secret_the_next_is_signed_again() -> None:
    """Also where the connection had ended before that login was answered: on the second here."""
    grants = []

    def answer(params: dict[str, Any], number: int) -> dict[str, Any] | None:
        grants.append(params["grant_type"])
        refused: dict[str, Any] = {"error": {"code": 13004}}
        return [refused, refused | {"close": b"", "error": {"code": 11094}}, None, None][number - 1]

    settings: dict[str, Any] = {"login": LOGIN, "retry_count": 3}
    async with scripted("public/auth", answer) as url, connected(url, **settings) as (client, _):
        client.cut("on request")
        await wait_for(lambda: client.reconnects == 1 and client.is_live, "the next connection")
        assert grants == ["client_signature", "client_credentials", "client_credentials", "client_signature"]


@in_loop
async def test_a_signature_has_the_time_of_the_exchange_once_that_is_known() -> None:
    hour, stamps = 3_600_000, []

    def answer(params: dict[str, Any], number: int) -> dict[str, Any] | None:
        if "timestamp" in params:
            stamps.append(params["timestamp"] - time.time_ns() // 1_000_000)
        return None if params else {"result": time.time_ns() // 1_000_000 + hour}

    async with scripted("public/", answer) as url, connected(url, login=LOGIN) as (client, ear):
        client.cut("the test wants it so")
        await wait_for(lambda: len(ear.find("live")) == 2, "the second life")
        assert [round(ahead / hour) for ahead in stamps] == [0, 1]


@in_loop
async def test_tokens_are_renewed_before_they_die_and_raw_data_flow_on(practice: str) -> None:
    login = LOGIN._replace(signed=False)
    async with connected(practice, "token_life:5", login=login, channels=[RAW]) as (client, ear):
        renewals = []
        first = client.session._refresh_at
        await wait_for(lambda: client.session._refresh_at != first, "the renewal")
        renewals.append(client.session._refresh_at)
        await wait_for(lambda: client.session._refresh_at != renewals[0], "the next renewal")
        assert renewals[0] - first >= 4
        assert time.monotonic() > first + 2  # the first token is dead by now
        assert (await client.send("private/get_cancel_on_disconnect"))["scope"] == "connection"
        await ear.wait_frames([RAW])
        assert client.reconnects == 0


@in_loop
async def test_a_refused_renewal_is_a_new_login(practice: str) -> None:
    async with connected(practice, "token_life:2", login=LOGIN) as (client, _):
        client.session._refresh_token = "dead"
        renewed = client.session._refresh_at
        await wait_for(lambda: client.session._refresh_at != renewed, "the renewal")
        assert client.session._refresh_token != "dead"
        assert client.reconnects == 0


@pytest.mark.parametrize("is_signature_taken", [True, False])
@in_loop
async def test_after_a_refused_renewal_the_secret_is_sent_only_where_a_signature_is_refused_too(
    is_signature_taken: bool,
) -> None:
    grants = []

    def answer(params: dict[str, Any], number: int) -> dict[str, Any] | None:
        grants.append(params["grant_type"])
        is_refused = number == 2 or (number == 3 and not is_signature_taken)
        return {"error": {"code": 13009}} if is_refused else None

    async with scripted("public/auth", answer) as url, connected(url, login=LOGIN) as (client, _):
        logged_in = client.session.logged_in_at
        client.session._refresh_at = 0.0
        await wait_for(lambda: client.session.logged_in_at > logged_in, "the new login")
        assert client.reconnects == 0
    assert grants[1:3] == ["refresh_token", "client_signature"]
    assert grants[3:] == ([] if is_signature_taken else ["client_credentials"])


@in_loop
async def test_tokens_that_are_dead_when_given_do_not_make_it_spin(practice: str) -> None:
    async with connected(practice, "expired_token", live=False, login=LOGIN, channels=[QUOTE]) as (client, ear):
        await client.connect()
        await ear.wait_frames([QUOTE])
        assert client.reconnects == 0


@pytest.mark.parametrize("answer", [{"error": {"code": code}} for code in (10041, 11094, 13028)] + [{"result": {}}])
@in_loop
async def test_a_renewal_that_fails_for_a_moment_costs_no_connection(answer: dict[str, Any]) -> None:
    """Unless the token has died meanwhile."""

    def fail(params: dict[str, Any], number: int) -> dict[str, Any] | None:
        return dict(answer) if number in (2, 4) else None

    async with scripted("public/auth", fail) as url, connected(url, login=LOGIN) as (client, _):
        session = client.session
        session._token_ends = soon = time.monotonic() + 30
        for is_due in (lambda: session._refresh_at == soon, lambda: session._refresh_at > soon):  # it fails once
            session._refresh_at = 0.0
            await wait_for(is_due, "the renewal, or that it is put off as long as the token lives")
        assert (client.reconnects, client.get_state()["authenticated"]) == (0, True)
        session._refresh_at = session._token_ends = 0.0
        await wait_for(lambda: client.reconnects == 1, "the loss")


def grant_for(life: float) -> Script:
    """Tokens that live so long (s)."""
    return lambda params, number: {"result": {"access_token": "a", "refresh_token": "r", "expires_in": life}}


@pytest.mark.parametrize("life", [0, -5, 1e-9])
@in_loop
async def test_a_token_that_is_said_to_have_no_life_is_not_renewed_all_the_time(life: float) -> None:
    async with scripted("public/auth", grant_for(life)) as url, connected(url, login=LOGIN) as (client, _):
        assert client.session._refresh_at == client.session.logged_in_at + RENEW_LEAST


@in_loop
async def test_a_token_whose_life_is_no_time_is_no_token() -> None:
    settings: dict[str, Any] = {"live": False, "login": LOGIN, "retry_count": 1}
    async with scripted("public/auth", grant_for(10**400)) as url, connected(url, **settings) as (client, _):
        with pytest.raises(Lost, match="there are no tokens in the answer"):
            await client.connect()


# -- heartbeat and silence --------------------------------------------------------------------------------------------

BRISK: dict[str, Any] = {"heartbeat_interval": 0.5}


@pytest.mark.parametrize(("faults", "channels"), [("", []), ("flood:3000,", [QUOTE, TICKER])])
@in_loop
async def test_every_test_request_is_answered(practice: str, faults: str, channels: list[str]) -> None:
    # On a busy machine the answer to a flood's test_request takes some time, and who gives none in time is cut.
    settings: dict[str, Any] = {"heartbeat_interval": 1.0}
    async with connected(practice, f"{faults}heartbeat_floor:1", channels=channels, **settings) as (client, ear):
        await wait_for(lambda: client.traffic.requests > 6 + bool(channels), "answers to test_requests")
        assert (client.machine.state, client.reconnects, ear.malformed) == ("live", 0, [])
        if channels:
            assert len(ear.frames) > 1000


@in_loop
async def test_an_unanswered_test_request_costs_the_connection_and_it_comes_back(practice: str) -> None:
    async with connected(practice, "heartbeat_floor:0.5,deaf", channels=[QUOTE], **BRISK) as (client, ear):
        await wait_for(lambda: len(ear.find("live")) == 2, "the second life")
        reason = ear.find("backoff")[0]
        assert "4000" in reason
        assert "heartbeat close" in reason
        await ear.wait_frames([QUOTE])
        assert (client.reconnects, client.exit) == (1, Exit.STOPPED)


@in_loop
async def test_silence_is_proven_before_the_connection_is_cut(practice: str) -> None:
    settings: dict[str, Any] = {"heartbeat_interval": 0.5, "timeout": 0.7}
    async with connected(practice, "heartbeat_floor:0.5,half_open:1", channels=[QUOTE], **settings) as (_, ear):
        await wait_for(lambda: len(ear.find("live")) == 2, "the second life")
        # On a busy machine a connection may take longer than 0.7 s: that is said too, and is not what this is about.
        reason = next(reason for reason in ear.find("backoff") if not reason.startswith("no connection to"))
        assert reason.endswith("no answer to public/test")
        assert float(re.findall(r"[\d.]+", reason)[0]) >= 1.45
        await ear.wait_frames([QUOTE])


@pytest.mark.parametrize("answer", ["", ",error:public/test=11051"])
@in_loop
async def test_a_quiet_connection_that_answers_is_not_cut(practice: str, answer: str) -> None:
    faults = f"no_heartbeat,heartbeat_floor:0.1{answer}"
    async with connected(practice, faults, heartbeat_interval=0.1) as (client, _):
        sent = client.traffic.requests
        await wait_for(lambda: client.traffic.requests >= sent + 5, "five proofs of life")
        assert (client.machine.state, client.reconnects) == ("live", 0)


@in_loop
async def test_a_connection_on_which_data_come_need_not_prove_its_life(practice: str) -> None:
    settings: dict[str, Any] = {"channels": [BOOK, QUOTE], "heartbeat_interval": 1.0}
    async with connected(practice, "no_heartbeat,heartbeat_floor:1", **settings) as (client, ear):
        sent, longest, over = client.traffic.requests, 0.0, time.monotonic() + 2 * 1.5
        while (now := time.monotonic()) < over:
            await ear.wait_frames([BOOK], more=1)
            longest = max(longest, time.monotonic() - now)
        assert client.traffic.requests == sent or longest > 1.0, "nothing came for so long, on a busy machine"


# -- loss and return --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("close:1000@2", "closed by the exchange: 1000"),
        ("close:1001@2", "closed by the exchange: 1001"),
        ("close:1011@2", "closed by the exchange: 1011"),
        ("close:4000@2", "closed by the exchange: 4000"),
        ("close:0@2", "closed by the exchange: no code"),
        ("reset:2", ""),
        ("drop:2", "broke off"),
        ("maintenance:2", "broke off"),
        ("oversized:17000000@2", "broken frame"),
    ],
)
@in_loop
async def test_a_lost_connection_comes_back_with_all_its_channels(practice: str, fault: str, words: str) -> None:
    async with connected(practice, f"{fault},first:1", channels=[BOOK, TRADES, QUOTE]) as (client, ear):
        await wait_for(lambda: len(ear.find("live")) == 2, "the second life")
        (reason,) = ear.find("backoff")
        assert words in reason
        assert client.get_state()["channels"]["confirmed"] == sorted([BOOK, TRADES, QUOTE])
        assert client.get_state()["reconnects"] == 1
        await ear.wait_frames([BOOK, QUOTE])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("refuse:503", "HTTP 503 instead of a WebSocket: refused on request"),
        ("429", "HTTP 429 instead of a WebSocket (32 connections are allowed from one address): Too Many Requests"),
        ("refuse:403", "403"),
    ],
)
@in_loop
async def test_a_refused_upgrade_is_tried_again(practice: str, fault: str, words: str) -> None:
    async with connected(practice, f"{fault},first:2", channels=[QUOTE]) as (client, ear):
        assert [words in reason for reason in ear.find("backoff")] == [True, True]
        assert (client.attempts, client.reconnects) == (3, 0)
        await ear.wait_frames([QUOTE])


@in_loop
async def test_proxies_of_the_environment_are_not_used(practice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("http", "https", "ws", "wss", "all", "no"):
        monkeypatch.setenv(f"{kind}_proxy", "http://127.0.0.1:9" if kind != "no" else "")
    assert await Catalogue(practice, {}, 10.0).fetch()
    async with connected(practice, retry_count=1) as (client, _):
        assert client.is_live


REFUSED, NO_ANSWER = "HTTP 403 instead of a WebSocket", "the answer is no WebSocket's"


@in_loop
async def test_a_misspelt_fault_is_named_by_the_one_that_asks_for_it(practice: str) -> None:
    async with connected(f"{practice}?faults=reste:1", live=False, retry_count=1) as (client, _):
        with pytest.raises(Lost, match="HTTP 400 instead of a WebSocket: no fault 'reste'"):
            await client.connect()
        assert "no fault 'reste'" in client.get_state()["last_error"]["message"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"text/plain\r\nContent-Length: 14\r\n\r\nat noon again\n", f"{REFUSED}: at noon again"),
        (b"text/plain\r\nContent-Length: 20\r\n\r\n\r\nfirst\r\nand second", f"{REFUSED}: first"),
        (b"text/plain\r\nContent-Length: 14\r\n\r\n\x1b[2Jgone\x07\xff...", f"{REFUSED}: ?[2Jgone?\ufffd..."),
        (b"text/plain\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1_000_000, f"{REFUSED}: {200 * 'x'}"),
        (b"text/plain\r\nContent-Length: 50\r\n\r\n", REFUSED),
        (b"text/plain\r\nContent-Length: 0\r\n\r\n", REFUSED),
        (b"text/plain\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope", REFUSED),
        (b"text/html\r\nContent-Length: 15\r\n\r\n<!DOCTYPE html>", REFUSED),
        (
            b"text/plain\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
            f"{NO_ANSWER}: Invalid character in chunk size",
        ),
    ],
    ids=["text", "lines", "steering", "long", "late", "empty", "packed", "page", "broken"],
)
@in_loop
async def test_what_a_strange_server_says_is_shown_only_as_far_as_is_safe(answer: bytes, said: str) -> None:
    assert str(await hear_refusal(answer, "ws://HOST/?faults=x", {})) == said


@pytest.mark.parametrize(
    ("target", "headers"),
    [
        ("ws://HOST/?key=hunter2", {}),
        ("ws://HOST/?hunter2", {}),
        ("ws://HOST/?faults=x&key=hunter2", {}),
        ("ws://desk:hunter2@HOST/", {}),
        ("ws://HOST/", {"X-Desk": "hunter2"}),
    ],
)
@in_loop
async def test_what_it_says_is_not_shown_where_it_may_repeat_a_secret(target: str, headers: dict[str, str]) -> None:
    """In whatever form: cut off, decoded, in capitals."""
    answer = b"text/plain\r\nContent-Length: 7\r\n\r\nHUNTER2"
    assert str(await hear_refusal(answer, target, headers)) == REFUSED
    assert str(await hear_refusal(answer, "ws://HOST/", {})) == f"{REFUSED}: HUNTER2"


@pytest.mark.parametrize(
    ("asked", "pause"),
    [
        (b"7", 7), (b" 0300 ", 300), (b"86400", 300), (b"0", 0), (b"-1", 0), (b"1.5", 0), (b"1_0", 0), (b"", 0),
        (b"inf", 0), (b"9" * 5000, 0), ("\u0663".encode(), 0), (b"Fri, 31 Dec 2100 23:59:59 GMT", 0),
    ],
)  # fmt: skip
@in_loop
async def test_a_refusal_says_how_long_it_wants_to_be_left_alone(asked: bytes, pause: int) -> None:
    answer = b"text/plain\r\nRetry-After: " + asked + b"\r\nContent-Length: 4\r\n\r\nbusy"
    assert (await hear_refusal(answer, "ws://HOST/", {})).pause == pause


async def hear_refusal(answer: bytes, target: str, headers: dict[str, str]) -> Lost:
    """What is raised of a server that refuses the upgrade so."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 403 No\r\nContent-Type: " + answer)
        with suppress(ConnectionError):
            await reader.read()
        writer.close()

    serving: list[Any] = []

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        with pytest.raises(Lost) as lost:
            await Socket.open(target.replace("HOST", f"127.0.0.1:{server.sockets[0].getsockname()[1]}"), headers, 10.0)
        await asyncio.wait(serving)
    return lost.value


@in_loop
async def test_an_attempt_that_fails_leaves_nothing_open(practice: str) -> None:
    told: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["message"]))
    for url in (name_faults(practice, "refuse:503"), "ws://127.0.0.1:1/"):
        with suppress(Lost):
            await Socket.open(url, {}, 10.0)
    gc.collect()  # aiohttp tells then of a session that nobody has closed
    assert told == []


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 403 No\r\nSet-Cookie: key=hunter2\r\n", "the server ended the connection before it answered"),
        (
            b"HTTP/1.1 403 No\r\nSet-Cookie: key=hunter2" + b"x" * 9000 + b"\r\n\r\n",
            f"{NO_ANSWER}: Got more than 8190 bytes when reading",
        ),
        (b"HTTP/1.1 403 No\r\nSet-Cookie: key=hunter2\x00\r\n\r\n", f"{NO_ANSWER}: Invalid HTTP header"),
        (b"key=hunter2\r\n\r\n", f"{NO_ANSWER}: Bad status line"),
    ],
    ids=["cut", "long", "broken", "strange"],
)
@in_loop
async def test_an_answer_that_is_none_is_not_shown(answer: bytes, said: str) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        with pytest.raises(Lost) as lost:
            await Socket.open(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/?key=hunter2", {}, 10.0)
    assert str(lost.value) == said


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, new_event_loop])
def test_a_server_that_hangs_up_is_asked_once_an_attempt(new_loop: Callable[[], Any]) -> None:
    async def hear() -> str:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            hanging_up = asyncio.create_task(asyncio.to_thread(lambda: listening.accept()[0].close()))
            with pytest.raises(Lost) as lost:
                await Socket.open(f"ws://127.0.0.1:{listening.getsockname()[1]}/", {}, 10.0)
            await hanging_up
            listening.setblocking(False)
            with pytest.raises(BlockingIOError):  # the pause before another attempt is for the client to make
                listening.accept()
        return str(lost.value)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        said = runner.run(hear())
    assert said == "the server ended the connection before it answered"


@in_loop
async def test_why_nobody_takes_the_connection_is_told() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # and nobody else has the port
        port = deaf.getsockname()[1]
        with pytest.raises(Lost) as lost:
            await Socket.open(f"wss://127.0.0.1:{port}/", {}, 10.0)
    cause = f"Connection refused ('127.0.0.1', {port})"
    assert str(lost.value) == f"Cannot connect to host 127.0.0.1:{port} [{cause}]"


class TwoAddresses(asyncio.SelectorEventLoop):
    """Every host has one that leads nowhere (this machine itself knows that), and 127.0.0.1."""

    async def getaddrinfo(self, host: Any, port: Any, **_: Any) -> Any:
        stream = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [
            (socket.AF_INET6, *stream, ("fe80::1", port, 0, 0)),  # of which link is not said
            (socket.AF_INET, *stream, ("127.0.0.1", port)),
        ]


def test_why_none_of_several_addresses_takes_the_connection_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with asyncio.Runner(loop_factory=TwoAddresses) as runner, pytest.raises(Lost) as lost:
        runner.run(Socket.open(f"ws://two.example:{port}/", {}, 10.0))
    said = str(lost.value)
    assert said.startswith(f"Cannot connect to host two.example:{port} [Multiple exceptions: ")
    assert said.endswith(f", Connection refused ('127.0.0.1', {port})]")


@in_loop
async def test_a_server_that_hangs_up_amid_the_handshake_is_told_as_such() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(Lost) as lost:
            await Socket.open(f"wss://{host}/", {}, 10.0)
    assert str(lost.value) == f"Cannot connect to host {host} [the server ended the connection]"


@in_loop
async def test_the_headers_of_the_settings_go_along_with_the_upgrade() -> None:
    seen: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        url, settings = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/", {"X-Desk": "desk-7"}
        async with connected(url, live=False, headers=settings, retry_count=1) as (client, _):
            with pytest.raises(Lost, match=REFUSED):
                await client.connect()
    assert [b"\r\nX-Desk: desk-7\r\n" in request for request in seen] == [True]


@pytest.mark.parametrize("scheme", ["http", "ws"])
@in_loop
async def test_a_redirect_is_not_followed_and_its_place_not_shown(scheme: str) -> None:
    seen: list[bytes] = []

    async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        seen.append(request)
        place = f"{scheme}://127.0.0.1:{port}/there?key=hunter2".encode()
        writer.write(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + place + b"\r\n\r\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_server(redirect, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Lost) as lost:
            await Socket.open(f"ws://127.0.0.1:{port}/?key=hunter2", {"X-Desk": "desk-7"}, 10.0)
    assert str(lost.value) == "redirected to another address: write the exchange's own as url"
    assert [b"GET /?key=hunter2" in request for request in seen] == [True]


@pytest.mark.skipif(not HAS_OPENSSL, reason="no openssl here to make a certificate with")
@in_loop
async def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    with exchange("--certificate", make_certificate(tmp_path)) as (url, _):
        with pytest.raises(Lost) as lost:
            await Socket.open(url, {}, 10.0)
        assert str(lost.value) == "the certificate of 127.0.0.1 is not trusted: self-signed certificate"
        with pytest.raises(Lost, match="the server ended the connection before it answered"):
            await Socket.open(url.replace("wss", "ws"), {}, 10.0)


STEPS = ["public/auth", "public/set_heartbeat", "private/enable_cancel_on_disconnect"]


@pytest.mark.parametrize("kind", ["error", "no_reply", "wrong_id"])
@pytest.mark.parametrize("method", STEPS)
@in_loop
async def test_a_failure_at_each_step_is_got_over(practice: str, method: str, kind: str) -> None:
    fault = {"error": f"error:{method}=10001", "no_reply": f"no_reply:{method}", "wrong_id": f"wrong_id:{method}"}[kind]
    settings: dict[str, Any] = {"login": LOGIN, "cancel_on_disconnect": True, "timeout": 2.0}
    async with connected(practice, f"{fault},first:1", channels=[QUOTE, RAW], **settings) as (client, ear):
        (reason,) = ear.find("backoff")
        assert reason.startswith(method)
        assert sorted(client.reconciler.subscriptions.confirmed) == [RAW, QUOTE]
        await ear.wait_frames([QUOTE, RAW])


@in_loop
async def test_a_login_that_is_not_known_at_a_later_step_is_no_wrong_one(practice: str) -> None:
    settings: dict[str, Any] = {"login": LOGIN, "cancel_on_disconnect": True}
    async with connected(practice, f"error:{STEPS[2]}=13009,first:1", **settings) as (client, ear):
        assert [reason.split(":")[0] for reason in ear.find("backoff")] == STEPS[2:]
        assert client.get_state()["authenticated"]


@in_loop
async def test_what_is_said_of_credentials_to_a_request_that_needs_none_is_no_end_for_good(practice: str) -> None:
    async with connected(practice, "error:public/set_heartbeat=13004,first:1", channels=[QUOTE]) as (_, ear):
        assert ear.find("backoff") == ["public/set_heartbeat: 13004 invalid_credentials"]


@in_loop
async def test_credentials_that_are_refused_at_a_later_step_are_no_good_either(practice: str) -> None:
    settings: dict[str, Any] = {"login": LOGIN, "cancel_on_disconnect": True}
    async with connected(practice, f"error:{STEPS[2]}=13004", live=False, **settings) as (client, _):
        with pytest.raises(Refused, match=f"{STEPS[2]}: 13004"):
            await client.connect()
        assert (client.exit, client.attempts) == (Exit.CREDENTIALS, 1)


@pytest.mark.parametrize("code", [10049, 13042])
@in_loop
async def test_data_come_without_cancel_on_disconnect_too(
    practice: str, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"login": LOGIN, "cancel_on_disconnect": True, "retry_count": 1}
    async with connected(practice, f"error:{STEPS[2]}={code}", channels=[RAW], **settings) as (client, ear):
        await ear.wait_frames([RAW])
        assert client.get_state()["last_error"]["code"] == code
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.message.startswith(f"cancel on disconnect is not on: {code}")


@pytest.mark.parametrize("method", STEPS)
@in_loop
async def test_a_step_that_always_fails_is_given_up(practice: str, method: str) -> None:
    settings: dict[str, Any] = {"login": LOGIN, "cancel_on_disconnect": True, "retry_count": 3}
    async with connected(practice, f"error:{method}=11094", live=False, channels=[QUOTE], **settings) as (client, ear):
        with pytest.raises(Lost, match=f"3 attempts in a row.*{method}: 11094"):
            await client.connect()
        assert (client.exit, client.machine.state) == (Exit.GAVE_UP, "failed")
        assert client.last_error["code"] == 11094
        assert len(ear.find("connecting")) == 3


@pytest.mark.parametrize("retries", [0, 1, 2, 4])
@in_loop
async def test_after_retry_count_attempts_it_gives_up(practice: str, retries: int) -> None:
    async with connected(practice, "refuse:503", live=False, retry_count=retries, retry_delay=0.04) as (client, ear):
        with pytest.raises(Lost, match="HTTP 503"):
            await client.connect()
        assert len(ear.find("connecting")) == max(1, retries)
        assert (client.exit, client.get_state()["state"]) == (Exit.GAVE_UP, "failed")
        pauses = [float(reason.split()[-2]) for reason in ear.find("connecting")[1:]]
        for place, pause in enumerate(pauses):
            assert 0.04 * 2**place / 2 - 0.006 <= pause <= 0.04 * 2**place + 0.006


@pytest.mark.parametrize("code", [10028, 11051])
@in_loop
async def test_a_pause_that_the_exchange_wants_is_made_before_it_gives_up_too(practice: str, code: int) -> None:
    """The next life of a worker comes at once, and knows nothing of it."""
    faults = f"error:public/subscribe={code}"
    async with connected(practice, faults, live=False, retry_count=1, channels=[QUOTE]) as (client, ear):
        await wait_for(lambda: ear.find("backoff"), "the loss")
        assert client.machine.state == "backoff"
        await wait_for(lambda: ear.find("failed"), "the end")
        assert (client.exit, client.last_error["code"]) == (Exit.GAVE_UP, code)


@in_loop
async def test_the_last_error_is_what_ended_the_connection(practice: str) -> None:
    async with connected(practice, retry_delay=60) as (client, _):
        with pytest.raises(ExchangeError):
            await client.send("public/nothing")
        client.cut("the test wants it so")
        client.cut("and so again")
        await wait_for(lambda: client.machine.state == "backoff", "the loss")
        assert client.last_error == {"message": "the test wants it so"}


@in_loop
async def test_a_pause_is_told_with_the_error_that_wants_it_not_with_a_later_one(practice: str) -> None:
    async with connected(practice, "error:public/status=12998@1") as (client, ear):
        for method in ("public/status", "public/nothing"):
            with pytest.raises(ExchangeError):
                await client.send(method)
        client.cut("the test wants it so")
        await wait_for(lambda: ear.find("backoff"), "the loss")
        told = r"the test wants it so, after 12998 \S+; no other attempt for \d+ s"
        assert re.fullmatch(told, ear.find("backoff")[0])
        assert client.last_error["code"] == 12998


@in_loop
async def test_a_pause_that_is_over_delays_nothing(practice: str) -> None:
    async with connected(practice, "error:public/status=11051@1") as (client, ear):
        with pytest.raises(ExchangeError):
            await client.send("public/status")
        over = time.monotonic() + PAUSES[Reaction.BACK_OFF]
        await wait_for(lambda: time.monotonic() > over, "the end of the pause")
        client.cut("the test wants it so")
        await wait_for(lambda: len(ear.find("connecting")) == 2, "the next attempt")
        assert float(ear.find("connecting")[1].split()[-2]) < 0.1


@in_loop
async def test_a_pause_that_the_exchange_wants_is_made_before_the_next_attempt(practice: str) -> None:
    async with connected(practice, "error:public/status=11051@1") as (client, ear):
        with pytest.raises(ExchangeError):
            await client.send("public/status")
        client.cut("the test wants it so")
        await wait_for(lambda: len(ear.find("connecting")) == 2, "the next attempt")
        assert float(ear.find("connecting")[1].split()[-2]) > 0.5


@in_loop
async def test_who_refuses_the_upgrade_is_left_alone_for_as_long_as_it_says() -> None:
    """Also after the last attempt; and those who are refused together do not come back together."""
    asked_at: list[float] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked_at.append(time.monotonic())
        writer.write(b"HTTP/1.1 429 No\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with connected(url, live=False, retry_count=2, retry_delay=0.4) as (client, ear):
            with pytest.raises(Lost, match="2 attempts in a row came to nothing"):
                await client.connect()
    asked_at.append(time.monotonic())
    assert [after - before >= 1.0 for before, after in pairwise(asked_at)] == [True, True]
    said = "HTTP 429 instead of a WebSocket (32 connections are allowed from one address)"
    assert ear.find("backoff") == [f"{said}; no other attempt for 1 s"] * 2
    assert [1.19 < float(reason.split()[-2]) < 1.41 for reason in ear.find("connecting")[1:]] == [True]
    assert client.last_error == {"message": said}


@in_loop
async def test_a_short_pause_is_not_told_as_none() -> None:
    ear = Ear()
    client = Client("ws://127.0.0.1:9/", listener=ear)
    client._apply("connect", "")
    await client._back_off(Lost("gone", pause=0.1))
    assert ear.find("backoff") == ["gone; no other attempt for 1 s"]


def test_backoff_doubles_up_to_a_cap_and_is_spread() -> None:
    delays = [backoff_delay(attempt, 1.0, 0.0) for attempt in range(1, 200)]
    assert delays[:6] == [1, 2, 4, 8, 16, 32]
    assert set(delays[6:]) == {BACKOFF_CAP}
    assert all(one <= other for one, other in pairwise(delays))
    assert backoff_delay(1, 1.0, 0.999) == pytest.approx(0.5, abs=0.01)
    assert backoff_delay(10**9, 1.0, 0.5) == BACKOFF_CAP * 0.75


@in_loop
async def test_lives_that_do_not_last_are_attempts_like_any_other(practice: str) -> None:
    async with connected(practice, "drop:2", retry_count=3) as (client, ear):
        await wait_for(lambda: client.machine.state == "failed", "the end")
        assert len(ear.find("live")) == 3
        assert client.exit == Exit.GAVE_UP


@in_loop
async def test_who_connects_is_not_told_that_a_client_is_closed_which_lives_on(practice: str) -> None:
    class Hasty(Ear):
        def change_state(self, state: str, reason: str) -> None:
            super().change_state(state, reason)
            if self.find("live") == [""]:
                client.cut("the test wants it so")

    client = Client(practice, listener=Hasty(), **QUICK)
    await client.connect()
    await wait_for(lambda: client.is_live, "the second life")
    await client.close()


@in_loop
async def test_attempts_are_forgotten_once_a_life_has_lasted(practice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next is made almost at once: only what fails waits."""
    monkeypatch.setattr("workers.deribit.connection.client.LASTED", 0.0)
    async with connected(practice, retry_count=1, retry_delay=600) as (client, ear):
        assert client.attempts == 1
        await wait_for(lambda: client.attempts == 0, "it to be forgotten")
        client.cut("the test wants it so")
        await wait_for(lambda: len(ear.find("live")) == 2, "the second life")
        assert client.reconnects == 1


@in_loop
async def test_an_exchange_that_is_not_there_is_given_up() -> None:
    async with connected("ws://127.0.0.1:1/ws/api/v2", live=False, retry_count=2) as (client, _):
        with pytest.raises(Lost, match=r"127\.0\.0\.1"):
            await client.connect()


@in_loop
async def test_a_slow_upgrade_is_bounded_by_the_timeout(practice: str) -> None:
    url, host = practice.replace("//", "//desk:hunter2@"), practice.split("/")[2]
    async with connected(url, "slow_open:30,first:1", timeout=1.5) as (_, ear):
        assert ear.find("backoff") == [f"no connection to {host} within 1.5 s"]


@in_loop
async def test_slow_answers_are_waited_for(practice: str) -> None:
    async with connected(practice, "slow:*=0.1", channels=[BOOK, QUOTE], login=LOGIN) as (client, ear):
        assert (client.attempts, client.reconnects, ear.find("backoff")) == (1, 0, [])


# -- hostile frames ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["garbage:0.05", "bad_json:0.05", "deep_json:0.05", "odd_json:0.05"])
@in_loop
async def test_frames_that_are_no_messages_are_counted_and_survived(practice: str, fault: str) -> None:
    async with connected(practice, fault, channels=[BOOK, QUOTE]) as (client, ear):
        # What looks like data is handed on as it is.
        await wait_for(lambda: ear.malformed or any(not f.endswith(b"}") for f in ear.frames), "nonsense")
        await ear.wait_frames([BOOK, QUOTE], 5)
        assert client.get_state()["malformed"] == len(ear.malformed)
        assert (client.machine.state, client.reconnects) == ("live", 0)
        assert await client.send("public/test")


@in_loop
async def test_unknown_members_are_of_no_matter(practice: str) -> None:
    async with connected(practice, "unknown_fields,exponents", channels=[BOOK, QUOTE], login=LOGIN) as (client, ear):
        await ear.wait_frames([BOOK, QUOTE])
        assert (ear.malformed, client.reconnects, client.get_state()["authenticated"]) == ([], 0, True)


@in_loop
async def test_an_answer_under_a_wrong_id_is_nobodys(practice: str) -> None:
    async with connected(practice, "wrong_id:public/status@1") as (client, ear):
        with pytest.raises(TimeoutError):
            await client.send("public/status", timeout=0.3)
        assert [reason for _, reason in ear.malformed] == ["an answer to no request of ours"]
        assert await client.send("public/status")


@in_loop
async def test_an_answer_that_comes_too_late_is_no_bad_frame(practice: str) -> None:
    async with connected(practice, "slow:public/status=1@1") as (client, ear):
        with pytest.raises(TimeoutError):
            await client.send("public/status", timeout=0.3)
        assert await client.send("public/test")  # comes behind it
        assert (ear.malformed, client.traffic.malformed) == ([], 0)


# -- the five functions -----------------------------------------------------------------------------------------------


@in_loop
async def test_results_and_errors_come_raw(practice: str) -> None:
    async with connected(practice) as (client, _):
        assert await client.send("public/test") == {"version": "1.2.26"}
        assert isinstance(await client.send("public/get_time"), int)
        with pytest.raises(ExchangeError) as error:
            await client.send("public/ticker", {"instrument_name": "NOPE"})
        assert error.value.raw == {
            "code": -32602, "message": "Invalid params",
            "data": {"reason": "instrument not found", "param": "instrument_name"},
        }  # fmt: skip
        assert client.get_state()["last_error"] == error.value.raw
        with pytest.raises(ExchangeError) as unknown:
            await client.send("public/nothing")
        assert unknown.value.code == -32601
        with pytest.raises(ExchangeError) as private:
            await client.send("private/get_positions", {"currency": "BTC"})
        assert private.value.code == 13009


@in_loop
async def test_a_hundred_requests_at_once_get_each_its_own_answer(practice: str) -> None:
    async with connected(practice, "delay:20") as (client, _):
        names = ["BTC-PERPETUAL", "ETH-PERPETUAL"] * 45
        tickers = await asyncio.gather(*(client.send("public/ticker", {"instrument_name": name}) for name in names))
        assert [ticker["instrument_name"] for ticker in tickers] == names
        assert client.traffic.waiting == {}


@in_loop
async def test_a_request_without_an_answer_ends_in_time_or_with_the_connection(practice: str) -> None:
    async with connected(practice, "no_reply:public/status,drop:6,first:1", timeout=2) as (client, ear):
        with pytest.raises(TimeoutError):
            await client.send("public/status")
        with pytest.raises(Lost):
            await client.send("public/status", timeout=30)
        with pytest.raises(NotConnected):
            await client.send("public/status")
        await wait_for(lambda: len(ear.find("live")) == 2, "the second life")
        assert await client.send("public/status")


@in_loop
async def test_who_sends_while_a_lost_connection_is_being_closed_hears_that_it_is_lost(practice: str) -> None:
    """The exchange says no more: it gets a second to answer the close frame."""
    async with connected(practice, "half_open:1.5") as (client, _):
        with suppress(TimeoutError):
            while await client.send("public/test", timeout=0.5):
                await asyncio.sleep(0.05)
        client.cut("the test wants it so")
        await wait_for(lambda: not client.is_live, "the end")
        with pytest.raises(NotConnected, match="the connection has just been lost"):
            await client.send("public/test")


@in_loop
async def test_what_is_begun_while_a_lost_connection_is_being_closed_ends_with_it(practice: str) -> None:
    async with connected(practice) as (client, ear):
        client.cut("the test wants it so")
        while client.is_live:
            await asyncio.sleep(0)
        begun = client.spawn(asyncio.sleep(60))
        await wait_for(lambda: len(ear.find("live")) == 2, "the second life")
        assert begun.cancelled()


@in_loop
async def test_nothing_can_be_sent_before_and_after() -> None:
    async with connected("ws://127.0.0.1:1/", live=False, retry_count=1) as (client, _):
        with pytest.raises(Lost):
            await client.connect()
        with pytest.raises(NotConnected, match="failed"):
            await client.send("public/test")
        for ask in (client.subscribe, client.unsubscribe):  # the wish would be kept for a connection that never comes
            with pytest.raises(Lost, match="1 attempt came to nothing"):
                await ask([QUOTE])
        await client.close()
        await client.close()


@in_loop
async def test_nothing_can_be_subscribed_to_once_it_is_closed(practice: str) -> None:
    async with connected(practice, channels=[QUOTE]) as (client, _):
        await client.close()
        with pytest.raises(Lost, match="closed"):
            await client.subscribe([BOOK])


@in_loop
async def test_connect_can_be_given_up_and_leaves_nothing(practice: str) -> None:
    async with connected(practice, "refuse:503", live=False) as (client, ear):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.connect()
        assert ear.find("backoff")


@pytest.mark.parametrize("faults", ["", "half_open:0.1", "flood:2000", "delay:200"])
@in_loop
async def test_close_waits_for_the_answer_no_longer_than_the_peer_is_given(practice: str, faults: str) -> None:
    async with connected(practice, faults, live=False, channels=[QUOTE]) as (client, ear):
        socket = await wait_for(lambda: client.traffic._socket, "the socket")
        if "half_open" in faults:
            frames = -1
            while frames != client.traffic.frames:  # until nothing has come for a while
                frames = client.traffic.frames
                await asyncio.sleep(0.2)
        began = time.monotonic()
        await client.close()
        assert time.monotonic() - began < 8  # aiohttp itself would wait for 10 s
        # 1000 is of the exchange's own close frame, 1006 is what aiohttp says where none came
        assert socket._socket.close_code == (1006 if "half_open" in faults else 1000)
        assert [state for state, _ in ear.states[-2:]] == ["closing", "closed"]
        assert client.exit == Exit.STOPPED


@pytest.mark.skipif(not HAS_OPENSSL, reason="no openssl here to make a certificate with")
@in_loop
async def test_a_silent_peer_is_cut_over_tls_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS has a farewell of its own, for which the loops wait half a minute: so long the exchange would count it."""
    own = make_certificate(tmp_path)
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", ssl.create_default_context(cafile=own))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own)
    is_closed = threading.Event()

    def serve() -> None:
        connection, _ = listening.accept()
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.sendall(accept_upgrade(secure.recv(10_000)))
            is_closed.wait(PATIENCE)
            with socket.socket(fileno=secure.detach()) as plain:  # beneath TLS, where nothing is answered
                plain.settimeout(10)
                with suppress(ConnectionResetError):
                    while plain.recv(10_000):
                        pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = asyncio.create_task(asyncio.to_thread(serve))
        opened = await Socket.open(f"wss://127.0.0.1:{listening.getsockname()[1]}/", {}, 10.0)
        await opened.close()
        is_closed.set()
        await serving


@in_loop
async def test_the_error_of_the_last_attempt_is_told_during_the_next_one(practice: str) -> None:
    class Asking(Ear):
        def change_state(self, state: str, reason: str) -> None:
            super().change_state(state, reason)
            told.append((state, client.get_state()["last_error"]))

    told: list[tuple[str, Any]] = []
    client = Client(name_faults(practice, "refuse:503,first:1"), listener=Asking(), retry_delay=0.02)
    await client.connect()
    error = told[1][1]
    assert "HTTP 503" in error["message"]
    assert told == [
        ("connecting", None), ("backoff", error), ("connecting", error), ("bootstrapping", None), ("live", None),
    ]  # fmt: skip
    await client.close()


@pytest.mark.parametrize("faults", ["refuse:503", "slow_open:30", "no_reply:public/hello"])
@in_loop
async def test_close_interrupts_whatever_is_under_way(practice: str, faults: str) -> None:
    states = {"refuse:503": "backoff", "slow_open:30": "connecting", "no_reply:public/hello": "bootstrapping"}
    async with connected(practice, faults, live=False, retry_delay=60, timeout=60) as (client, ear):
        await wait_for(lambda: client.machine.state == states[faults], states[faults])
        await client.close()
        assert ear.states[-1][0] == "closed"


@in_loop
async def test_who_closes_before_it_has_begun_connects_to_nothing(practice: str) -> None:
    ear = Ear()
    client = Client(practice, listener=ear)
    life = client.start()
    await client.close()
    assert (life.done(), client.get_state()["state"], ear.states) == (True, "closed", [])


@pytest.mark.parametrize("turns", range(9))
@in_loop
async def test_close_leaves_no_socket_open_wherever_a_loss_is_being_wound_up(practice: str, turns: int) -> None:
    async with connected(practice, channels=[QUOTE]) as (client, ear):
        socket = client.traffic._socket
        assert socket is not None
        client.cut("the test wants it so")
        for _ in range(turns):
            await asyncio.sleep(0)
        await client.close()
        assert socket._session.closed
        assert (client.get_state()["channels"]["confirmed"], ear.states[-1][0]) == ([], "closed")


@pytest.mark.parametrize("is_closed", [False, True])
@pytest.mark.parametrize("turns", range(9))
@in_loop
async def test_a_life_that_is_cancelled_just_as_the_connection_is_lost_is_cancelled(
    practice: str, turns: int, is_closed: bool
) -> None:
    """Also where it is being closed at the same time."""
    client = Client(practice, **QUICK)
    life = client.start()
    await wait_for(lambda: client.is_live, "life")
    client.cut("the test wants it so")
    for _ in range(turns):
        await asyncio.sleep(0)
    if is_closed:
        closing = asyncio.create_task(client.close())
        await asyncio.sleep(0)
    assert life.cancel()
    await asyncio.wait({life}, timeout=5)
    assert life.cancelled()
    if is_closed:
        await closing


@pytest.mark.parametrize("turns", range(9))
@in_loop
async def test_a_refusal_amid_the_close_does_not_hold_it_up(turns: int) -> None:
    def refuse(params: dict[str, Any], number: int) -> dict[str, Any] | None:
        return {"error": {"code": 13007}} if number == 2 else None

    async with scripted("public/auth", refuse) as url, connected(url, login=LOGIN) as (client, ear):
        client.session._refresh_at = 0.0
        while client.last_error is None:
            await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        await client.close()
        assert ear.states[-1][0] in ("closed", "failed")
        assert len(ear.find("connecting")) == 1


@in_loop
async def test_who_gives_up_waiting_for_the_close_is_cancelled_and_it_closes_all_the_same(practice: str) -> None:
    async with connected(practice, "half_open:0.1") as (client, ear):
        frames = -1
        while frames != client.traffic.frames:  # until nothing has come for a while
            frames = client.traffic.frames
            await asyncio.sleep(0.2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await client.close()
        assert client.machine.state == "closing"
        await wait_for(lambda: ear.find("closed"), "the end")


@in_loop
async def test_who_closes_what_is_being_closed_waits_for_the_same_end(practice: str) -> None:
    async with connected(practice, "half_open:0.1") as (client, ear):
        closings = [asyncio.create_task(client.close()) for _ in range(2)]
        await asyncio.wait(closings)
        assert [state for state, _ in ear.states[-2:]] == ["closing", "closed"]
        await client.close()
        assert client.machine.state == "closed"


@in_loop
async def test_who_asks_while_it_closes_is_not_told_that_the_wish_is_kept(practice: str) -> None:
    async with connected(practice) as (client, _):
        closing = asyncio.create_task(client.close())
        while client.machine.state != "closing":
            await asyncio.sleep(0)
        for call in (client.subscribe([QUOTE]), client.unsubscribe([QUOTE]), client.connect()):
            with pytest.raises(Lost, match="closed"):
                await call
        await closing


def accept_upgrade(request: bytes) -> bytes:
    """The answer to a request for a WebSocket."""
    (key,) = re.findall(rb"(?i)sec-websocket-key: (\S+)", request)
    accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    head = b"HTTP/1.1 101 Yes\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "
    return head + accept + b"\r\n\r\n"


@pytest.mark.parametrize("how", ["fin", "rst"])
@in_loop
async def test_a_ping_before_a_broken_connection_is_a_loss_like_another(how: str) -> None:
    """With a request that we answer before it, in one read: the answer finds the socket gone, and so does the pong."""
    asked = b'{"params":{"type":"test_request"},"method":"heartbeat","jsonrpc":"2.0"}'
    is_followed, is_closed = threading.Event(), threading.Event()

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            request = b""
            while not request.endswith(b"\r\n\r\n"):
                request += connection.recv(4096)
            connection.sendall(accept_upgrade(request))
            assert is_followed.wait(10)
            connection.sendall(bytes([0x81, len(asked)]) + asked + b"\x89\x00")
            if how == "rst":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        is_closed.set()

    class Held(Ear):
        """Holds the loop, once the socket is followed, until all of it has come and the other end is gone."""

        def change_state(self, state: str, reason: str) -> None:
            super().change_state(state, reason)
            if state == "bootstrapping":
                holding.append(asyncio.create_task(self.hold()))

        async def hold(self) -> None:
            for _ in range(20):
                await asyncio.sleep(0)
            is_followed.set()
            assert is_closed.wait(10)

    holding: list[asyncio.Task[None]] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = asyncio.create_task(asyncio.to_thread(serve))
        client = Client(f"ws://127.0.0.1:{listening.getsockname()[1]}/", retry_count=1, listener=Held())
        with pytest.raises(Lost):
            await client.connect()
        await asyncio.gather(server, *holding)
    assert client.exit is Exit.GAVE_UP


# -- a listener that fails --------------------------------------------------------------------------------------------


class Careless(Ear):
    """Fails in one of its methods, or in the change to one state."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place

    def _fail_in(self, place: str) -> None:
        if place == self.place:
            raise KeyError(place)

    def take_frame(self, frame: bytes, receive_ts: int) -> None:
        self._fail_in("take_frame")

    def take_malformed(self, frame: bytes, reason: str) -> None:
        self._fail_in("take_malformed")

    def confirm_channels(self, names: list[str]) -> None:
        self._fail_in("confirm_channels")

    def change_state(self, state: str, reason: str) -> None:
        super().change_state(state, reason)
        self._fail_in(state)


@pytest.mark.parametrize(
    ("place", "faults"),
    [
        ("take_frame", ""),
        ("take_malformed", "garbage:0.05"),
        ("confirm_channels", ""),
        ("bootstrapping", ""),
        ("live", ""),
        ("backoff", "drop:0.3"),
    ],
)
def test_what_a_listener_raises_ends_the_connection_and_is_told(
    practice: str, place: str, faults: str, caplog: pytest.LogCaptureFixture
) -> None:
    ear = Careless(place)

    @in_loop
    async def run() -> None:
        client = Client(name_faults(practice, faults), listener=ear, **QUICK)
        client.reconciler.subscriptions.ask([QUOTE])
        connecting = asyncio.create_task(client.connect())
        await wait_for(lambda: client.get_state()["state"] == "failed", "the end")
        assert client.get_state()["last_error"] == {"message": f"KeyError: '{place}'"}
        assert (client.exit, ear.find("failed")) == (Exit.CRASHED, [f"KeyError: '{place}'"])
        assert client.traffic._socket is None
        await asyncio.gather(connecting, return_exceptions=True)  # it may have been live
        for call in (
            client.connect(), client.send("public/test"), client.subscribe([BOOK]), client.unsubscribe([QUOTE]),
            client.close(),
        ):  # fmt: skip
            with pytest.raises(KeyError, match=place):
                await call

    run()
    (record,) = [record for record in caplog.records if record.name == "deribit"]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)


@pytest.mark.parametrize("is_given_up", [False, True])
@in_loop
async def test_a_listener_that_fails_in_what_is_asked_for_later_ends_it_too(practice: str, is_given_up: bool) -> None:
    """Whether or not the caller still waits to be told."""
    client = Client(name_faults(practice, "slow:public/subscribe=0.2"), listener=Careless("confirm_channels"), **QUICK)
    await client.connect()
    asking = asyncio.create_task(client.subscribe([QUOTE]))
    if is_given_up:
        while not client.traffic.waiting:
            await asyncio.sleep(0)
        asking.cancel()
    with pytest.raises(asyncio.CancelledError if is_given_up else KeyError):
        await asking
    await wait_for(lambda: client.get_state()["state"] == "failed", "the end", 5)
    with pytest.raises(KeyError, match="confirm_channels"):
        await client.close()


@pytest.mark.parametrize("place", ["closing", "closed"])
@in_loop
async def test_a_listener_that_fails_while_it_closes_leaves_nothing_open(practice: str, place: str) -> None:
    ear = Careless(place)
    client = Client(practice, listener=ear, **QUICK)
    await client.connect()
    with pytest.raises(KeyError, match=place):
        await client.close()
    assert (len(ear.find("closing")), len(ear.find("closed"))) == (1, 1)
    assert (client.traffic._socket, client.get_state()["state"]) == (None, "closed")


# -- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults", ["", "wrong_id:public/auth@1,first:1", "error:public/auth=13009@1", "bad_json:0.05", "token_life:1"]
)
def test_no_secret_is_told(practice: str, faults: str, caplog: pytest.LogCaptureFixture) -> None:
    login = Login("practice", "practice")
    tokens: set[str] = set()

    @in_loop
    async def run() -> None:
        async with connected(practice, faults, login=login, channels=[RAW], timeout=2.0) as (client, ear):
            await ear.wait_frames([RAW])
            tokens.add(client.session._refresh_token)
            told = [repr(client.get_state()), repr(login), repr(ear.states), str(client.session), repr(client)]
            told += [f"{frame!r} {reason}" for frame, reason in ear.malformed]
            texts.extend(told)

    texts: list[str] = []
    with caplog.at_level(logging.DEBUG):
        run()
    texts.append(caplog.text)
    for text in texts:
        assert "access_token" not in text
        assert "refresh_token" not in text
        assert not any(token[:30] in text for token in tokens)
        assert "secret='" not in text
    assert repr(login) == "Login('practice', ...)"


@pytest.mark.parametrize("is_late", [False, True], ids=["in time", "too late"])
@in_loop
async def test_an_error_that_repeats_a_login_is_told_without_its_secret(
    is_late: bool, caplog: pytest.LogCaptureFixture
) -> None:
    secret = 'hush/hush-"quoted"'
    told: dict[str, Any] = {"code": 13004, "message": f"it was {secret}", "data": {"client_secret": secret}}

    def refuse(params: dict[str, Any], number: int) -> dict[str, Any]:
        if params["grant_type"] == "client_signature":
            return {"error": {"code": 13004}}
        said.append(params["client_secret"])
        return {"error": told, "id": 1} if is_late else {"error": told}

    said: list[str] = []
    settings: dict[str, Any] = {"login": Login("somebody", secret), "retry_count": 1, "timeout": 2.0}
    async with scripted("public/auth", refuse) as url, connected(url, live=False, **settings) as (client, ear):
        await wait_for(lambda: said and client.last_error and "***" in repr(client.last_error), "the error")
        assert client.last_error == told | {"message": "it was ***", "data": {"client_secret": "***"}}
        await wait_for(lambda: client.exit, "the end")
        for text in (repr(client.get_state()), caplog.text, repr(ear.states), str(client.failure)):
            assert "hush" not in text


@pytest.mark.parametrize("signed", [False, True], ids=["sent", "never sent"])
@in_loop
async def test_a_close_that_repeats_a_login_is_told_without_its_secret(signed: bool) -> None:
    def refuse(params: dict[str, Any], number: int) -> dict[str, Any]:
        assert ("client_secret" in params) is not signed
        return {"close": b"who is hunter2?"}

    settings: dict[str, Any] = {"login": Login("somebody", "hunter2", signed=signed), "retry_count": 1}
    async with scripted("public/auth", refuse) as url, connected(url, live=False, **settings) as (client, ear):
        await wait_for(lambda: ear.find("failed"), "the end")
        assert ear.find("backoff") == ["closed by the exchange: 1000 who is ***?"]
        assert client.last_error == {"message": "closed by the exchange: 1000 who is ***?"}


@in_loop
async def test_a_frame_that_spells_a_secret_in_another_way_is_not_shown() -> None:
    """The server of this test writes no letters but ASCII."""
    secret = "h\u00fcsh-0123456789"

    def refuse(params: dict[str, Any], number: int) -> dict[str, Any]:
        is_plain = params["grant_type"] == "client_credentials"
        return {"error": {"code": 13004, "message": f"it was {secret}"}, **({"id": None} if is_plain else {})}

    settings: dict[str, Any] = {"login": Login("somebody", secret), "retry_count": 1, "timeout": 2.0}
    async with scripted("public/auth", refuse) as url, connected(url, live=False, **settings) as (_, ear):
        await wait_for(lambda: ear.malformed, "the frame")
        assert ear.malformed == [
            (b"(not shown)", "an error that answers no request of ours: 13004 it was ***"),
        ]


@pytest.mark.parametrize(("token", "told"), [("hush-0123456789", "***"), ("", "")])
@in_loop
async def test_a_refused_renewal_is_told_without_its_token(token: str, told: str) -> None:
    def answer(params: dict[str, Any], number: int) -> dict[str, Any]:
        if params["grant_type"] == "refresh_token":
            return {"error": {"code": 11094, "message": f"not now: {params['refresh_token']}"}}
        return {"result": {"access_token": "a", "refresh_token": token, "expires_in": 900}}

    async with scripted("public/auth", answer) as url, connected(url, login=LOGIN) as (client, _):
        client.session._refresh_at = 0.0
        await wait_for(lambda: client.last_error, "the error")
        assert client.last_error == {"code": 11094, "message": f"not now: {told}"}


@pytest.mark.parametrize(
    ("key", "value"), [("access_token", "a"), ("refresh_token", "r"), ("client_secret", "c"), ("echo", "hunter2")]
)
@in_loop
async def test_an_answer_that_nobody_can_place_is_not_shown_where_it_may_hold_a_secret(key: str, value: str) -> None:
    def answer(params: dict[str, Any], number: int) -> dict[str, Any] | None:
        return {"id": 0, "result": {key: value}} if number == 2 else None

    login = Login("somebody", "hunter2", signed=False)
    async with scripted("public/test", answer) as url, connected(url, login=login) as (client, ear):
        for _ in range(2):
            with suppress(TimeoutError):
                await client.send("public/test", timeout=0.3)
        await wait_for(lambda: ear.malformed, "the answer")
        assert ear.malformed == [(b"(not shown)", "an answer to no request of ours")]


@in_loop
async def test_what_was_read_is_counted_on_while_there_is_no_connection_and_by_the_next(practice: str) -> None:
    async with connected(practice) as (client, ear):
        before = client.traffic.bytes_read, client.traffic.frames
        client.cut("the test wants it so")
        await wait_for(lambda: ear.find("backoff"), "the loss")
        assert (client.traffic.bytes_read, client.traffic.frames) >= before
        await wait_for(lambda: len(ear.find("live")) == 2, "the next connection")
        assert client.traffic.bytes_read > before[0]


# -- frames -----------------------------------------------------------------------------------------------------------


@in_loop
async def test_frames_that_come_with_the_answer_to_the_upgrade_are_the_first() -> None:
    """And one in fragments is as long as any may be."""
    long = b"x" * (5 << 20)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(accept_upgrade(await reader.readuntil(b"\r\n\r\n")) + b"\x81\x03one\x81\x03two")
        await is_followed.wait()
        writer.write(b"\x81\x05three\x01\x7f" + struct.pack(">Q", len(long)) + long + b"\x80\x03end")
        writer.close()

    frames: list[bytes] = []
    is_followed = asyncio.Event()
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        opened = await Socket.open(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/", {}, 10.0)
        await wait_for(lambda: opened.bytes_read == 10, "the first two")
        is_followed.set()
        with pytest.raises(Lost, match="broke off"):
            await opened.follow(frames.extend)
        await opened.close()
    assert frames == [b"one", b"two", b"three", long + b"end"]


@in_loop
async def test_fragments_are_put_together_and_keep_their_place(practice: str) -> None:
    """aiohttp joins them, and from then on hands all frames on: none is lost, doubled or overtaken at the change."""
    async with connected(practice, "fragments:1", channels=[BOOK]) as (client, ear):
        socket = client.traffic._socket
        assert socket is not None
        framing = socket._socket.tap._framing
        await ear.wait_frames([BOOK], 3)
        assert not framing.is_foreign
        await wait_for(lambda: framing.is_foreign, "the first fragment")
        await ear.wait_frames([BOOK], 10)
        books = [json.loads(frame)["params"]["data"] for frame in ear.frames if BOOK.encode() in frame[:100]]
        assert books[0]["type"] == "snapshot"
        assert all(new["prev_change_id"] == old["change_id"] for old, new in pairwise(books))
        assert client.get_state()["reconnects"] == 0
