"""Fetches the trades that were missed and has them published, marked, with one repair message for each gap.

New trades are not held up: healing is requests beside the stream, on the same connection, paced to Deribit's credits.
"""

import asyncio
import logging
import time
from contextlib import suppress
from itertools import count
from typing import Any

from collector.limits import CALL_BURST, CALL_COST
from workers.deribit.connection.client import Client
from workers.deribit.connection.credits import pay
from workers.deribit.connection.together import together
from workers.deribit.feeds.frames import convert_trades
from workers.deribit.feeds.trades.feed import TradeFeed
from workers.deribit.feeds.trades.tape import Tape
from workers.deribit.healing.fetch import Ask, Healed, Healing, Page, heal_feed, heal_known
from workers.deribit.publishing.publisher import Publisher
from workers.deribit.publishing.streams import SURE
from workers.deribit.rpc.errors import ExchangeError, Lost, Reaction, find_reaction

log = logging.getLogger("deribit")

PATIENCE = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0)
"""Seconds before each further try of a request that the exchange asks us to send again."""

WORTH_SAYING = PATIENCE[3]
"""The pause before which the log says that a request is tried again and again."""

SLICE = 50
"""Instruments whose healing ends in one go: some 1 ms."""

AT_ONCE = 64
"""Channels that are healed side by side: many wait, for a late history or for the credits that pace all requests."""


class Healer:
    """Heals the feeds that call for it, in turn."""

    def __init__(self, client: Client, publisher: Publisher) -> None:
        self._client = client
        self._publisher = publisher
        self._turns: asyncio.Queue[TradeFeed] = asyncio.Queue()
        self._room = asyncio.Semaphore(AT_ONCE)
        self._calling: set[TradeFeed] = set()
        self._under_way: set[TradeFeed] = set()
        self._is_closed = False
        self._rested = asyncio.Event()

    def heal(self, feed: TradeFeed) -> None:
        """Fetch what this feed lacks, as soon as the connection is live; once more where that is under way already."""
        self._calling.add(feed)
        if feed not in self._under_way:
            self._under_way.add(feed)
            self._turns.put_nowait(feed)

    async def run(self) -> None:
        """Heal whatever is asked for, until cancelled: a feed that must be patient holds up none but itself."""
        async with together() as group:
            while True:
                await self._room.acquire()
                feed = await self._turns.get()
                await self._client.wait_live()
                group.create_task(self._take_turn(feed))

    async def _take_turn(self, feed: TradeFeed) -> None:
        self._calling.discard(feed)
        await self._heal_feed(feed)
        self._room.release()
        if feed in self._calling:
            self._turns.put_nowait(feed)
        else:
            self._under_way.discard(feed)
        self._rested.set()

    async def finish(self, feeds: list[TradeFeed]) -> None:
        """Heal these, and wait until nothing more can be had of what they lack."""
        for feed in feeds:
            self.heal(feed)
        while not self._under_way.isdisjoint(feeds):
            self._rested.clear()
            await self._rested.wait()

    async def _heal_feed(self, feed: TradeFeed) -> None:
        session = self._client.session
        healing = heal_feed(feed, time.time_ns(), session.clock_offset, session.earlier_offset)
        feed.changed = False
        try:
            await self._carry_out(feed, healing)
            if feed.changed:  # what was fetched shows that more is missing
                self.heal(feed)
        except (Lost, TimeoutError) as error:
            log.info("healing of %s goes on after the next bootstrap: %s", feed.channel.name, error)
            self.heal(feed)

    async def _carry_out(self, feed: TradeFeed, healing: Healing) -> None:
        page, said = None, count(1)
        with suppress(StopIteration):
            while not feed.is_ended:
                step = healing.send(page)
                if isinstance(step, Healed):
                    page = None
                    self._say_repairs(feed, step)
                    if next(said) % SLICE == 0:  # what comes may not wait for a thousand of these
                        await asyncio.sleep(0)
                else:
                    page = await self._fetch(feed, step)

    def end(self, feed: TradeFeed) -> None:
        """Nobody asks for this channel any more: what came is all that comes; say what is not known to have come."""
        for stream, message in feed.end(feed in self._under_way, self._client.read_clock()):
            self._publisher.say(stream, message)

    def _say_repairs(self, feed: TradeFeed, healed: Healed) -> None:
        for message in healed.tape.end_healing(healed.holes, self._client.read_clock()):
            self._publisher.say(healed.tape.stream, message)
        asyncio.get_running_loop().call_later(SURE, self._note_out, feed, healed.tape)

    def _note_out(self, feed: TradeFeed, tape: Tape) -> None:
        if not (self._is_closed or feed.is_ended):  # then the topic is left, or another channel's by now
            tape.note_out()

    def close(self) -> None:
        """Leave the ledger alone from now on: a later life fetches again what was not surely out."""
        self._is_closed = True

    async def _fetch(self, feed: TradeFeed, ask: Ask) -> Page | None:
        """Send one request and publish what it brings; None if the exchange refuses. Raises Lost and its kin."""
        await asyncio.sleep(ask.pause)
        try:
            page = read_page(await self._send_patiently(ask, feed))
        except (ExchangeError, ValueError) as error:
            log.warning("trades of %s could not be fetched: %s", feed.channel.name, error)
            return None
        except TimeoutError:
            feed.put_last(ask.params.get("instrument_name", ""))
            raise
        if not feed.is_ended:
            now = self._client.read_clock()
            self._publisher.publish(feed.backfill(page.trades, now), now, is_fetched=True)
        return page

    async def _send_patiently(self, ask: Ask, feed: TradeFeed) -> Any:
        """Settlement or maintenance may last: while the exchange asks for patience it gets it, and where it is silent:
        all pages of before would have to be fetched again. What is known to be missing need not wait for an answer by
        time: who stops or dies meanwhile would never have asked for it.
        """
        for patience in (*PATIENCE, None):
            await pay(self._client.session.credits, CALL_COST, reserve=CALL_BURST / 2)  # bootstraps come first
            try:
                return await self._client.send(ask.method, ask.params)
            except (ExchangeError, TimeoutError) as error:
                if patience is None or not wants_patience(error):
                    raise
                if patience == WORTH_SAYING:
                    reason = str(error) or "no answer"
                    log.warning("trades of %s cannot be fetched yet: %s; tried again", feed.channel.name, reason)
                if "start_timestamp" in ask.params:
                    await self._carry_out(feed, heal_known(feed))
                await asyncio.sleep(patience)


def wants_patience(error: ExchangeError | TimeoutError) -> bool:
    """Whether the same request may be answered later."""
    return isinstance(error, TimeoutError) or find_reaction(error.code) in (Reaction.RETRY, Reaction.BACK_OFF)


def read_page(answer: Any) -> Page:
    """The trades of an answer, without those that are none. Raises ValueError if it holds none at all."""
    try:
        rows, has_more = list(answer["trades"]), bool(answer.get("has_more"))
    except (KeyError, TypeError) as error:
        raise ValueError(f"the answer holds no trades: {error}") from None
    try:
        return Page(convert_trades(rows), has_more)
    except ValueError as error:
        trades = []
        for row in rows:  # one that cannot be read must not cost all that came with it
            with suppress(ValueError):
                trades += convert_trades([row])
        if not trades:
            raise ValueError(f"the answer holds no trades: {error}") from None
        log.warning("%d fetched trades could not be read: %s", len(rows) - len(trades), error)
        return Page(trades, has_more)
