"""Logins: who may, by which grant, and the tokens given out. Time (ms) and random are passed in."""

import hashlib
import hmac
from dataclasses import dataclass
from random import Random
from typing import Any

from workers.exchange.protocol.rpc import RpcError, refuse_param

LIFE = 31_536_000
"""Seconds a token lives by default, as on production (2025)."""

WINDOW = 60_000
"""ms: how old the timestamp of a signature may be."""

MAX_TOKENS = 10_000
"""How many of each kind are remembered, the newest."""

DEFAULT_KEYS = {"practice": "practice"}
"""Client id and secret that are accepted unless others are given."""

_DEFAULT_SCOPE = "block_trade:read trade:read_write account:read_write wallet:read mainaccount"
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"


@dataclass(frozen=True, slots=True)
class Login:
    """A login that holds until `expires` (ms)."""

    client_id: str
    expires: int
    scope: str
    connection: int | None
    """The connection that the token is tied to; None with session scope."""


def read_keys(text: str) -> dict[str, str]:
    """Read `id:secret,id:secret`; none given are the default keys."""
    pairs = (part.partition(":") for part in text.split(",") if part.strip())
    return {name.strip(): secret.strip() for name, _, secret in pairs} or dict(DEFAULT_KEYS)


class Authority:
    """Checks grants and remembers the tokens and nonces."""

    def __init__(self, keys: dict[str, str], rng: Random) -> None:
        self._keys = keys
        self._rng = rng
        self._access: dict[str, Login] = {}
        self._refresh: dict[str, Login] = {}
        self._nonces: dict[tuple[str, str], int] = {}

    def grant(self, params: dict[str, Any], now: int, connection: int, life: float) -> tuple[Login, dict[str, Any]]:
        """Carry out public/auth: the login and the result. Raises RpcError 13004, 13009 or -32602."""
        kind = params.get("grant_type")
        if kind == "client_credentials":
            client_id = self._check_secret(params)
        elif kind == "client_signature":
            client_id = self._check_signature(params, now)
        elif kind == "refresh_token":
            return self._renew(params, now, connection, life)
        else:
            raise refuse_param("grant_type", "value required" if kind is None else "invalid value")
        scope = str(params.get("scope") or "")
        return self._issue(client_id, scope, now, connection, life, params)

    def check_token(self, token: str, now: int, connection: int) -> Login:
        """The login of an access token. Raises RpcError 13009 if it is unknown, dead or another connection's."""
        login = self._access.get(token)
        if login is None or login.expires <= now or login.connection not in (None, connection):
            raise RpcError(13009, {"reason": "invalid_token"})
        return login

    def revoke(self, login: Login) -> None:
        """Make the tokens of a login void."""
        for tokens in (self._access, self._refresh):
            for token in [token for token, held in tokens.items() if held == login]:
                del tokens[token]

    def _check_secret(self, params: dict[str, Any]) -> str:
        client_id, secret = _require(params, "client_id"), _require(params, "client_secret")
        if not hmac.compare_digest(self._keys.get(client_id, "\0").encode(), secret.encode()):
            raise RpcError(13004)
        return client_id

    def _check_signature(self, params: dict[str, Any], now: int) -> str:
        client_id, given = _require(params, "client_id"), _require(params, "signature")
        nonce, timestamp = _require(params, "nonce"), _require(params, "timestamp")
        secret = self._keys.get(client_id)
        if secret is None or not timestamp.isdecimal() or len(timestamp) > 20:
            raise RpcError(13004)
        message = f"{timestamp}\n{nonce}\n{params.get('data') or ''}"
        wanted = hmac.new(secret.encode(), message.encode(), hashlib.sha256).hexdigest()
        if not hmac.compare_digest(wanted.encode(), given.encode()):
            raise RpcError(13004)
        if abs(now - int(timestamp)) > WINDOW:
            raise RpcError(13009, {"reason": "timestamp_out_of_range"})
        self._nonces = {key: at for key, at in self._nonces.items() if at > now - 2 * WINDOW}
        if (client_id, nonce) in self._nonces:
            raise RpcError(13009, {"reason": "nonce_already_used"})
        self._nonces[client_id, nonce] = now
        return client_id

    def _renew(self, params: dict[str, Any], now: int, connection: int, life: float) -> tuple[Login, dict[str, Any]]:
        old = self._refresh.get(_require(params, "refresh_token"))
        if old is None:
            raise RpcError(13009, {"reason": "invalid_token"})
        self.revoke(old)
        return self._issue(old.client_id, old.scope, now, connection, life, params)

    def _issue(
        self, client_id: str, scope: str, now: int, connection: int, life: float, params: dict[str, Any]
    ) -> tuple[Login, dict[str, Any]]:
        session = next((word[8:] for word in scope.split() if word.startswith("session:")), None)
        for word in scope.split():
            if word.startswith("expires:") and word[8:].isdecimal():
                life = min(life, float(word[8:]))
        expires = now + int(life * 1000)
        granted = _grant_scope(scope, session is None)
        login = Login(client_id, expires, granted, connection if session is None else None)
        access, refresh = self._make_token(expires), self._make_token(expires + LIFE * 1000)
        for tokens, token in ((self._access, access), (self._refresh, refresh)):
            tokens[token] = login
            if len(tokens) > MAX_TOKENS:
                del tokens[next(iter(tokens))]
        result: dict[str, Any] = {"enabled_features": [], "access_token": access, "expires_in": int(max(life, 0))}
        result |= {"refresh_token": refresh, "scope": granted, "token_type": "bearer"}
        if session is not None:
            result["sid"] = session
        if "state" in params:
            result["state"] = params["state"]
        return login, result

    def _make_token(self, expires: int) -> str:
        draw = "".join(self._rng.choices(_ALPHABET, k=72))
        return f"{expires}.{draw[:8]}.{draw[8:]}"


def _grant_scope(asked: str, connection: bool) -> str:
    words = asked.split()
    if not [word for word in words if not word.startswith(("session:", "expires:", "ip:", "connection"))]:
        words += _DEFAULT_SCOPE.split()
    if connection and "connection" not in words:
        words.append("connection")
    if "mainaccount" not in words:
        words.append("mainaccount")
    return " ".join(words)


def _require(params: dict[str, Any], key: str) -> str:
    value = params.get(key)
    if value is None or isinstance(value, (dict, list)):
        raise refuse_param(key, "value required")
    return str(value)
