"""What can go wrong with a connection, and what each of Deribit's error codes asks of us. No I/O, no clock."""

from collections.abc import Iterable
from contextlib import suppress
from enum import Enum
from typing import Any, Self

import msgspec

from collector.lifecycle import Exit
from collector.messages import encode
from collector.words import say_error

MAX_WORDS = 500
"""Letters of an error that are told in logs, reasons and messages: the exchange may send as many as a frame holds."""

MAX_TOLD = 5_000
"""Bytes of an error that stand in the state as the exchange sent it: each beat carries it."""

MAX_INT = 1 << 63
"""Integers below it have a place in MessagePack, negative ones too."""


class Lost(Exception):
    """The connection cannot go on, but another attempt may, after `pause` seconds at the least.

    `raw` is the exchange's own error, if that ended it.
    """

    def __init__(self, message: str, raw: dict[str, Any] | None = None, pause: float = 0.0) -> None:
        super().__init__(message)
        self.raw = raw
        self.pause = pause


class Refused(Exception):
    """The exchange said no for good; `exit` says which no. Another attempt would be harmful."""

    def __init__(self, message: str, exit: Exit) -> None:
        super().__init__(message, exit)
        self.exit = exit

    def __str__(self) -> str:
        return str(self.args[0])


class NotConnected(Lost):
    """The connection is not live just now: nothing was sent."""


class ExchangeError(Exception):
    """The exchange answered with an error.

    `raw` is its own error object, unchanged; `told` what states have of it: the same, or MAX_WORDS of it if it is long.
    Both are such words if MessagePack cannot hold it: no state and no reply may fail for what an exchange said.
    """

    def __init__(self, raw: dict[str, Any]) -> None:
        super().__init__(raw)
        code = raw.get("code")
        self.code = code if isinstance(code, int) and abs(code) < MAX_INT else 0
        self._words = f"{self.code} {say_error(raw)}"[:MAX_WORDS]
        size, brief = _measure(raw), {"code": self.code, "message": self._words}
        self.raw = raw if size else brief
        self.told = raw if 0 < size <= MAX_TOLD else brief

    def __str__(self) -> str:
        return self._words

    def hide(self, secrets: Iterable[bytes]) -> Self:
        """The same error without secrets (as JSON spells them) that it repeats: a server may tell what it was asked."""
        with suppress(msgspec.MsgspecError, RecursionError, OverflowError):
            text = said = msgspec.json.encode(self.args[0])  # not `raw`: words may end within a secret
            for secret in secrets:
                text = text.replace(secret, b"***")
            hidden = self if text == said else type(self)(msgspec.json.decode(text))
            if hidden.code == self.code:  # what is asked of us must not depend on a secret
                return hidden
        return type(self)({"code": self.code, "message": "(not shown: it may repeat a secret)"})


def _measure(raw: dict[str, Any]) -> int:
    """Bytes of it as deep in MessagePack as a state may have it; 0 if it has no form there."""
    try:
        return len(encode([[[[raw]]]]))
    except (ValueError, OverflowError):
        return 0


class Reaction(Enum):
    """What an error code asks of us."""

    RETRY = "retry"  # the same request again, soon
    REFRESH = "refresh"  # log in again once, then stop
    BACK_OFF = "back off"  # expect the connection to end; come back later
    LOCK_OUT = "lock out"  # too many logins: each further one may prolong it; come back much later
    LOG_IN = "log in"  # needs credentials: without them this can not be had
    REFUSED = "refused"  # the credentials are no good: never loop
    BANNED = "banned"  # this host or account is shut out: never loop
    FAULT = "fault"  # our request was wrong: report it, go on


REACTIONS: dict[int, Reaction] = {
    10000: Reaction.REFRESH,
    10001: Reaction.RETRY,
    10028: Reaction.BACK_OFF,
    10040: Reaction.RETRY,
    10041: Reaction.RETRY,
    10047: Reaction.BACK_OFF,
    10066: Reaction.BACK_OFF,
    11042: Reaction.REFUSED,
    11051: Reaction.BACK_OFF,
    11056: Reaction.LOG_IN,
    11094: Reaction.RETRY,
    11098: Reaction.BANNED,
    12003: Reaction.LOCK_OUT,
    12005: Reaction.BANNED,
    12998: Reaction.LOCK_OUT,
    13004: Reaction.REFUSED,
    13007: Reaction.REFUSED,
    13008: Reaction.RETRY,
    13009: Reaction.REFRESH,
    13012: Reaction.REFUSED,
    13021: Reaction.REFUSED,
    13025: Reaction.BACK_OFF,
    13028: Reaction.BACK_OFF,
    13403: Reaction.REFUSED,
    13503: Reaction.BACK_OFF,
    13668: Reaction.REFUSED,
    13778: Reaction.LOG_IN,
    13888: Reaction.RETRY,
}
"""Error code to reaction; a code that is not here is a FAULT. Source: Deribit's table of RPC errors (2026)."""

TOO_MANY_REQUESTS = 10028
"""A pool of credits is used up."""


PAUSES = {Reaction.BACK_OFF: 3.0, Reaction.LOCK_OUT: 60.0}
"""Seconds before another connection: in 3 a used-up pool of credits refills (deribit.com: rate limits); for how long
too many logins lock a key out is not published."""


def find_reaction(code: int) -> Reaction:
    """What the error code asks of us."""
    return REACTIONS.get(code, Reaction.FAULT)
