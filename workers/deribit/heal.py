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
from workers.deribit.fetch import Ask, Healed, Page, heal_feed
from workers.deribit.frames import TradeData, convert_laxly
from workers.deribit.payloads import Repair
from workers.deribit.publisher import Publisher
from workers.deribit.trades import TradeFeed

log = logging.getLogger("deribit")

SURE = 5.0
"""Seconds after which what was published is taken to have left this process, should it be killed."""

AT_ONCE = 8
"""Channels that are healed side by side."""


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
        healing = heal_feed(feed, time.time_ns(), self._client.session.clock_offset)
        page = None
        try:
            while True:
                step = healing.send(page)
                if isinstance(step, Healed):
                    page = None
                    self._end(feed, step)
                else:
                    page = await self._fetch(feed, step)
        except StopIteration:
            pass
        except (Lost, NotConnected, TimeoutError) as error:
            log.info("healing of %s goes on after the next bootstrap: %s", feed.channel.name, error)
            if self._client.machine.state == "live":
                self.heal(feed)

    def _end(self, feed: TradeFeed, healed: Healed) -> None:
        for message in feed.end_healing(healed.stream, healed.holes, self._client.read_clock()):
            if isinstance(message, Repair):
                self.repaired += message.repaired
                self.missing += sum(last - first + 1 for first, last in message.missing)
            self._publisher.say(healed.stream, message)
        asyncio.get_running_loop().call_later(SURE, feed.settle, healed.stream)

    async def _fetch(self, feed: TradeFeed, ask: Ask) -> Page | None:
        """Send one request and publish what it brings; None if the exchange refuses. Raises Lost and its kin."""
        await asyncio.sleep(max(ask.pause, self._credits.take(CALL_COST, time.monotonic())))
        try:
            page = read_page(await self._client.send(ask.method, ask.params))
            now = self._client.read_clock()
            self._publisher.publish(feed.backfill(page.trades, now), now)
        except (ExchangeError, ValueError) as error:
            log.warning("trades of %s could not be fetched: %s", feed.channel.name, error)
            return None
        return page


def read_page(answer: Any) -> Page:
    """The trades of an answer. Raises ValueError if it holds none."""
    try:
        return Page(convert_laxly(answer["trades"], list[TradeData]), bool(answer.get("has_more")))
    except (msgspec.ValidationError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the answer holds no trades: {error}") from None
