"""What a keeper makes of what its worker says, message by message."""

import asyncio
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from collector.lifecycle import MAX_RESTARTS, Exit
from collector.link import Link, open_link
from collector.messages import ControlError
from collector.supervisor.keeper import Keeper
from collector.supervisor.process import UNKNOWN_EXIT, Spawner
from collector.supervisor.wishes import Wishes
from tests.support import REPOSITORY, in_loop, no_more_threads


def make_running() -> Keeper:
    """A keeper whose worker has said that it is ready."""
    keeper = Keeper("a", "deribit", 1.0, Spawner(), time.time_ns, lambda _: {})
    keeper._begin_life()
    keeper._receive({"kind": "ready", "endpoints": {}})
    return keeper


@asynccontextmanager
async def linked(keeper: Keeper) -> AsyncIterator[tuple[Link, asyncio.Queue[dict[str, Any]]]]:
    """The worker's end of a link to the keeper, and what comes there."""
    ours, theirs = socket.socketpair()
    asked: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    worker = await open_link(theirs, asked.put_nowait, lambda _: None)
    keeper._child = link = cast(Any, await open_link(ours, keeper._receive, lambda _: None))
    yield worker, asked
    worker.close()
    link.close()


def test_who_waits_for_it_to_be_live_is_woken_though_an_answer_said_so_before_the_beat() -> None:
    async def check() -> None:
        keeper = make_running()
        keeper._receive({"kind": "beat", "report": {"state": "connecting"}})
        waiting = asyncio.create_task(keeper.wait_settled())
        await asyncio.sleep(0)
        assert keeper.state == "connecting"
        keeper.add_report({"state": "live", "gaps": 0})
        assert keeper.report["gaps"] == 0
        assert not keeper.is_live
        keeper._receive({"kind": "beat", "report": {"state": "live"}})
        await asyncio.wait_for(waiting, 20)
        assert keeper.is_live

    asyncio.run(check())


def test_listings_that_come_while_the_worker_subscribes_go_together_once_it_has() -> None:
    async def check() -> None:
        keeper = make_running()
        ours, theirs = socket.socketpair()
        asked: list[dict[str, Any]] = []
        worker = await open_link(theirs, asked.append, print)
        keeper._child = link = cast(Any, await open_link(ours, keeper._receive, print))

        async def hear(number: int) -> list[tuple[str, list[str]]]:
            async with asyncio.timeout(20):
                while len(asked) < number:
                    await asyncio.sleep(0.001)
            return [(each["op"], each["arguments"]["channels"]) for each in asked]

        wishes = Wishes(keeper)
        for name in "abc":
            wishes.tell("subscribe", [name])
            wishes.tell("unsubscribe", [name.upper()], "expired")  # waits for nothing
            wishes.catch_up()
        told = [("unsubscribe", [name]) for name in "ABC"]
        assert sorted(await hear(4)) == sorted([("subscribe", ["a"]), *told])
        (first,) = (each["id"] for each in asked if each["op"] == "subscribe")
        worker.send({"kind": "reply", "id": first, "ok": True, "result": {"channels": {"a": True}}})
        assert (await hear(5))[4:] == [("subscribe", ["b", "c"])]
        worker.close()
        link.close()

    asyncio.run(check())


@in_loop
async def test_wishes_that_no_worker_hears_wait_for_it_and_what_is_given_up_goes_first() -> None:
    keeper = make_running()  # it has no process
    wishes = Wishes(keeper)
    wishes.tell("subscribe", ["wide"])
    wishes.tell("unsubscribe", ["narrow"])
    async with asyncio.timeout(20):
        while wishes._telling:
            await asyncio.sleep(0)
    assert wishes.list_leaving() == ["narrow"]
    async with linked(keeper) as (_, asked), asyncio.timeout(20):
        wishes.catch_up()
        assert [(await asked.get())["op"] for _ in range(2)] == ["unsubscribe", "subscribe"]
    for task in [*wishes._telling]:
        task.cancel()


@in_loop
async def test_the_answer_to_an_earlier_wish_does_not_pass_for_that_to_a_later_one() -> None:
    keeper = make_running()
    wishes = Wishes(keeper)
    async with linked(keeper) as (worker, asked), asyncio.timeout(20):
        ids = []
        for op in ("subscribe", "unsubscribe"):
            wishes.tell(op, ["a"])
            ids.append((await asked.get())["id"])
        error = {"code": "expired", "message": "the worker was stopped"}
        answers: list[dict[str, Any]] = [{"ok": True, "result": {"channels": {}}}, {"ok": False, "error": error}]
        for number, answer in zip(ids, answers, strict=True):
            before = len(wishes._telling)
            worker.send({"kind": "reply", "id": number, **answer})
            while len(wishes._telling) == before:
                await asyncio.sleep(0)
            assert wishes.list_leaving() == ["a"]


@in_loop
async def test_a_wish_that_is_taken_back_at_once_is_not_told() -> None:
    keeper = make_running()
    wishes = Wishes(keeper)
    async with linked(keeper) as (_, asked), asyncio.timeout(20):
        wishes.tell("subscribe", ["a", "b"])
        wishes.tell("unsubscribe", ["a"])
        heard = [await asked.get() for _ in range(2)]
    told = [(each["op"], each["arguments"]["channels"]) for each in heard]
    assert told == [("subscribe", ["b"]), ("unsubscribe", ["a"])]
    for task in [*wishes._telling]:
        task.cancel()


def test_who_has_been_live_once_is_tried_for_ever() -> None:
    keeper = make_running()
    assert keeper._is_hopeless(Exit.GAVE_UP, MAX_RESTARTS + 1)
    assert keeper._is_hopeless(Exit.BAD_SPEC, 1)
    keeper._receive({"kind": "beat", "report": {"state": "live"}})
    assert not keeper._is_hopeless(Exit.GAVE_UP, 1_000_000)
    assert not keeper._is_hopeless(Exit.BAD_SPEC, 1)
    assert keeper._is_hopeless(Exit.CREDENTIALS, 1)


def test_a_later_life_is_not_live_since_an_earlier_one_was() -> None:
    keeper = make_running()
    keeper._receive({"kind": "beat", "report": {"state": "live"}})
    assert keeper.is_live
    keeper._end_life(Exit.CRASHED)
    keeper._begin_life()
    keeper._receive({"kind": "ready", "endpoints": {}})
    assert keeper.state == "starting"
    assert keeper._live_since is None


def ask(keeper: Keeper) -> asyncio.Task[Any]:
    return asyncio.create_task(keeper.ask("send", {}, time.time_ns() + 20_000_000_000))


@in_loop
async def test_an_answer_is_heard_at_once_though_beats_wait_to_be_read() -> None:
    keeper = make_running()
    async with linked(keeper) as (worker, asked):
        keeper._receive({"kind": "beat", "report": {"state": "live"}})  # what it says now is read with the next beat
        asking = ask(keeper)
        number = (await asked.get())["id"]
        for gaps in (1, 2):
            worker.send({"kind": "beat", "report": {"state": "live", "gaps": gaps}})
            async with asyncio.timeout(10):
                while keeper.report.get("gaps") != gaps:
                    await asyncio.sleep(0.001)
        worker.send({"kind": "reply", "id": number, "ok": True, "result": 7})
        assert await asking == 7


@pytest.mark.parametrize("how", ["answered", "ended"])
@in_loop
async def test_what_comes_for_one_who_has_just_given_up_harms_nobody(how: str) -> None:
    keeper = make_running()
    async with linked(keeper) as (_, asked):
        asking = ask(keeper)
        number = (await asked.get())["id"]
        asking.cancel()  # it has not run yet
        if how == "answered":
            keeper._receive({"kind": "reply", "id": number, "ok": True, "result": 7})
        else:
            keeper._end_life(Exit.CRASHED)
        await asyncio.wait((asking,))
        assert asking.cancelled()
        assert not keeper._asked


@in_loop
async def test_an_answer_that_is_none_is_a_fault_of_ours() -> None:
    keeper = make_running()
    async with linked(keeper) as (worker, asked):
        asking = ask(keeper)
        worker.send({"kind": "reply", "id": (await asked.get())["id"], "ok": False, "error": "nonsense"})
        with pytest.raises(ControlError, match="answered with garbage") as raised:
            await asking
        assert raised.value.code == "internal"


def test_what_went_wrong_is_told_until_it_is_live_again() -> None:
    keeper, error = make_running(), {"message": "public/set_heartbeat was not answered in time"}
    keeper._receive({"kind": "beat", "report": {"state": "connecting", "last_error": None}})
    assert keeper.report["last_error"] is None  # told also while nothing has gone wrong yet
    keeper._receive({"kind": "beat", "report": {"state": "backoff", "last_error": error}})
    keeper._receive({"kind": "beat", "report": {"state": "bootstrapping", "last_error": None}})
    keeper.add_report({"state": "bootstrapping", "last_error": None})
    assert keeper.last_error == error
    keeper._receive({"kind": "beat", "report": {"state": "live", "last_error": None}})
    assert keeper.last_error is None


def test_since_when_it_is_in_its_state_is_told() -> None:
    keeper = make_running()
    keeper._receive({"kind": "beat", "report": {"state": "live"}})
    before = keeper.since
    keeper._receive({"kind": "beat", "report": {"state": "live"}})
    assert keeper.since == before
    keeper._receive({"kind": "beat", "report": {"state": "backoff"}})
    assert keeper.since > before


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-9, "was killed by SIGKILL"),
        (-6, "was killed by SIGABRT (too few processes or threads? see ulimit -u, TasksMax=)"),
        (UNKNOWN_EXIT, "ended for an unknown reason (the forkserver was gone)"),
    ],
)
def test_of_one_that_is_given_up_it_is_told_what_its_last_process_could_not_say(code: int, words: str) -> None:
    keeper = make_running()
    own = keeper.report["last_error"] = {"message": "its own"}
    assert keeper._is_hopeless(Exit.GAVE_UP, MAX_RESTARTS + 1)
    assert keeper.last_error is own
    assert keeper._is_hopeless(code, MAX_RESTARTS + 1)
    assert keeper.last_error == {"message": f"the worker process {words}; never live in 6 starts, given up"}


def test_one_that_is_stopped_just_as_it_turns_out_that_it_cannot_run_is_closed() -> None:
    async def check() -> None:
        async def prepare() -> Exit:
            keeper.stop()
            return Exit.GAVE_UP

        keeper = Keeper("a", "deribit", 1.0, Spawner(), time.time_ns, lambda _: {})
        await keeper.keep(prepare())
        assert (keeper.state, keeper.exit_code) == ("closed", None)

    asyncio.run(check())


def test_that_a_worker_is_ready_just_as_it_is_stopped_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    keeper = Keeper("a", "deribit", 1.0, Spawner(), time.time_ns, lambda _: {})
    keeper.machine.apply("start")
    keeper.stop()
    for message in ({"kind": "ready", "endpoints": {}}, {"kind": "nonsense"}):
        keeper._receive(message)
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert said == ["a: not understood on the link: {'kind': 'nonsense'}"]
    assert keeper.state == "closing"


def test_a_worker_that_no_thread_can_start_is_started_again_later_and_its_state_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check() -> None:
        spawner = Spawner()
        keeper = Keeper("a", "deribit", 60.0, spawner, time.time_ns, lambda _: {})
        ours, theirs = socket.socketpair()
        with ours, no_more_threads():
            keeping = asyncio.create_task(keeper.keep())
            while keeper.state != "backoff" and not keeping.done():
                await asyncio.sleep(0)
            with pytest.raises(OSError, match="can't start new thread"):
                await spawner.spawn("deribit", theirs)
            assert ours.recv(1) == b""  # that child will not come when there is a thread again
        assert re.match(r"the worker process cannot be started: .+; started again \d", keeper.last_error["message"])
        keeper.stop()
        await keeping
        assert keeper.state == "closed"

    asyncio.run(check())
    assert "a: was not started; started again in" in caplog.text


STARTED = """
import asyncio, multiprocessing, os
from collector.supervisor.process import Spawner, start_child

async def main():
    spawner = Spawner()
    for _ in range(3):
        child = await start_child(spawner, "deribit", print)
        asked = multiprocessing.active_children()
        child.kill()
        print(asked, await child.wait(), len(os.listdir("/proc/self/fd")))

asyncio.run(main())
"""


def test_a_child_leaves_nothing_open_and_its_exit_code_is_asked_for_by_no_other_start() -> None:
    """Each start asks all children that multiprocessing knows of, in its own thread; the code can be read once."""
    said = subprocess.check_output([sys.executable, "-c", STARTED], cwd=REPOSITORY, text=True, timeout=60)
    first, *others = said.splitlines()
    assert first.startswith("[] -9 ")
    assert others == [first, first]
