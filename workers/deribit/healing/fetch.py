"""Which pages of trades to ask the exchange for, to heal what a channel lacks. Pure: requests go out, pages come in.

A healing is a generator: it yields an `Ask`, is sent the `Page` once its trades have been handed to the feed (None if
the exchange refused), and yields `Healed` for each topic of which all that can be had has come.
"""

from collections.abc import Generator
from typing import Any, NamedTuple

from workers.deribit.feeds.frames import MS, TradeData
from workers.deribit.feeds.trades.feed import TradeFeed
from workers.deribit.feeds.trades.holes import MAX_HELD, Hole
from workers.deribit.feeds.trades.tape import Tape
from workers.deribit.publishing.streams import Stream

PAGE = 1000
"""Trades of one answer; more are not given."""

PAGES = MAX_HELD // PAGE + 1
"""Pages of one run: of more than they hold nothing is kept."""

SLACK_MS = 5000
"""A fetch by time begins this much before the loss: clocks differ, and repeats are known by their trade_seq."""

KEPT_MS = 86_400_000 - 3_600_000
"""How far back a fetch by time goes: the exchange answers for a day. Asked for an earlier start it returns nothing,
without an error, not even what it still has; asked for an earlier number it gives that (measured, 2026). An hour less,
since a request may be sent long after it was made: it waits for credits, behind others, and where the exchange wants it
later.
"""

UNNOTICED_MS = 120_000
"""For so long a connection may have been dead before that was noticed."""

PAUSES = (0.0, 0.5, 1.0, 2.0)
"""Seconds before each try to get what is still missing: the exchange's history may be a little behind its stream."""

LATE = sum(PAUSES)
"""Seconds before the last look by time: by then the history is as far as at the last try by number."""

CURRENCIES = ("BTC", "ETH", "USDC", "USDT", "EURR")
SINGLE_KINDS = ("future", "option", "spot", "future_combo", "option_combo")
"""What `any` stands for in requests for trades. Of all kinds at once Deribit gives none where a pair of the currency is
matched at Coinbase (docs.deribit.com: spot trading venues, 2026)."""


class Ask(NamedTuple):
    """One request, to be sent after `pause` seconds."""

    pause: float
    method: str
    params: dict[str, Any]


class Page(NamedTuple):
    """What one request brought; `has_more`: and that was not all."""

    trades: list[TradeData]
    has_more: bool


class Healed(NamedTuple):
    """These holes of a tape are as full as they will be."""

    tape: Tape
    holes: list[Hole]


Healing = Generator[Ask | Healed, Page | None, None]
Fetch = Generator[Ask | Healed, Page | None, bool]


def heal_feed(feed: TradeFeed, now: int, offset: int, earlier_offset: int | None = None) -> Healing:
    """Heal one channel at `now` (ns); the exchange's clock is `offset` ns ahead of ours, and was `earlier_offset` ahead
    before the loss (None: as much): our clock may have been set in the meantime.

    A wide channel is asked by time first, so that 1,500 instruments do not cost 1,500 requests, and one that was first
    traded while we were away is found. What that did not bring is asked by trade_seq, instrument by instrument.
    A single instrument is asked by trade_seq, and by time only if that does not show the trade before the loss: the
    exchange may count anew. What was asked for by time is looked for once more when the exchange's history is surely
    that far. What comes to be missing later on is left to the next healing, unless it comes at once.
    """
    theirs, shift = now + offset, offset if earlier_offset is None else min(offset, earlier_offset)
    losses = feed.losses
    losses.begin_healing(now)
    since = _leave_to_numbers(feed)
    lost_from = losses.lost_from
    answered = yield from _fetch_loss(feed, theirs, shift)
    since = None if since is None else _date_loss(since, shift, theirs)
    yield from _fetch_numbers(feed, theirs, not answered, since)
    if lost_from is not None:  # only now: what is known to be missing need not wait for what may be
        answered &= yield from _fetch_all(feed, theirs // MS - SLACK_MS, theirs // MS + SLACK_MS, LATE)
        losses.end(is_whole=answered)  # what was refused so often will not be had later either
        yield from _fetch_numbers(feed, theirs, not answered, None)


def heal_known(feed: TradeFeed) -> Healing:
    """Fetch once, by number, what is known to be missing, while a healing of the channel awaits an answer by time."""
    if feed.losses.lost_from is None:
        return
    for tape in [each for each in feed.tapes.values() if any(hole.is_bounded for hole in each.holes)]:
        missing = tape.find_missing(tails=False)
        if missing is not None and not (yield from _fetch_run(tape.stream, *missing, 0.0)):
            return  # what is refused, or not there yet, is left to that healing
        if not tape.lacks_more(tails=False):  # one that may lie between two counts is left to that healing, too
            yield Healed(tape, [hole for hole in tape.holes if hole.is_bounded and not hole.known[0]])


def _fetch_numbers(feed: TradeFeed, theirs: int, tails: bool, since: int | None) -> Healing:
    """Fetch by number what is missing; of a single instrument by time, too, if its trade before the loss is not there:
    that is all `since` then, by the exchange's clock.
    """
    tried: set[Hole] = set()
    losses = feed.losses
    for pause in PAUSES:
        wait = pause
        for tape in [each for each in feed.tapes.values() if each.holes or each.find_missing(tails)]:
            missing, answered = tape.find_missing(tails), True
            if missing is not None:
                answered = yield from _fetch_run(tape.stream, *missing, wait)
                wait = 0.0
                if since is not None and answered and not losses.is_checked:
                    yield from _fetch_since(feed, since, theirs)
                    since = None
            # What a quiet tail, or a new instrument or count, may lack is known only by time: until then it stays open.
            ripe = [hole for hole in tape.holes if hole.is_bounded or losses.lost_from is None]
            tried.update(ripe if pause == PAUSES[0] else ())
            if not tape.lacks_more(tails):
                yield Healed(tape, ripe)
            elif pause == PAUSES[-1]:
                yield Healed(tape, [hole for hole in ripe if hole in tried])


def _leave_to_numbers(feed: TradeFeed) -> int | None:
    """End the loss of a single instrument whose trades are numbered: these show what is missing; say since when."""
    losses = feed.losses
    if not (feed.channel.instrument and all(tape.is_numbered for tape in feed.tapes.values())):
        return None
    since = losses.lost_from
    losses.end()
    return since


def _fetch_loss(feed: TradeFeed, theirs: int, shift: int) -> Fetch:
    """Fetch by time all that a lost connection may have cost a channel; say whether all of it has been answered.

    `theirs` is the exchange's time now; earlier times of ours are that by `shift`.
    """
    losses = feed.losses
    if losses.lost_from is None:
        return losses.is_checked and not feed.channel.instrument  # by an earlier healing
    fetch = _fetch_once if feed.channel.instrument else _fetch_since
    answered = yield from fetch(feed, _date_loss(losses.lost_from, shift, theirs), theirs)
    # While the connection stood, everything came: quiet days before the loss need not be asked for.
    answered &= losses.away_from is None or losses.away_from + shift > theirs - (KEPT_MS - UNNOTICED_MS) * MS
    if losses.newer_from is None and not feed.channel.instrument:
        losses.is_checked = answered  # one alone is checked once its trade before the loss has been seen again
    return answered


def _date_loss(since: int, shift: int, theirs: int) -> int:
    """Since when trades are missing, by the exchange's clock. `since` may be a time of either: the earlier is taken.

    One that is still to come is of our clock before that was set back: then nothing tells when it was.
    """
    since += min(shift, 0)
    return since if since // MS - SLACK_MS <= theirs // MS else 0


def _fetch_once(feed: TradeFeed, since: int, now: int) -> Fetch:
    return (yield from _fetch_all(feed, max(since // MS - SLACK_MS, now // MS - KEPT_MS), now // MS + SLACK_MS, 0.0))


def _fetch_since(feed: TradeFeed, since: int, now: int) -> Fetch:
    answered = yield from _fetch_once(feed, since, now)
    # Twice: what was traded just now may not yet be in the exchange's history, and a new count would not be seen.
    start, end = max(since, now) // MS - SLACK_MS, now // MS + SLACK_MS
    return (yield from _fetch_all(feed, start, end, PAUSES[1])) and answered


def _fetch_all(feed: TradeFeed, start: int, end: int, pause: float) -> Fetch:
    """Fetch what all instruments of a channel traded from `start` to `end` (ms of the exchange)."""
    channel, answered = feed.channel, True
    if channel.instrument:
        subjects = [{"instrument_name": channel.instrument}]
    else:
        kinds = SINGLE_KINDS if channel.kind == "any" else (channel.kind,)
        currencies = CURRENCIES if channel.currency == "any" else (channel.currency,)
        subjects = [{"currency": currency, "kind": kind} for currency in currencies for kind in kinds]
    for subject in subjects:
        answered &= yield from _fetch_period(subject, start, end, pause)
        pause = 0.0
    return answered


def _fetch_period(subject: dict[str, str], start: int, end: int, wait: float) -> Fetch:
    method = f"public/get_last_trades_by_{'instrument' if 'instrument_name' in subject else 'currency'}_and_time"
    while start <= end:
        params = {**subject, "start_timestamp": start, "end_timestamp": end, "count": PAGE, "sorting": "asc"}
        for pause in PAUSES:  # nothing else would find an instrument that was first traded while we were away
            page = yield Ask(max(pause, wait), method, params)
            wait = 0.0
            if page is not None:
                break
        else:
            return False
        if not (page.trades and page.has_more):
            return True
        if (last := page.trades[-1].timestamp) < start:
            return False  # it is no answer to this: who tells no times would be asked without end
        # A page may end within one ms: what it repeats is known, but one that does not lead on must not hold us up.
        start = last + (last == start)
    return True


def _fetch_run(stream: Stream, first: int, last: int | None, pause: float) -> Fetch:
    first = max(1, first - 1)  # the one before is known: if it is another now, the exchange counts anew
    for _ in range(PAGES):
        params = {"instrument_name": stream.instrument, "start_seq": first, "count": PAGE, "sorting": "asc"}
        if last is not None:
            params["end_seq"] = last
        page = yield Ask(pause, "public/get_last_trades_by_instrument", params)
        if page is None:
            return False
        following = _find_following(page.trades, first)
        if not page.has_more or following <= first:
            return True
        first, pause = following, 0.0
    return True


def _find_following(trades: list[TradeData], first: int) -> int:
    """From which number on to ask for more than these, which were asked for from `first` on.

    They go by time: a page may end between the trades of one ms, which stand in any order (seen at history.deribit.com,
    2026). All of that ms are asked for once more, unless they fill the page.
    """
    older = [each.trade_seq for each in trades if each.timestamp < trades[-1].timestamp]
    following = max(older, default=0) + 1
    return following if following > first else max((each.trade_seq for each in trades), default=0) + 1
