"""Patterns as a whole program: expanded at the start, spread, and kept equal to what the exchange lists."""

import asyncio
import json
import re
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from collector.channels import LISTINGS
from collector.config import Config, load_config
from collector.planning.catalogue import Catalogue
from collector.supervisor.follower import CHECK, MARKS, MAX_ROWS, find_next_check
from collector.supervisor.supervisor import Supervisor
from tests.collected import MANY, PATIENT, QUICK, Collected, collected, give_up_unheard, held_at_start
from tests.pipeline import Subscriber, exchange, find_port, short_directory, subscribed, write_config
from tests.support import PATIENCE, collector, wait_until

OPTIONS: dict[str, Any] = {**QUICK, "channels": ["quote.{kind=option,currency=BTC}"]}
BUSY = {"faults": "listing:1,expiry:1"}
"""Every second an option is listed, and one expires."""


def find_asked(run: Collected, name: str = "a") -> set[str]:
    """The channels that a connection asks for, without those by which it hears of instruments."""
    return set(run.get_state(name)["channels"]["asked"]) - set(LISTINGS)


def find_expired(subscriber: Subscriber) -> list[str]:
    return [message["instrument"] for message in subscriber.find("deribit.quote.", type="status", state="expired")]


def test_listings_come_by_themselves_and_expired_ones_are_told_and_freed() -> None:
    with collected({"a": OPTIONS}, exchange=BUSY) as run:
        state = run.wait_state("a")
        with subscribed(state["publish"]) as subscriber:
            first = find_asked(run)
            assert len(first) > 50

            def find_new() -> list[str]:
                return [m["instrument"] for m in subscriber.find("deribit.quote.", type="quote")
                        if f"quote.{m['instrument']}" not in first]  # fmt: skip

            subscriber.listen_until(find_new, "data of an instrument that was not there at the start")
            subscriber.listen_until(lambda: find_expired(subscriber), "an instrument that expired")
        gone, new = find_expired(subscriber)[0], find_new()[0]
        assert f"quote.{gone}" in first
        wait_until(lambda: f"quote.{gone}" not in find_asked(run), "its channel to be freed")
        wait_until(lambda: f"quote.{gone}" not in run.get_state("a")["channels"]["confirmed"], "the exchange's answer")
        channels = run.get_state("a")["channels"]
        assert f"quote.{gone}" not in channels["refused"]
        assert f"quote.{new}" in channels["confirmed"]
        # It hears of instruments, but nobody asked it to publish that.
        assert not subscriber.find("deribit.instrument.")
        assert [m["type"] for m in subscriber.find(f"deribit.quote.{gone}.")][-1] == "status"


def test_what_hears_of_instruments_is_published_where_it_is_asked_for() -> None:
    channels = [*OPTIONS["channels"], "instrument.state.any.any"]
    with (
        collected({"a": {**OPTIONS, "channels": channels}}, exchange=BUSY) as run,
        subscribed(run.wait_state("a")["publish"]) as subscriber,
    ):
        assert subscriber.wait_for("deribit.instrument.", state="delivered")["epoch"]
        subscriber.listen_until(lambda: find_expired(subscriber), "an instrument that expired")


def test_what_is_listed_while_the_worker_is_away_is_found() -> None:
    with collected({"a": OPTIONS}, exchange=BUSY) as run:
        psutil.Process(run.wait_state("a")["pid"]).kill()
        before = find_asked(run)
        run.wait_state("a", restarts=1)
        wait_until(lambda: find_asked(run) - before, "a listing")
        wait_until(lambda: before - find_asked(run), "an expiry")


MUTE = ",".join(f"mute:{channel}@0" for channel in LISTINGS)
"""The exchange confirms these channels, and never says anything on them."""


@pytest.mark.parametrize(
    ("faults", "first"),
    [
        (MUTE, "from collector.supervisor import follower; follower.CHECK = 2.0"),  # else 5 minutes
        (f"{MUTE},reset:6", ""),
        (f"mute:{LISTINGS[1]}@0", ""),
    ],
    ids=["the regular look", "a look after each reconnect", "a look for what is open and was never listed"],
)
def test_what_no_event_tells_of_is_found(faults: str, first: str) -> None:
    table = {**OPTIONS, "url": f"practice?faults={faults}"}
    with collected({"a": table}, exchange={"faults": "listing:1"}, first=first) as run:
        run.wait_state("a")
        at_start = find_asked(run)
        wait_until(lambda: find_asked(run) - at_start, "what was listed before anybody listened")
        before = find_asked(run)
        wait_until(lambda: find_asked(run) - before, "a listing")
        assert (run.get_state("a")["reconnects"] > 0) is ("reset" in faults)


def test_a_look_that_has_failed_is_soon_followed_by_another() -> None:
    port = find_port()
    table = {**OPTIONS, "url": f"ws://127.0.0.1:{port}/ws/api/v2"}
    first = "from collector.supervisor import follower; follower.AGAIN = 0.1"
    with exchange(port, "--options", "100") as practice, collected({"a": table}, exchange=None, first=first) as run:
        run.wait_state("a")
        before = find_asked(run)
        practice.process.kill()
        practice.process.wait()
        # The worker asks for one look when it is back, and not for as many as fail.
        with exchange(port, "--options", "200", "--faults", "error:public/get_instruments=13028@6"):
            run.program.wait_line("a: the list of instruments is not checked: .* answered 13028", timeout=60)
            wait_until(lambda: find_asked(run) - before, "what the other exchange lists besides")


def test_what_was_refused_is_asked_for_again_as_soon_as_its_instrument_opens(tmp_path: Path) -> None:
    """As all do after the settlement at 08:00 UTC. Else it is asked for ten minutes later."""
    data = {"instrument_name": "BTC-PERPETUAL"}
    frames = [
        {"method": "subscription", "params": {"channel": LISTINGS[0], "data": {**data, "state": state}}}
        for state in ("settlement", "open")
    ]
    recording, port = tmp_path / "recording", find_port()
    recording.write_text("".join(f"{4 * place}.0: {json.dumps(frame)}\n" for place, frame in enumerate(frames)))
    url = f"ws://127.0.0.1:{port}/ws/api/v2?faults=drop_subscribe:quote.BTC-PERPETUAL@2"
    table = {**QUICK, "url": url, "channels": ["quote.BTC-PERP*"]}
    with exchange(port, "--replay", str(recording)), collected({"a": table}, exchange=None) as run:
        run.wait_state("a")
        wait_until(lambda: run.get_state("a")["channels"]["refused"], "the refusal")
        wait_until(lambda: "quote.BTC-PERPETUAL" in run.get_state("a")["channels"]["confirmed"], "the next answer")


def test_what_was_asked_for_by_name_stays_until_it_is_given_up_by_name(tmp_path: Path) -> None:
    """When its instrument leaves the pattern. The other one is in the pattern once more after it was given up."""
    coins = [(0, "SOL_USDC", "locked"), (4, "SOL_USDC", "open")]
    coins += [(8, coin, "locked") for coin in ("SOL_USDC", "BTC", "ETH")]
    recording, port = tmp_path / "recording", find_port()
    lines = []
    for at, coin, state in coins:
        row = {"instrument_name": f"{coin}-PERPETUAL", "state": state}
        frame = {"method": "subscription", "params": {"channel": LISTINGS[0], "data": row}}
        lines.append(f"{at}.0: {json.dumps(frame)}\n")
    recording.write_text("".join(lines))
    table = {**QUICK, "url": f"ws://127.0.0.1:{port}/ws/api/v2", "channels": ["quote.*-PERPETUAL{state=open}"]}
    with exchange(port, "--replay", str(recording)), collected({"a": table}, exchange=None) as run:
        run.wait_state("a")
        named, other = "quote.BTC-PERPETUAL", "quote.SOL_USDC-PERPETUAL"
        wait_until(lambda: other not in find_asked(run), "what leaves the pattern first")
        both = dict.fromkeys([named, other], True)
        assert run.ask("subscribe", connection="a", channels=list(both))["channels"] == both
        assert run.ask("unsubscribe", connection="a", channels=[other])["channels"] == {other: True}
        wait_until(lambda: "quote.ETH-PERPETUAL" not in find_asked(run), "what leaves the pattern last")
        assert named in find_asked(run)
        assert other not in find_asked(run)


def test_what_was_given_up_is_not_asked_for_again_when_its_instrument_opens(tmp_path: Path) -> None:
    rows = [{"instrument_name": "BTC-PERPETUAL", "state": "open"},
            {"instrument_name": "NEW-PERPETUAL", "state": "open", "kind": "future"}]  # fmt: skip
    frames = [{"method": "subscription", "params": {"channel": LISTINGS[0], "data": row}} for row in (*rows[:1], *rows)]
    recording, port = tmp_path / "recording", find_port()
    recording.write_text("".join(f"{at}.0: {json.dumps(frame)}\n" for at, frame in zip((0, 3, 3), frames, strict=True)))
    table = {**QUICK, "url": f"ws://127.0.0.1:{port}/ws/api/v2", "channels": ["quote.*-PERPETUAL"]}
    with exchange(port, "--replay", str(recording)), collected({"a": table}, exchange=None) as run:
        run.wait_state("a")
        assert run.ask("unsubscribe", connection="a", channels=["quote.BTC-PERPETUAL"])["channels"]

        def find_told() -> list[str]:
            channels = run.get_state("a")["channels"]
            return [*channels["confirmed"], *channels["refused"]]

        wait_until(lambda: "quote.NEW-PERPETUAL" in find_told(), "what opened after that")
        assert "quote.BTC-PERPETUAL" not in find_told()


def test_of_spot_pairs_matched_at_coinbase_patterns_ask_for_no_trades_and_who_names_these_is_told() -> None:
    patterns = ["trades.*USD*.100ms", "chart.trades.*USD*.60", "book.*_USDC.100ms", "ticker.*_USDC.100ms"]
    named = ["trades.BTC_USDC.100ms", "quote.BTC_USDC"]
    tables = {"a": {**QUICK, "channels": patterns}, "b": {**QUICK, "channels": named}}
    with collected(tables, exchange={"faults": "routed_spot"}) as run:
        run.wait_state("a")
        wait_until(lambda: set(run.get_state("a")["channels"]["confirmed"]) >= find_asked(run), "all that is asked for")
        assert run.get_state("a")["channels"]["refused"] == {}
        asked = find_asked(run)
        assert asked >= {f"{family}.{coin}_USDC.100ms" for family in ("book", "ticker") for coin in ("BTC", "ETH")}
        assert asked >= {"trades.BTC_USDC-PERPETUAL.100ms", "chart.trades.BTC_USDC-PERPETUAL.60"}
        assert not [channel for channel in asked if re.search(r"trades\.[A-Z]+_USDC\.", channel)]
        run.wait_state("b")
        wait_until(lambda: run.get_state("b")["channels"]["refused"], "the refusal")
        channels = run.get_state("b")["channels"]
        assert channels["confirmed"] == ["quote.BTC_USDC"]
        assert list(channels["refused"]) == ["trades.BTC_USDC.100ms"]
        assert "matched at Coinbase" in str(channels["refused"])


def test_the_end_of_an_instrument_goes_by_the_exchanges_clock() -> None:
    ahead = 40 * 86_400_000
    with collected({"a": OPTIONS}, exchange={"faults": f"clock:{ahead}"}) as run:
        listed = Catalogue(run.wait_state("a")["url"], {}, 5.0).read_all()
        now = time.time_ns() // 1_000_000 + ahead
        options = [each for each in listed.values() if each.kind == "option" and each.name.startswith("BTC-")]
        asked = {f"quote.{each.name}" for each in options if each.is_listed(now)}
        assert 0 < len(asked) < len(options)
        assert find_asked(run) == asked


def test_one_that_waits_for_the_list_keeps_no_other_from_asking() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}/ws/api/v2"
        patient = {**QUICK, "url": url, "channels": ["quote.*"], "timeout": 60.0}
        other = {**patient, "channels": ["book.*.100ms"], "timeout": 0.5}
        with collected({"a": patient, "b": other}, exchange=None) as run:
            silent.settimeout(20)
            with silent.accept()[0]:
                run.program.wait_line("b: patterns cannot be expanded: .* cannot be reached")
                assert not [line for line in run.program.err if " a: patterns cannot" in line]


def test_a_look_holds_no_listing_up() -> None:
    faults = {"faults": "listing:0.5,slow:public/get_instruments=4"}
    with collected({"a": OPTIONS}, exchange=faults) as run:
        port = urlsplit(run.wait_state("a")["url"]).port
        supervisor = psutil.Process(run.program.pid)

        def find_looks() -> set[int]:
            ends = supervisor.net_connections("tcp")
            return {each.laddr.port for each in ends if each.raddr and each.raddr.port == port}

        (look,) = wait_until(find_looks, "the look after the start")
        before = find_asked(run)
        wait_until(lambda: find_asked(run) - before, "a listing")
        assert look in find_looks()


def test_what_happens_during_a_look_is_looked_at_again() -> None:
    table = {**OPTIONS, "url": f"practice?faults={MUTE}"}
    with collected({"a": table}, exchange={"faults": "listing:1,slow:public/get_instruments=4"}) as run:
        port = urlsplit(run.wait_state("a")["url"]).port
        supervisor = psutil.Process(run.program.pid)

        def is_looking() -> bool:
            return any(each.raddr and each.raddr.port == port for each in supervisor.net_connections("tcp"))

        wait_until(is_looking, "the look after the start")
        psutil.Process(run.get_state("a")["pid"]).kill()
        run.wait_state("a", restarts=1)  # it listens anew: what was listed meanwhile, it cannot have heard
        wait_until(lambda: LISTINGS[0] in run.get_state("a")["channels"]["confirmed"], "the listening")
        assert is_looking()
        at_start = find_asked(run)
        wait_until(lambda: find_asked(run) - at_start, "what that look has found")
        before = find_asked(run)
        wait_until(lambda: find_asked(run) - before, "what has been listed since")


def test_what_is_listed_and_expires_while_the_worker_starts_reaches_it() -> None:
    table = {**OPTIONS, "channels": [*OPTIONS["channels"], *MANY[:300]]}  # one connection carries no more
    first = "from collector.supervisor import follower; follower.CHECK = 1.0"  # no worker tells of it
    with collected({"a": table}, exchange=BUSY, first=first) as run:
        catalogue = Catalogue(run.wait_state("a")["url"], {}, 5.0)
        with held_at_start(run, "a"):
            before = find_asked(run)
            new = wait_until(lambda: find_asked(run) - before, "a listing")
            gone = wait_until(lambda: before - find_asked(run), "an expiry")

        def is_told() -> bool:
            still = new & {f"quote.{name}" for name in catalogue.read_all()}
            channels = run.get_state("a")["channels"]
            return bool(still <= set(channels["confirmed"]) and gone.isdisjoint(channels["asked"]))

        wait_until(is_told, f"{new} and not {gone}")


def test_what_expires_while_the_worker_is_away_is_told_when_it_is_back() -> None:
    with collected({"a": OPTIONS}, exchange={"faults": "expiry:1"}) as run:
        state = run.wait_state("a")
        before = find_asked(run)
        worker = psutil.Process(state["pid"])
        worker.suspend()  # it is killed after four seconds, in which some expire
        with subscribed(state["publish"]) as subscriber:
            catalogue = Catalogue(state["url"], {}, 5.0)
            there = before & {f"quote.{name}" for name in catalogue.read_all()}
            run.program.wait_line(r"a: pid \d+ gave no sign of life")
            gone = there - {f"quote.{name}" for name in catalogue.read_all()}
            assert gone
            subscriber.listen_until(lambda: gone <= {f"quote.{name}" for name in find_expired(subscriber)}, "all ends")
            assert not gone & find_asked(run)


def with_exchange(act: Callable[[Catalogue, dict[str, Any]], None], *options: str) -> None:
    """Act on an exchange of its own: its catalogue, and a table that names it."""
    port = find_port()
    with exchange(port, *options):
        url = f"ws://127.0.0.1:{port}/ws/api/v2"
        act(Catalogue(url, {}, 5.0), {**QUICK, "url": url})


def test_more_than_one_connection_carries_is_spread_as_planned() -> None:
    def act(catalogue: Catalogue, table: dict[str, Any]) -> None:
        port = find_port()
        many = {**table, "channels": ["ticker.*.agg2", "book.{kind=option}.agg2"], "publish": f"tcp://127.0.0.1:{port}"}
        with collected({"options": many}, exchange=None) as run:
            run.program.wait_line("options: spread over options-1, options-2, options-3")
            states = {name: run.wait_state(name) for name in ("options-1", "options-2", "options-3")}
            planned = json.loads(subprocess.check_output(collector("plan", "--json", str(run.config))))
            assert run.ask("get_state").keys() == states.keys() == {each["name"] for each in planned["connections"]}
            for each in planned["connections"]:
                assert find_asked(run, each["name"]) == set(each["channels"])
                assert states[each["name"]]["publish"] == each["publish"]
            asked = [channel for name in states for channel in find_asked(run, name)]
            assert len(asked) == len(set(asked))
            listed = catalogue.read_all()
            assert set(asked) == {f"ticker.{name}.agg2" for name in listed} | {
                f"book.{name}.agg2" for name, each in listed.items() if each.kind == "option"
            }
            assert run.stop() == 0
            assert "has ended for good" not in run.program.text()
            run.wait_gone()
            assert [path.name for path in run.runtime_dir.iterdir()] == ["lock"]

    with_exchange(act, "--options", "500")


def test_a_new_listing_goes_to_one_of_the_shards_and_the_others_stay() -> None:
    def act(catalogue: Catalogue, table: dict[str, Any]) -> None:
        beside = "deribit_price_index.btc_usd"
        table["channels"] = ["quote.*", "book.*.agg2", "ticker.*.agg2", beside]
        with collected({"options": table}, exchange=None) as run:
            run.program.wait_line("options: spread over options-1, options-2$")
            shards = ("options-1", "options-2")
            for name in shards:
                run.wait_state(name)
            before = {name: find_asked(run, name) for name in shards}
            (other,) = (name for name in shards if beside not in before[name])
            run.ask("unsubscribe", connection=other, channels=[beside])  # it is not this one's to give up

            def find_new() -> dict[str, set[str]]:
                new = {name: find_asked(run, name) - before[name] for name in shards}
                return {name: channels for name, channels in new.items() if channels}

            places: dict[str, set[str]] = wait_until(find_new, "a listing")
            for channels in places.values():  # the three channels of an instrument stand together
                names = {channel.split(".")[1] for channel in channels}
                assert channels == {f"{form}.{name}{tail}" for name in names for form, tail in (
                    ("quote", ""), ("book", ".agg2"), ("ticker", ".agg2"))}  # fmt: skip
            assert all(before[name] <= find_asked(run, name) for name in shards)

    with_exchange(act, "--options", "200", "--faults", "listing:2")


@pytest.mark.parametrize("end", ["closed", "failed"])
def test_a_shard_that_has_ended_for_good_gets_no_new_listing(end: str) -> None:
    def act(catalogue: Catalogue, table: dict[str, Any]) -> None:
        table["channels"] = ["quote.*", "book.*.agg2", "ticker.*.agg2"]
        table["publish"] = f"tcp://127.0.0.1:{find_port()}"
        with socket.socket() as taken:
            if end == "failed":  # it cannot publish, at the very first
                taken.bind(("127.0.0.1", int(table["publish"].rpartition(":")[2])))
                taken.listen()
            with collected({"options": table}, exchange=None) as run:
                check(catalogue, run)

    def check(catalogue: Catalogue, run: Collected) -> None:
        run.program.wait_line("options: spread over options-1, options-2$")
        run.wait_state("options-2")
        if end == "closed":
            run.wait_state("options-1")
            assert "has ended for good" not in run.program.text()
            run.ask("close", connection="options-1")
        run.program.wait_line(
            rf"options: options-1 has ended for good \({end}\), and its \d+ channels with it; "
            "new instruments go to options-2"
        )
        before = set(catalogue.read_all())
        new = wait_until(lambda: n if len(n := set(catalogue.read_all()) - before) >= 6 else None, "listings")
        wait_until(lambda: {f"quote.{name}" for name in new} <= find_asked(run, "options-2"), f"{new}")
        assert "is not asked for" not in run.program.text()

    with_exchange(act, "--options", "200", "--faults", "listing:0.5")


def test_a_shard_that_is_stuck_keeps_no_listing_from_another() -> None:
    def act(catalogue: Catalogue, table: dict[str, Any]) -> None:
        table["channels"] = ["quote.*", "book.*.agg2", "ticker.*.agg2"]
        with collected({"options": table}, exchange=None, first=PATIENT) as run:
            run.program.wait_line("options: spread over options-1, options-2$")
            stuck = psutil.Process(run.wait_state("options-1")["pid"])
            run.wait_state("options-2")
            asked = find_asked(run, "options-1")
            stuck.suspend()

            def is_told() -> bool:
                found = [re.search(r"options: .* expired: (\S+) \.\.\.", line) for line in list(run.program.err)]
                return any(match[1] in asked for match in found if match)

            wait_until(is_told, "an end of which the stuck worker must hear")
            known = {f"quote.{name}" for name in catalogue.read_all()}

            def find_new() -> list[str]:
                confirmed = run.get_state("options-2")["channels"]["confirmed"]
                return [name for name in confirmed if name.startswith("quote.") and name not in known]

            wait_until(find_new, "a listing on the other one")
            assert stuck.status() == psutil.STATUS_STOPPED
            stuck.resume()

    with_exchange(act, "--options", "200", "--faults", "listing:1,expiry:1")


@pytest.mark.parametrize("how", ["unsubscribe", "unsubscribe unheard", "close"])
def test_what_was_left_to_another_connection_is_taken_up_when_that_gives_it_up(how: str) -> None:
    def act(catalogue: Catalogue, table: dict[str, Any]) -> None:
        listed = {name for name in catalogue.read_all() if name.startswith("BTC-") and name.endswith("-C")}
        series = {name.rsplit("-", 2)[0] for name in listed}
        coming = {f"{each}-{strike}-C" for each in series for strike in range(80_000, 105_000, 1000)} - listed
        tables = {"a": {**table, "channels": OPTIONS["channels"]}, "b": {**table, "channels": []}}
        with collected(tables, exchange=None, first=PATIENT) as run:
            for name in tables:
                run.wait_state(name)
            run.ask("subscribe", connection="b", channels=[f"quote.{name}" for name in coming])  # but what a has by now
            left = run.program.wait_line(r"a: 1 channel not asked for now: b feeds the same topics: (quote\.\S+)$")[1]
            assert left not in find_asked(run)
            if how == "close":
                run.ask("close", connection="b")
            elif how == "unsubscribe unheard":
                give_up_unheard(run, "b", left).resume()
            else:
                run.ask("unsubscribe", connection="b", channels=[left])
            wait_until(lambda: left in run.get_state("a")["channels"]["confirmed"], f"{left} on a")
            assert len([line for line in run.program.err if line.endswith(f": b feeds the same topics: {left}")]) == 1

    with_exchange(act, "--faults", "listing:2")


def test_an_exchange_that_is_not_there_is_waited_for() -> None:
    port = find_port()
    table = {**QUICK, "url": f"ws://127.0.0.1:{port}/ws/api/v2", "channels": ["quote.*-PERPETUAL"], "retry_count": 1000}
    with collected({"a": table}, exchange=None, log_level="info") as run:
        run.program.wait_line(
            rf"a: patterns cannot be expanded: 127\.0\.0\.1:{port} cannot be reached .*; asked again in [\d.]+ s"
        )
        state = run.wait_state("a", "starting")
        assert str(port) in state["last_error"]["message"]
        with exchange(port):
            assert run.wait_state("a")["last_error"] is None
            assert "quote.BTC-PERPETUAL" in find_asked(run)


def test_a_list_that_is_refused_for_a_while_is_asked_for_again() -> None:
    faults = {"faults": "error:public/get_instruments=13028@3"}
    with collected({"a": {**OPTIONS, "retry_count": 2}}, exchange=faults) as run:
        run.wait_state("a")
        assert len([line for line in run.program.err if "patterns cannot be expanded" in line]) == 3
        run.program.wait_line(r"patterns cannot be expanded: 127.0.0.1:\d+ answered 13028 .*; asked again in")


def test_it_is_given_up_like_a_connection_that_was_never_live() -> None:
    table = {
        **QUICK,
        "url": "ws://127.0.0.1:9/ws/api/v2",
        "channels": ["quote.*"],
        "retry_count": 1,
        "retry_delay": 0.01,
    }
    with collected({"a": table}, exchange=None) as run:
        assert run.program.wait_exit() == 1, run.program.text()
        again = [line for line in run.program.err if "patterns cannot be expanded" in line]
        assert len(again) == 5  # of six attempts the last is followed by none
        assert all("asked again in" in line for line in again)
        run.program.wait_line(r"a: .* could not be had: 127\.0\.0\.1:9 cannot be reached .*: not started")


@pytest.mark.parametrize(
    ("patterns", "names"), [(["quote.*"], ["a"]), (["quote.*", "book.*.agg2", "ticker.*.agg2"], ["a-1", "a-2"])]
)
def test_what_is_wished_before_the_list_has_come_holds(patterns: list[str], names: list[str]) -> None:
    port = find_port()
    index, added, found = "deribit_price_index.btc_usd", "trades.option.any.100ms", "quote.BTC-PERPETUAL"
    beside = "deribit_price_index.eth_usd"  # in the file, of no pattern
    channels = [*patterns, index, beside]
    table = {**QUICK, "url": f"ws://127.0.0.1:{port}/ws/api/v2", "channels": channels, "retry_count": 1000}
    with collected({"a": table}, exchange=None) as run:
        run.wait_state("a", "starting")
        told = run.ask("subscribe", connection="a", channels=[added])["channels"]
        assert told[added]["code"] == "not_connected"
        told = run.ask("unsubscribe", connection="a", channels=[index, found])["channels"]
        assert told == {index: True, found: True}
        with exchange(port, "--options", "200"):
            run.program.wait_line(rf"{names[0]}: ready")
            for name in names:
                run.wait_state(name)
            asked = set().union(*(find_asked(run, name) for name in names))
    assert {"quote.ETH-PERPETUAL", beside, added} <= asked
    assert not {index, found} & asked


def test_a_pattern_that_meets_what_was_wished_before_the_list_came_is_told() -> None:
    port = find_port()
    url = f"ws://127.0.0.1:{port}/ws/api/v2"
    table = {**QUICK, "url": url, "channels": ["trades.{kind=option}.100ms"], "retry_count": 1000}
    with collected({"a": table, "b": {**QUICK, "channels": []}}) as run:
        run.wait_state("a", "starting")
        run.ask("subscribe", connection="a", channels=["trades.option.any.100ms"])
        with exchange(port):
            words = run.wait_state("a", "failed")["last_error"]["message"]
            assert "would feed the same topics as trades.option.any.100ms; write one of them" in words


def test_one_of_the_file_that_was_given_up_is_connected_again_also_if_it_needs_several() -> None:
    port = find_port()
    table = {
        **QUICK,
        "url": f"ws://127.0.0.1:{port}/ws/api/v2",
        "channels": ["quote.*", "book.*.agg2", "ticker.*.agg2"],
        "retry_count": 1,
        "retry_delay": 0.01,
    }
    with collected({"a": {**QUICK, "channels": []}, "options": table}) as run:
        run.wait_state("options", "failed")
        table["name"] = "options"
        assert "could not be had" in str(run.refuse("connect", connection=table))
        assert run.get_state("options")["state"] == "failed"
        with exchange(port, "--options", "200"):
            answer = run.refuse("connect", connection=table, deadline=time.time_ns() + 10_000_000_000)
            assert "options is spread over options-1, options-2" in answer.message
            assert run.ask("get_state").keys() == {"a", "options-1", "options-2"}
            run.wait_state("options-2")
            refused = run.refuse("connect", connection={**QUICK, "name": "other", "channels": ["quote.*"]})
            assert "channels: quote.* stands in connection options-2 too; write it once" in refused.message
            # The same where it is to be connected anew: once all of them are closed.
            run.ask("close", connection="options-1")
            refused = run.refuse("connect", connection=table)
            assert (refused.code, refused.message) == ("exists", "options runs as options-2; close these first")
            run.ask("close", connection="options-2")
            answer = run.refuse("connect", connection=table, deadline=time.time_ns() + 10_000_000_000)
            assert "options is spread over options-1, options-2" in answer.message


def test_it_can_be_closed_and_stopped_while_it_waits() -> None:
    table = {**QUICK, "url": "ws://127.0.0.1:9/ws/api/v2", "channels": ["quote.*"], "retry_count": 1000}
    with collected({"a": table, "b": {**table, "channels": ["book.*.100ms"]}}, exchange=None) as run:
        run.wait_state("a", "starting")
        assert run.ask("close", connection="a")["state"] == "closed"
        assert run.ask("get_state").keys() == {"b"}

        def count_attempts(name: str) -> int:
            return sum(f" {name}: patterns cannot be expanded" in line for line in list(run.program.err))

        before = {name: count_attempts(name) for name in "ab"}
        wait_until(lambda: count_attempts("b") >= before["b"] + 2, "two attempts of the other")
        assert count_attempts("a") == before["a"]
        assert run.stop() == 0


def test_one_that_is_closed_just_as_the_list_comes_starts_nothing() -> None:
    async def check(config: Config) -> None:
        supervisor = Supervisor(config, "info", time.time_ns)
        (connection,) = config.connections
        catalogue = supervisor.find_catalogue(connection)

        async def close() -> None:
            await catalogue.share()
            entry.keeper.stop()

        closing = asyncio.create_task(close())
        await asyncio.sleep(0)  # it asks first, and so goes on first
        entry = supervisor.start_connection(connection, from_file=True)
        await closing
        await entry.keeping
        assert not supervisor.entries

    def act(catalogue: Catalogue, table: dict[str, Any]) -> None:
        table["channels"] = ["quote.*", "book.*.agg2", "ticker.*.agg2"]
        with short_directory() as directory:
            asyncio.run(check(load_config(write_config(directory, {"options": table}), {})))

    with_exchange(act, "--options", "200")


def test_where_more_is_told_than_can_be_kept_the_whole_list_is_asked_for() -> None:
    async def check(config: Config) -> None:
        supervisor = Supervisor(config, "info", time.time_ns)
        follower = supervisor.start_connection(config.connections[0], from_file=True).follower
        assert follower is not None
        row = {"instrument_name": "BTC-25DEC26-90000-C", "state": "open"}
        for _ in range(MAX_ROWS):
            follower.take_event({"event": "instrument", "row": row})
        assert not follower._outdated.is_set()
        follower.take_event({"event": "instrument", "row": row})
        assert follower._outdated.is_set()
        assert len(follower._rows) == MAX_ROWS

    table = {**QUICK, "url": "ws://127.0.0.1:9/ws/api/v2", "channels": ["quote.*"]}
    with short_directory() as directory:
        asyncio.run(check(load_config(write_config(directory, {"a": table}), {})))


def test_what_leaves_a_pattern_by_the_time_is_let_go_also_where_the_list_cannot_be_had() -> None:
    """Where nothing is told either: only the clock moves then."""

    async def check(config: Config, stop: Callable[[], None]) -> None:
        supervisor = Supervisor(config, "info", time.time_ns)
        running = asyncio.create_task(supervisor.run())
        async with asyncio.timeout(20):
            while "a" not in supervisor.entries or not (entry := supervisor.entries["a"]).channels:
                await asyncio.sleep(0.05)
        stop()
        supervisor.find_catalogue(entry.connection)._offset += 400 * 86_400
        assert entry.follower is not None
        assert not await entry.follower._check()
        async with asyncio.timeout(20):
            while entry.channels:
                await asyncio.sleep(0.05)
        supervisor.end(0)
        await running

    table = {**QUICK, "channels": ["quote.{kind=option,expiry<365d}"], "retry_count": 1000}
    with short_directory() as directory, ExitStack() as stack:
        stack.enter_context(exchange(port := find_port(), "--options", "100"))
        table["url"] = f"ws://127.0.0.1:{port}/ws/api/v2"
        (directory / "run").mkdir(mode=0o700)
        asyncio.run(check(load_config(write_config(directory, {"a": table}), {}), stack.close))


def test_of_patterns_that_meet_the_first_has_what_both_stand_for_and_the_other_the_rest() -> None:
    """As with what is listed later; and where one ends, the other takes it up."""
    tables = {"a": OPTIONS, "b": {**QUICK, "channels": ["quote.BTC-*", "trades.BTC-*.100ms"]},
              "c": {**QUICK, "channels": ["trades.option.BTC.100ms"]}}  # fmt: skip
    with collected(tables) as run:
        for name in tables:
            run.wait_state(name)
        both = find_asked(run)
        assert len(both) > 50
        rest = find_asked(run, "b")
        assert {"quote.BTC-PERPETUAL", "trades.BTC-PERPETUAL.100ms"} <= rest
        assert not [name for name in rest if name.endswith(("-C", "-P", "-C.100ms", "-P.100ms"))]
        run.program.wait_line(r"b: \d+ channels not asked for now: [ac] feeds the same topics: ")
        left = run.get_state("b")["left_to"]
        assert (left.keys(), left["a"], run.get_state("a")["left_to"]) == ({"a", "c"}, len(both), {})
        assert run.get_state("c")["left_to"] == {}
        state = run.ask("connect", connection={**QUICK, "name": "d", "channels": ["quote.BTC-*{kind=option}"]})
        assert (state["state"], state["left_to"], find_asked(run, "d")) == ("live", {"a": len(both)}, set())
        assert run.ask("close", connection="d")["left_to"] == {"a": len(both)}
        run.ask("close", connection="a")
        wait_until(lambda: both < set(run.get_state("b")["channels"]["confirmed"]), "what the first had")


def test_that_a_connection_takes_up_more_than_it_should_carry_is_told() -> None:
    def act(catalogue: Catalogue, table: dict[str, Any]) -> None:
        tables = {"a": {**table, "channels": ["quote.{kind=option}"]},
                  "b": {**table, "channels": ["quote.*", "ticker.*.agg2"]}}  # fmt: skip
        with collected(tables, exchange=None) as run:
            for name in tables:
                run.wait_state(name)
            count = len(find_asked(run) | find_asked(run, "b"))
            assert len(find_asked(run, "b")) < 500 < count
            assert "should carry" not in run.program.text()
            run.ask("close", connection="a")
            run.program.wait_line(
                f"WARNING .* b: {count} channels on 1 connection, more than these should carry: "
                "the next start spreads them over 2$"
            )
            wait_until(lambda: len(run.get_state("b")["channels"]["confirmed"]) >= count, "what the first had")

    with_exchange(act, "--options", "300")


def test_who_follows_one_that_was_closed_ends_with_it() -> None:
    """Else it asks for the list once more, some minutes later."""

    async def check(config: Config) -> None:
        supervisor = Supervisor(config, "info", time.time_ns)
        running = asyncio.create_task(supervisor.run())
        async with asyncio.timeout(PATIENCE):
            while "a" not in supervisor.entries or not (entry := supervisor.entries["a"]).channels:
                await asyncio.sleep(0.05)
            before = set(supervisor._guarded)
            entry.keeper.stop()
            await entry.keeping
            while len(before & supervisor._guarded) > 1:  # the watch over all goes on
                await asyncio.sleep(0.05)
        supervisor.end(0)
        await running

    table = {**QUICK, "channels": ["quote.BTC-*"]}
    with short_directory() as directory, exchange(port := find_port()):
        table["url"] = f"ws://127.0.0.1:{port}/ws/api/v2"
        (directory / "run").mkdir(mode=0o700)
        asyncio.run(check(load_config(write_config(directory, {"a": table}), {})))


@pytest.mark.parametrize(("op", "arguments"), [("close", {}), ("unsubscribe", {"channels": ["quote.BTC-PERPETUAL"]})])
def test_what_another_connection_names_is_left_to_it_from_the_start(op: str, arguments: dict[str, Any]) -> None:
    """As it is where its instrument is listed later."""
    named, other = "quote.BTC-PERPETUAL", "trades.BTC-PERPETUAL.100ms"
    channels = {"a": ["quote.BTC-*", "trades.BTC-*.100ms"], "b": [named, other, "ticker.*PERPETUAL.100ms"]}
    with collected({name: {**QUICK, "channels": each} for name, each in channels.items()}) as run:
        for name in "ab":
            run.wait_state(name)
        run.program.wait_line(rf"a: 2 channels not asked for now: b feeds the same topics: {named} {other}$")
        assert len(find_asked(run)) > 50
        assert named not in find_asked(run)
        run.ask(op, connection="b", **arguments)
        wait_until(lambda: named in run.get_state("a")["channels"]["confirmed"], f"{named} on a")


@pytest.mark.parametrize("is_held", [False, True])
def test_what_is_named_goes_back_from_a_pattern_when_its_connection_is_connected_again(is_held: bool) -> None:
    """And no topic is fed by both: it starts when the worker that lets go has heard it."""
    named = ["quote.BTC-PERPETUAL", "quote.ETH-PERPETUAL"]
    tables = {"a": {**QUICK, "channels": ["quote.*-PERPETUAL"]}, "b": {**QUICK, "channels": named}}
    with collected(tables, first=PATIENT) as run:
        states = {name: run.wait_state(name) for name in tables}
        assert run.ask("close", connection="b")["state"] == "closed"
        wait_until(lambda: set(named) <= set(run.get_state("a")["channels"]["confirmed"]), "what the pattern takes up")
        with subscribed(*(state["publish"] for state in states.values())) as subscriber:
            subscriber.wait_for("deribit.quote.BTC-PERPETUAL.", type="quote")
            worker, table = psutil.Process(states["a"]["pid"]), {**tables["b"], "name": "b"}
            if is_held:
                worker.suspend()
                soon = time.time_ns() + 1_000_000_000
                assert run.refuse("connect", connection=table, deadline=soon).code == "timeout"
                assert run.get_state("b")["pid"] is None
                assert run.ask("close", connection="b")["state"] == "closed"
                assert run.refuse("connect", connection=table, deadline=time.time_ns() + 300_000_000).code == "timeout"
                worker.resume()
                run.wait_state("b")
            else:
                assert run.ask("connect", connection=table)["state"] == "live"
            assert find_asked(run, "b") == set(named)
            assert not find_asked(run) & set(named)
            run.program.wait_line("a: 2 channels left to who names them")
            run.program.wait_line(r"a: 2 channels not asked for now: b feeds the same topics: ")
            epoch, topic = run.get_state("b")["epoch"], "deribit.quote.BTC-PERPETUAL."
            last = subscriber.wait_for(topic, state="closed", connection="a")
            first = subscriber.wait_for(topic, epoch=epoch)
            assert last["receive_ts"] < first["receive_ts"]
            assert not [each for each in subscriber.find(topic, type="quote", epoch=last["epoch"])
                        if each["receive_ts"] > last["receive_ts"]]  # fmt: skip
        run.ask("close", connection="b")
        wait_until(lambda: set(named) <= set(run.get_state("a")["channels"]["confirmed"]), "what it gives up once more")


def test_no_pattern_matches_yet_and_the_connection_waits_for_a_listing() -> None:
    table = {**QUICK, "channels": ["quote.{kind=option,expiry>9999d}"]}
    with collected({"a": table}, log_level="info") as run:
        run.program.wait_line(r"WARNING .*quote\.\{kind=option,expiry>9999d\}: 0 channels$")
        assert find_asked(run) == set()
        run.wait_state("a")


def test_connect_takes_patterns_that_one_connection_carries() -> None:
    with collected({"a": QUICK}) as run:
        run.wait_state("a")
        state = run.ask("connect", connection={**OPTIONS, "name": "b"})
        assert state["state"] == "live"
        assert len(find_asked(run, "b")) > 50
        everything = [f"{form}.{tail}" for form in ("book.*", "ticker.*", "trades.*") for tail in ("100ms", "agg2")]
        refused = run.refuse("connect", connection={**QUICK, "name": "c", "channels": everything})
        assert refused.code == "bad_request"
        assert re.search(r"^c: cannot run as configured: .* must stand in the file", refused.message)
        assert run.ask("get_state").keys() == {"a", "b"}


def test_what_hears_of_instruments_is_not_given_up() -> None:
    with collected({"a": OPTIONS}) as run:
        run.wait_state("a")
        answer = run.ask("unsubscribe", connection="a", channels=list(LISTINGS))["channels"]
        assert [answer[name]["message"] for name in LISTINGS] == ["the patterns of this connection need it"] * 2
        assert set(LISTINGS) <= set(run.get_state("a")["channels"]["confirmed"])


def at(hour: int, minute: int, second: float = 0.0) -> float:
    return datetime(2026, 11, 20, hour, minute, tzinfo=UTC).timestamp() + second


@pytest.mark.parametrize(
    ("now", "seconds"),
    [
        (at(12, 0), CHECK),
        (at(7, 55, 6), 299.0),
        (at(7, 59, 59), 1 + MARKS[0]),
        (at(8, 0), MARKS[0]),
        (at(8, 0, 5), MARKS[1] - 5),
        (at(8, 1, 6), MARKS[2] - 66),
        (at(8, 2, 30), CHECK),
    ],
)
def test_the_list_is_looked_at_after_eight(now: float, seconds: float) -> None:
    assert find_next_check(now) == pytest.approx(seconds)
