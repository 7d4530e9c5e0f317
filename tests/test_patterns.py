"""Patterns: what is read, what is refused, which instruments match; and how channels are spread over connections."""

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.channels import parse_channel
from collector.config import Connection, read_connection
from collector.config.clashes import Placed, Places
from collector.config.endpoints import parse_endpoint
from collector.config.keys import ConfigError
from collector.config.patterns import (
    CONDITIONS,
    SETTLING,
    Instrument,
    expand,
    is_pattern,
    parse_pattern,
    read_instrument,
)
from collector.limits import MAX_CHANNELS
from collector.planning.shards import (
    MAX_RATE,
    SLACK,
    Weight,
    assign,
    count_shards,
    estimate_rate,
    shift_endpoint,
    spread,
    weigh,
)

DAY = 86_400_000
NOW = int(datetime(2026, 11, 20, 12, tzinfo=UTC).timestamp() * 1000)
CHRISTMAS = int(datetime(2026, 12, 25, 8, tzinfo=UTC).timestamp() * 1000)
FOREVER = 32_503_708_800_000


def make_row(name: str, kind: str, **more: Any) -> dict[str, Any]:
    """A row as the exchange writes it."""
    return {
        "instrument_name": name, "kind": kind, "state": "open", "is_active": True, "base_currency": "BTC",
        "quote_currency": "USD", "settlement_currency": "BTC", "expiration_timestamp": FOREVER, **more,
    }  # fmt: skip


ROWS = [
    make_row("BTC-PERPETUAL", "future"),
    make_row("BTC-25DEC26", "future", expiration_timestamp=CHRISTMAS),
    make_row("BTC_USDC-PERPETUAL", "future", quote_currency="USDC", settlement_currency="USDC"),
    make_row("BTC_USDC", "spot", quote_currency="USDC", settlement_currency=None),
    make_row("ETH-25DEC26-4000-C", "option", base_currency="ETH", quote_currency="ETH", settlement_currency="ETH",
             strike=4000.0, option_type="call", expiration_timestamp=CHRISTMAS),
    make_row("ETH-25DEC26-4000-P", "option", base_currency="ETH", quote_currency="ETH", settlement_currency="ETH",
             strike=4000.0, option_type="put", expiration_timestamp=CHRISTMAS),
    make_row("ETH-21NOV26-3000-C", "option", base_currency="ETH", quote_currency="ETH", settlement_currency="ETH",
             strike=3000, option_type="call", expiration_timestamp=NOW + 20 * 3_600_000),
    make_row("BTC-FS-25DEC26_PERP", "future_combo", expiration_timestamp=CHRISTMAS, state="locked"),
]  # fmt: skip


def list_rows(*rows: dict[str, Any]) -> dict[str, Instrument]:
    return {each.name: each for row in rows if (each := read_instrument(row))}


LISTED = list_rows(*ROWS)


def find(pattern: str, now: int = NOW) -> set[str]:
    """The instruments of a pattern."""
    return set(expand([pattern], LISTED, now)[pattern].values())


FOUND = {
    "book.BTC-*.100ms": {"BTC-PERPETUAL", "BTC-25DEC26", "BTC-FS-25DEC26_PERP"},
    "book.btc-*.100ms": {"BTC-PERPETUAL", "BTC-25DEC26", "BTC-FS-25DEC26_PERP"},
    "quote.[be]th-25dec26-*{option_type=put}": {"ETH-25DEC26-4000-P"},
    "book.*-PERPETUAL.none.10.100ms": {"BTC-PERPETUAL", "BTC_USDC-PERPETUAL"},
    "quote.BTC?USDC": {"BTC_USDC"},
    "quote.[BX]*_*P*": {"BTC_USDC-PERPETUAL", "BTC-FS-25DEC26_PERP"},
    "chart.trades.*25DEC26.60": {"BTC-25DEC26"},
    "incremental_ticker.ETH-*-P": {"ETH-25DEC26-4000-P"},
    "perpetual.*.100ms": {"BTC-PERPETUAL", "BTC_USDC-PERPETUAL"},
    "ticker.{kind=option,currency=ETH,expiry<45d}.100ms": {
        "ETH-25DEC26-4000-C", "ETH-25DEC26-4000-P", "ETH-21NOV26-3000-C",
    },
    "ticker.{ kind = option , expiry < 24h }.100ms": {"ETH-21NOV26-3000-C"},
    "ticker.{kind=option,expiry>1.5d}.agg2": {"ETH-25DEC26-4000-C", "ETH-25DEC26-4000-P"},
    "trades.{expiry<2026-12-25}.100ms": {"ETH-21NOV26-3000-C"},
    "trades.{expiry<=25DEC26,kind=future}.100ms": {"BTC-25DEC26"},
    "trades.{expiry=2026-12-25,kind=combo}.100ms": {"BTC-FS-25DEC26_PERP"},
    "trades.{kind=future_combo}.100ms": {"BTC-FS-25DEC26_PERP"},
    "quote.{strike>3000}": {"ETH-25DEC26-4000-C", "ETH-25DEC26-4000-P"},
    "quote.{strike>=4000}": {"ETH-25DEC26-4000-C", "ETH-25DEC26-4000-P"},
    "quote.{strike<4000}": {"ETH-21NOV26-3000-C"},
    "quote.{strike=3000}": {"ETH-21NOV26-3000-C"},
    "quote.{strike<=3000,option_type=put}": set(),
    "quote.ETH*{option_type=PUT}": {"ETH-25DEC26-4000-P"},
    "quote.{currency=USDC}": {"BTC_USDC-PERPETUAL", "BTC_USDC"},
    "quote.{settlement=usdc}": {"BTC_USDC-PERPETUAL"},
    "quote.{base=BTC,quote=USDC}": {"BTC_USDC-PERPETUAL", "BTC_USDC"},
    "quote.{state=locked}": {"BTC-FS-25DEC26_PERP"},
    "quote.*{kind=spot}": {"BTC_USDC"},
}  # fmt: skip


@pytest.mark.parametrize("pattern", FOUND)
def test_finds_its_instruments(pattern: str) -> None:
    assert is_pattern(pattern)
    assert find(pattern) == FOUND[pattern]


def test_writes_channels_in_order_of_the_names() -> None:
    expanded = expand(["book.BTC-*.100ms", "quote.NONE*"], LISTED, NOW)
    assert list(expanded) == ["book.BTC-*.100ms", "quote.NONE*"]
    assert list(expanded["book.BTC-*.100ms"]) == [
        "book.BTC-25DEC26.100ms", "book.BTC-FS-25DEC26_PERP.100ms", "book.BTC-PERPETUAL.100ms",
    ]  # fmt: skip
    assert expanded["quote.NONE*"] == {}


def test_what_never_expires_has_no_time_to_expiry() -> None:
    assert "BTC-PERPETUAL" not in find("quote.{expiry>1d}") | find("quote.{expiry<99999d}")


def test_a_time_to_expiry_moves_with_the_clock() -> None:
    pattern = "quote.{kind=future,expiry<7d}"
    assert find(pattern) == set()
    assert find(pattern, CHRISTMAS - 8 * DAY) == set()
    assert find(pattern, CHRISTMAS - 6 * DAY) == {"BTC-25DEC26"}


@pytest.mark.parametrize("mark", ["is_csr", "is_cbe_routed"])
def test_a_spot_pair_matched_at_coinbase_has_all_but_trades(mark: str) -> None:
    """Deribit leaves its trades and candles out: each look at the list would ask for them again, in vain."""
    listed = list_rows(*(row | ({mark: True} if row["kind"] == "spot" else {}) for row in ROWS))
    for head, has_it in {"book": True, "ticker": True, "quote": True, "trades": False, "chart.trades": False}.items():
        tail = {"quote": "", "chart.trades": ".60"}.get(head, ".100ms")
        pattern = f"{head}.BTC_*{tail}"
        assert ("BTC_USDC" in expand([pattern], listed, NOW)[pattern].values()) == has_it
        assert set(expand([pattern], listed, NOW)[pattern].values()) >= {"BTC_USDC-PERPETUAL"}
    marked = make_row("BTC_USDC", "spot", **{mark: False})
    assert list_rows(marked)["BTC_USDC"].has_trades


def test_an_expired_instrument_is_gone_once_it_has_settled() -> None:
    assert find("quote.BTC-25DEC26*", CHRISTMAS + SETTLING - 1) == {"BTC-25DEC26"}
    assert find("quote.BTC-25DEC26*", CHRISTMAS + SETTLING) == set()
    for word in ("delivered", "archivized", "closed", "terminated"):
        assert not replace(LISTED["BTC-PERPETUAL"], state=word).is_listed(NOW)
    for word in ("open", "settlement", "halted", "inactive", "locked", "a word of next year"):
        assert replace(LISTED["BTC-PERPETUAL"], state=word).is_listed(NOW)


def test_the_daily_settlement_gives_up_no_channel() -> None:
    settling = replace(LISTED["BTC-PERPETUAL"], state="settlement")

    def finds(state: str, instrument: Instrument) -> bool:
        return any(expand([f"quote.{{state={state}}}"], {instrument.name: instrument}, NOW).values())

    assert finds("open", settling)
    assert finds("settlement", settling)
    assert not finds("settlement", LISTED["BTC-PERPETUAL"])
    assert not finds("open", replace(settling, state="halted"))


REFUSED = {
    "book.*.*": "'book.*.*': one part may be a pattern, the instrument; write for example book.BTC-*.100ms",
    "book.{kind=option}.{x}": "one part may be a pattern",
    "book.{kind=option.100ms": "one part may be a pattern",
    "*.BTC-PERPETUAL.100ms": "one part may be a pattern",
    "book.BTC-*.raw\n": "one part may be a pattern",
    "deribit_price_index.*": "patterns go over instruments, in trades, book, ticker, incremental_ticker, quote,",
    "boook.*.raw": "incremental_ticker, quote, perpetual, chart; did you mean book?",
    "trades.*.any.100ms": "'trades.*.any.100ms': the pattern must stand for the instrument",
    "trades.option.*.100ms": "'trades.option.*.100ms': the pattern must stand for the instrument",
    "book.*.100s": "'book.*.100s': interval '100s' is not offered (raw, 100ms, agg2)",
    "ticker.BTC-*": "'ticker.BTC-*': ticker channels have the form ticker.INSTRUMENT.INTERVAL",
    "quote.{kind=option}.raw": "'quote.{kind=option}.raw': quote channels have the form quote.INSTRUMENT",
    "book.BTC-[.100ms": "one part may be a pattern",
    "book.BTC *.100ms": "one part may be a pattern",
    "book.\n*.100ms": "one part may be a pattern",
    "quote.{kind=option,kind=future}": "kind stands twice, no instrument has both; write a pattern for each",
    "quote.{kind!=option}": "'kind!=option' is no condition; write for example kind=option, a comma between two",
    "quote.{KIND=option}": "no condition is called KIND; did you mean kind?",
    "quote.{kind==option}": "'kind==option' is no condition; write for example kind=option",
    "quote.{kind=option;currency=BTC}": "'kind=option;currency=BTC' is no condition; write for example kind=option,",
    "quote.{instrument=BTC-*}": "no condition is called instrument; there are kind, currency, base",
    "quote.{}": "'quote.{}': names no condition; write for example {kind=option}, or * for all",
    "quote.{knd=option}": "'quote.{knd=option}': no condition is called knd; did you mean kind?",
    "quote.{colour=red}": "no condition is called colour; there are kind, currency, base, quote, settlement, option_ty",
    "quote.{kind}": "'quote.{kind}': kind is no condition; write for example kind=option",
    "quote.{kind<option}": "'kind<option' is no condition; write for example kind=option",
    "quote.{kind=optoin}": "no kind is called optoin; did you mean option?",
    "quote.{kind=zzz}": "no kind is called zzz; there are future, option, spot, future_combo, option_combo, combo",
    "quote.{option_type=C}": "no option_type is called C; there are call, put",
    "quote.{currency=}": "currency '' is no word; write for example currency=ETH",
    "quote.{currency=B-C}": "currency B-C is no word; write for example currency=ETH",
    "quote.{strike>8k}": "strike 8k is no number; write for example strike>=80000",
    "quote.{strike>nan}": "strike nan is no number",
    "quote.{expiry<45}": "expiry<45 is neither a time nor a date; write for example expiry<45d, expiry<12h or",
    "quote.{expiry<45m}": "is neither a time nor a date",
    "quote.{expiry=45d}": "is neither a time nor a date",
    "quote.{expiry<2026-13-01}": "is neither a time nor a date",
    "quote.{expiry<<45d}": "'expiry<<45d' is no condition; write for example expiry<45d",
}


@pytest.mark.parametrize("pattern", REFUSED)
def test_is_refused_in_one_line(pattern: str) -> None:
    assert is_pattern(pattern)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse_pattern(pattern)
    assert REFUSED[pattern] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_each_condition_has_an_example_that_is_taken() -> None:
    for key, (signs, example, _) in CONDITIONS.items():
        (condition,) = parse_pattern(f"quote.{{{example}}}").conditions
        assert condition.key == key
        assert condition.sign in signs


@given(st.text("book.{}<>=*?[]-,0129dhkinexpry \n", max_size=60))
def test_any_text_is_a_pattern_or_refused_in_one_line(text: str) -> None:
    try:
        parse_pattern(text)
    except ValueError as error:
        refusal = str(error)
    else:
        expand([text], LISTED, NOW)
        return
    assert refusal
    assert "\n" not in refusal


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists)
    | st.dictionaries(
        st.sampled_from([*ROWS[4], "x"]),
        st.none() | st.integers() | st.floats() | st.text() | st.sampled_from(["option", "BTC-1"]),
    )
)
def test_any_row_is_an_instrument_or_none(row: Any) -> None:
    found = read_instrument(row)
    if found is not None:
        for channels in expand(
            ["quote.{kind=option,strike>1,expiry<1d}", "quote.*"], {found.name: found}, NOW
        ).values():
            assert all(parse_channel(name).instrument == found.name for name in channels)


# over connections


def make_options(count: int) -> dict[str, Instrument]:
    return {
        name: Instrument(name, "option", strike=float(number), expiry=CHRISTMAS)
        for number in range(count)
        if (name := f"BTC-25DEC26-{number}-C")
    }


def make_connection(*patterns: str, **more: Any) -> Connection:
    table = {"name": "options", "url": "practice", "publish": "tcp://127.0.0.1:5601", "channels": list(patterns)}
    return read_connection(table | more, "test", Path("/run"), {})


def test_what_one_connection_carries_stays_one() -> None:
    connection = make_connection("book.*.100ms", "quote.BTC-PERPETUAL", "quote.*PERPETUAL")
    found, _, _ = spread(connection, make_options(499) | LISTED, NOW, Places())
    assert found == {"book.*.100ms": 507, "quote.*PERPETUAL": 2}
    found, (only,), left = spread(connection, make_options(400) | LISTED, NOW, Places())
    assert (only.name, only.publish) == ("options", "tcp://127.0.0.1:5601")
    assert len(only.channels) == len(set(only.channels)) == 410
    assert only.patterns == ()
    assert not left


def test_what_others_have_is_left_to_them() -> None:
    connection = make_connection("quote.*", "quote.BTC-*", "ticker.*PERPETUAL.100ms")
    named = {"quote.BTC-PERPETUAL", "ticker.BTC_USDC-PERPETUAL.100ms", "quote.NEW"}
    taken = Places()
    for name in named:
        taken.add(Placed("other", parse_channel(name)))
    found, (only,), left = spread(connection, LISTED, NOW, taken)
    assert left == named - {"quote.NEW"}
    assert found["quote.*"] == len(LISTED) - 1
    everything = spread(connection, LISTED, NOW, Places()).shards[0].channels
    assert [name for name in everything if name not in named] == list(only.channels)


def test_more_is_spread_evenly_over_the_following_ports() -> None:
    connection = make_connection("book.*.100ms", "ticker.*.100ms", "trades.option.any.100ms")
    listed = make_options(1_200) | LISTED
    found, shards, _ = spread(connection, listed, NOW, Places())
    assert sum(found.values()) == 2 * len(listed)
    assert [(shard.name, shard.publish) for shard in shards] == [
        (f"options-{number}", f"tcp://127.0.0.1:{5600 + number}") for number in range(1, 7)
    ]
    assert Counter(name for shard in shards for name in shard.channels).most_common(1)[0][1] == 1
    rates = [sum(map(estimate_rate, shard.channels)) for shard in shards]
    assert max(rates) <= SLACK * sum(rates) / len(rates) + 3
    assert all(len(shard.channels) <= MAX_CHANNELS for shard in shards)
    for shard in shards:  # an instrument's channels stay together
        books = {name.split(".")[1] for name in shard.channels if name.startswith("book")}
        assert books == {name.split(".")[1] for name in shard.channels if name.startswith("ticker")}
    assert spread(connection, dict(reversed(listed.items())), NOW, Places()) == (found, shards, set())


def test_an_impossible_number_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"options: channels: 16500 channels need 33 connections.*narrow the pattern"):
        spread(make_connection("quote.*"), make_options(16_500), NOW, Places())
    with pytest.raises(ConfigError, match="has no such port"):
        spread(make_connection("quote.*", publish="tcp://127.0.0.1:65535"), make_options(1_500), NOW, Places())


def test_shards_publish_beside_each_other() -> None:
    assert shift_endpoint("ipc:///run/options.pub", 2) == "ipc:///run/options-2.pub"
    assert shift_endpoint("ipc:///run/a.b/options", 1) == "ipc:///run/a.b/options-1"
    assert shift_endpoint("tcp://127.0.0.1:5601", 3) == "tcp://127.0.0.1:5603"
    assert parse_endpoint(shift_endpoint("tcp://127.0.0.1:*", 3)).port == 0


WEIGHTS = st.dictionaries(
    st.text("ABCD-0123", min_size=1, max_size=8),
    st.builds(Weight, st.floats(0.01, 30), st.integers(1, 4)),
    min_size=1, max_size=200,
)  # fmt: skip


@given(WEIGHTS, st.integers(1, 32))
def test_every_instrument_has_one_place_and_no_place_much_more_than_its_share(
    weights: dict[str, Weight], count: int
) -> None:
    places = assign(weights, count, {})
    assert places.keys() == weights.keys()
    assert set(places.values()) <= set(range(count))
    rates = [sum(weights[name].rate for name, place in places.items() if place == each) for each in range(count)]
    heaviest = max(weight.rate for weight in weights.values())
    assert max(rates) <= SLACK * sum(rates) / count + heaviest + 1e-6


@given(WEIGHTS, WEIGHTS, st.integers(1, 32))
def test_who_has_a_place_keeps_it_while_others_come_and_go(
    before: dict[str, Weight], after: dict[str, Weight], count: int
) -> None:
    places = assign(before, count, {})
    later = assign(after, count, places)
    assert later.keys() == after.keys()
    assert all(later[name] == places[name] for name in before.keys() & after.keys())


def test_most_keep_their_place_also_over_a_restart() -> None:
    before = {f"BTC-{number}": Weight(0.2, 2) for number in range(1_500)}
    after = {f"BTC-{number}": Weight(0.2, 2) for number in range(20, 1_520)}
    old, new = assign(before, 7, {}), assign(after, 7, {})
    moved = [name for name in before.keys() & after.keys() if old[name] != new[name]]
    assert len(moved) < 0.05 * len(before), len(moved)


def test_busy_channels_need_more_connections_than_quiet_ones() -> None:
    perpetuals = [f"quote.X{number}_USDC-PERPETUAL" for number in range(131)]
    assert count_shards(weigh([f"book.X{number}_USDC-PERPETUAL.100ms" for number in range(131)])) == 1
    assert sum(map(estimate_rate, perpetuals)) > MAX_RATE
    assert count_shards(weigh(perpetuals)) == 2
    assert count_shards(weigh([f"quote.BTC-25DEC26-{number}-C" for number in range(400)])) == 1
    assert count_shards({"BTC-1": Weight(0.2, 16_000)}) == 32  # as many as there may be, each a little fuller
    assert estimate_rate("trades.option.any.100ms") > estimate_rate("trades.BTC-PERPETUAL.100ms")
    assert estimate_rate("book.BTC-PERPETUAL.raw") > estimate_rate("book.BTC-PERPETUAL.100ms")
