"""The oracle: a file of JSON lines that says what really happened, for judging what a client made of it.

Events: `trade` (every trade of the market), `listed`, `expired`, `opened` and `ended` (connections, with the
reason), `fault` (each frame that a fault kept back, changed or added, with its channel and ids; each request that
`no_reply` or `error` kept from its answer, with its method), `silent` (a connection that hears no more).
"""

from pathlib import Path
from typing import Any

from workers.exchange.market.market import Event
from workers.exchange.protocol.rpc import encode

_TRADE = ("instrument_name", "trade_seq", "trade_id", "price", "amount", "direction", "timestamp")


class Oracle:
    """Appends to the file; each write is complete lines. Without a path it does nothing."""

    def __init__(self, path: str | None) -> None:
        self._file = Path(path).open("ab", buffering=0) if path else None  # noqa: SIM115 - lives as long as the exchange

    def note(self, event: str, **more: Any) -> None:
        """Write one line."""
        if self._file is not None:
            self._file.write(encode({"event": event, **more}) + b"\n")

    def note_market(self, events: list[Event]) -> None:
        """Write the trades, listings and expiries among the events."""
        for event in events:
            for trade in event.trades:
                self.note("trade", **{key: trade[key] for key in _TRADE})
            if event.created or event.state == "delivered":
                what = "listed" if event.created else "expired"
                self.note(what, instrument_name=event.instrument.name, timestamp=event.timestamp)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
