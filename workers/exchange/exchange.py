"""The whole exchange without its sockets: the market, its subscribers, the logins, and what every connection shares."""

from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

from collector.faults import FOREVER, Faults, Setting, parse_faults
from workers.exchange.channels.account import Account
from workers.exchange.channels.hub import Frame, Hub
from workers.exchange.market.market import Market
from workers.exchange.oracle import Oracle
from workers.exchange.protocol.auth import Authority
from workers.exchange.protocol.distort import shift_times
from workers.exchange.protocol.methods import MARKET_METHODS
from workers.exchange.protocol.rpc import RpcError
from workers.exchange.protocol.session import Credits
from workers.exchange.replay import Recorded, Replay

MAX_NAMES = 10_000
"""How many names that clients make up (their faults, pools, methods) are remembered; with more, it is begun anew."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run the exchange. `rate` is book events a second, `options` how many options are listed.

    `own_credits`: no connection draws on another's credits, as if each were of an account of its own.
    """

    host: str = "127.0.0.1"
    port: int = 0
    faults: str = ""
    seed: int = 1
    rate: float = 200.0
    options: int = 240
    oracle: str | None = None
    recording: tuple[Recorded, ...] = ()
    speed: float = 1.0
    own_credits: bool = False
    certificate: str | None = None  # PEM file with certificate and key: serve wss and https
    keys: dict[str, str] = field(default_factory=dict, repr=False)


class Exchange:
    """What all connections share. Times are ms since 1970. Raises ValueError for unknown faults."""

    def __init__(self, settings: Settings, now: int) -> None:
        self.settings = settings
        self.faults = parse_faults(settings.faults, "exchange")
        self.market = Market(settings.seed, now, settings.options, settings.rate)
        self.market.retention = int(self.faults.number("retention", 86_400) * 1000)
        self.account = Account(self.market)
        self.authority = Authority(settings.keys, Random(settings.seed + 1))
        self.replay = Replay(settings.recording, settings.speed) if settings.recording else None
        self.hub = Hub(self.market, self.account, self.replay.channels if self.replay else frozenset())
        self.oracle = Oracle(settings.oracle)
        self.opened = 0
        self._named: Counter[str] = Counter()
        self._credits: dict[tuple[str, float | None], Credits] = {}
        self._next = {name: now + self._find_period(name) for name in ("listing", "expiry")}

    def draw_faults(self, text: str | None) -> Faults:
        """The faults of the next connection: those of its URL, else the exchange's. Raises ValueError.

        `first` and `skip` count the connections that named the same faults.
        """
        faults = self.faults if text is None else parse_faults(text)
        _bound(self._named)
        place = self._named[faults.text]
        self._named[faults.text] += 1
        skip, first = faults.number("skip"), faults.number("first", FOREVER)
        return faults if skip <= place < skip + first else Faults()

    def find_credits(self, payer: str, limit: float | None, now: float) -> Credits:
        """The pools that all connections of an account or address draw on, full at first (`now` in seconds).

        Those whose pools a fault makes smaller (`limit`) share these small ones.
        """
        _bound(self._credits)
        return self._credits.setdefault((payer, limit), Credits(now, limit))

    def advance(self, now: int) -> None:
        """Let the market live until `now` (ms) and send what follows."""
        events = self.hub.advance(now)
        if not self.market.frozen:
            for name, change in (("listing", self.market.list_option), ("expiry", self.market.expire_next)):
                period = self._find_period(name)
                if name in self.faults and not 0 < self._next[name] - now <= period:  # the clock may be set back
                    self._next[name] = now + period
                    events += self.hub.take(change())
        self.oracle.note_market(events)
        if self.replay is not None:
            for frame in self.replay.take_due(now / 1000.0):
                self.hub.relay(Frame(frame.channel, None, text=frame.text))

    def _find_period(self, name: str) -> int:
        return max(100, int(self.faults.number(name) * 1000))

    def ask(self, method: str, params: dict[str, Any], now: int, faults: Faults) -> Any:
        """Answer a method that needs no socket. Raises RpcError."""
        clock = int(faults.number("clock"))
        if method == "public/get_time":
            return now + clock
        if method not in MARKET_METHODS:
            raise RpcError(-32601)
        return MARKET_METHODS[method](self.market, shift_times(params, -clock) if clock else params)


Counts = Counter[tuple[str, str, int, str]]
"""How often each setting has held: (all the faults, the fault, its place among those of its name, the method)."""


def _bound(named: dict[Any, Any]) -> None:
    if len(named) > MAX_NAMES:
        named.clear()


def find_failure(faults: Faults, kind: str, name: str, counts: Counts) -> Setting | None:
    """The setting of a fault such as `error:METHOD=CODE@TIMES` for this call of the method (or channel), if one holds.

    One that has held so often as it may leaves the next call to the next one.
    """
    for place, setting in enumerate(faults.all(kind)):
        # `*` is each method by itself, but all channels of a subscribe together.
        key = (faults.text, kind, place, "" if kind == "drop_subscribe" else name)
        if setting.text in (name, "*") and counts[key] < setting.at:
            _bound(counts)
            counts[key] += 1
            return setting
    return None
