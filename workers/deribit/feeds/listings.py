"""How a connection hears of instruments that come and go. No I/O, no clock."""

from collections.abc import Callable, Iterable
from typing import Any

from collector.channels import ENDED, Channel
from workers.deribit.feeds.normalise import EventFeed, read_map
from workers.deribit.publishing.streams import Published, Stream, Topics

MAX_EVENTS = 20_000
"""Events that wait for the next beat; what is beyond them, the regular look at the exchange's list finds."""

_MEMBERS = (
    "instrument_name", "state", "kind", "base_currency", "quote_currency", "settlement_currency", "option_type",
    "strike", "expiration_timestamp", "is_csr", "timestamp",
)  # fmt: skip


class ListingFeed(EventFeed):
    """Listings and states of instruments: each event goes to the supervisor; it is published if the channel `is_asked`.

    `ended` are those that tell of an end: they wait until the channels of the instrument have said their last.
    `changed` is set when the first of them has come. `ask_again(instrument)` is called for each that is listed, or can
    be traded again: what was refused of it may be had now.
    """

    def __init__(
        self, channel: Channel, topics: Topics, events: list[dict[str, Any]], ask_again: Callable[[str], None],
        is_asked: bool,
    ) -> None:  # fmt: skip
        super().__init__(channel, topics)
        self.is_asked = is_asked
        self.ended: list[dict[str, Any]] = []
        self._events = events
        self._ask_again = ask_again

    def adopt(self, streams: Iterable[Stream]) -> None:
        """Go on with topics of an earlier life only if anybody asks for it."""
        if self.is_asked:
            super().adopt(streams)

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """Note one event."""
        row = read_map(frame)
        name, state = row.get("instrument_name"), row.get("state")
        has_ended = isinstance(name, str) and isinstance(state, str) and state in ENDED
        if isinstance(name, str) and not has_ended:
            self._ask_again(name)
        if len(self._events) + len(self.ended) < MAX_EVENTS:
            members = {key: row[key] for key in _MEMBERS if isinstance(row.get(key), (str, int, float))}
            (self.ended if has_ended else self._events).append({"event": "instrument", "row": members})
            self.changed = self.changed or (has_ended and len(self.ended) == 1)
        return self.build_event(row, receive_ts) if self.is_asked else []
