"""What each control op does to a running collector. See messages.OPS and messages.CODES."""

import asyncio
import json
import logging
import re
import time
from collections.abc import Iterable
from typing import Any

from collector.channels import LISTINGS, Channel, parse_channel
from collector.config import ConfigError, Connection, read_connection
from collector.config.clashes import Placed
from collector.config.patterns import is_pattern
from collector.config.reader import check_family, check_login
from collector.config.urls import hide_secrets
from collector.lifecycle import Exit
from collector.limits import MAX_FRAME
from collector.messages import ControlError, Request
from collector.supervisor.process import describe_exit
from collector.supervisor.supervisor import Entry, Supervisor
from collector.words import say_error

LOOK = 500_000_000
"""Ns that a worker has to say its state; what is known of it is answered after that."""

MAX_ON_ONE = 20_000
"""Channels that may be asked for on one connection."""

STOPPING = "the collector is stopping"

NO_PATTERNS = "patterns stand in the file, or in the table of connect; here channels are named one by one"

_SENDABLE = re.compile(r"(public/|private/get_)[a-z0-9_]{1,100}\Z")

UNSENDABLE = frozenset(
    {
        "public/subscribe", "public/unsubscribe", "public/unsubscribe_all", "public/auth", "public/fork_token",
        "public/exchange_token", "public/set_heartbeat", "public/disable_heartbeat",
    }
)  # fmt: skip
"""Public methods that would change, behind the worker's back, what it keeps itself."""

log = logging.getLogger(__name__)


class Commands:
    """Answers control requests on a supervisor."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._entries = supervisor.entries

    async def answer(self, request: Request) -> Any:
        """Carry out one request. Raises ControlError."""
        ops = {
            "connect": self._connect, "subscribe": self._subscribe, "unsubscribe": self._unsubscribe,
            "send": self._send, "close": self._close, "get_state": self._get_state,
        }  # fmt: skip
        return await ops[request.op](request)

    def _find(self, name: str | None) -> Entry:
        entry = self._entries.get(name or "")
        if entry is None:
            names = ", ".join(self._entries) or "none"
            raise ControlError("unknown_connection", f"no connection {str(name)[:60]!r}; there are: {names}")
        return entry

    def _find_lasting(self, name: str | None) -> Entry:
        """One that is not over, nor about to be: what is wished of it will be carried out."""
        entry = self._find(name)
        keeper = entry.keeper
        if self._supervisor.is_stopping:
            raise ControlError("not_connected", STOPPING)
        if keeper.is_over:
            raise ControlError("not_connected", f"{name} has ended for good ({keeper.state}); connect it anew")
        if keeper.is_stopping:
            raise ControlError("not_connected", f"{name} is being closed; connect it anew once it has ended")
        return entry

    # connect and close

    async def _connect(self, request: Request) -> dict[str, Any]:
        if self._supervisor.is_stopping:
            raise ControlError("not_connected", STOPPING)
        connection = self._check_connection(request.arguments["connection"])
        known = self._entries.get(connection.name)  # it has failed
        in_file = any(connection.name == each.name for each in self._supervisor.config.connections)
        entry = self._supervisor.start_connection(connection, from_file=in_file)
        self._supervisor.take_from_patterns(entry)
        keeper = entry.keeper
        log.info("%s: connected by a control request", connection.name)
        try:
            async with asyncio.timeout(_count_left(request.deadline)):
                await keeper.wait_settled()
        except TimeoutError:
            text = f"{connection.name} is not live yet ({keeper.state}), still being tried"
            raise _blame("timeout", text, keeper.last_error) from None
        if not keeper.is_live:
            if known is None and self._entries.get(connection.name) is entry:  # else it was closed, or replaced
                del self._entries[connection.name]
            raise _explain_failure(entry)
        return await self._look(entry, request.deadline)

    def _check_connection(self, table: dict[str, Any]) -> Connection:
        """Check a table as the file's are, by itself and beside those that run."""
        config = self._supervisor.config
        try:
            connection = read_connection(table, "connection", config.runtime_dir, config.secrets)
            if len(connection.channels) > MAX_ON_ONE:
                raise ConfigError(
                    f"{connection.name}: {len(connection.channels)} channels; ask for at most {MAX_ON_ONE}"
                )
            known = self._entries.get(connection.name)
            if known is not None and not known.keeper.is_over:
                words = "is being closed; try again" if known.keeper.is_stopping else "runs already; close it first"
                raise ControlError("exists", f"{connection.name} {words}, or choose another name")
            if shards := self._supervisor.list_lasting_shards(connection.name):
                raise ControlError("exists", f"{connection.name} runs as {', '.join(shards)}; close these first")
            self._supervisor.check_beside([connection], known)
        except ConfigError as error:
            raise ControlError("bad_request", str(error)) from None
        return connection

    async def _close(self, request: Request) -> dict[str, Any]:
        entry = self._find(request.connection)
        log.info("%s: closed by a control request", entry.keeper.name)
        entry.keeper.stop()
        try:
            async with asyncio.timeout(_count_left(request.deadline)):
                await asyncio.shield(entry.keeping)
        except TimeoutError:
            raise ControlError("timeout", f"{entry.keeper.name} is still closing; it will be killed soon") from None
        if self._entries.get(entry.keeper.name) is entry:
            del self._entries[entry.keeper.name]  # one that had failed was still shown
        return self._describe(entry, {})

    # state

    async def _get_state(self, request: Request) -> dict[str, Any]:
        if request.connection is not None:
            return await self._look(self._find(request.connection), request.deadline)
        entries = dict(self._entries)
        states = await asyncio.gather(*(self._look(entry, request.deadline) for entry in entries.values()))
        return dict(zip(entries, states, strict=True))

    async def _look(self, entry: Entry, deadline: int) -> dict[str, Any]:
        """The state map, from the worker if it answers soon; a stuck or dead one does not hold up the answer."""
        try:
            theirs = await entry.keeper.ask("get_state", {}, min(deadline, time.time_ns() + LOOK))
        except ControlError:
            theirs = {}
        return self._describe(entry, theirs if isinstance(theirs, dict) else {})

    def _describe(self, entry: Entry, theirs: dict[str, Any]) -> dict[str, Any]:
        """The supervisor's part of the state map first, then the worker's: just now, or what it said last."""
        keeper = entry.keeper
        keeper.add_report(theirs)
        ours = keeper.describe() | {
            "url": hide_secrets(self._supervisor.resolve_url(entry.connection)),
            "publish": entry.bound,
            "left_to": entry.follower.count_left() if entry.follower is not None else {},
        }
        if keeper.machine.state != "running":
            channels = {"asked": list(entry.channels), "confirmed": [], "refused": {}, "mute": []}
            now = {"authenticated": False, "channels": channels, "rate": 0.0, "cpu": 0.0, "memory": 0}
        else:
            now = {key: theirs[key] for key in ("state", "since") if key in theirs}
        return ours | {key: value for key, value in keeper.report.items() if key not in ours} | now

    # channels

    async def _subscribe(self, request: Request) -> dict[str, Any]:
        entry = self._find_lasting(request.connection)
        asked = list(dict.fromkeys(request.arguments["channels"]))
        results = self._admit(entry, asked)
        wanted = [name for name in asked if name not in results]
        if entry.follower is not None:
            entry.follower.keep(wanted)
        results |= await self._pass_on(entry, request, wanted)
        return {"channels": {name: results[name] for name in asked}}

    def _admit(self, entry: Entry, asked: list[str]) -> dict[str, Any]:
        """Add to the channels of a connection those that may stand beside all others; return why the rest may not."""
        refused: dict[str, Any] = {}
        places = self._supervisor.list_places()
        for name in asked:
            try:
                places.place(Placed(entry.keeper.name, _read_channel(name, bool(entry.connection.credentials))))
                if name not in entry.channels and len(entry.channels) >= MAX_ON_ONE:
                    raise ValueError(f"{MAX_ON_ONE} channels are asked for on {entry.keeper.name} already")
            except ValueError as error:
                refused[name] = _refuse(str(error))
            else:
                entry.channels[name] = None
        return refused

    async def _unsubscribe(self, request: Request) -> dict[str, Any]:
        entry = self._find_lasting(request.connection)
        names = list(dict.fromkeys(request.arguments["channels"]))
        results: dict[str, Any] = {name: _refuse(why) for name in names if (why := _find_hindrance(entry, name))}
        unwanted = [name for name in names if name not in results]
        if entry.follower is not None:
            entry.follower.release(entry.channels.keys() & unwanted)  # not what another one of its connections has
        for name in unwanted:
            entry.channels.pop(name, None)
        is_running = entry.keeper.machine.state == "running"
        results |= await self._pass_on(entry, request, unwanted)
        if not is_running:
            results |= dict.fromkeys(unwanted, True)  # nothing is subscribed now, and will not be
        return {"channels": {name: results[name] for name in names}}

    async def _pass_on(self, entry: Entry, request: Request, names: list[str]) -> dict[str, Any]:
        """Have the worker (un)subscribe; while it cannot hear, the wish stands."""
        if not names:
            return {}
        try:
            channels = await entry.wishes.ask(request.op, names, request.deadline)
        except ControlError as error:
            if error.code not in ("not_connected", "expired"):
                raise
            channels = {}
        kept = {"code": "not_connected", "message": "kept, and carried out when the connection is live"}
        return {name: channels.get(name, kept) for name in names}

    # send

    async def _send(self, request: Request) -> Any:
        entry = self._find(request.connection)
        method = request.arguments["method"]
        if not is_sendable(method, entry.connection.send_allow):
            raise ControlError("forbidden", explain_forbidden(method, entry.connection.send_allow))
        arguments = {"method": method, "params": _check_params(request.arguments.get("params") or {})}
        return await entry.keeper.ask("send", arguments, request.deadline)


def _check_params(params: dict[str, Any]) -> dict[str, Any]:
    """What the exchange could not read, or answers in a way that nobody can place, is refused before it is sent."""
    try:
        size = len(json.dumps(params, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ControlError("bad_request", f"params cannot be written as JSON: {error}") from None
    if size > MAX_FRAME:
        raise ControlError("bad_request", f"params are {size} bytes of JSON; Deribit takes {MAX_FRAME} in a request")
    return params


def _refuse(message: str) -> dict[str, str]:
    return {"code": "bad_request", "message": message}


def _find_hindrance(entry: Entry, name: str) -> str:
    """Why a channel cannot be given up, "" if it can."""
    if is_pattern(name):
        return NO_PATTERNS
    return "the patterns of this connection need it" if entry.follower and name in LISTINGS else ""


def _read_channel(name: str, login: bool) -> Channel:
    if is_pattern(name):
        raise ValueError(NO_PATTERNS)
    check_family(name)
    channel = parse_channel(name)
    check_login(channel, name, login)
    return channel


def is_sendable(method: str, allowed: Iterable[str]) -> bool:
    """Whether a method may be sent through control; `allowed` are the table's own exceptions."""
    return method in allowed or (bool(_SENDABLE.match(method)) and method not in UNSENDABLE)


def explain_forbidden(method: str, allowed: Iterable[str]) -> str:
    """Say why a method may not be sent, and what may."""
    shown = repr(method[:60])
    if re.fullmatch(r"[a-z0-9_]{1,60}", method):
        return f"{shown} lacks its first part; write public/{method} or private/{method}"
    if re.fullmatch(r"(public|private)/(un)?subscribe(_all)?", method):
        return f"{shown} is not for send: the ops subscribe and unsubscribe keep account of the channels"
    if method in UNSENDABLE:
        return f"{shown} would change what the collector keeps itself; send_allow in its table can allow it"
    listed = ", ".join(["public/*", "private/get_*", *allowed])
    return f"{shown} is none of {listed}; send_allow in the connection's table names further methods"


def _count_left(deadline: int) -> float:
    return (deadline - time.time_ns()) / 1e9


_CODES: dict[int, str] = {
    Exit.BAD_SPEC: "bad_request", Exit.CREDENTIALS: "exchange_error", Exit.BANNED: "exchange_error",
}  # fmt: skip


def _explain_failure(entry: Entry) -> ControlError:
    """Say why a new connection came to nothing, or what came in its place."""
    keeper = entry.keeper
    if entry.follower is not None and len(shards := entry.follower.list_shards()) > 1:
        return ControlError("not_connected", f"{keeper.name} is spread over {', '.join(shards)}: look at their states")
    if keeper.machine.state != "failed" or keeper.exit_code is None:
        return ControlError("not_connected", f"{keeper.name} was closed before it was live")
    code = _CODES.get(keeper.exit_code, "not_connected")
    return _blame(code, f"{keeper.name}: {describe_exit(keeper.exit_code)}", keeper.last_error)


def _blame(code: str, message: str, error: Any) -> ControlError:
    """A refusal with what went wrong last, in words; the exchange's own error is its `data` too."""
    if not isinstance(error, dict):
        return ControlError(code, message, error)
    words = f"{error['code']} {say_error(error)}" if "code" in error else say_error(error)
    return ControlError(code, f"{message}: {words}", error if "code" in error else None)
