"""Which channels are asked for, which the exchange has confirmed, and the calls that make the two equal. Pure.

Facts (Deribit): the answer to public/subscribe lists what is now subscribed of what was asked for; a bad channel is
left out in silence; a second subscribe of the same channel gives no second snapshot.
"""

from collections.abc import Iterable
from typing import NamedTuple

from collector.channels import Channel, guess_kind, parse_channel
from collector.limits import chunk_channels

TRIES = 2
"""How often a channel that the exchange leaves out is asked for before it is refused."""

EXPIRED = "the instrument has expired"
"""Why a channel is not asked for again, also on a new connection."""

LEFT_OUT = "the exchange left it out of its answer: no such instrument, or not offered"

NO_TRADES = (
    f"{LEFT_OUT}; of spot pairs that are matched at Coinbase it has no trades, "
    "and so none of all kinds or currencies at once: ask for one kind of one currency"
)
"""Why channels of trades are left out that are, or may be, of such a pair (docs.deribit.com: spot trading venues,
2026).
"""


OWN = "user."
"""How the channels of an account begin. Their names may come back in other letters than they were asked for: the
documents show `user.portfolio.btc` where clients ask for `user.portfolio.BTC`."""


def is_same(name: str, said: str) -> bool:
    """Whether a channel is the one that the exchange calls so."""
    return name == said or (name.startswith(OWN) and name.lower() == said.lower())


def explain_left_out(channel: Channel) -> str:
    """Why the exchange may have left a channel out."""
    if channel.type not in ("trade", "candle"):
        return LEFT_OUT
    is_spot = guess_kind(channel.instrument) == "spot" if channel.instrument else channel.has_spot
    return NO_TRADES if is_spot or channel.currency == "any" else LEFT_OUT


class Call(NamedTuple):
    """One subscribe or unsubscribe request to be sent."""

    method: str
    channels: tuple[str, ...]

    @property
    def leaves(self) -> bool:
        """Whether it unsubscribes."""
        return self.method.endswith("unsubscribe")


class Subscriptions:
    """The channels of one connection. `refused` holds the reason for each that the exchange would not give.

    `presumed` are those of the expired whose end was told by nothing but a clock, which may have been wrong.
    """

    def __init__(self) -> None:
        self.asked: dict[str, Channel] = {}
        self.confirmed: set[str] = set()
        self.refused: dict[str, str] = {}
        self.presumed: set[str] = set()
        self._in_flight: set[str] = set()
        self._dropped: set[str] = set()
        self._tries: dict[str, int] = {}
        self._listed: set[str] = set()

    def ask(self, names: list[str]) -> None:
        """Want these channels (again, if they were refused). Raises ValueError for text that is no channel."""
        channels = [parse_channel(name) for name in names]
        for channel in channels:
            self.asked[channel.name] = channel
            self._forgive(channel.name)

    def drop(self, names: list[str]) -> None:
        """Want these no more; who wants one again gets it anew, from its first state on."""
        for name in names:
            self.asked.pop(name, None)
            if name in self.confirmed:
                self._dropped.add(name)
            self._forgive(name)

    def forget(self) -> None:
        """The connection is gone: nothing is confirmed, nothing on its way; of the refused only the expired stay."""
        self.confirmed.clear()
        self._in_flight.clear()
        self._dropped.clear()
        self._tries.clear()
        self._listed.clear()
        self.refused = {name: reason for name, reason in self.refused.items() if reason == EXPIRED}

    def expire(self, names: list[str], by_clock: bool = False) -> list[str]:
        """Ask for these no more, unless somebody wants them again. Returns those for which that is new."""
        ended = [name for name in names if name in self.asked and self.refused.get(name) != EXPIRED]
        self.refused |= dict.fromkeys(ended, EXPIRED)
        if by_clock:
            self.presumed.update(ended)
        else:
            self.presumed.difference_update(names)
        return ended

    def _forgive(self, name: str) -> None:
        self.refused.pop(name, None)
        self.presumed.discard(name)
        self._tries.pop(name, None)

    def plan_calls(self, logged_in: bool, awaits_login: bool = False) -> list[Call]:
        """The calls that are needed now; their channels count as on their way until `end_call`.

        With `awaits_login` those are left out that need a login which is still to come.
        """
        self._ask_for_listed()
        missing = [c for c in self._find_missing() if not (awaits_login and c.needs_login)]
        unwanted = [parse_channel(name) for name in self._find_unwanted()]
        needed = {
            "public/subscribe": [c.name for c in missing if not (c.is_private and logged_in)],
            "private/subscribe": [c.name for c in missing if c.is_private and logged_in],
            "public/unsubscribe": [c.name for c in unwanted if not c.is_private],
            "private/unsubscribe": [c.name for c in unwanted if c.is_private],
        }
        self._in_flight.update(*needed.values())
        return [Call(method, tuple(each)) for method, names in needed.items() for each in chunk_channels(names, method)]

    def _find_missing(self) -> list[Channel]:
        """In the order in which they were asked for. Each second all are looked at, and mostly none is missing."""
        confirmed, refused, in_flight = self.confirmed, self.refused, self._in_flight
        return [
            channel
            for name, channel in self.asked.items()
            if name not in confirmed and name not in refused and name not in in_flight
        ]

    def _find_unwanted(self) -> set[str]:
        unwanted = self.confirmed.difference(self.asked)
        unwanted.update(self.confirmed.intersection(self.refused), self.confirmed & self._dropped)
        return unwanted - self._in_flight

    def take_answer(self, call: Call, answered: list[str]) -> tuple[list[str], list[str]]:
        """Take the answer to a call that subscribes. Returns (newly confirmed, newly refused).

        What has ended meanwhile is neither: it is left again.
        """
        present = set(answered)
        own = [name for name in answered if name.startswith(OWN)]
        gained = [n for n in call.channels if n in present or any(is_same(n, name) for name in own)]
        self.confirmed.update(gained)
        for name in gained:  # to be left it may be asked as often anew
            self._tries.pop(name, None)
        missing = [name for name in call.channels if name not in self.confirmed]
        left_out = [n for name in missing for n in self.refuse([name], explain_left_out(parse_channel(name)), TRIES)]
        return [name for name in gained if name not in self.refused], left_out

    def note_left(self, names: Iterable[str]) -> None:
        """The exchange sends these no more."""
        for name in names:
            self.confirmed.discard(name)
            self._dropped.discard(name)
            self._tries.pop(name, None)

    def refuse(self, names: list[str], reason: str, tries: int = 1) -> list[str]:
        """Count one more refusal of each; those that have had `tries` are given up and returned."""
        given_up = []
        for name in names:
            self._tries[name] = self._tries.get(name, 0) + 1
            if name in self.asked and self._tries[name] >= tries:
                self.refused[name] = reason
                given_up.append(name)
        return given_up

    def refuse_leaving(self, call: Call, tries: int) -> None:
        """Count one more refusal to let these go; after so many they count as left, and what still comes as unknown."""
        for name in call.channels:
            self._tries[name] = self._tries.get(name, 0) + 1
        self.note_left([name for name in call.channels if self._tries[name] >= tries])

    def give_another_chance(self) -> None:
        """Ask again for all that was refused; but not for what has expired."""
        for name in [name for name, reason in self.refused.items() if reason != EXPIRED]:
            self._forgive(name)

    def note_listed(self, instrument: str) -> None:
        """What was refused of an instrument may be had now: it is asked for again with the next calls.

        Not found here: hundreds are listed together, while thousands that have just ended are refused.
        """
        if self.refused:
            self._listed.add(instrument)

    def _ask_for_listed(self) -> None:
        if listed := self._listed:
            self._listed = set()
            for name in [name for name, reason in self.refused.items() if reason != EXPIRED]:
                if self.asked[name].instrument in listed:
                    self._forgive(name)

    def end_call(self, call: Call) -> None:
        """A call has ended: its channels are missing again, but for what its answer said."""
        self._in_flight.difference_update(call.channels)

    def is_any_in_flight(self, names: list[str]) -> bool:
        """Whether a call that is on its way will tell of one of these."""
        return not self._in_flight.isdisjoint(names)
