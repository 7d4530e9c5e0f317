"""How traders move one book: makers quote around the fair price, takers sweep what is stale. Random is passed in."""

import math
from dataclasses import dataclass
from random import Random

from workers.exchange.market.book import ASK, BID, Book, Change, sort_levels

Fill = tuple[int, int, int]
"""(side that was hit, tick, lots) of one trade."""


@dataclass(frozen=True, slots=True)
class Style:
    """How a kind of instrument is quoted, in ticks and lots."""

    depth: int  # levels a side
    half_spread: float
    spacing: int
    lots: int  # typical amount of a level
    taking: float  # share of events that are random taker orders
    negative: bool = False  # combos may have prices of 0 and below


STYLES = {
    "perpetual": Style(40, 1.0, 2, 2000, 0.12),
    "future": Style(25, 1.5, 2, 1000, 0.06),
    "option": Style(6, 2.0, 2, 40, 0.08),
    "spot": Style(20, 1.0, 2, 500, 0.08),
    "future_combo": Style(4, 2.0, 2, 500, 0.05, negative=True),
    "option_combo": Style(3, 3.0, 2, 20, 0.05, negative=True),
}


def fill_book(book: Book, fair: float, style: Style, rng: Random) -> None:
    """Put a full set of levels into an empty book."""
    for side in (BID, ASK):
        limit = _limit(side, fair, style)
        for rank in range(style.depth):
            tick = limit + (rank * style.spacing if side == ASK else -rank * style.spacing)
            if tick > 0 or style.negative:
                book.set_level(side, tick, _draw_lots(style, rng))


def act_once(book: Book, fair: float, style: Style, rng: Random) -> tuple[list[Change], list[Fill]]:
    """Let one trader act; return what changed in the book and what was traded. Both may be empty."""
    stale = _find_stale(book, fair, style)
    if stale is not None:
        side, ticks = stale
        if rng.random() < 0.5:
            return [book.set_level(side, tick, 0) for tick in ticks], []
        return _take(book, side, sum(book.sides[side][tick] for tick in ticks[:3]))
    if rng.random() < style.taking:
        side = ASK if rng.random() < 0.5 else BID
        return _take(book, side, max(1, _draw_lots(style, rng) // 2), keep=1)
    return _make(book, fair, style, rng), []


def _limit(side: int, fair: float, style: Style) -> int:
    return math.ceil(fair + style.half_spread) if side == ASK else math.floor(fair - style.half_spread)


def _draw_lots(style: Style, rng: Random) -> int:
    return max(1, int(style.lots * rng.expovariate(1.0)))


def _find_stale(book: Book, fair: float, style: Style) -> tuple[int, list[int]] | None:
    bid, ask = book.best_bid, book.best_ask
    if ask is not None and ask < fair - style.half_spread:
        return ASK, sort_levels(ASK, (tick for tick in book.sides[ASK] if tick < fair))
    if bid is not None and bid > fair + style.half_spread:
        return BID, sort_levels(BID, (tick for tick in book.sides[BID] if tick > fair))
    return None


def _take(book: Book, side: int, lots: int, keep: int = 0) -> tuple[list[Change], list[Fill]]:
    changes, fills = [], []
    for tick in sort_levels(side, book.sides[side]):
        if lots <= 0 or len(book.sides[side]) <= keep:
            break
        held = book.sides[side][tick]
        taken = min(held, lots)
        lots -= taken
        changes.append(book.set_level(side, tick, held - taken))
        fills.append((side, tick, taken))
    return changes, fills


def _make(book: Book, fair: float, style: Style, rng: Random) -> list[Change]:
    side = ASK if rng.random() < 0.5 else BID
    if len(book.sides[side]) > len(book.sides[1 - side]) + style.depth // 2:
        side = 1 - side
    own = book.sides[side]
    away = int(rng.expovariate(3.0 / style.depth)) * style.spacing
    tick = _stay_uncrossed(book, side, _limit(side, fair, style) + (away if side == ASK else -away))
    if tick <= 0 and not style.negative:
        return []
    if tick in own and len(own) > style.depth // 2 and rng.random() < 0.5:
        return [book.set_level(side, tick, 0)]
    changes = []
    if tick not in own and len(own) >= style.depth:
        farthest = max(own) if side == ASK else min(own)
        changes.append(book.set_level(side, farthest, 0))
    changes.append(book.set_level(side, tick, _draw_lots(style, rng)))
    return [change for change in changes if change.old != change.new]


def _stay_uncrossed(book: Book, side: int, tick: int) -> int:
    other = book.best_bid if side == ASK else book.best_ask
    if other is None:
        return tick
    return max(tick, other + 1) if side == ASK else min(tick, other - 1)
