"""Deribit's bootstrap as data: which requests make a fresh connection ready, and the rule that each keeps. Pure.

Requests of one round are sent together, since none needs the answer of another: going live costs few round trips.
"""

import hashlib
import hmac
from collections.abc import Callable
from typing import Any, NamedTuple

from collector import __version__

PLAIN = "client_credentials"
"""The grant by which the secret itself is sent."""


class Login(NamedTuple):
    """What a login needs. `signed`: by client_signature, which leaves the secret here; else with the secret itself."""

    client_id: str
    client_secret: str
    signed: bool = True

    def __repr__(self) -> str:
        return f"Login({self.client_id!r}, ...)"


class Moment(NamedTuple):
    """What the steps are told: settings, and the time and randomness that pure code may not fetch."""

    login: Login | None
    heartbeat_interval: float
    cancel_on_disconnect: bool
    now_ms: int
    nonce: str


def sign(secret: str, timestamp_ms: int, nonce: str, data: str = "") -> str:
    """Deribit's WebSocket signature: hex HMAC-SHA256 of timestamp LF nonce LF data (docs: authentication)."""
    text = f"{timestamp_ms}\n{nonce}\n{data}"
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()


def build_auth(moment: Moment) -> dict[str, Any]:
    """The params of public/auth: by signature, or with id and secret where signing is switched off."""
    login = moment.login
    assert login is not None
    if not login.signed:
        return build_plain(login)
    return {
        "grant_type": "client_signature",
        "client_id": login.client_id,
        "timestamp": moment.now_ms,
        "nonce": moment.nonce,
        "data": "",
        "signature": sign(login.client_secret, moment.now_ms, moment.nonce),
    }


def build_plain(login: Login) -> dict[str, Any]:
    """The params of public/auth with id and secret."""
    return {"grant_type": PLAIN, "client_id": login.client_id, "client_secret": login.client_secret}


def build_refresh(refresh_token: str) -> dict[str, Any]:
    """The params of public/auth that trade a refresh token for a new pair."""
    return {"grant_type": "refresh_token", "refresh_token": refresh_token}


def simplify(seconds: float) -> float:
    """A number of seconds as Deribit documents them: without a fraction where it has none."""
    return int(seconds) if seconds == int(seconds) else seconds


class Step(NamedTuple):
    """One request: in which round it is sent, when it applies, and its params."""

    method: str
    round: int
    applies: Callable[[Moment], bool]
    params: Callable[[Moment], dict[str, Any]]


STEPS = (
    # Deribit asks clients to say who they are.
    Step("public/hello", 1, lambda m: True, lambda m: {"client_name": "collector", "client_version": __version__}),
    # Raw and private channels are refused (13778, 13009) before it; later requests of the socket see the login.
    Step("public/auth", 1, lambda m: m.login is not None, build_auth),
    # Without it an idle socket is cut after 60 s, and a dead one is never noticed; its floor is 10 s.
    Step("public/set_heartbeat", 1, lambda m: True, lambda m: {"interval": simplify(m.heartbeat_interval)}),
    # Lag is measured against the exchange's clock: offset and its error, as NTP does it.
    Step("public/get_time", 1, lambda m: True, lambda m: {}),
    # Needs the login. Only of use to who places orders on this connection.
    Step(
        "private/enable_cancel_on_disconnect", 2,
        lambda m: m.login is not None and m.cancel_on_disconnect, lambda m: {"scope": "connection"},
    ),
)  # fmt: skip


def plan_round(number: int, moment: Moment) -> list[tuple[str, dict[str, Any]]]:
    """The (method, params) pairs to send together in round 1 or 2."""
    return [(s.method, s.params(moment)) for s in STEPS if s.round == number and s.applies(moment)]
