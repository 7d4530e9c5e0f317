"""Several things at once, of which none may outlive the failure of another."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any


@asynccontextmanager
async def together() -> AsyncIterator[asyncio.TaskGroup]:
    """A group of tasks: the first failure ends the others, and is raised by itself once they are gone."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def do_together(*works: Coroutine[Any, Any, None]) -> None:
    """Await all; the first failure ends the others, and is raised once they are gone."""
    async with together() as group:
        for work in works:
            group.create_task(work)
