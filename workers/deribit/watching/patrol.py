"""Once a second: the heartbeat, and a look at what silence, lag and waiting books say."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import count

from collector.limits import CALL_COST, Credits
from collector.messages import EXCHANGE, WIRE
from collector.words import say_count
from workers.deribit.connection.client import Client
from workers.deribit.connection.credits import pay
from workers.deribit.connection.session import NEVER
from workers.deribit.feeds.book import BookFeed
from workers.deribit.feeds.feed import Feed
from workers.deribit.feeds.rhythm import QUIET, SECOND, Rhythm
from workers.deribit.publishing.ledger import HEARD, OUT
from workers.deribit.publishing.payloads import ConnectionHeartbeat
from workers.deribit.publishing.publisher import Publisher
from workers.deribit.publishing.streams import Topics
from workers.deribit.rpc.errors import ExchangeError, Lost, Reaction, Refused, find_reaction
from workers.deribit.watching.lag import LagWatch, Samples
from workers.deribit.watching.statuses import LAST_DATA, MUTE, REPEAT, Statuses

log = logging.getLogger("deribit")

RECONNECT_ONCE_IN = 60 * SECOND
"""Time between reconnections that nothing but our own judgement asks for."""

SNAPSHOT_WAIT = 5.0
"""Seconds after which a book that is subscribed to and has no snapshot is asked for anew."""

RESYNCS, REFILL = 10.0, 1 / 20
"""How often one book may be asked for anew, and how many times more each second. Then it has to wait."""

HOUR = 3600
"""Seconds between looks for topics that can be forgotten."""

SLICE = 500
"""Channels that are looked at in one go: some 0.2 ms."""

TOGETHER = 0.1
"""Seconds in which books that break are gathered, to be asked for by one call: they often break together."""

PATIENCE = 5
"""Seconds after which files that cannot be made again are told: the supervisor may be making their directory."""

RHYTHMIC = ("book", "ticker", "quote", "trade", "index", "volatility", "mark_prices", "funding", "expiration_price")
"""Types whose silence can mean something; the others speak only when something happens."""


class Patrol:
    """Watches over the feeds of one connection. `resyncs` counts books asked for anew, `rate` is messages/s.

    `take_up(names, epoch)` is called for channels that were taken for ended too early.
    """

    def __init__(
        self, name: str, feeds: Mapping[bytes, Feed], client: Client, publisher: Publisher,
        statuses: Statuses, topics: Topics, take_up: Callable[[list[str], int], None],
    ) -> None:  # fmt: skip
        self._name = name
        self._feeds = feeds
        self._client = client
        self._publisher = publisher
        self._statuses = statuses
        self._topics = topics
        self._take_up = take_up
        self._heartbeat = topics.find("heartbeat", name, "1s")
        self._counted = 0
        self._frames = self._heard_at = 0
        self._whole = Rhythm()
        self._late = LagWatch()
        self._broken: dict[Feed, None] = {}
        self._reconnected = -RECONNECT_ONCE_IN  # monotonic, ns
        self._ask_at = 0.0
        self._unrestored = 0
        self._has_rationed = False
        self.lag = Samples()
        self.last_ts = 0
        self.rate = 0.0
        self.resyncs = 0

    def take_lag(self, lag: int) -> None:
        """One sample of lag, in ns."""
        self.lag.add(lag)
        self._late.add(lag)

    async def run(self) -> None:
        """Look once a second, until cancelled."""
        due = time.monotonic()
        for second in count():
            due = max(due + 1.0, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            if self._publisher.is_out:  # before the heartbeat, which would wait
                self._topics.ledger.cells[OUT] = time.time_ns()
            published = self._publisher.published
            self.rate, self._counted = float(published - self._counted), published
            self._say_heartbeat()
            self._restore_files()
            self._topics.forget_left(time.monotonic_ns())
            if second % HOUR == HOUR - 1:
                await self._forget_all_old()
            if self._client.is_live:
                self._topics.ledger.cells[HEARD] = time.time_ns()
                now = time.monotonic_ns()
                self._judge_lag(now)
                self._note_heard()
                self._judge_whole(now)
                self._judge_books(now)
            self._statuses.repeat_others(second % REPEAT)
            await self._look_at_all(second % REPEAT)

    async def _look_at_all(self, part: int) -> None:
        """Look at each feed, and say again what is due in this part of REPEAT; in slices: what comes may not wait."""
        names, silent, is_steady = list(self._feeds), [], False
        for start in range(0, len(names), SLICE):
            feeds = [feed for name in names[start : start + SLICE] if (feed := self._feeds.get(name)) is not None]
            with self._publisher.gather():
                self._statuses.repeat(feeds, part)
                if self._client.is_live:
                    self._tell_lag(feeds)
                    now = time.monotonic_ns()
                    silent += self._judge_feeds(feeds, now)
                    if part == 0:
                        silent += [feed for feed in feeds if self._is_over(feed, now)]
                    is_steady = is_steady or any(map(_is_heard, feeds))
            await asyncio.sleep(0)
        self._whole.is_steady = is_steady
        if silent and self._may_ask_for_life():
            # Aside: the answer may be long in coming, and heartbeats may not wait.
            self._client.spawn(self._tell_silent(silent))
        if part == 0 and self._client.is_live:
            self._take_up_early()

    async def _forget_all_old(self) -> None:
        """Options come and go every day; a collector that runs for months must not keep them all."""
        while self._forget_old():  # in slices: what comes may not wait
            await asyncio.sleep(0)

    def _forget_old(self) -> bool:
        """Forget some topics; say whether there were any."""
        kept = {feed.stream for feed in self._feeds.values() if feed.channel.instrument}
        clock = self._client.session.read_exchange_clock()
        gone = set(self._topics.forget_old(time.monotonic_ns(), clock, kept))
        for feed in self._feeds.values():
            for stream in gone.intersection(feed.streams.values()):
                feed.forget(stream)
        return bool(gone)

    def _say_heartbeat(self) -> None:
        self._publisher.say(
            self._heartbeat,
            ConnectionHeartbeat(
                EXCHANGE, self._name, self._topics.epoch, 0, 0, time.time_ns(), WIRE, self._name,
                self._client.machine.state, self._publisher.published, self.lag.newest / 1e9,
            ),
        )  # fmt: skip

    def _restore_files(self) -> None:
        """Make anew what somebody has removed from the runtime directory; the directory itself is the supervisor's."""
        try:
            self._publisher.restore()
        except OSError as error:
            self._unrestored += 1
            if self._unrestored == PATIENCE:
                log.error("a file was removed and cannot be made again: %s", error)
        else:
            self._unrestored = 0

    def begin(self) -> None:
        """The connection is live: its silence counts from now on, not that of the time when it was away."""
        self._heard_at = self._client.session.read_exchange_clock()
        self._whole.restart(self.last_ts, time.monotonic_ns())

    def lose(self) -> None:
        """The connection is gone, and what was thought of its lag."""
        self._late = LagWatch()
        self._broken.clear()
        self._has_rationed = False

    # -- lag ----------------------------------------------------------------------------------------------------------

    def _judge_lag(self, now: int) -> None:
        was_lagging = self._late.is_lagging
        hopeless = self._late.end_second()
        if self._late.is_lagging != was_lagging:
            log.warning("lag is over, %.1f s" if was_lagging else "lag %.1f s", self.lag.newest / SECOND)
        if hopeless:
            self._reconnect(now, f"data come {self.lag.newest / SECOND:.0f} s late, and later and later")

    def _tell_lag(self, feeds: list[Feed]) -> None:
        fine, late = ("live", ""), ("stale", "lag")
        before, after = (fine, late) if self._late.is_lagging else (late, fine)
        for feed in feeds:  # each second: some may have come into step only now
            if feed.condition == before:
                self._statuses.tell(feed, *after)

    def _reconnect(self, now: int, reason: str) -> None:
        if now - self._reconnected > RECONNECT_ONCE_IN:
            self._reconnected = now
            self._client.cut(reason)

    def _note_heard(self) -> None:
        """Whatever comes, be it a heartbeat, comes after all that was sent before it; unless data are late.

        After a standstill, the network's or our own, it may be the first of what has waited for long: sure is only what
        was sent before the one before it had come.
        """
        frames, before = self._client.traffic.frames, self._frames
        self._frames = frames
        if frames != before and not self._late.is_lagging:
            self._statuses.heard_until, self._heard_at = self._heard_at, self._client.session.read_exchange_clock()

    # -- silence ------------------------------------------------------------------------------------------------------

    def _judge_whole(self, now: int) -> None:
        self._whole.look(self.last_ts, now)
        if self._whole.is_broken(now) and self._may_ask_for_life() and now - self._reconnected > RECONNECT_ONCE_IN:
            self._client.spawn(self._reconnect_if_silent())

    async def _reconnect_if_silent(self) -> None:
        """No data at all: a new connection may bring them, if the exchange is open. Where it does not, none was due.

        A connection on which nothing comes, not even the answer, is dead: the heartbeat would show that much later.
        """
        frames = self._client.traffic.frames
        proven = await self._ask_for_life()
        now = time.monotonic_ns()
        self._whole.look(self.last_ts, now)
        silence = self._whole.measure_silence(now)
        if proven and self._whole.is_broken(now):
            self._whole.admit(now)
            self._reconnect(now, f"no data at all for {silence:.0f} s")
        elif frames == self._client.traffic.frames and self._client.is_live:
            self._client.cut(f"no data for {silence:.0f} s, and no answer to public/test")

    def _judge_feeds(self, feeds: list[Feed], now: int) -> list[Feed]:
        """Those that have fallen mute, as it seems."""
        mute = []
        for feed in feeds:
            feed.rhythm.look(feed.last_ts, now)
            if not feed.is_complete:
                self._judge_waiting(feed)
            elif feed.condition == MUTE and not feed.rhythm.is_broken(now):
                self._statuses.tell(feed, "live", "")
            elif feed.condition[0] == "live" and feed.channel.type in RHYTHMIC and feed.rhythm.is_broken(now):
                mute.append(feed)
        return mute

    def _is_over(self, feed: Feed, now: int) -> bool:
        """Whether its instrument has ended by its name, and nothing has come for a while since then.

        While data come late its last ones may be still to come, or what is known of the exchange's clock is wrong. How
        late they are is known only while any come.
        """
        if not feed.channel.instrument or _lasts(feed.rhythm, now):
            return False
        if self._late.is_lagging and _lasts(self._whole, now):
            return False
        ended = self._client.session.read_exchange_clock() - LAST_DATA
        return feed.stream.has_expired(ended) and feed.condition[0] != "expired"

    def _take_up_early(self) -> None:
        """Take up what was taken for ended by a clock that was wrong, as is known by now.

        Found and taken up in one go: whoever speaks in between may have given it up.
        """
        clock = self._client.session.read_exchange_clock() + LAST_DATA
        presumed = [self._feeds[name.encode()] for name in self._client.reconciler.subscriptions.presumed]
        if early := [feed.channel.name for feed in presumed if not feed.stream.has_expired(clock)]:
            log.warning("%s asked for again: not ended as the clock had it", say_count(len(early), "channel"))
            with self._publisher.gather():
                self._take_up(early, 0)

    async def _tell_silent(self, silent: list[Feed]) -> None:
        """Those that are silent while the exchange is there are mute, or have ended."""
        if not await self._ask_for_life():
            return
        now = time.monotonic_ns()
        for feed in filter(self._is_current, silent):  # one may have been given up meanwhile, and taken up anew
            feed.rhythm.look(feed.last_ts, now)  # it may have spoken meanwhile
            is_mute = feed.condition[0] == "live" and feed.rhythm.is_broken(now)
            clock = self._client.session.read_exchange_clock()
            if self._is_over(feed, now) or (is_mute and feed.channel.instrument and feed.stream.has_expired(clock)):
                self._client.reconciler.expire([feed.channel.name], by_clock=True)
            elif is_mute:
                log.warning("%s is silent for %.0f s", feed.channel.name, feed.rhythm.measure_silence(now))
                self._statuses.tell(feed, *MUTE)

    def _may_ask_for_life(self) -> bool:
        return time.monotonic() >= self._ask_at

    async def _ask_for_life(self) -> bool:
        """Whether the exchange answers and says that it is open: only then is silence the channel's own.

        Not twice at a time; one that does not is let alone for a while.
        """
        again, self._ask_at, is_open = time.monotonic() + QUIET / SECOND, NEVER, False
        try:
            await pay(self._client.session.credits, 2 * CALL_COST)
            await self._client.send("public/test")
            status = await self._client.send("public/status")
            is_open = not (isinstance(status, dict) and str(status.get("locked", "")).lower() == "true")
        except ExchangeError as error:
            is_open = find_reaction(error.code) is not Reaction.BACK_OFF  # that is: not now, not for anybody
        except (TimeoutError, Lost):
            pass
        finally:
            self._ask_at = 0.0 if is_open else again
        return is_open

    # -- books --------------------------------------------------------------------------------------------------------

    def _judge_waiting(self, feed: Feed) -> None:
        """A snapshot that does not come is asked for again, as often as the book's allowance lasts."""
        is_given = feed.channel.name in self._client.reconciler.subscriptions.confirmed
        if is_given and time.monotonic() - feed.waiting_since > SNAPSHOT_WAIT:
            self._ask_anew(feed)

    def resync(self, feed: Feed) -> None:
        """Ask for a new snapshot of one channel; later if it breaks again and again, all anew if all of them do."""
        if not self._ask_anew(feed):
            self._has_rationed = True

    def _judge_books(self, now: int) -> None:
        """Once a second, not for each book that breaks: it is a look at all of them, and hundreds break together."""
        if not self._has_rationed:
            return
        self._has_rationed = False
        books = [each for each in self._feeds.values() if isinstance(each, BookFeed)]
        if len(books) > 1 and all(map(_is_sick, books)):
            self._reconnect(now, "all books out of step")

    def _ask_anew(self, feed: Feed) -> bool:
        now = time.monotonic()
        feed.allowance = feed.allowance or Credits(RESYNCS, REFILL, now)
        if feed.allowance.take(1, now):
            if not feed.is_rationed:
                feed.is_rationed = True
                log.warning("%s breaks again and again: a snapshot only each %.0f s", feed.channel.name, 1 / REFILL)
            return False
        feed.is_rationed = feed.is_rationed and _is_sick(feed)
        feed.waiting_since = now
        self._broken[feed] = None
        if len(self._broken) == 1:
            self._client.spawn(self._resubscribe())
        return True

    async def _resubscribe(self) -> None:
        await asyncio.sleep(TOGETHER)
        gathered, self._broken = self._broken, {}
        # Else a snapshot has come unasked, or the channel was taken up anew: to leave now would lose changes.
        broken = [feed for feed in gathered if not feed.is_complete and self._is_current(feed)]
        self.resyncs += len(broken)
        with suppress(Lost, Refused):
            await self._client.reconciler.unsubscribe_once([feed.channel.name for feed in broken])
        for feed in broken:
            if feed.is_complete and self._is_current(feed):
                # One came unasked before the exchange let go of the channel: what changes from then on is lost.
                feed.lose("sequence", time.time_ns())
                self._statuses.tell(feed, "recovering", "sequence")
        with suppress(Lost, Refused):  # then the next connection brings the snapshots
            await self._client.reconciler.reconcile()

    def _is_current(self, feed: Feed) -> bool:
        return self._feeds.get(feed.channel.name.encode()) is feed


def _lasts(rhythm: Rhythm, now: int) -> bool:
    """Whether it has come of late, or has been asked for."""
    return rhythm.measure_silence(now) * SECOND < LAST_DATA


def _is_heard(feed: Feed) -> bool:
    """Whether it is never quiet, and the exchange gives it."""
    return feed.rhythm.is_steady and feed.condition[0] not in ("refused", "expired")


def _is_sick(feed: Feed) -> bool:
    """Whether it has broken again and again of late."""
    return feed.allowance is not None and feed.allowance.level < RESYNCS / 2
