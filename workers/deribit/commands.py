"""The commands that one connection takes from the supervisor: what control asks for, what patterns bring and end."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from collector.channels import parse_channel
from collector.limits import CALL_BURST, CALL_COST
from collector.messages import ControlError
from workers.deribit.channels import Channels
from workers.deribit.connection.client import Client
from workers.deribit.connection.credits import pay
from workers.deribit.feeds.trades.feed import TradeFeed
from workers.deribit.healing.heal import Healer
from workers.deribit.publishing.publisher import Publisher
from workers.deribit.rpc.errors import ExchangeError, Lost, NotConnected, Refused
from workers.deribit.watching.statuses import OVER, UNSUBSCRIBED

SLICE = 200
"""Channels that are taken up, or let go, in one go: some 7 ms."""

LAST_HEALING = 10.0
"""Seconds that trades of an instrument that has ended may still be healed once the supervisor gives its channel up."""


class Commands:
    """Carries commands out until `end`."""

    def __init__(self, client: Client, channels: Channels, healer: Healer, publisher: Publisher) -> None:
        self._client = client
        self._channels = channels
        self._healer = healer
        self._publisher = publisher
        self._has_ended = False
        self._turn = asyncio.Lock()
        self._ops = {"subscribe": self._subscribe, "unsubscribe": self._unsubscribe, "send": self._send}

    def end(self) -> None:
        """The connection has ended: nothing is carried out any more."""
        self._has_ended = True

    async def answer(self, op: str, arguments: dict[str, Any]) -> Any:
        """Carry out one command. Raises ControlError."""
        if op not in self._ops:
            raise ControlError("unknown_op", f"a connection has no op {op!r}")
        if self._has_ended:
            raise ControlError("not_connected", "the connection has ended")
        try:
            return await self._ops[op](arguments)
        except ExchangeError as error:
            raise ControlError("exchange_error", str(error), error.raw) from None
        except NotConnected as error:
            raise ControlError("not_connected", str(error)) from None
        except (Lost, Refused) as error:
            raise ControlError("not_connected", f"{error}; whether it was carried out is not known") from None
        except ValueError as error:
            raise ControlError("bad_request", str(error)) from None

    async def _subscribe(self, arguments: dict[str, Any]) -> dict[str, Any]:
        names, epoch = arguments["channels"], arguments["epoch"]
        for name in names:  # all or none
            parse_channel(name)
        async with self._turn:
            await self._do_in_slices(names, lambda some: self._channels.take_up(some, epoch))
        return {"channels": await self._client.subscribe(names)}

    async def _do_in_slices(self, names: list[str], act: Callable[[list[str]], None]) -> None:
        """Do something for thousands of channels: what comes may not wait for all of them."""
        for start in range(0, len(names), SLICE):
            if self._has_ended:  # else a later life says it, if this one has not
                return
            with self._publisher.gather():
                act(names[start : start + SLICE])
            await asyncio.sleep(0)

    async def _unsubscribe(self, arguments: dict[str, Any]) -> dict[str, Any]:
        names = arguments["channels"]
        condition = OVER if arguments.get("reason") == "expired" else UNSUBSCRIBED
        async with self._turn:  # some may be about to be taken up
            if condition is OVER and not self._has_ended:
                self._channels.add(names)  # an earlier life may have had them: then it is said all the same
        try:
            left = await self._client.unsubscribe(names)
            if condition is OVER:
                await self._heal_last(names)
            return {"channels": left}
        finally:
            await self._do_in_slices(names, lambda some: self._channels.leave(some, condition))

    async def _heal_last(self, names: list[str]) -> None:
        """The last trades of instruments that have ended may have been lost: fetch them, if that can be soon."""
        feeds = [feed for name in names if isinstance(feed := self._channels.feeds.get(name.encode()), TradeFeed)]
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_HEALING):
                await self._healer.finish(feeds)

    async def _send(self, arguments: dict[str, Any]) -> Any:
        if self._client.is_live:  # overdrawn, the exchange cuts the data off with it; bootstraps come first
            await pay(self._client.session.credits, CALL_COST, reserve=CALL_BURST / 2)
        # The deadline of the command bounds it, not the connection's own timeout.
        return await self._client.send(arguments["method"], arguments.get("params"), timeout=3600)
