"""Coroutines taken in hand: several at once, of which none may outlive the failure of another; one begun by hand."""

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any


async def do_together(*works: Coroutine[Any, Any, None]) -> None:
    """Await all; the first failure ends the others, and is raised once they are gone."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


class Resumed:
    """A coroutine that was stepped once by hand and had to wait: `await Resumed(it, what_it_waits_for)` goes on."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], waits_for: Any) -> None:
        self._coroutine = coroutine
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, Any]:
        waits_for = self._waits_for
        while True:
            try:
                try:
                    sent = yield waits_for
                except BaseException as error:  # also a cancellation is the coroutine's to answer
                    waits_for = self._coroutine.throw(error)
                else:
                    waits_for = self._coroutine.send(sent)
            except StopIteration as done:
                return done.value
