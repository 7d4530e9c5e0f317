"""Fetches the trades that were missed and has them published, marked, with one repair message for each gap.

New trades are not held up: healing is requests beside the stream, on the same connection, paced to Deribit's credits.
"""

import asyncio
import logging
import time
from typing import Any

import msgspec

from collector.limits import CALL_COST, CALL_POOL, Credits
from workers.deribit.connection import Client
from workers.deribit.errors import ExchangeError, Lost, NotConnected
from workers.deribit.frames import TradeData
from workers.deribit.publisher import Publisher
from workers.deribit.streams import Stream
from workers.deribit.trades import TradeFeed

log = logging.getLogger("deribit")

PAGE = 1000
"""Trades of one answer; more are not given."""

SLACK_MS = 5000
"""A fetch by time begins this much before the loss: clocks differ, and repeats are known by their trade_seq."""

PAUSES = (0.0, 0.5, 1.0, 2.0)
"""Seconds before each try to get what is still missing: the exchange's history may be a little behind its stream."""

AT_ONCE = 8
"""Streams that are healed side by side."""

CURRENCIES = ("BTC", "ETH", "USDC", "USDT", "EURR")
"""What `any` stands for in requests for trades."""

FAILURES = (ExchangeError, Lost, NotConnected, TimeoutError)


class Healer:
    """The feeds that wait for healing. `repaired` and `missing` count trades over this epoch."""

    def __init__(self, client: Client, publisher: Publisher) -> None:
        self._client = client
        self._publisher = publisher
        self._credits = Credits(CALL_POOL // 2, now=time.monotonic())
        self._waiting: dict[TradeFeed, None] = {}
        self._called = asyncio.Event()
        self.repaired = 0
        self.missing = 0

    def heal(self, feed: TradeFeed) -> None:
        """Fetch what this feed lacks, soon."""
        self._waiting[feed] = None
        self._called.set()

    async def run(self) -> None:
        """Heal whatever is asked for, until cancelled."""
        while True:
            await self._called.wait()
            self._called.clear()
            feeds, self._waiting = list(self._waiting), {}
            for start in range(0, len(feeds), AT_ONCE):
                await asyncio.gather(*(self._heal_feed(feed) for feed in feeds[start : start + AT_ONCE]))

    async def _heal_feed(self, feed: TradeFeed) -> None:
        try:
            if not feed.channel.instrument and feed.lost_from is not None:
                await self._fetch_by_time(feed, feed.lost_from)
            streams = [stream for stream in feed.streams.values() if feed.find_missing(stream)]
            for start in range(0, len(streams), AT_ONCE):
                await asyncio.gather(*(self._heal_stream(feed, s) for s in streams[start : start + AT_ONCE]))
            for stream in list(feed.holes):
                self._end(feed, stream)
            feed.lost_from = None
        except (Lost, NotConnected, TimeoutError) as error:
            log.info("healing of %s goes on after the next bootstrap: %s", feed.channel.name, error)
            if self._client.machine.state == "live":
                self.heal(feed)

    async def _heal_stream(self, feed: TradeFeed, stream: Stream) -> None:
        for pause in PAUSES:
            await asyncio.sleep(pause)
            missing = feed.find_missing(stream)
            if missing is None:
                break
            try:
                await self._fetch_by_seq(feed, stream, *missing)
            except ExchangeError as error:
                log.warning("trades of %s could not be fetched: %s", stream.instrument, error)
                break
            if missing[1] is None and not feed.holes.get(stream):
                break  # nothing came after the last trade that we have, and nothing says that anything should
        self._end(feed, stream)

    def _end(self, feed: TradeFeed, stream: Stream) -> None:
        for repair in feed.end_healing(stream, self._client.read_clock()):
            self.repaired += repair.repaired
            self.missing += sum(last - first + 1 for first, last in repair.missing)
            self._publisher.say(stream, repair)

    async def _fetch_by_seq(self, feed: TradeFeed, stream: Stream, first: int, last: int | None) -> None:
        while True:
            params: dict[str, Any] = {
                "instrument_name": stream.instrument,
                "start_seq": first,
                "count": PAGE,
                "sorting": "asc",
            }
            if last is not None:
                params["end_seq"] = last
            trades, has_more = await self._fetch("public/get_last_trades_by_instrument", params)
            self._publish(feed, trades)
            if not (trades and has_more) or trades[-1].trade_seq < first:
                return
            first = trades[-1].trade_seq + 1

    async def _fetch_by_time(self, feed: TradeFeed, lost_from: int) -> None:
        channel, offset = feed.channel, self._client.session.clock_offset
        start = (lost_from + offset) // 1_000_000 - SLACK_MS
        for currency in CURRENCIES if channel.currency == "any" else (channel.currency,):
            params = {"currency": currency, "count": PAGE, "sorting": "asc"}
            if channel.kind != "any":
                params["kind"] = channel.kind
            await self._fetch_period(feed, params, start, (time.time_ns() + offset) // 1_000_000 + SLACK_MS)

    async def _fetch_period(self, feed: TradeFeed, params: dict[str, Any], start: int, end: int) -> None:
        while True:
            period = {"start_timestamp": start, "end_timestamp": end}
            try:
                trades, has_more = await self._fetch("public/get_last_trades_by_currency_and_time", params | period)
            except ExchangeError as error:
                log.warning("trades of %s could not be fetched: %s", params["currency"], error)
                return
            self._publish(feed, trades)
            if not (trades and has_more):
                return
            # A page may end within one ms: what it repeats is known, and a page of one ms alone must not hold us up.
            start = max(trades[-1].timestamp, start + (trades[-1].timestamp == trades[0].timestamp == start))

    async def _fetch(self, method: str, params: dict[str, Any]) -> tuple[list[TradeData], bool]:
        await asyncio.sleep(self._credits.take(CALL_COST, time.monotonic()))
        answer = await self._client.send(method, params)
        try:
            trades = msgspec.convert(answer["trades"], list[TradeData], strict=False)
            return trades, bool(answer.get("has_more"))
        except (msgspec.ValidationError, KeyError, TypeError, AttributeError) as error:
            raise ExchangeError({"code": 0, "message": f"{method}: the answer holds no trades: {error}"}) from None

    def _publish(self, feed: TradeFeed, trades: list[TradeData]) -> None:
        now = self._client.read_clock()
        self._publisher.publish(feed.backfill(trades, now), now)
