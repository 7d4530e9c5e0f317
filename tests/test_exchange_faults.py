"""Each fault of the practice exchange does what its row in the table says, and leaves other connections alone."""

import asyncio
import json
import re
import struct
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest

from collector.faults import CONNECTION_FAULTS, EXCHANGE_FAULTS, parse_faults
from tests.exchange_client import KEYS, Client, Line, apply_book, connect, exchange, get
from tests.support import collector, in_loop, running, wait_until
from workers.exchange.channels.account import Account
from workers.exchange.channels.hub import Frame, Hub
from workers.exchange.exchange import Exchange, Settings
from workers.exchange.market.market import Market
from workers.exchange.protocol.connection import Connection
from workers.exchange.protocol.distort import Distortion

BOOK = "book.BTC-PERPETUAL.100ms"


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("oracle") / "oracle.jsonl"


@pytest.fixture(scope="module")
def url(oracle: Path) -> Iterator[str]:
    with exchange("--rate", "1500", "--oracle", str(oracle)) as (address, _):
        yield address


def read_oracle(path: Path, **wanted: Any) -> list[dict[str, Any]]:
    """What the exchange did, of the trades only if they are wanted: they are most of it."""
    trades = wanted["event"] == "trade"
    text = path.read_text().rpartition("\n")[0]  # the last line may be half written
    lines = [json.loads(line) for line in text.splitlines() if ('"event":"trade"' in line) == trades]
    return [line for line in lines if all(line.get(key) == value for key, value in wanted.items())]


def find_connection(path: Path, faults: str) -> int | None:
    """The number of the newest connection that has named these faults."""
    return next((line["connection"] for line in read_oracle(path, event="opened", faults=faults)[::-1]), None)


def find_breaks(frames: list[dict[str, Any]]) -> list[int]:
    """Places where the chain of a book's frames breaks."""
    pairs = enumerate(pairwise(frames), 1)
    return [
        place for place, (a, b) in pairs if b["type"] == "change" and b["prev_change_id"] != a["change_id"]
    ]  # fmt: skip


def test_the_table_is_printed_and_every_default_can_be_read() -> None:
    with running(*collector("exchange", "--list-faults")) as program:
        assert program.wait_exit() == 0
        for fault in (*CONNECTION_FAULTS, *EXCHANGE_FAULTS):
            assert fault.name in program.text()
            assert fault.meaning in program.text()
            if fault.default is not None:
                assert fault.name in parse_faults(fault.name, "exchange")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nope", "no fault 'nope'"), ("reset:soon", "does not have the form reset:SECONDS"),
        ("first", "the form first:N"),
        ("error:public/auth", "the form error:METHOD=CODE@TIMES"), ("ban:1@2", "the form ban:CODE"),
        ("429:5", "takes no argument"), ("listing:5", "is for the whole exchange"),
        ("gap:nan", "'gap': nan is out of range; write 0 to 1000000000"), ("flood:inf", "'flood': inf is out of"),
        ("reset:-1", "-1 is out of range"), ("error:*=1e400", "inf is out of"), ("close:99999@1", "write 0 to 4999"),
        ("refuse:99", "write 200 to 599"), ("gap:5@nan", "the form gap:RATE@TIMES"), ("lag:8@-1", "the form lag:"),
    ],
)  # fmt: skip
def test_faults_that_cannot_be_read_are_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(ValueError, match="fault") as refused:
        parse_faults(text)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@in_loop
async def test_a_refusal_is_late_too(url: str) -> None:
    began = time.monotonic()
    with pytest.raises(aiohttp.WSServerHandshakeError, match="503"):
        async with connect(url, "slow_open:0.5,refuse"):
            pass
    assert time.monotonic() - began >= 0.5


@in_loop
async def test_first_and_skip_say_which_connections_have_the_faults(url: str) -> None:
    for faults, wanted in (("refuse:418,first:2", [418, 418, 0, 0]), ("refuse:418,skip:1,first:1", [0, 418, 0, 0])):
        seen = []
        for _ in wanted:
            try:
                async with connect(url, faults) as client:
                    await client.ask("public/test")
                    seen.append(0)
            except aiohttp.WSServerHandshakeError as error:
                seen.append(error.status)
        assert seen == wanted


@in_loop
async def test_first_does_not_count_who_was_one_too_many() -> None:
    with exchange("--faults", "connections:1") as (url, _):

        async def find_status() -> int:
            with pytest.raises(aiohttp.WSServerHandshakeError) as error:
                async with connect(url, "refuse:418,first:1"):
                    pass
            return error.value.status

        async with connect(url):
            assert await find_status() == 429
        assert await find_status() == 418


@in_loop
async def test_a_connection_ends_and_leaves_others_alone(url: str) -> None:
    async with connect(url, "close:4001@0.2") as client, connect(url) as other:
        await other.subscribe(BOOK)
        await client.wait(lambda: client.closed, "the end")
        assert client.closed is not None
        assert client.closed[0] == 4001
        await other.wait_data(BOOK, len(other.data(BOOK)) + 1)


async def open_raw(url: str, faults: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A TCP connection that has asked to become a WebSocket."""
    host, port = url.split("/")[2].split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1000)
    writer.write(
        f"GET /ws/api/v2?faults={faults} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
    )
    return reader, writer


@in_loop
async def test_a_reset_is_a_reset(url: str) -> None:
    reader, writer = await open_raw(url, "reset:0.1")
    await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 10)
    writer.close()


@in_loop
async def test_a_client_has_a_second_to_answer_a_close_frame(url: str) -> None:
    """Ended at once, with what the client still sends unread, it would be a reset, which can cost the last answers."""
    began = time.monotonic()
    reader, writer = await open_raw(url, "close:4001@0.2")
    await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    reason = b"closed on request"
    said = struct.pack("!BBH", 0x88, 2 + len(reason), 4001) + reason
    assert await asyncio.wait_for(reader.read(), 10) == said
    assert time.monotonic() - began >= 1.2
    writer.close()


@in_loop
async def test_a_half_open_socket_says_nothing_at_all_but_stays(url: str, oracle: Path) -> None:
    async with connect(url) as other, connect(url, "half_open:1.5", autoping=False) as client:
        await client.subscribe(BOOK)
        await other.subscribe(BOOK)
        await client.wait_data(BOOK, 2)
        begun = {"event": "silent", "connection": find_connection(oracle, "half_open:1.5")}
        await other.wait(lambda: read_oracle(oracle, **begun), "the silence to begin")
        await other.wait_data(BOOK, len(other.data(BOOK)) + 2)  # what was sent before the silence has come too
        count, theirs = len(client.texts), len(other.data(BOOK))
        await client.send('{"jsonrpc":"2.0","id":50,"method":"public/test"}')
        await client.socket.ping()
        await other.wait_data(BOOK, theirs + 5)
        assert len(client.texts) == count
        assert client.closed is None  # nor has a pong ended its reading


@in_loop
async def test_mute_stops_data_but_not_answers(url: str) -> None:
    async with connect(url, f"mute:{BOOK}@0,heartbeat_floor:0.3") as client:
        await client.ask("public/subscribe", channels=[BOOK, "quote.BTC-PERPETUAL"])
        await client.ask("public/set_heartbeat", interval=0.4)
        await client.wait_data("quote.BTC-PERPETUAL", 10)
        await client.wait(lambda: any("test_request" in text for text in client.texts), "a test_request")
        assert "result" in await client.ask("public/test")
        assert client.data(BOOK) == []


def check_same_order(late: list[dict[str, Any]], true: list[dict[str, Any]]) -> None:
    """One connection has the very frames of another, with none left out; it began somewhere among them."""
    ids, all_ids = [frame["change_id"] for frame in late], [frame["change_id"] for frame in true]
    start = all_ids.index(ids[0])
    assert ids == all_ids[start : start + len(ids)]


@in_loop
async def test_lag_makes_data_late_and_nothing_else(url: str) -> None:
    async with (
        connect(url) as true,
        connect(url, "lag:1@0") as late,
        connect(url, "lag:1000@0,heartbeat_floor:0.1") as never,
    ):
        for client in (true, late, never):
            await client.subscribe(BOOK)
        await true.wait_data(BOOK, 5)
        assert abs((await never.ask("public/get_time"))["result"] / 1000 - time.time()) < 60
        assert never.data(BOOK) == []
        await never.ask("public/set_heartbeat", interval=0.1)
        await never.wait(lambda: any("test_request" in text for text in never.texts), "a test_request")
        frames = await late.wait_data(BOOK, 10)
        assert time.time() * 1000 - frames[-1]["timestamp"] >= 1000
        check_same_order(frames, await true.wait_data(BOOK, len(true.data(BOOK)) + 1))


@in_loop
async def test_a_backlog_grows(url: str) -> None:
    async with connect(url) as true, connect(url, "backlog:0.3@0") as late:
        await true.subscribe(BOOK)
        await late.subscribe(BOOK)
        behind = []
        for count in (3, 6, 9):
            frames = await late.wait_data(BOOK, count)
            behind.append(len(true.data(BOOK)) - len(frames))
        assert behind == sorted(set(behind))
        check_same_order(frames, true.data(BOOK))


@in_loop
async def test_what_is_late_is_bounded(url: str, oracle: Path) -> None:
    faults = "lag:1000@0,slow_reader:20000"
    async with connect(url, faults) as client:
        await client.subscribe(BOOK)
        number = find_connection(oracle, faults)
        await client.wait(lambda: client.closed, "the cut")
        assert client.data(BOOK) == []
        assert read_oracle(oracle, event="ended", reason="connection_too_slow", connection=number)


def test_a_client_is_idle_since_its_last_request() -> None:
    line, halves = Line(), 0
    connection = Connection(Exchange(Settings(options=0), 0), parse_faults(""), line, 0.0, "")
    while not line.is_cut and halves < 300:
        halves += 1
        connection.tick(halves / 2)
        if halves == 20:
            connection.receive('{"id":1,"method":"public/test"}', halves / 2)
    assert halves / 2 == 10 + 60.5  # as measured


def test_a_client_for_which_too_much_waits_is_cut_without_any_fault_too() -> None:
    line = Line()
    connection = Connection(Exchange(Settings(options=0), 0), parse_faults(""), line, 0.0, "")
    frame = Frame("quote.BTC-PERPETUAL", None, text=bytes(1 << 20))
    for _ in range(32):
        connection.deliver(frame)
    assert not line.is_cut
    connection.deliver(frame)
    assert line.is_cut


@pytest.mark.parametrize("step", [3600.0, -3600.0])
def test_a_clock_that_is_set_makes_nothing_later_or_earlier(step: float) -> None:
    line = Line()
    connection = Connection(Exchange(Settings(options=0), 0), parse_faults("lag:5@0,reset:60"), line, 0.0, "")
    connection.deliver(Frame("quote.BTC-PERPETUAL", None, text=b"late"))
    connection.receive('{"id":1,"method":"public/test"}', step)
    waited = 0
    while connection.outbox[-1].payload != b"late" and waited < 10:
        waited += 1
        connection.tick(step + waited)
    assert waited == 5
    assert not line.is_cut


@pytest.mark.parametrize(("faults", "end"), [("maintenance:1,until:1.5", 2), ("half_open:1,until:30", 31)])
def test_what_is_over_has_left_nothing_behind(faults: str, end: int) -> None:
    """Neither refusals, nor a heartbeat that nobody could answer."""
    connection = Connection(Exchange(Settings(options=0), 0), parse_faults(faults), Line(), 0.0, "")
    connection.receive('{"id":1,"method":"public/set_heartbeat","params":{"interval":10}}', 0.0)
    for halves in range(2 * end):
        connection.tick(halves / 2)
    connection.receive('{"id":2,"method":"public/test"}', end)
    answer = json.loads(connection.outbox[-1].payload)
    assert (answer["id"], "result" in answer) == (2, True)


@in_loop
async def test_a_connection_is_well_again_in_the_end(url: str) -> None:
    async with (
        connect(url) as true,
        connect(url, "lag:1000@0,until:4") as late,
        connect(url, f"mute:{BOOK}@0,garbage:0.1,until:4") as mute,
        connect(url, "half_open:3,until:4") as silent,
    ):
        for client in (true, late, mute, silent):
            await client.subscribe(BOOK)
        await true.wait_data(BOOK, 5)
        assert (late.data(BOOK), mute.data(BOOK)) == ([], [])
        frames = await late.wait_data(BOOK, 15)
        check_same_order(frames, await true.wait_data(BOOK, len(true.data(BOOK)) + 1))
        assert frames[0]["type"] == "snapshot"
        assert (await mute.wait_data(BOOK))[0]["type"] == "change"
        assert any("hello" in text for text in mute.texts)
        count = len(mute.texts)
        await mute.wait_data(BOOK, 10)
        assert not any("hello" in text for text in mute.texts[count:])
        await silent.wait(lambda: find_breaks(silent.data(BOOK)), "data after the silence")
        assert "result" in await silent.ask("public/test")


@in_loop
async def test_a_frame_is_nested_deeper_than_pythons_json_can_read(url: str) -> None:
    async with connect(url, "deep_json:0.1") as client:
        await client.wait(lambda: any("[" * 50_000 in text for text in client.texts), "a deep frame")


@in_loop
async def test_a_fault_that_is_named_more_than_once_holds_each_time(url: str) -> None:
    twice = f"drop_subscribe:{BOOK}@1,drop_subscribe:*@1,oversized:4000000@0.1,oversized:5000000@0.3"
    async with connect(url, f"error:public/test=13028@1,error:public/test=11094@2,{twice}") as client:
        codes = [(await client.ask("public/test")).get("error", {}).get("code") for _ in range(4)]
        assert codes == [13028, 11094, 11094, None]
        acks = [(await client.ask("public/subscribe", channels=[BOOK]))["result"] for _ in range(3)]
        assert acks == [[], [], [BOOK]]
        await client.wait(lambda: any(len(text) > 5_000_000 for text in client.texts), "the second frame")
        assert any(4_000_000 < len(text) < 5_000_000 for text in client.texts)


@in_loop
async def test_what_waits_comes_also_at_the_end_of_a_silence(url: str) -> None:
    async with connect(url) as true, connect(url, "lag:1000@0,half_open:1,until:2") as late:
        await true.subscribe(BOOK)
        await late.subscribe(BOOK)
        frames = await late.wait_data(BOOK, 15)
        assert frames[0]["type"] == "snapshot"
        assert find_breaks(frames) == []


@pytest.mark.parametrize("faults", ["duplicate:1", "clock:1000"])
@in_loop
async def test_labels_stay_whatever_happens_to_the_data(url: str, faults: str) -> None:
    async with connect(url, faults) as client:
        await client.log_in()
        await client.ask("private/subscribe", channels=["user.portfolio.BTC"], label="mine")
        await client.wait_data("user.portfolio.BTC")
        labels = [m["params"].get("label") for m in client.messages() if m.get("method") == "subscription"]
        assert set(labels) == {"mine"}


@in_loop
async def test_answers_that_go_wrong(url: str) -> None:
    faults = "wrong_id:public/test@1,error:public/get_time=11094@2,no_reply:public/hello@1,slow:public/status=0.4"
    async with connect(url, faults) as client:
        await client.send('{"jsonrpc":"2.0","id":70,"method":"public/test"}')
        await client.wait(lambda: [m for m in client.messages() if m.get("id") == 999_999_999], "the wrong id")
        assert "result" in await client.ask("public/test")
        for code in (11094, 11094, None):
            answer = await client.ask("public/get_time")
            assert answer.get("error", {}).get("code") == code
        await client.send('{"jsonrpc":"2.0","id":71,"method":"public/hello","params":{}}')
        start = time.monotonic()
        await client.send('{"jsonrpc":"2.0","id":72,"method":"public/status"}')
        await client.ask("public/test")
        assert time.monotonic() - start > 0.39
        ids = [m["id"] for m in client.messages()]
        assert 71 not in ids
        assert ids.index(72) < len(ids) - 1


@pytest.mark.parametrize("rate", ["gap:5", "gap:0.2", "gap:3@1"])
@in_loop
async def test_gaps_break_the_chain_and_the_oracle_knows_them(url: str, oracle: Path, rate: str) -> None:
    async with connect(url, rate) as client:
        await client.subscribe(BOOK)
        frames = await client.wait_data(BOOK, 25)
        number = find_connection(oracle, rate)
        lost = {line["change_id"] for line in read_oracle(oracle, event="fault", connection=number, fault="gap")}
        breaks = find_breaks(frames)
        assert breaks
        assert {frames[place]["prev_change_id"] for place in breaks} <= lost
        assert not lost & {frame["change_id"] for frame in frames}
        assert len(lost) < len(frames)
        if rate.endswith("@1"):
            assert len(breaks) == len(lost) == 1


@in_loop
async def test_frames_are_repeated_and_change_places(url: str) -> None:
    async with connect(url, "duplicate:4") as twice, connect(url, "reorder:4") as mixed:
        await twice.subscribe(BOOK)
        await mixed.subscribe(BOOK)
        ids = [frame["change_id"] for frame in await twice.wait_data(BOOK, 12)]
        assert len(set(ids)) < len(ids)
        assert ids == sorted(ids)
        order = [frame["change_id"] for frame in await mixed.wait_data(BOOK, 12)]
        assert order != sorted(order)
        assert len(set(order)) == len(order)


@in_loop
async def test_odd_but_legal_book_frames(url: str) -> None:
    async with (
        connect(url, "prev0:4") as zero,
        connect(url, "resnapshot:4") as again,
        connect(url, "crossed:4") as cross,
    ):
        for client in (zero, again, cross):
            await client.subscribe(BOOK)
        frames = await zero.wait_data(BOOK, 12)
        assert [f["prev_change_id"] for f in frames if f["type"] == "change"].count(0) >= 2
        fresh = await again.wait_data(BOOK, 12)
        assert [f["type"] for f in fresh].count("snapshot") >= 3
        assert find_breaks(fresh) == []
        crossings = 0
        levels: dict[str, dict[float, float]] = {"bids": {}, "asks": {}}
        for frame in await cross.wait_data(BOOK, 20):
            apply_book(levels, frame)
            crossings += max(levels["bids"]) >= min(levels["asks"])
        assert 2 <= crossings <= 10, "the next change uncrosses the book"


class Follower:
    """A client of the hub with a book as its faults leave it; `wrong` counts where it stays other than the true one."""

    def __init__(self, faults: str) -> None:
        self.crossings = self.wrong = 0
        self._levels: dict[str, dict[float, float]] = {"bids": {}, "asks": {}}
        self._distortion = Distortion(parse_faults(faults), Random(1), self._note)

    def _note(self, fault: str, frame: Frame) -> None:
        self._crossed = fault == "crossed"

    def deliver(self, frame: Frame) -> None:
        self._crossed = False
        for text in self._distortion.apply(frame):
            apply_book(self._levels, json.loads(text)["params"]["data"])
        assert frame.feed is not None
        true = frame.feed.open()[0]
        wanted = {side: {price: amount for _, price, amount in true[side]} for side in ("bids", "asks")}
        self.crossings += self._crossed
        self.wrong += not self._crossed and self._levels != wanted


@pytest.mark.parametrize("faults", ["crossed:2", "crossed:2,resnapshot:3"])
def test_a_crossed_book_is_put_right_and_keeps_its_true_levels(faults: str) -> None:
    market = Market(1, 1_765_541_474_000, options=0, rate=600)
    hub, client = Hub(market, Account(market)), Follower(faults)
    for frame in hub.subscribe("book.BTC-PERPETUAL.agg2", client):
        client.deliver(frame)
    for _ in range(120):
        hub.advance(market.now + 1000)
    assert client.crossings > 20
    assert client.wrong == 0


def test_faults_of_the_data_leave_alone_what_is_not_theirs() -> None:
    """A frame is the same object for all who listen, and of another kind no trade is lost."""
    market = Market(1, 1_765_541_474_000, options=0)
    (frame,) = Hub(market, Account(market)).subscribe("ticker.BTC-PERPETUAL.100ms", Follower(""))
    true = json.loads(json.dumps(frame.data))
    for faults, is_changed in (("wrong_types:1", True), ("clock:5,unknown_fields", True), ("lost_trades:1", False)):
        (text,) = Distortion(parse_faults(faults), Random(1), lambda fault, of: None).apply(frame)
        assert (json.loads(text)["params"]["data"] != true) is is_changed
        assert frame.data == true


@in_loop
async def test_a_snapshot_is_missing_and_a_channel_is_left_out_of_the_ack(url: str) -> None:
    async with connect(url, f"no_snapshot:1,drop_subscribe:{BOOK}@1") as client:
        assert (await client.ask("public/subscribe", channels=[BOOK]))["result"] == []
        await client.subscribe(BOOK)
        assert (await client.wait_data(BOOK))[0]["type"] == "change"
        await client.ask("public/unsubscribe", channels=[BOOK])
        count = len(client.data(BOOK))
        await client.subscribe(BOOK)
        assert (await client.wait_data(BOOK, count + 1))[count]["type"] == "snapshot"


@in_loop
async def test_data_come_before_the_ack(url: str) -> None:
    async with connect(url, "ack_late") as client:
        await client.subscribe(BOOK)
        assert client.messages()[0]["params"]["channel"] == BOOK


@in_loop
async def test_lost_trades_leave_holes_that_http_fills_and_the_oracle_knows(url: str, oracle: Path) -> None:
    async with connect(url, "lost_trades:3") as client:
        channel = "trades.BTC-PERPETUAL.100ms"
        await client.subscribe(channel)
        sequence = [trade["trade_seq"] for data in await client.wait_data(channel, 8) for trade in data]
    holes = set(range(sequence[0], sequence[-1] + 1)) - set(sequence)
    assert holes
    page = {"instrument_name": "BTC-PERPETUAL", "start_seq": min(holes), "end_seq": max(holes), "count": 1000}
    found = get(url, "public/get_last_trades_by_instrument", **page)[1]["result"]["trades"]
    assert holes <= {trade["trade_seq"] for trade in found}
    number = find_connection(oracle, "lost_trades:3")
    lost = read_oracle(oracle, event="fault", connection=number, fault="lost_trades")
    assert holes <= {seq for line in lost for name, seq in line["trades"] if name == "BTC-PERPETUAL"}


PAIR, FAR = "BTC_USDC", "BTC-PERPETUAL"


@in_loop
async def test_of_spot_pairs_that_are_matched_at_coinbase_there_is_all_but_trades(url: str) -> None:
    left_out = [
        f"trades.{PAIR}.100ms", f"trades.{PAIR}.agg2", f"chart.trades.{PAIR}.60", "trades.spot.BTC.100ms",
        "trades.any.USDC.100ms", "trades.spot.any.100ms", "trades.any.any.agg2",
    ]  # fmt: skip
    given = [
        f"trades.{FAR}.100ms", f"chart.trades.{FAR}.60", "trades.future.any.100ms", "trades.any.EURR.100ms",
        "trades.spot.EURR.100ms", "trades.combo.BTC.100ms", f"book.{PAIR}.100ms", f"ticker.{PAIR}.100ms",
        f"quote.{PAIR}", "instrument.state.spot.any",
    ]  # fmt: skip
    async with connect(url, "routed_spot") as client, connect(url) as plain:
        channels = left_out + given
        assert set((await client.ask("public/subscribe", channels=channels))["result"]) == set(given)
        assert set((await plain.ask("public/subscribe", channels=channels))["result"]) == set(channels)
    marks = ("is_csr", "is_cbe_routed")
    for faults, marked in (("routed_spot", {"BTC_USDC", "ETH_USDC", "USDT_USDC"}), ("delay:0", set())):
        rows = get(url, "public/get_instruments", currency="any", faults=faults)[1]["result"]
        assert {row["instrument_name"] for row in rows if any(mark in row for mark in marks)} == marked
        row = get(url, "public/get_instrument", instrument_name=PAIR, faults=faults)[1]["result"]
        assert all(row.get(mark) is (True if marked else None) for mark in marks)

    def ask_for(way: str, **params: Any) -> int | None:
        answer = get(url, f"public/get_last_trades_by_{way}", faults="routed_spot", **params)[1]
        code: int | None = answer.get("error", {}).get("code")
        return code

    refused = [("BTC", "spot"), ("USDC", "any"), ("any", "any")]
    answered = [("BTC", "future"), ("EURR", "any"), ("any", "option")]
    for end in ("", "_and_time"):
        assert ask_for(f"instrument{end}", instrument_name=PAIR) == 11060
        assert ask_for(f"instrument{end}", instrument_name=FAR) is None
        assert {ask_for(f"currency{end}", currency=currency, kind=kind) for currency, kind in refused} == {11060}
        assert {ask_for(f"currency{end}", currency=currency, kind=kind) for currency, kind in answered} == {None}


def test_trades_are_found_by_time_as_far_back_as_they_are_kept() -> None:
    with exchange("--rate", "1000", "--faults", "retention:2") as (url, _):

        def find(way: str, **more: Any) -> list[dict[str, Any]]:
            page = get(url, f"public/get_last_trades_by_{way}", count=1000, sorting="asc", **more)[1]["result"]
            found: list[dict[str, Any]] = page["trades"]
            return found

        named = {"instrument_name": "BTC-PERPETUAL"}
        old = wait_until(lambda: find("instrument", **named), "a trade")[0]["timestamp"]
        wait_until(lambda: find("instrument", **named)[-1]["timestamp"] > old + 3000, "a later one")
        for way, subject in (("instrument_and_time", named), ("currency_and_time", {"currency": "BTC"})):
            assert find(way, **subject, start_timestamp=old) == []
            first, *others = find("instrument", **named, start_seq=1)
            assert first["timestamp"] > old
            assert others[0]["trade_seq"] == first["trade_seq"] + 1
            now = find("instrument", **named)[-1]["timestamp"]
            assert find(way, **subject, start_timestamp=now - 1000)


@in_loop
async def test_wrong_types_unknown_fields_and_exponents(url: str) -> None:
    ticker = "ticker.BTC-PERPETUAL.100ms"
    async with (
        connect(url, "wrong_types:2") as odd,
        connect(url, "unknown_fields") as more,
        connect(url, "exponents") as big,
    ):
        for client in (odd, more, big):
            await client.subscribe(ticker)
        whole = await more.wait_data(ticker, 2)
        assert "never_seen_before" in whole[0]
        answer = await more.ask("public/test")
        assert "never_seen_before" in answer
        assert "never_seen_before" in answer["result"]
        await more.subscribe("trades.any.any.100ms")
        assert all("never_seen_before" in trade for trade in (await more.wait_data("trades.any.any.100ms"))[0])
        assert all("never_seen_before" in message for message in more.messages())
        listed = get(url, "public/get_currencies", faults="unknown_fields")[1]
        assert all("never_seen_before" in item for item in (listed, *listed["result"]))
        plain = {key: type(value) for key, value in whole[0].items()}
        kinds = [{k: type(v) for k, v in frame.items()} for frame in await odd.wait_data(ticker, 12)]
        numbers: dict[type, type] = {int: float, float: float}
        assert any(
            numbers.get(kind, kind) != numbers.get(plain.get(key, kind), plain.get(key, kind))
            for frame in kinds for key, kind in frame.items()
        )  # fmt: skip
        await big.wait_data(ticker)
        assert any(re.search(r'"index_price":\d\.\d+e4\b', text) for text in big.texts)
        assert 50_000 < big.data(ticker)[0]["index_price"] < 150_000


@in_loop
async def test_the_clock_is_off(url: str) -> None:
    async with connect(url, "clock:-3600000") as client, connect(url) as true:
        await client.subscribe(BOOK)
        await true.subscribe(BOOK)
        off = (await client.ask("public/get_time"))["result"] / 1000
        assert abs(off + 3600 - time.time()) < 60
        await true.wait_data(BOOK, 3)
        frames = await client.wait_data(BOOK, 3)
        times = {frame["change_id"]: frame["timestamp"] for frame in true.data(BOOK)}
        shared = [frame for frame in frames if frame["change_id"] in times]
        assert shared
        assert all(frame["timestamp"] == times[frame["change_id"]] - 3_600_000 for frame in shared)


@in_loop
async def test_a_clock_that_is_off_is_so_in_all_that_is_asked_for(url: str) -> None:
    off, page = 3_600_000, {"instrument_name": "BTC-PERPETUAL", "count": 1000}
    trades = wait_until(lambda: get(url, "public/get_last_trades_by_instrument", **page)[1]["result"]["trades"], "some")
    page |= {"start_seq": trades[-1]["trade_seq"], "end_seq": trades[0]["trade_seq"], "sorting": "desc"}
    moved = (("timestamp", off), ("starbase_timestamp", off * 1_000_000))
    wanted = [{**trade, **{key: trade[key] + by for key, by in moved}} for trade in trades]
    span = {"start_timestamp": wanted[-1]["timestamp"], "end_timestamp": wanted[0]["timestamp"]}
    ways = {"public/get_last_trades_by_instrument": {}, "public/get_last_trades_by_instrument_and_time": span}
    async with connect(url, f"clock:{off}") as client:
        for method, more in ways.items():
            over_http = get(url, method, **page, **more, faults=f"clock:{off}")[1]
            for answer in (await client.ask(method, {**page, **more}), over_http):
                assert answer["result"]["trades"] == wanted
                assert off - 60_000 < answer["usIn"] / 1000 - time.time() * 1000 < off + 60_000
        row = (await client.ask("public/get_instrument", page))["result"]
        true = get(url, "public/get_instrument", **page)[1]["result"]
        assert row == {**true, "creation_timestamp": true["creation_timestamp"] + off}


@in_loop
async def test_what_is_left_or_mute_comes_neither_from_a_flood_nor_from_what_was_held(url: str) -> None:
    ticker, quote, index = "ticker.BTC-PERPETUAL.100ms", "quote.BTC-PERPETUAL", "deribit_price_index.btc_usd"
    async with connect(url, f"flood:500,mute:{quote}@3") as client:
        for channel in (ticker, quote, index):
            await client.subscribe(channel)
        for channel in (ticker, quote, index):
            await client.wait_data(channel, 10)
        await client.ask("public/unsubscribe", channels=[ticker])
        count = len(client.data(ticker))
        await client.wait(lambda: set(list_channels(client)[-100:]) == {index}, "the index alone")
        assert len(client.data(ticker)) == count


def list_channels(client: Client) -> list[str]:
    return [m["params"]["channel"] for m in client.messages() if m.get("method") == "subscription"]


@in_loop
async def test_a_frame_that_was_held_is_forgotten_with_its_channel(url: str) -> None:
    async with connect(url, "reorder:1@1") as client:
        index = "deribit_price_index.btc_usd"
        await client.subscribe(index)  # whose first frame is held
        await client.ask("public/unsubscribe", channels=[index])
        count = len(client.data(index))
        await client.subscribe(index)
        times = [frame["timestamp"] for frame in (await client.wait_data(index, count + 3))[count:]]
        assert times == sorted(set(times))


@in_loop
async def test_small_pools_of_credits(url: str) -> None:
    async with connect(url, "credits:6000") as client:
        for _ in range(9):  # the usual pool has enough for all
            await client.send('{"jsonrpc":"2.0","id":3,"method":"public/subscribe","params":{"channels":[]}}')
        await client.wait(lambda: client.closed, "the cut")
        codes = [m.get("error", {}).get("code") for m in client.messages()]
        assert codes[:2] == [None, None]
        assert codes[-1] == 10028


@in_loop
async def test_logins_that_fail_or_do_not_last(url: str) -> None:
    async with connect(url, "ban") as client:
        assert (await client.ask("public/auth", KEYS))["error"] == {"code": 12005, "message": "country_is_banned"}
    async with connect(url, "expired_token") as client:
        await client.log_in()
        assert (await client.ask("private/get_positions"))["error"]["code"] == 13009
    async with connect(url, "token_life:1") as client:
        token = await client.log_in()
        assert token["expires_in"] == 1
        assert "result" in await client.ask("private/get_positions")
        while "result" in (answer := await client.ask("private/get_positions")):
            await asyncio.sleep(0.1)
        assert answer["error"]["code"] == 13009
        renewed = await client.ask("public/auth", grant_type="refresh_token", refresh_token=token["refresh_token"])
        assert "access_token" in renewed["result"]
        assert "result" in await client.ask("private/get_positions")
    async with connect(url, "login_only") as client:
        assert (await client.ask("public/get_time"))["error"]["code"] == 11056
        await client.log_in()
        assert "result" in await client.ask("public/get_time")


@in_loop
async def test_heartbeats_that_are_missing_or_not_taken_as_answered(url: str) -> None:
    async with (
        connect(url, "no_heartbeat,heartbeat_floor:0.1") as none,
        connect(url, "deaf,heartbeat_floor:0.1") as deaf,
    ):
        await none.ask("public/set_heartbeat", interval=0.2)
        await deaf.ask("public/set_heartbeat", interval=0.3)
        while deaf.closed is None:
            await deaf.send('{"jsonrpc":"2.0","id":4,"method":"public/test"}')
            await asyncio.sleep(0.05)
        assert deaf.closed[0] == 4000
        assert not any("heartbeat" in text for text in none.texts)


@in_loop
async def test_maintenance(url: str) -> None:
    async with connect(url, "maintenance:1.5") as client:
        await client.subscribe("platform_state")
        await client.wait(lambda: {"maintenance": True} in client.data("platform_state"), "the announcement")
        assert (await client.ask("public/test"))["error"] == {"code": 11051, "message": "system_maintenance"}
        await client.wait(lambda: client.closed, "the drop")


@in_loop
async def test_delay_is_added_each_way(url: str) -> None:
    async with connect(url, "delay:100") as client:
        start = time.monotonic()
        await client.ask("public/test")
        assert time.monotonic() - start >= 0.2
        count = 100  # one after the other they would need longer than anything is waited for
        await asyncio.gather(*(client.send(json.dumps({"id": 500 + n, "method": "public/test"})) for n in range(count)))
        await client.wait(lambda: len([m for m in client.messages() if m["id"] >= 500]) == count, "all answers")
        assert [m["id"] for m in client.messages() if m["id"] >= 500] == list(range(500, 500 + count))


def mask(body: bytes) -> bytes:
    """A short text frame of a client."""
    return struct.pack("!BB4s", 0x81, 0x80 | len(body), b"\0\0\0\0") + body


@in_loop
async def test_a_frame_comes_in_two_fragments_with_a_ping_between_them(url: str) -> None:
    reader, writer = await open_raw(url, "fragments:0")
    await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    writer.write(mask(b'{"id":1,"method":"public/test"}'))
    async with asyncio.timeout(10):
        found = []
        for _ in range(3):
            first, size = await reader.readexactly(2)
            found.append((first, await reader.readexactly(size)))
    (begun, one), ping, (ended, other) = found
    assert (begun, ping, ended) == (0x01, (0x89, b""), 0x80)
    assert "result" in json.loads(one + other)
    writer.close()


async def open_deaf(url: str, faults: str) -> asyncio.StreamWriter:
    """A client that subscribes to a ticker and never reads what comes."""
    _, writer = await open_raw(url, faults)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    body = b'{"jsonrpc":"2.0","id":1,"method":"public/subscribe","params":{"channels":["ticker.BTC-PERPETUAL.100ms"]}}'
    writer.write(mask(body))
    return writer


@pytest.mark.parametrize("more", ["", "fragments:0,"])
@in_loop
async def test_a_client_that_does_not_read_is_cut(url: str, oracle: Path, more: str) -> None:
    faults = f"{more}slow_reader:20000000,flood:20000"  # more than one step of the flood
    writer = await open_deaf(url, faults)
    async with connect(url) as other:
        await other.subscribe(BOOK)
        number = await other.wait(lambda: find_connection(oracle, faults), "the connection")
        ended = {"event": "ended", "reason": "connection_too_slow", "connection": number}
        await other.wait(lambda: read_oracle(oracle, **ended), "the cut", 30)
    writer.close()


async def write_on(writer: asyncio.StreamWriter, other: Client) -> None:
    for _ in range(300):
        writer.write(b"\x8a\x80\0\0\0\0")
        await writer.drain()
        await other.wait_data(BOOK, len(other.data(BOOK)) + 1)


@in_loop
async def test_a_client_that_does_not_read_is_cut_also_where_it_is_to_be_closed(url: str, oracle: Path) -> None:
    faults = "flood:20000,close:4001@2"
    writer = await open_deaf(url, faults)
    async with connect(url) as other:
        await other.subscribe(BOOK)
        number = await other.wait(lambda: find_connection(oracle, faults), "the connection")
        ended = {"event": "ended", "reason": "closed on request", "connection": number}
        await other.wait(lambda: read_oracle(oracle, **ended), "the close", 30)
        with pytest.raises(ConnectionError):
            await write_on(writer, other)


@in_loop
async def test_faults_of_the_whole_exchange_hold_for_all_who_name_none() -> None:
    with exchange("--faults", "error:public/test=11094,connections:1") as (url, _):
        async with connect(url) as client:
            assert (await client.ask("public/test"))["error"]["code"] == 11094
            with pytest.raises(aiohttp.WSServerHandshakeError):
                async with connect(url):
                    pass
        assert get(url, "public/test")[1]["error"]["code"] == 11094


@in_loop
async def test_the_oracle_has_every_trade(url: str, oracle: Path) -> None:
    async with connect(url) as client:
        await client.subscribe("trades.any.any.100ms")
        frames = await client.wait_data("trades.any.any.100ms", 10)
    seen = [trade for data in frames for trade in data]
    names = ("instrument_name", "trade_seq", "trade_id", "price", "amount", "direction", "timestamp")
    told = [{name: line[name] for name in names} for line in read_oracle(oracle, event="trade")]
    assert all({name: trade[name] for name in names} in told for trade in seen)
