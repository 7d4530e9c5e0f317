"""What makes a fresh connection ready and keeps it so: bootstrap, login and its tokens, the exchange's clock."""

import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from collector.lifecycle import Exit
from collector.limits import CALL_COST
from workers.deribit.connection.bootstrap import PLAIN, SIGNED, Login, build_auth, build_first_requests, build_refresh
from workers.deribit.connection.credits import Pool, pay
from workers.deribit.connection.together import do_together
from workers.deribit.rpc.codec import MAX_MS
from workers.deribit.rpc.errors import ExchangeError, Lost, Reaction, Refused, find_reaction

log = logging.getLogger("deribit")

Send = Callable[[str, dict[str, Any] | None], Awaitable[Any]]

TIME_SYNC = 60.0
"""Seconds between measurements of the exchange's clock."""

DRIFT = 100e-6
"""Part by which the steady clock may go wrong. A measurement that is worse than what is known by the one before is
passed over: an answer that waited behind late data would hide half of how late they are."""

OFF = 1_000_000_000
"""What our clock and the exchange's may differ by (ns), and by how much that may change, before it is told (again)."""

INVALID_CREDENTIALS = 13004
"""Never to be repeated when id and secret were sent; but a signature whose time is off may be answered so, too."""

DISPENSABLE = frozenset({"public/hello", "public/get_time"})
"""What data come without: whatever is answered to these, or not, costs no connection."""

REFUSALS = {
    "public/auth": (Reaction.REFUSED, Reaction.REFRESH),
    "private/enable_cancel_on_disconnect": (Reaction.REFUSED,),
}
"""What means, in answer to these, that the credentials are no good. To requests that show none it may pass."""

NO_CANCEL = frozenset({10049, 13042})
"""Cancel on disconnect cannot be had: another connection would hear the same, and its data do not depend on it."""

REFRESH_AT = 0.8
"""Part of a token's life after which it is renewed."""

RENEW_AGAIN, RENEW_LEAST = 60.0, 1.0
"""Seconds after which a renewal that failed is tried again, and from a login to its renewal whatever life is said."""

NEVER = float("inf")

_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""A clock that nobody sets; on Linux one that goes on while the machine sleeps."""


def _read_steady() -> int:
    return time.clock_gettime_ns(_STEADY)


class Session:
    """The settings of the bootstrap, and what came of it on the connection that is up now.

    `measured_offset` is the exchange's clock less ours when that was measured, in ns. `earlier_offset` is the least
    that it was on the connections before, so long as what they lost may still be healed (ours may have been set since);
    None if there is none.
    """

    def __init__(
        self, send: Send, credits: Pool, login: Login | None, heartbeat_interval: float, cancel_on_disconnect: bool
    ) -> None:
        self._send = send
        self.credits = credits
        self._login = self._given = login
        self._heartbeat_interval = heartbeat_interval
        self._cancel_on_disconnect = cancel_on_disconnect
        self._refresh_token = ""
        self._refresh_at = NEVER
        self._token_ends = NEVER
        self._sync_at = NEVER
        self.logged_in_at = 0.0  # monotonic; 0: this connection has not
        self._ahead: int | None = None  # the exchange's clock less the steady one
        self.measured_offset = 0
        self._error = 0
        self._synced_at: int | None = None  # by the steady clock, on this connection
        self.earlier_offset: int | None = None
        self._told_offset = 0  # 0: none, or that they agree

    @property
    def logged_in(self) -> bool:
        """Whether this connection has logged in."""
        return self.logged_in_at != 0.0

    @property
    def awaits_login(self) -> bool:
        """Whether a login is still to come."""
        return self._login is not None and not self.logged_in

    def end(self) -> None:
        """The connection is gone, and the login with it."""
        if self._error:
            earlier = self.measured_offset if self.earlier_offset is None else self.earlier_offset
            self.earlier_offset = min(self.measured_offset, earlier)
        self.logged_in_at = 0.0
        self._synced_at = None

    def read_exchange_clock(self) -> int:
        """The exchange's time now, in ns since 1970, as far as it is known."""
        return time.time_ns() + self.clock_offset

    @property
    def clock_offset(self) -> int:
        """The exchange's clock less ours, in ns, as far as it is known; else 0.

        It goes on by the steady clock: ours may be set at any moment, and what it says of the exchange's must not
        be wrong until that is measured again.
        """
        return 0 if self._ahead is None else self._ahead + _read_steady() - time.time_ns()

    @property
    def clock_error(self) -> int:
        """How far off that may be, in ns: the more, the longer ago it was measured. 0 if it never was."""
        age = 0 if self._synced_at is None else _read_steady() - self._synced_at
        return self._error + int(age * DRIFT)

    async def send_first_requests(self) -> None:
        """Send together what needs no earlier answer. Raises Lost or Refused."""
        auth = None if self._login is None else self._build_auth(self._login)
        requests = build_first_requests(self._heartbeat_interval, auth)
        await do_together(*(self._take_step(method, params) for method, params in requests.items()))

    def _build_auth(self, login: Login) -> dict[str, Any]:
        return build_auth(login, self.read_exchange_clock() // 1_000_000, secrets.token_hex(8))

    async def enable_cancel(self) -> None:
        """Have orders die with the connection, where that is wanted. It needs the login. Raises Lost or Refused."""
        if self._login is not None and self._cancel_on_disconnect:
            await self._take_step("private/enable_cancel_on_disconnect", {"scope": "connection"})

    async def keep_up(self, now: float) -> None:
        """Renew the token and measure the clock when it is time (`now` is monotonic). Raises Lost or Refused."""
        if now >= self._refresh_at:
            await self._renew(now)
        if now >= self._sync_at:
            self.earlier_offset = None
            await self._take_step("public/get_time", {})

    async def _renew(self, now: float) -> None:
        try:
            await self._take_step("public/auth", build_refresh(self._refresh_token))
        except Lost as error:
            if now >= self._token_ends:
                raise
            self._refresh_at = min(now + RENEW_AGAIN, self._token_ends)
            log.warning("the token is renewed later: %s", error)  # if the connection is gone, its reader tells

    async def _take_step(self, method: str, params: dict[str, Any]) -> None:
        await pay(self.credits, CALL_COST)
        try:
            if method == "public/auth":
                await self._log_in(params)
            elif method == "public/get_time":
                await self._sync_time()
            else:
                await self._send(method, params)
        except TimeoutError:
            if method not in DISPENSABLE:
                raise Lost(f"{method} was not answered in time") from None
            log.warning("%s was not answered in time; goes on without it", method)
        except ExchangeError as error:
            self._react(method, error)

    def _react(self, method: str, error: ExchangeError) -> None:
        reaction = find_reaction(error.code)
        if reaction in REFUSALS.get(method, ()):
            raise Refused(f"{method}: {error}", Exit.CREDENTIALS)
        if reaction is Reaction.BANNED:
            raise Refused(f"{method}: {error}", Exit.BANNED)
        if method in DISPENSABLE:
            log.warning("%s: %s; goes on without it", method, error)
            return
        if error.code in NO_CANCEL:
            log.error("cancel on disconnect is not on: %s", error)
            return
        raise Lost(f"{method}: {error}", error.told)

    async def _log_in(self, params: dict[str, Any]) -> None:
        try:
            tokens = await self._send("public/auth", params)
        except ExchangeError as error:
            may_pass = find_reaction(error.code) is Reaction.REFRESH or error.code == INVALID_CREDENTIALS
            if not may_pass or self._login is None or params["grant_type"] == PLAIN:
                raise
            # A token is good for its life, a signature for 60 s by the exchange's clock: id and secret always are.
            if params["grant_type"] == SIGNED:
                self._login = self._login._replace(signed=False)  # for the next, if this one ends now
            return await self._log_in(self._build_auth(self._login))
        try:
            life, self._refresh_token = float(tokens["expires_in"]), str(tokens["refresh_token"])
        except (TypeError, KeyError, ValueError, OverflowError):
            raise Lost("public/auth: there are no tokens in the answer") from None
        self._login = self._given
        self.logged_in_at = now = time.monotonic()
        self._refresh_at, self._token_ends = now + max(RENEW_LEAST, life * REFRESH_AT), now + life

    async def _sync_time(self) -> None:
        self._sync_at = time.monotonic() + TIME_SYNC
        sent = _read_steady()
        theirs = await self._send("public/get_time", {})
        received = _read_steady()
        # The exchange's ms is cut off, not rounded: half of one belongs to the estimate, and to its error.
        error = (received - sent) // 2 + 500_000
        is_better = self._synced_at is None or error <= self.clock_error
        if type(theirs) in (int, float) and 0 <= theirs <= MAX_MS and is_better:
            self._ahead = int(theirs) * 1_000_000 + 500_000 - (sent + received) // 2
            self.measured_offset = self.clock_offset
            self._error, self._synced_at = error, received
            self._tell_clock()

    def _tell_clock(self) -> None:
        """Our clock stands in each `receive_ts`: whoever reads them must know by how much it may be off."""
        offset, error = self.measured_offset, self._error
        if min(abs(offset), abs(offset - self._told_offset)) - error > OFF:
            self._told_offset = offset
            side = "ahead of" if offset < 0 else "behind"
            log.warning("the clock of this host is %.1f s %s the exchange's: one is wrong", abs(offset) / 1e9, side)
        elif self._told_offset and abs(offset) + error < OFF:  # between the two it may be either
            self._told_offset = 0
            log.info("the clock of this host agrees with the exchange's again")
