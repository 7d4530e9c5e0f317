"""Deribit's bootstrap as data: which requests make a fresh connection ready, and the rule that each keeps. Pure.

The first requests are sent together, since none needs the answer of another: going live costs few round trips.
"""

import hashlib
import hmac
from typing import Any, NamedTuple

from collector import __version__

PLAIN, SIGNED = "client_credentials", "client_signature"
"""The grants by which the secret itself is sent, and by which it is not."""


class Login(NamedTuple):
    """What a login needs. `signed`: by client_signature, which leaves the secret here; else with the secret itself."""

    client_id: str
    client_secret: str
    signed: bool = True

    def __repr__(self) -> str:
        return f"Login({self.client_id!r}, ...)"


def sign(secret: str, timestamp_ms: int, nonce: str) -> str:
    """Deribit's WebSocket signature (docs: authentication): hex HMAC-SHA256 of timestamp LF nonce LF, and no data."""
    text = f"{timestamp_ms}\n{nonce}\n"
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()


def build_auth(login: Login, now_ms: int, nonce: str) -> dict[str, Any]:
    """The params of public/auth: by signature, or with id and secret where signing is switched off."""
    if not login.signed:
        return {"grant_type": PLAIN, "client_id": login.client_id, "client_secret": login.client_secret}
    return {
        "grant_type": SIGNED,
        "client_id": login.client_id,
        "timestamp": now_ms,
        "nonce": nonce,
        "data": "",
        "signature": sign(login.client_secret, now_ms, nonce),
    }


def build_refresh(refresh_token: str) -> dict[str, Any]:
    """The params of public/auth that trade a refresh token for a new pair."""
    return {"grant_type": "refresh_token", "refresh_token": refresh_token}


def simplify(seconds: float) -> float:
    """A number of seconds as Deribit documents them: without a fraction where it has none."""
    return int(seconds) if seconds == int(seconds) else seconds


def build_first_requests(heartbeat_interval: float, auth: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The requests that a connection begins with, by method; `auth` are the params of a login. In Deribit's order."""
    # Deribit asks clients to say who they are.
    requests: dict[str, dict[str, Any]] = {"public/hello": {"client_name": "collector", "client_version": __version__}}
    if auth is not None:
        # Raw and private channels are refused (13778, 13009) before it; later requests of the socket see the login.
        requests["public/auth"] = auth
    # Without it an idle socket is cut after 60 s, and a dead one is never noticed; its floor is 10 s.
    requests["public/set_heartbeat"] = {"interval": simplify(heartbeat_interval)}
    # Lag is measured against the exchange's clock: offset and its error, as NTP does it.
    requests["public/get_time"] = {}
    return requests
