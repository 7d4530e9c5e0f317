"""Broken and hostile input, to the whole program: it is counted, nothing else is lost, and nothing dies of it."""

from pathlib import Path

from collector.schema import ENVELOPE, SCHEMA
from tests.collected import overheard
from tests.pipeline import Subscriber

CHANNELS = [
    "book.BTC-PERPETUAL.100ms", "trades.BTC-PERPETUAL.100ms", "ticker.BTC-PERPETUAL.100ms", "quote.BTC-PERPETUAL",
    "deribit_price_index.btc_usd", "book.ETH-PERPETUAL.none.10.100ms", "incremental_ticker.ETH-PERPETUAL",
    "platform_state",
]  # fmt: skip


def wait_for_more(ear: Subscriber) -> None:
    """Data of every kind that flows all the time comes after this."""
    counts = {prefix: len(ear.find(prefix)) for prefix in ("deribit.book.", "deribit.ticker.", "deribit.quote.")}
    ear.listen_until(lambda: all(len(ear.find(prefix)) > n + 3 for prefix, n in counts.items()), "more data")


def test_broken_frames_are_counted_and_the_others_flow() -> None:
    faults = "garbage:0.3,bad_json:0.3,odd_json:0.3,deep_json:0.3,wrong_types:7,exponents"
    with overheard(CHANNELS, faults) as (run, ear):
        ear.listen_until(lambda: run.get_state("a")["malformed"] >= 30, "malformed frames")
        wait_for_more(ear)
        state = run.get_state("a")
        assert (state["state"], state["restarts"], state["reconnects"]) == ("live", 0, 0)


def test_what_deribit_may_add_or_spell_otherwise_is_taken() -> None:
    with overheard(CHANNELS, "unknown_fields,exponents") as (run, ear):
        for prefix in ("book", "trade", "ticker", "quote", "index", "platform"):
            ear.wait_for(f"deribit.{prefix}.")
        wait_for_more(ear)
        state = run.get_state("a")
        assert (state["state"], state["malformed"], state["reconnects"]) == ("live", 0, 0)


LARGE = "9" * 25
TRADE = '[{"instrument_name":"A-B","trade_seq":1,"trade_id":"1","price":1,"amount":1,"direction":"buy"}]'
NOTHING = '"tick_direction":null,"liquidation":null,"block_trade_id":null,"combo_id":null,"iv":null'
NULLS = TRADE.replace('"trade_seq":1', f'"trade_seq":2,{NOTHING}')
"""What a trade may lack, spelled as null."""
CANDLE = '{"open":1,"high":1,"low":1,"close":1,"volume":1,"cost":1,"tick":1.7672e12}'
"""A whole number, spelled as another."""
HOSTILE = [
    ("quote.A-B", "5"),
    ("quote.A-B", '{"timestamp":"soon"}'),
    ("quote.A-B", '{"timestamp":' + LARGE + "}"),
    ("quote.A-B", '{"timestamp":1,"best_bid_price":{"deep":[1]}}'),
    ("quote.A-B", '{"timestamp":1,"best_bid_price":"low"}'),
    ("trades.A-B.100ms", '[{"instrument_name":"A-B","trade_seq":1}]'),
    ("trades.A-B.100ms", TRADE.replace("A-B", "A.B C")),
    ("trades.A-B.100ms", TRADE.replace("A-B", "A-C")),
    ("trades.A-B.100ms", TRADE.replace("buy", "up")),
    ("trades.A-B.100ms", TRADE.replace('"price":1', '"price":1e999')),
    ("book.A-B.100ms", '{"type":"snapshot","change_id":1,"bids":[["new",1]],"asks":[]}'),
    ("book.A-B.100ms", '{"type":"snapshot","change_id":-1,"bids":[],"asks":[]}'),
    ("book.A-B.100ms", '{"type":"snapshot","change_id":' + LARGE + ',"bids":[],"asks":[]}'),
    ("ticker.A-B.100ms", '{"timestamp":1,"state":"open","mark_price":"market_price"}'),
    ("ticker.A-B.100ms", '{"timestamp":1}'),
    ("ticker.A-B.100ms", "[" * 500 + "]" * 500),
    ("deribit_price_index.a_b", '{"timestamp":1,"price":null}'),
    ("deribit_price_index.a_b", '{"timestamp":true,"price":1}'),
    ("user.any", '{"large":' + LARGE + "}"),
]
"""Data that no channel of these carries; each frame is refused and counted."""

SOUND = [
    ("quote.A-B", '{"timestamp":1,"best_bid_price":1.5}', "deribit.quote.A-B.raw"),
    ("book.A-B.100ms", '{"type":"snapshot","change_id":1,"bids":[],"asks":[]}', "deribit.book.A-B.100ms"),
    ("trades.A-B.100ms", TRADE, "deribit.trade.A-B.100ms"),
    ("trades.A-B.100ms", NULLS, "deribit.trade.A-B.100ms"),
    ("user.any", '{"price":"market_price"}', "deribit.other.user:any.raw"),
    ("quote.A-B", '{"best_bid_price":1.5}', "deribit.quote.A-B.raw"),
    ("chart.trades.A-B.1", CANDLE, "deribit.candle.A-B.1"),
]


def test_each_hostile_frame_is_refused_and_sound_ones_behind_it_come(tmp_path: Path) -> None:
    head, tail = '{"jsonrpc":"2.0","method":"subscription","params":{"channel":"', "}}"
    frames = [f'{head}{channel}","data":{data}{tail}\n' for channel, data, *_ in [*HOSTILE, *SOUND]]
    recording = tmp_path / "hostile.jsonl"
    recording.write_text("".join(frames))
    channels = sorted({channel for channel, *_ in [*HOSTILE, *SOUND]})
    with overheard(channels, "", "--replay", str(recording), "--speed", "0") as (run, ear):
        for _, _, topic in SOUND:
            ear.wait_for(topic, type=topic.split(".")[1])
        assert ear.find("deribit.candle.", type="candle")[0]["tick"] == 1767200000000
        assert [body["exchange_ts"] for body in ear.find("deribit.quote.", type="quote")] == [1_000_000, 0]
        state = run.get_state("a")
        assert (state["state"], state["malformed"], state["restarts"]) == ("live", len(HOSTILE), 0)
        data = ("quote", "book", "trade", "ticker", "index", "other", "candle")
        assert [topic for topic, body in ear.messages if body["type"] in data] == [topic for _, _, topic in SOUND]
        plain, of_nulls = ear.find("deribit.trade.A-B.", type="trade")
        assert plain.keys() == {key for key in {**ENVELOPE, **SCHEMA["trade"]} if not key.endswith("?")}
        assert of_nulls.keys() - plain.keys() == {"iv"}  # the wire's table allows nil there; the others are left out
