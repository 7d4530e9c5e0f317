"""Several things at once, of which none may outlive the failure of another."""

import asyncio
from collections.abc import Coroutine
from typing import Any


async def do_together(*works: Coroutine[Any, Any, None]) -> None:
    """Await all; the first failure ends the others, and is raised by itself once they are gone."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
