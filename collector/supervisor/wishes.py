"""What a connection's worker is asked to subscribe and to give up: said again until it has heard it."""

import asyncio
import logging
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from collector.messages import ControlError
from collector.supervisor.keeper import Keeper
from collector.words import say_count

PATIENCE = 30
"""Seconds that a worker has to carry out what nobody waits for.

After this, as at the deadline of who waits, it asks for these channels no more by themselves, but for all that are
missing in one call: wishes of one channel each would wait for credits one after another, 200 of them for a minute.
"""

UNHEARD = ("not_connected", "expired", "timeout")
"""Codes after which it is not sure that the worker knows of a wish. To hear it twice does no harm."""

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Wish:
    """One op on some channels. `is_under_way`: it was sent, and the answer is still to come."""

    op: str
    reason: str
    is_under_way: bool = False


class Wishes:
    """The last wish for each channel of which the worker of `keeper` may not know yet.

    A worker that starts, is stopped for a moment, or owes too many answers hears nothing: it is told with the next sign
    of life.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._unheard: dict[str, Wish] = {}
        self._telling: dict[asyncio.Task[bool], Wish] = {}

    async def ask(self, op: str, names: list[str], deadline: int) -> dict[str, Any]:
        """Have the worker (un)subscribe until `deadline` (ns); return what came of each channel.

        Raises ControlError; after one of UNHEARD the wish stands.
        """
        return await self._pass_on(self._note(op, names, ""), names, deadline)

    def tell(self, op: str, names: list[str], reason: str = "") -> None:
        """The same, for one who waits for no answer. The wish stands from now on, and is sent after all before it.

        `reason`: why the channels are given up, if not because of a wish.
        """
        self._note(op, names, reason)
        self.catch_up()

    def _note(self, op: str, names: list[str], reason: str) -> Wish:
        wish = Wish(op, reason)
        self._unheard |= dict.fromkeys(names, wish)
        return wish

    async def _pass_on(self, wish: Wish, names: list[str], deadline: int) -> dict[str, Any]:
        arguments: dict[str, Any] = {"channels": names} | ({"reason": wish.reason} if wish.reason else {})
        if wish.op == "subscribe":
            arguments["epoch"] = self._keeper.begin_epoch()
        wish.is_under_way = True
        was_heard = False
        try:
            answer = await self._keeper.ask(wish.op, arguments, deadline)
            was_heard = True
            return dict(answer["channels"])
        except ControlError as error:
            was_heard = error.code not in UNHEARD
            raise
        finally:
            wish.is_under_way = False
            if was_heard:
                self._forget(wish, names)

    def list_leaving(self) -> list[str]:
        """Channels that are given up, and of which a worker may not know that yet."""
        return [name for name, wish in self._unheard.items() if wish.op == "unsubscribe"]

    def note_spec(self) -> None:
        """A new life is told now what the channels are. Of some it must still say that they expired."""
        self._unheard = {name: wish for name, wish in self._unheard.items() if wish.reason}

    def _begin_telling(self, wish: Wish, names: list[str]) -> None:
        wish.is_under_way = True  # before the task is: this may be asked for again at once
        task = asyncio.create_task(self._tell(wish, names))
        self._telling[task] = wish
        task.add_done_callback(self._end_telling)

    async def _tell(self, wish: Wish, names: list[str]) -> bool:
        """Pass a wish on; return whether the worker listens."""
        names = [name for name in names if self._unheard.get(name) is wish]  # else the opposite was wanted meanwhile
        try:
            if names:
                await self._pass_on(wish, names, time.time_ns() + PATIENCE * 1_000_000_000)
        except ControlError as error:
            log.debug("%s: %s: %s", self._keeper.name, wish.op, error)
            return error.code not in UNHEARD
        return True

    def _end_telling(self, task: asyncio.Task[bool]) -> None:
        del self._telling[task]
        if not task.cancelled() and task.result():
            self.catch_up()

    def _forget(self, wish: Wish, names: list[str]) -> None:
        for name in names:
            if self._unheard.get(name) is wish:  # else another one has come since
                del self._unheard[name]

    def catch_up(self) -> None:
        """Tell the worker what it has not heard, at each sign of life too.

        What is to be subscribed to while another such wish is under way goes together once that has been heard: each
        call costs credits that connections share.
        """
        is_subscribing = any(wish.op == "subscribe" for wish in self._telling.values())
        groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name, wish in self._unheard.items():
            if not wish.is_under_way and not (is_subscribing and wish.op == "subscribe"):
                groups[wish.op, wish.reason].append(name)
        # Backwards: first it gives up what may stand in the way.
        for (op, reason), names in sorted(groups.items(), reverse=True):
            log.debug("%s: told now: %s of %s", self._keeper.name, op, say_count(len(names), "channel"))
            self._begin_telling(self._note(op, names, reason), names)
