"""Requests that wait for their answers, by number."""

import asyncio
from typing import Any

from workers.deribit.rpc.codec import Reply


class Requests:
    """Numbers requests 1, 2, 3 ... over the life of a client, so that no answer can be taken for another's.

    `last` is the number of the newest, `waiting` holds those without an answer, `methods` what they ask for.
    """

    def __init__(self) -> None:
        self.last = 0
        self.waiting: dict[int, asyncio.Future[Any]] = {}
        self.methods: dict[int | None, str] = {}

    def open(self, method: str) -> tuple[int, asyncio.Future[Any]]:
        """The number of a new request, and what will hold its result."""
        self.last += 1
        answer = self.waiting[self.last] = asyncio.get_running_loop().create_future()
        self.methods[self.last] = method
        return self.last, answer

    def close(self, number: int) -> None:
        """Nobody waits for this one any more."""
        self.waiting.pop(number, None)
        self.methods.pop(number, None)

    def take_reply(self, reply: Reply) -> bool:
        """Give a reply to who waits for it, if anybody still does; False if it answers no request of ours."""
        answer = self.waiting.get(reply.number) if reply.number is not None else None
        if answer is None:
            return reply.number is not None and 0 < reply.number <= self.last
        if not answer.done():
            answer.set_exception(reply.error) if reply.error else answer.set_result(reply.result)
        return True

    def fail(self, error: Exception) -> None:
        """No answer will come any more."""
        for answer in self.waiting.values():
            if not answer.done():
                answer.set_exception(error)
                answer.exception()  # where nobody waits any more, nobody need be told
