"""A process of the bench and the pipe to it: it reports (event, facts), and takes (verb, arguments)."""

import multiprocessing
import time
from multiprocessing.process import BaseProcess
from typing import Any

spawn = multiprocessing.get_context("spawn")


class Process:
    """One process, from its start to its end."""

    def __init__(self, target: Any, *arguments: Any) -> None:
        self.pipe, theirs = spawn.Pipe()
        self.process: BaseProcess = spawn.Process(target=target, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self.process.pid is not None
        return self.process.pid

    def order(self, verb: str, **arguments: Any) -> None:
        """Have it do something."""
        self.pipe.send((verb, arguments))

    def wait_for(self, *events: str, timeout: float = 60.0) -> tuple[str, dict[str, Any]]:
        """The next of these events, and its facts; others before it are dropped.

        Raises AssertionError if it does not come, or if the process says that it cannot.
        """
        end = time.monotonic() + timeout
        while self.pipe.poll(max(0.0, end - time.monotonic())):
            name, facts = self.pipe.recv()
            if name == "broken":
                raise AssertionError(facts["reason"])
            if name in events:
                return name, facts
        raise AssertionError(f"waited {timeout:.0f} s in vain for {' or '.join(events)} from process {self.pid}")

    def wait_facts(self, event: str, timeout: float = 60.0) -> dict[str, Any]:
        """The facts of the next such event."""
        return self.wait_for(event, timeout=timeout)[1]

    def drain(self) -> None:
        """Drop what it has said so far."""
        while self.pipe.poll():
            self.pipe.recv()

    def end(self) -> None:
        """Make sure that it is gone."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
