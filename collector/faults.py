"""Faults of the practice exchange: the one table of what can go wrong, and the reader of `NAME:ARG,NAME:ARG`.

A connection names its faults in the query of its URL (`/ws/api/v2?faults=gap:50,reset:2,first:1`); those given to
the exchange itself (`--faults`) hold for every connection that names none. No I/O, no clock.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    """One row: its argument's form and default (no default: an argument is needed), and what happens."""

    name: str
    form: str
    default: str | None
    meaning: str


RATE = "RATE is a share below 1 (0.01), or every n-th from 1 on (50); TIMES bounds how often."

CONNECTION_FAULTS = (
    Fault("first", "N", None,
          "only the first N connections that name these same faults have them; the later ones are well"),
    Fault("skip", "N", None, "the first N connections that name these same faults are well"),
    Fault("until", "SECONDS", None,
          "so long after opening the connection is well again (but for delay and credits); what waited comes at once"),
    Fault("seed", "N", None, "seed of this connection's chance; else the exchange's seed and the connection's number"),
    Fault("refuse", "STATUS", "503", "the upgrade is refused with this HTTP status"),
    Fault("429", "", "", "the upgrade is refused as if 32 connections were open"),
    Fault("slow_open", "SECONDS", "10", "the upgrade is answered so late"),
    Fault("delay", "MS", "50", "each frame is held for so long, each way; the upgrade for both ways"),
    Fault("close", "CODE@SECONDS", "1001@5", "a close frame with this code (0: without one), SECONDS after opening"),
    Fault("reset", "SECONDS", "5", "the TCP connection is reset"),
    Fault("drop", "SECONDS", "5", "the TCP connection is closed without a close frame"),
    Fault("half_open", "SECONDS", "5", "from then on nothing is sent, not even pongs and answers; the socket stays"),
    Fault("mute", "CHANNEL@SECONDS", "*@5",
          "from then on no data of the channel (* all); heartbeats and answers go on"),
    Fault("lag", "SECONDS@START", "8@5",
          "from START on data come SECONDS late, in order; heartbeats and answers are in time"),
    Fault("backlog", "SHARE@START", "0.1@5", "from START on data run at this share of the true speed: later and later"),
    Fault("maintenance", "SECONDS", "5",
          "platform_state says so, requests get 11051, and a second later the socket drops"),
    Fault("garbage", "SECONDS", "1", "every SECONDS a text frame that is no JSON and a binary frame"),
    Fault("bad_json", "SECONDS", "1", "every SECONDS a notification that breaks off in the middle"),
    Fault("deep_json", "SECONDS", "1", "every SECONDS a frame of 100,000 nested arrays"),
    Fault("odd_json", "SECONDS", "1",
          "every SECONDS frames of valid JSON that are no messages (null, a list, wrong members)"),
    Fault("oversized", "BYTES@SECONDS", "17000000@2", "one frame of so many bytes"),
    Fault("fragments", "SECONDS", "1", "from then on each frame comes in two fragments, a ping between them"),
    Fault("wrong_id", "METHOD@TIMES", None, "answers to the method bear an id that nobody asked with"),
    Fault("no_reply", "METHOD@TIMES", None, "the method is never answered (nor carried out)"),
    Fault("error", "METHOD=CODE@TIMES", None, "the method is answered with this error (10028 also cuts)"),
    Fault("slow", "METHOD=SECONDS@TIMES", None, "the method is answered SECONDS late; what comes behind it waits"),
    Fault("heartbeat_floor", "SECONDS", None,
          "heartbeat intervals from here on are taken (Deribit: 10); grace is the interval"),
    Fault("no_heartbeat", "", "", "set_heartbeat is answered but no heartbeat and no test_request is ever sent"),
    Fault("deaf", "", "", "answers to test_request do not count: closed with 4000 although answered"),
    Fault("idle", "SECONDS", None, "idle sockets are cut after SECONDS instead of 60.5"),
    Fault("no_snapshot", "N", "1", "the first N book snapshots are not sent"),
    Fault("gap", "RATE@TIMES", "50", "book changes are lost, the chain goes on"),
    Fault("duplicate", "RATE@TIMES", "50", "data frames are sent twice"),
    Fault("reorder", "RATE@TIMES", "50", "a data frame comes after the next one of its channel"),
    Fault("prev0", "RATE@TIMES", "50", "book changes say prev_change_id 0"),
    Fault("resnapshot", "RATE@TIMES", "50", "a full snapshot comes in the place of a book change"),
    Fault("crossed", "RATE@TIMES", "50", "a book change crosses the book; the next one uncrosses it"),
    Fault("lost_trades", "RATE@TIMES", "10", "trade frames are lost: holes in trade_seq that REST can fill"),
    Fault("wrong_types", "RATE@TIMES", "20", "in data frames one known field has another type"),
    Fault("unknown_fields", "", "", "results, data and envelopes have members that nobody knows"),
    Fault("exponents", "", "", "numbers are spelled with exponents (2.2e3)"),
    Fault("clock", "MS", "3000", "get_time and all timestamps are off by this, those of requests too; not expiries"),
    Fault("flood", "RATE", "1000", "so many more frames a second: repeats of tickers, quotes and indices"),
    Fault("credits", "N", "6000", "pools of so many credits, for all that say the same; 10028 and the cut come soon"),
    Fault("ban", "CODE", "12005", "public/auth is answered with this error"),
    Fault("expired_token", "", "", "tokens are dead when they are given"),
    Fault("token_life", "SECONDS", "60", "expires_in, and tokens die then"),
    Fault("login_only", "", "", "public requests without login get 11056"),
    Fault("routed_spot", "", "",
          "spot pairs are matched at Coinbase: channels with trades of one are left out, requests for them get 11060"),
    Fault("drop_subscribe", "CHANNEL@TIMES", "*@1", "the channel (* any) is silently left out of the ack so often"),
    Fault("ack_late", "", "", "the first data of a subscription come before its ack"),
    Fault("slow_reader", "BYTES", "16000000", "a client that lets so many bytes wait is cut"),
)  # fmt: skip

EXCHANGE_FAULTS = (
    Fault("listing", "SECONDS", "10", "every SECONDS a new option is listed"),
    Fault("expiry", "SECONDS", "10", "every SECONDS an option expires"),
    Fault("retention", "SECONDS", "86400",
          "older trades are gone: from an earlier number the others come, from an earlier time none (Deribit: 24 h)"),
    Fault("connections", "N", "32", "so many connections of one address at most, the next gets HTTP 429 (0: no limit)"),
)  # fmt: skip
"""Only for the whole exchange, not in a URL."""

TABLE = {fault.name: fault for fault in (*CONNECTION_FAULTS, *EXCHANGE_FAULTS)}
_WORDS = ("METHOD", "CHANNEL")
FOREVER = float("inf")

_MOST = 10**9
_BOUNDS = {
    "refuse": (200, 599), "close": (0, 4999), "error": (-_MOST, _MOST), "ban": (-_MOST, _MOST),
    "clock": (-(10**13), 10**13), "seed": (-(10**18), 10**18),
}  # fmt: skip
"""What the number of a fault may be, if not 0 to _MOST: an HTTP status, a code of RFC 6455, what may have a sign."""


class Setting(NamedTuple):
    """The argument of one fault: what stood before `=` or `@` as text or number, and the numbers behind them."""

    text: str
    value: float
    at: float


class Faults(dict[str, list[Setting]]):
    """The faults of one connection: each setting of a fault by its name, as it may be named more than once."""

    text = ""

    def all(self, name: str) -> list[Setting]:
        """Each setting of a fault."""
        return self.get(name, [])

    def number(self, name: str, default: float = 0.0) -> float:
        """The number of a fault that was named; else the default."""
        settings = self.all(name)
        return settings[-1].value if settings else default


def parse_faults(text: str, where: str = "connection") -> Faults:
    """Read `NAME:ARG,NAME:ARG`. Raises ValueError, in one line, for what the table does not have.

    `where`: "connection" (from a URL: the exchange's own faults are refused) or "exchange".
    """
    faults = Faults()
    faults.text = text
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, argument = item.partition(":")
        fault = TABLE.get(name)
        if fault is None:
            raise ValueError(f"no fault {name[:40]!r}; {_suggest(name)}")
        if fault in EXCHANGE_FAULTS and where == "connection":
            raise ValueError(f"fault {name!r} is for the whole exchange: give it to the exchange, not in the URL")
        faults.setdefault(name, []).append(_check_bounds(fault, _read_argument(fault, argument)))
    return faults


def _suggest(name: str) -> str:
    from difflib import get_close_matches  # wanted only when something is wrong already

    close = get_close_matches(name[:100], TABLE, 1)
    return f"did you mean {close[0]}?" if close else "`collector exchange --list-faults` lists them"


def _read_argument(fault: Fault, argument: str) -> Setting:
    form = f"{fault.name}:{fault.form}" if fault.form else fault.name
    if not fault.form:
        if argument:
            raise ValueError(f"fault {fault.name!r} takes no argument")
        return Setting("", 1.0, FOREVER)
    argument = argument or fault.default or ""
    left, _, at = argument.partition("@")
    default_at = (fault.default or "").partition("@")[2]
    form_left = fault.form.partition("@")[0]
    try:
        if not left or (at and "@" not in fault.form):
            raise ValueError
        later = float(at or default_at or FOREVER)
        if not later >= 0:  # nan, too
            raise ValueError
        if "=" in form_left:
            text, _, value = left.partition("=")
            return Setting(text, float(value), later)
        if form_left in _WORDS:
            return Setting(left, 0.0, later)
        return Setting("", float(left), later)
    except ValueError:
        raise ValueError(f"fault {fault.name!r}: {argument[:60]!r} does not have the form {form}") from None


def _check_bounds(fault: Fault, setting: Setting) -> Setting:
    low, high = _BOUNDS.get(fault.name, (0, _MOST))
    if not low <= setting.value <= high:  # nan, too
        raise ValueError(f"fault {fault.name!r}: {setting.value:g} is out of range; write {low} to {high}")
    return setting


def list_faults() -> str:
    """The table as text: name and form, default, meaning."""
    lines = []
    for title, rows in (("In a URL or --faults:", CONNECTION_FAULTS), ("In --faults only:", EXCHANGE_FAULTS)):
        lines.append(title)
        for row in rows:
            form = f"{row.name}:{row.form}" if row.form else row.name
            default = f" [{row.default}]" if row.default else ""
            lines.append(f"  {form:32} {row.meaning}{default}")
    return "\n".join([*lines, RATE])
