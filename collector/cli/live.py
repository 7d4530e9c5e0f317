"""The live view: connections, a table of topics with their last values, recent trades and events."""

import time
from collections import deque
from itertools import zip_longest

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from collector.cli.render import describe, show_clock, show_level
from collector.client.orderbook import OrderBook
from collector.client.rules.check import SECOND
from collector.client.rules.heartbeats import LAST, SILENCE
from collector.client.stream import MAX_TOPICS, ON_DATA_TOPICS, Loss, Message
from collector.messages import Topic
from collector.words import printable, say_count

ORDER = ("index", "ticker", "quote", "book", "trade", "funding", "candle", "volatility", "mark_prices")
NEEDED = {"TYPE": 0, "INSTRUMENT": 0, "INTERVAL": 96, "LAST": 0, "MSG/S": 60, "AGE": 0}
"""The columns of the table, and how wide a terminal must be for each: LAST has to have some of the room."""

LEFT = frozenset({"closed", "expired"})
"""States of a topic on which no data come any more, unless it is taken up again."""

GONE = 180.0
"""Seconds without a word after which a topic that was left is not shown any more. Where nobody asks for it, its last
word is said for two minutes more: options come and go every day.
"""

STYLES = {"live": "green", "recovering": "yellow", "stale": "yellow", "buy": "green", "sell": "red"}


class Row:
    """One topic: its last data, how many messages came, and how many a second."""

    def __init__(self, topic: Topic) -> None:
        self.topic = topic
        self.message: Message | None = None
        self.book = OrderBook() if topic.type == "book" else None
        self.state = ""
        self.count = 0
        self.rate = 0.0
        self.came = 0.0
        self.said = 0.0
        self._counted = 0

    def take(self, message: Message, now: float) -> None:
        """Take the next message of this topic."""
        self.said = now
        if self.book is not None:
            self.book.apply(message)
        if message.type == "status":
            self.state = printable(message["state"])
        elif message.type not in ON_DATA_TOPICS:
            self.message = message
            self.count += 0 if message.is_join else 1
            self.came = now

    def is_gone(self, now: float) -> bool:
        """Whether nothing will be heard of it any more, as it seems."""
        return self.state in LEFT and now - self.said > GONE

    def measure(self, elapsed: float) -> None:
        """Bring the rate up to date, smoothly, after `elapsed` seconds."""
        fresh = (self.count - self._counted) / elapsed
        self.rate = fresh if self._counted == 0 else 0.6 * self.rate + 0.4 * fresh
        self._counted = self.count

    def describe(self) -> str:
        """The last value; of a book its best prices."""
        if self.book is None:
            return describe(self.message) if self.message is not None else ""
        if not self.book.in_sync:
            return "not in sync"
        bids, asks = self.book.get_depth(None)
        bid, ask = (show_level(*reversed(side[0])) if side else "-" for side in (bids, asks))
        return f"bid {bid}  ask {ask}  ({len(bids)} + {len(asks)} levels)"


class Board:
    """All that the live view shows. `notes` are lines above the table: endpoints and how to stop."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes
        self.rows: dict[Topic, Row] = {}
        self._heartbeats: dict[str, Message] = {}  # the newest of each connection, by its name
        self._statuses: dict[str, Message] = {}  # likewise
        self._reasons: dict[str, str] = {}  # why it is not live
        self.endpoints: dict[str, str] = {}
        self.lifeless: set[str] = set()
        self.count = 0
        self.rate = 0.0
        self._trades: deque[Message] = deque(maxlen=60)
        self._events: deque[Text] = deque(maxlen=60)
        self._measured = time.monotonic()
        self._started = self._measured
        self._counted = 0

    def take(self, item: Message | Loss) -> None:
        """Take the next message or loss."""
        if isinstance(item, Loss):
            self._events.append(Text(_shorten_loss(item), style="red"))
            return
        if item.topic.type == "heartbeat":
            self._heartbeats[item.instrument] = item
            return
        self.count += 1
        if item.type in ON_DATA_TOPICS and not item.is_join:
            self._note_event(item)
        if item.topic.type == "status":
            if item.type == "status":
                self._note_status(item)
            return
        if item.topic not in self.rows:
            if len(self.rows) >= MAX_TOPICS:
                del self.rows[next(iter(self.rows))]
            self.rows[item.topic] = Row(item.topic)
        self.rows[item.topic].take(item, time.monotonic())
        if item.type == "trade":
            self._trades.append(item)

    def _note_event(self, message: Message) -> None:
        """Remember a gap, a repair or a change of state; a status that says nothing new is left out."""
        topic = message.topic
        known = self.rows[topic].state if topic in self.rows else ""
        if topic.type == "status" and message.instrument in self._statuses:
            known = self._statuses[message.instrument]["state"]
        if message.type == "status" and message["state"] in (known, known or "live"):
            return
        style = "red" if message.type == "gap" else STYLES.get(message.get("state", ""), "")
        where = message.instrument if topic.type == "status" else f"{topic.type} {message.instrument}"
        what = describe(message).removeprefix("status ")  # half of 80 columns must hold it
        self._events.append(Text(f"{show_clock(message.receive_ts)[:8]} {where}: {what}", style=style))

    def _note_status(self, status: Message) -> None:
        self._statuses[status.instrument] = status
        if status["state"] in ("backoff", "failed"):
            self._reasons[status.instrument] = status.get("reason", "")
        elif status["state"] == "live":
            self._reasons.pop(status.instrument, None)

    def measure(self) -> None:
        """Bring all rates up to date, and leave out what has gone, at most once a second."""
        elapsed = time.monotonic() - self._measured
        if elapsed < 1.0:
            return
        self._measured += elapsed
        self.rate, self._counted = (self.count - self._counted) / elapsed, self.count
        self.rows = {topic: row for topic, row in self.rows.items() if not row.is_gone(self._measured)}
        for row in self.rows.values():
            row.measure(elapsed)

    def render(self, console: Console) -> RenderableType:
        """Draw it for a terminal of this size."""
        self.measure()
        width, height = console.size
        head = [self._draw_title(), *self._draw_connections(), *(Text(note, style="dim") for note in self.notes)]
        below = max(5, height // 3)
        above = max(3, height - len(head) - below - 3)
        for line in head:
            line.truncate(width, overflow="ellipsis")
        return Group(*head, self._draw_topics(above, width), self._draw_recent(below - 2))

    def _draw_title(self) -> Text:
        age = int(time.monotonic() - self._started)
        topics = say_count(len(self.rows), "topic")
        facts = f"{self.rate:,.0f} messages/s on {topics}, {self.count:,} in {age // 60}:{age % 60:02d}"
        return Text.assemble(("collector  ", "bold"), facts)

    def _draw_connections(self) -> list[Text]:
        names = sorted(self.endpoints or self._heartbeats)  # of one that is closed no endpoint is named any more
        return [self._draw_connection(name, max(map(len, names))) for name in names]

    def _draw_connection(self, name: str, width: int) -> Text:
        heartbeat = self._heartbeats.get(name)
        heard = [each for each in (heartbeat, self._statuses.get(name)) if each is not None]
        line = Text(f"  {printable(name).ljust(width)}  ")
        if not heard and name in self.lifeless:
            return line.append(f"no worker runs: `collector state {printable(name)}` says why", "yellow")
        last = max(heard, key=lambda each: each.receive_ts, default=None)
        state = printable(last["state"]) if last is not None else "no heartbeat yet"
        line.append(state, STYLES.get(state, "yellow"))
        if heartbeat is not None and last is not None and state not in LAST:  # a status alone comes once a minute
            if (silent := time.time_ns() - last.receive_ts) > SILENCE:
                line.append(f"  silent for {silent / SECOND:.0f} s", "red")
            else:
                line.append(f"  lag {(heartbeat['lag'] or 0.0) * 1e3:,.0f} ms")
        if state != "live" and (reason := self._reasons.get(name)):
            return line.append(printable(f"  {reason}"))
        return line.append(printable(f"  publishes at {self.endpoints[name]}") if name in self.endpoints else "")

    def _draw_topics(self, room: int, width: int) -> Table:
        table = Table(box=None, expand=True, header_style="bold", padding=(0, 1), pad_edge=False)
        titles = [title for title, needed in NEEDED.items() if width >= needed]
        for title in titles:
            if title in ("MSG/S", "AGE"):
                table.add_column(title, justify="right", no_wrap=True, min_width=6)
            else:
                table.add_column(title, no_wrap=True, overflow="ellipsis", ratio=1 if title == "LAST" else None)
        shown = self._choose_rows(room)
        for row in shown:
            cells = dict(zip(NEEDED, self._draw_row(row), strict=True))
            table.add_row(*(cells[title] for title in titles))
        hidden = len(self.rows) - len(shown)
        if hidden:
            table.add_row("", Text(f"and {say_count(hidden, 'more topic')}", style="dim"))
        return table

    def _choose_rows(self, room: int) -> list[Row]:
        """The busiest that there is room for, in an order that does not jump about."""
        rows = list(self.rows.values())
        if len(rows) > room:
            rows = sorted(rows, key=lambda row: -row.count)[: room - 1]  # the last line says how many more there are
        places = {name: place for place, name in enumerate(ORDER)}
        return sorted(rows, key=lambda row: (places.get(row.topic.type, len(ORDER)), row.topic))

    def _draw_row(self, row: Row) -> tuple[RenderableType, ...]:
        age = f"{time.monotonic() - row.came:.1f} s" if row.came else "-"
        last = Text(row.describe())
        if row.state not in ("", "live"):
            last = Text.assemble((f"{row.state}  ", STYLES.get(row.state, "red")), last)
        return row.topic.type, row.topic.instrument, row.topic.interval, last, f"{row.rate:,.1f}", age

    def _draw_recent(self, room: int) -> Table:
        table = Table(box=box.SIMPLE_HEAD, expand=True, header_style="bold", padding=(0, 1), pad_edge=False)
        table.add_column("TRADES (UTC)", no_wrap=True, overflow="ellipsis", ratio=1)
        table.add_column("EVENTS (UTC)", no_wrap=True, overflow="ellipsis", ratio=1)
        trades = [
            Text(f"{show_clock(each.receive_ts)[:8]} {each.instrument}  {describe(each)}", STYLES.get(each["side"], ""))
            for each in list(self._trades)[-room:]
        ]
        events = list(self._events)[-room:] or [Text("none: no gap, no loss, no change of state", style="dim")]
        for cells in zip_longest(reversed(trades), reversed(events), fillvalue=""):
            table.add_row(*cells)
        return table


def _shorten_loss(loss: Loss) -> str:
    """A loss in the few words that there is room for."""
    where = f"{loss.topic.type} {loss.topic.instrument}" if loss.topic else "unknown topic"
    what = f"{loss.last - loss.first + 1} lost on the way here" if loss.reason == "sequence" else loss.reason
    return f"{time.strftime('%H:%M:%S', time.gmtime())} {where}: {what}"
