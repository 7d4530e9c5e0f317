"""Blocking work beside an event loop."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


async def run_aside(work: Callable[[], Result], name: str) -> Result:
    """Run blocking work in a daemon thread; an executor's threads would be waited for at the end of the program.

    Raises what the work raises, and RuntimeError where the system allows no further thread.
    """
    done: Future[Result] = Future()
    done.set_running_or_notify_cancel()  # who waits may be cancelled, the work is not

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await asyncio.wrap_future(done)
