"""Makes the channels that the exchange sends equal to those asked for: paced calls, refusals, resyncs."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from collector.channels import has_expired
from collector.lifecycle import Exit
from collector.limits import CALL_COST, SUBSCRIBE_COST, chunk_channels
from workers.deribit.connection.credits import Pool, pay
from workers.deribit.connection.listener import Listener
from workers.deribit.connection.session import NEVER, Send, Session
from workers.deribit.connection.subscriptions import EXPIRED, TRIES, Call, Subscriptions
from workers.deribit.connection.together import do_together
from workers.deribit.rpc.errors import ExchangeError, Lost, Reaction, Refused, find_reaction

RETRY_PAUSE, RETRIES = 1.0, 10
"""Seconds before a call that the exchange asks us to retry is sent again, and how often it may ask."""

SUBSCRIBE_FAILED = 11052
"""Some channel of a call failed, which one and why is not said: as if it had been left out of the answer."""

SECOND_CHANCE, SOON = 600.0, 60.0
"""Seconds after which all that was refused is asked for again; and where some was only to be asked for later."""

LOGIN_IS_NEW = 60.0
"""Seconds after a login. So soon, "login needed" is said of the channel; later it means that the login has died (the
key was reset), and a new connection logs in anew."""


class Reconciler:
    """Sends the calls of one connection's subscriptions. Tells the listener what is confirmed, and what refused.

    What waits here, and what it has `spawn` do beside that, must be cancelled before `end`: no call of one connection
    may go on in the next.
    """

    def __init__(
        self,
        send: Send,
        session: Session,
        credits: Pool,
        listener: Listener,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self.subscriptions = Subscriptions()
        self._send = send
        self._session = session
        self._listener = listener
        self._spawn = spawn
        self.credits = credits
        self._turn = asyncio.Lock()
        self._answered = asyncio.Event()
        self._chance_at = NEVER  # monotonic
        self._denied: set[str] = set()  # not what the login may have, said of each soon after it

    def end(self) -> None:
        """The connection is gone: everything must be asked for again."""
        self.subscriptions.forget()

    async def settle(self, names: list[str]) -> None:
        """Reconcile until these are confirmed or refused, whoever has asked for them. Raises Lost or Refused."""
        await self.reconcile()
        while self.subscriptions.is_any_in_flight(names):
            await self._answered.wait()
            await self.reconcile()

    async def reconcile(self) -> None:
        """Ask until nothing is missing but what was refused, or waits for the login. Raises Lost or Refused."""
        session = self._session
        while calls := self.subscriptions.plan_calls(session.logged_in, session.awaits_login):
            await do_together(*(self._place(call) for call in calls))

    async def keep_up(self, now: float) -> None:
        """Ask for what came to nothing, and now and then for what was refused (`now` is monotonic). Raises as before.

        What was wrong at the exchange may be well by then.
        """
        if now >= self._chance_at:
            self._chance_at = NEVER
            self.subscriptions.give_another_chance()
        self._chance_at = min(self._chance_at, now + SECOND_CHANCE)
        await self.reconcile()

    async def unsubscribe_once(self, channels: list[str]) -> None:
        """Unsubscribe from channels that are still wanted, and wait for the answer. Raises Lost or Refused.

        To `reconcile` after it is the one way to new snapshots.
        """
        names = [n for n in channels if n in self.subscriptions.confirmed and n in self.subscriptions.asked]
        calls = [Call("public/unsubscribe", tuple(chunk)) for chunk in chunk_channels(names, "public/unsubscribe")]
        await do_together(*(self._place(call) for call in calls))

    def describe_wish(self, name: str) -> Any:
        """True if the channel is confirmed, else a map of code and message."""
        if name in self.subscriptions.confirmed:
            return True
        if name in self.subscriptions.refused:
            return {"code": "exchange_error", "message": self.subscriptions.refused[name]}
        return {"code": "not_connected", "message": "kept, and asked for when the connection is live"}

    async def _place(self, call: Call) -> None:
        """Send a call once there are credits for it. What was sent is seen through, whoever gives up waiting for it."""
        sent = None
        try:
            if call.leaves:
                await pay(self._session.credits, CALL_COST)
            else:
                async with self._turn:  # calls keep their order
                    await pay(self.credits, SUBSCRIBE_COST)
            sent = self._spawn(self._see_through(call))
            await asyncio.shield(sent)
        finally:
            if sent is None:
                self._end_call(call)

    async def _see_through(self, call: Call) -> None:
        awaited_login = self._session.awaits_login  # it may be judged before the login, though answered after it
        reaction = None
        try:
            answered = await self._send(call.method, {"channels": list(call.channels)})
        except ExchangeError as error:
            reaction = find_reaction(error.code)
            await self._take_error(call, error, reaction, awaited_login)
        except TimeoutError:
            raise Lost(f"{call.method} was not answered in time") from None
        else:
            self._take_answer(call, answered)
        finally:
            # Not before: others would ask for the same, and use up the tries. Who is banned asks no more at all.
            if reaction is not Reaction.BANNED:
                self._end_call(call)

    def _end_call(self, call: Call) -> None:
        self.subscriptions.end_call(call)
        self._answered.set()  # those who wait for it look what came of it
        self._answered = asyncio.Event()

    def _take_answer(self, call: Call, answered: Any) -> None:
        if call.leaves:
            return self.subscriptions.note_left(call.channels)
        names = [name for name in answered if isinstance(name, str)] if isinstance(answered, list) else []
        gained, refused = self.subscriptions.take_answer(call, names)
        self._denied.difference_update(gained)
        self._listener.confirm_channels(gained)
        reasons = {name: self.subscriptions.refused[name] for name in refused}
        for reason in dict.fromkeys(reasons.values()):
            self._tell_refused([name for name in refused if reasons[name] == reason], reason)

    async def _take_error(self, call: Call, error: ExchangeError, reaction: Reaction, awaited_login: bool) -> None:
        said = f"{call.method}: {error}"
        match reaction:
            case Reaction.BANNED:
                raise Refused(said, Exit.BANNED)
            case Reaction.RETRY:
                await self._put_off(call, error)
            case Reaction.BACK_OFF if call.leaves:
                await self._put_off(call, error)  # it can wait, and is worth no connection
            case Reaction.BACK_OFF | Reaction.LOCK_OUT:
                raise Lost(said, error.told)
            case Reaction.LOG_IN | Reaction.REFRESH if awaited_login:
                await self._put_off(call, error)
            case Reaction.LOG_IN | Reaction.REFRESH if self._has_login_died(call):
                raise Lost(f"the login is not known any more: {said}", error.told)
            case _:
                await self._blame_channels(call, error, reaction)

    async def _put_off(self, call: Call, error: ExchangeError) -> None:
        """Have it asked for again; what was asked for so often is given up."""
        await asyncio.sleep(RETRY_PAUSE)
        if call.leaves:
            return self.subscriptions.refuse_leaving(call, RETRIES)
        self._chance_at = min(self._chance_at, time.monotonic() + SOON)
        self._count_refusal(list(call.channels), error, RETRIES)

    async def _blame_channels(self, call: Call, error: ExchangeError, reaction: Reaction) -> None:
        """One bad channel can fail a whole call: give up those that are known to be to blame, else halve the call."""
        bad, asked = list(call.channels), self.subscriptions.asked
        if len(bad) > 1:
            are_known = reaction is Reaction.LOG_IN and not self._session.logged_in
            bad = [name for name in bad if are_known and name in asked and asked[name].needs_login]
        if not bad:
            middle = len(call.channels) // 2
            for half in (call.channels[:middle], call.channels[middle:]):
                await self._place(Call(call.method, half))
        elif call.leaves:  # it is not sent any more, says the exchange
            self.subscriptions.note_left(bad)
        else:
            self._denied.update(bad if reaction in (Reaction.LOG_IN, Reaction.REFRESH) else ())
            self._count_refusal(bad, error, TRIES if error.code == SUBSCRIBE_FAILED else 1)

    def _has_login_died(self, call: Call) -> bool:
        """Whether "login needed" means that; of a channel that the login never gave, it says nothing new."""
        is_old = time.monotonic() - self._session.logged_in_at > LOGIN_IS_NEW
        return self._session.logged_in and (call.leaves or (is_old and self._denied.isdisjoint(call.channels)))

    def _count_refusal(self, names: list[str], error: ExchangeError, tries: int = 1) -> None:
        self._tell_refused(self.subscriptions.refuse(names, str(error), tries), str(error))

    def _tell_refused(self, names: list[str], reason: str) -> None:
        """Tell of refusals; that of an instrument whose day has passed is its end."""
        now = self._session.read_exchange_clock()
        expired = [name for name in names if has_expired(self.subscriptions.asked[name].instrument, now)]
        self.expire(expired, by_clock=True)
        if others := [name for name in names if name not in expired]:
            self._listener.refuse_channels(others, reason)

    def expire(self, names: list[str], by_clock: bool = False) -> None:
        """The lives of the instruments of these channels have ended: leave them, and do not ask for them again."""
        if ended := self.subscriptions.expire(names, by_clock):
            self._listener.refuse_channels(ended, EXPIRED)
