"""An exchange that counts anew: after a reset it may number an instrument's trades from a lower number on. Pure.

It says so nowhere. What shows it is a trade that is newer than all before, with a number that was given before.
"""

from operator import itemgetter

from msgspec import UNSET

from workers.deribit.feeds.frames import MS, TradeData
from workers.deribit.feeds.trades.holes import Hole, Known, contradicts
from workers.deribit.feeds.trades.tape import Tape
from workers.deribit.publishing.ledger import BEFORE, BEGUN, FIRST, KNOWN
from workers.deribit.publishing.streams import ANY_ID, Published


def find_contradiction(tape: Tape, data: TradeData) -> Known | None:
    """What is known that cannot be, unless the exchange counts anew; None if it does not."""
    known, due = [tape.tell_known()], tape.stream.due
    if due is not None and due.reason == "restart":
        # Nothing has been said in this life: what the one before had not found out counts as well.
        known += [hole.known for hole in tape.holes]
    return min((each for each in known if contradicts(each, data)), key=itemgetter(1), default=None)


def begin_count(tape: Tape, known: Known, seq: int, now: int, published: Published) -> None:
    """A trade bears a number that was given before: a gap says so, and nothing goes on from what was before it."""
    stream, holes = tape.stream, tape.holes
    published += [(stream, said) for said in tape.end_healing(holes, now)]
    gap = stream.due or tape.announce(now)
    gap.missing_from, gap.healing = UNSET, False
    gap.reason = "sequence" if gap.reason == "disconnect" else gap.reason
    tape.publish_due(now, published)
    _forget_count(tape, known, seq)
    stream.last_id = 0


def find_count(tape: Tape, data: TradeData, now: int, published: Published) -> bool:
    """Whether a fetched trade shows that a hole lies between two counts: the newer had passed the older by then."""
    stream, holes = tape.stream, tape.holes
    places = [place for place, hole in enumerate(holes) if contradicts(hole.known, data)]
    if not places:
        return False
    older, newer = holes[: places[-1]], holes[places[-1] :]
    published += [(stream, said) for said in tape.end_healing(older, now)]
    published.append((stream, tape.describe_gap(now)))
    tape.open_hole(None, 1, min(hole.first for hole in newer) - 1)
    _forget_count(tape, newer[0].known, stream.last_id)
    newer[0].known = (0, 0)
    return True


def _forget_count(tape: Tape, known: Known, begun: int) -> None:
    """What the new count lacks is found by time, from the newest trade of the old one on."""
    stream = tape.stream
    tape.losses.add_since(min(stream.last_ts, known[1] * MS))
    cells, slot = tape.topics.ledger.cells, stream.slot
    cells[slot + FIRST], cells[slot + BEGUN], cells[slot + BEFORE] = 0, begun, known[1]
    stream.reached = 0
    tape.note_out()


def take_doubt_over(tape: Tape) -> None:
    """What an earlier life had not found out: whether the exchange has begun to count anew, what came before the first
    trade that it saw.
    """
    cells, slot, last = tape.topics.ledger.cells, tape.stream.slot, tape.stream.last_id
    for cell in KNOWN[::2] if slot else ():
        if (known := (cells[slot + cell], cells[slot + cell + 1]))[0]:
            number = last if known[0] == ANY_ID else known[0]  # no trade bears that one, so none is asked for
            tape.holes.append(Hole(None, number + 1, number, known))
    if slot and last and not cells[slot + FIRST]:
        tape.holes.append(Hole(None, 1, last, (0, 0)))
