"""The supervisor as a whole program: starts, restarts, gives up, stops, leaves nothing behind."""

import asyncio
import os
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from collector import Control
from collector.cli.options import ONE_WISH
from collector.config import Config, load_config
from collector.messages import ControlError
from collector.supervisor.runtime import EPOCH_AT, FILES, FILES_EACH, RuntimeDir
from collector.supervisor.supervisor import Supervisor
from tests.collected import QUICK, Collected, collected, is_alive
from tests.pipeline import ask, exchange, find_port, short_directory, subscribed, write_config
from tests.support import Program, as_no_root, collector, running, wait_until

DEAD = {"url": "ws://127.0.0.1:9/ws/api/v2", "retry_count": 1, "retry_delay": 0.02}
"""A connection that finds nobody."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_leaves_no_process_no_socket_and_no_file_but_the_lock(number: signal.Signals) -> None:
    tcp = f"tcp://127.0.0.1:{find_port()}"
    with collected({"a": QUICK, "b": {**QUICK, "channels": [], "publish": tcp}}) as run:
        url = run.wait_state("a")["url"]
        run.wait_state("b")
        assert {path.name for path in run.runtime_dir.iterdir()} >= {"lock", "control", "a.pub"}
        assert run.stop(number) == 0, run.program.text()
        run.wait_gone()
        assert "started again" not in run.program.text()
        assert [path.name for path in run.runtime_dir.iterdir()] == ["lock"]
        assert {path.name for path in run.directory.iterdir()} == {"run", "collector.toml"}
        for endpoint in (tcp, url):
            port = int(endpoint.split(":")[2].split("/")[0])
            with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
                probe.connect(("127.0.0.1", port))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_what_rotates_logs_ends_no_process_by_its_signals(number: signal.Signals) -> None:
    with collected() as run:
        before = run.wait_state("a")
        for process in run.find_processes():
            process.send_signal(number)
        assert all(map(is_alive, run.seen.values()))
        after = run.get_state("a")
        assert (after["state"], after["pid"], after["restarts"]) == ("live", before["pid"], 0)
        assert run.stop() == 0, run.program.text()
    with running(*collector("exchange")) as program:
        program.wait_line("listening on")
        for each in (number, signal.SIGTERM):
            program.process.send_signal(each)
        assert program.wait_exit() == 0


def test_under_nohup_the_end_of_its_terminal_is_not_its_own() -> None:
    with short_directory() as directory:
        config = write_config(directory, {"a": DEAD})
        with running("nohup", *collector("run", str(config))) as program:
            program.wait_line("control on", stream="err")
            program.process.send_signal(signal.SIGHUP)
            with Control(f"ipc://{directory}/run/control") as control:
                assert "a" in control.get_state()  # by now it would be stopping
            program.process.send_signal(signal.SIGTERM)
            assert program.wait_exit() == 0
        (stopping,) = [line for line in program.err if line.endswith(": stopping")]
        assert "SIGTERM" in stopping


def test_the_start_says_what_runs_where_and_how_to_stop() -> None:
    secret = {**QUICK, "url": "ws://127.0.0.1:9/path?hidden=hunter2", "channels": [], "retry_count": 1000}
    followed = {**QUICK, "channels": ["quote.ETH-PERPETUAL", "ticker.BTC-PERP*.100ms"]}
    with collected({"a": QUICK, "b": secret, "c": followed}, log_level="info") as run:
        run.wait_state("a")
        run.program.wait_line(r"collector \d+\.\d+.*collector\.toml", stream="err")
        run.program.wait_line("b: 0 channels of ws://127.0.0.1:9/path$", stream="err")
        run.program.wait_line("c: 1 channel and 1 pattern of practice", stream="err")
        run.program.wait_line(rf"a: ready, pid \d+, publishes on ipc://{run.runtime_dir}/a\.pub", stream="err")
        run.program.wait_line(rf"control on {run.control}", stream="err")
        run.program.wait_line(r"Ctrl-C stops", stream="err")
        run.program.wait_line("b: backoff: ", stream="err")
        assert "hunter2" not in run.program.text()
        assert run.program.out == []


def test_a_killed_worker_is_replaced_where_its_subscribers_wait_and_its_restart_counted() -> None:
    with collected({"a": {**QUICK, "publish": "tcp://127.0.0.1:*"}}) as run:
        before = run.wait_state("a")
        with subscribed(before["publish"]) as subscriber:
            subscriber.wait_for("deribit.quote.", type="quote")
            psutil.Process(before["pid"]).kill()
            after = run.wait_state("a", restarts=1)
            assert after["pid"] != before["pid"]
            assert after["epoch"] > before["epoch"]
            assert after["publish"] == before["publish"]
            subscriber.wait_for("deribit.quote.", type="gap", reason="restart", epoch=after["epoch"])
        run.program.wait_line(r"a: killed by SIGKILL; started again in", stream="err")


def test_a_free_port_that_another_program_took_meanwhile_is_left_to_it() -> None:
    with collected({"a": {**QUICK, "publish": "tcp://127.0.0.1:*", "retry_delay": 1}}) as run, socket.socket() as other:
        before = run.wait_state("a")
        psutil.Process(before["pid"]).kill()
        take_port(other, before["publish"])
        after = run.wait_state("a", restarts=2)
        assert after["publish"].startswith("tcp://127.0.0.1:")
        assert after["publish"] != before["publish"]


def test_what_the_file_says_of_a_connection_reaches_its_worker() -> None:
    keys = {"headers.X-Desk": "7", "queue": 7, "timeout": 6.0, "retry_count": 8, "retry_delay": 9.0}
    with short_directory() as directory:
        path = write_config(directory, {"a": {**DEAD, "heartbeat_interval": 11.0, **keys}})
        head = '[collector]\nscheduling = "batch"\nread_pause = 0.005'
        path.write_text(path.read_text().replace("[collector]", head))
        spec = asyncio.run(build_spec(load_config(path, {})))
        # In a process of its own, which becomes one that interrupts no others.
        code = (
            "import os, sys; from workers.deribit.worker import create_worker; "
            f"worker = create_worker({spec!r}); client = worker.client; "
            "print([client.headers, client.timeout, client.retry_count, client.retry_delay, client.heartbeat_interval, "
            "client.traffic._pace.pause, worker.publisher._socket._queue, os.sched_getscheduler(0) == os.SCHED_BATCH])"
        )
        (directory / "run").mkdir(mode=0o700)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "[{'X-Desk': '7'}, 6.0, 8, 9.0, 11.0, 0.005, 7, True]\n"


async def build_spec(config: Config) -> dict[str, Any]:
    """What the worker of the first connection would be told; it is not started: nothing is waited for."""
    supervisor = Supervisor(config, "info", time.time_ns)
    entry = supervisor.start_connection(config.connections[0], from_file=True)
    return supervisor._build_connection_spec(entry.keeper)


def take_port(other: socket.socket, endpoint: str) -> None:
    """Listen where a worker did, as soon as it is gone."""

    def take() -> bool:
        with suppress(OSError):
            other.bind(("127.0.0.1", int(endpoint.rpartition(":")[2])))
            other.listen()
            return True
        return False

    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    wait_until(take, f"{endpoint}, before the next worker has it")


def test_who_was_never_live_is_not_bound_to_the_free_port_of_before() -> None:
    dead = {**DEAD, "publish": "tcp://127.0.0.1:*", "retry_delay": 1}
    with collected({"a": dead}, exchange=None) as run, socket.socket() as other:
        run.program.wait_line("a: ready")
        before = run.get_state("a")["publish"]
        take_port(other, before)
        wait_until(lambda: run.get_state("a")["publish"] != before, "another port")
        assert run.get_state("a")["restarts"] == 1


def test_a_worker_that_is_killed_while_a_beat_of_it_waits_is_replaced_at_once() -> None:
    first = "from collector.supervisor import keeper, process; keeper.BEAT_READ = keeper.BEATS_MISSED = 600.0; "
    with collected(first=first + "process._CODE_WAIT = 600.0") as run:
        before = run.wait_state("a")
        with subscribed(before["publish"]) as subscriber:

            def count_heartbeats() -> int:
                return sum(message["type"] == "heartbeat" for _, message in subscriber.messages)

            subscriber.listen_until(lambda: count_heartbeats() > 4, "beats, of which the supervisor has read one")
        psutil.Process(before["pid"]).kill()
        run.program.wait_line("a: killed by SIGKILL; started again")  # to ask it would have the rest read


def test_state_says_that_the_worker_was_killed_until_it_lives_again() -> None:
    with collected({"a": {**QUICK, "retry_delay": 4}}) as run:
        before = run.wait_state("a")
        psutil.Process(before["pid"]).kill()
        error = run.wait_state("a", "backoff")["last_error"]
        words = r"the worker process was killed by SIGKILL; started again [2-4]\.\d s after that"
        assert re.fullmatch(words, error["message"])
        run.wait_state("a", restarts=1, last_error=None)


def test_a_stopped_worker_is_killed_and_replaced() -> None:
    with collected({"a": {**QUICK, "retry_delay": 4}}) as run:
        before = run.wait_state("a")
        psutil.Process(before["pid"]).suspend()
        held = run.get_state("a")
        assert held["pid"] == before["pid"], "a stuck worker holds up the answer: it was killed meanwhile"
        assert held["url"] == before["url"]  # the last known values
        error = run.wait_state("a", "backoff")["last_error"]
        assert error["message"].startswith("the worker process gave no sign of life in 4 s: killed; started again ")
        run.wait_state("a", restarts=1)
        assert not psutil.pid_exists(before["pid"])
        run.program.wait_line(r"a: pid \d+ gave no sign of life in 4 s: killed", stream="err")
        psutil.Process(run.get_state("a")["pid"]).kill()
        error = run.wait_state("a", "backoff")["last_error"]
        assert error["message"].startswith("the worker process was killed by SIGKILL; started again ")


def test_restarts_back_off_from_the_beginning_once_a_life_has_lasted() -> None:
    first = "from collector.supervisor import keeper; keeper.STEADY_AFTER = 0.3"
    url = f"ws://127.0.0.1:{(port := find_port())}/ws/api/v2"
    table = {**QUICK, "url": url, "retry_count": 1, "retry_delay": 0.4}
    with exchange(port) as practice, collected({"a": table}, exchange=None, first=first) as run:

        def find_delays() -> list[float]:
            found = (re.search(r" a: .*; started again in (\S+) s$", line) for line in list(run.program.err))
            return [float(match[1]) for match in found if match]

        def outlast(restarts: int) -> int:
            pid: int = run.wait_state("a", restarts=restarts)["pid"]
            seen = time.monotonic()
            wait_until(lambda: time.monotonic() - seen > 0.5, "a life that has lasted")
            return pid

        for restarts in range(2):
            psutil.Process(outlast(restarts)).kill()
        outlast(2)
        practice.process.kill()  # from now on none is live
        delays = wait_until(lambda: (each := find_delays())[4:] and each, "five restarts")
        assert max(delays[:3]) <= 0.4
        assert delays[4] >= 0.8


def test_a_pause_of_the_supervisor_is_not_held_against_the_workers() -> None:
    with collected() as run:
        before = run.wait_state("a")
        everything = run.find_processes()
        for process in everything:  # as when a container is frozen: beats are missing, and nobody is to blame
            process.suspend()
        wait_until(lambda: all(each.status() == psutil.STATUS_STOPPED for each in everything), "the pause")
        paused = time.monotonic()
        wait_until(lambda: time.monotonic() - paused > 5.0, "more than the time of the missed beats")
        psutil.Process(run.program.pid).resume()
        # The supervisor alone: it wakes first, and looks for beats that cannot have come.
        wait_until(lambda: run.ask("get_state")["a"]["state"] == "live", "an answer of the supervisor")
        for process in everything:
            process.resume()
        messages = run.get_state("a")["messages"]
        after = wait_until(lambda: (s := run.get_state("a"))["messages"] > messages + 5 and s, "beats and data again")
        assert (after["pid"], after["restarts"]) == (before["pid"], 0)


def test_a_killed_supervisor_leaves_no_orphan() -> None:
    with collected({"a": QUICK, "b": {**QUICK, "channels": []}}) as run:
        run.wait_state("a")
        run.wait_state("b")
        titles = [process.cmdline()[0] for process in run.find_processes()]
        assert {"collector: a", "collector: b", "collector: exchange"} <= set(titles)
        run.program.process.kill()
        run.wait_gone()
        with running(*collector("run", str(run.config))) as next_one:  # what the killed one left is no hindrance
            next_one.wait_line("a: ready")
            next_one.process.send_signal(signal.SIGINT)
            assert next_one.wait_exit() == 0


def leave_orphan(run: Collected) -> psutil.Process:
    """Kill the supervisor; its worker, which is stopped before, would be gone at once else."""
    orphan = psutil.Process(run.wait_state("a")["pid"])
    run.find_processes()
    orphan.suspend()
    wait_until(lambda: orphan.status() == psutil.STATUS_STOPPED, "its stop")
    run.program.process.kill()
    run.program.process.wait()  # its output goes on: the orphan has it too
    return orphan


def test_an_endpoint_that_an_orphan_still_holds_is_waited_for() -> None:
    with collected({"a": {**QUICK, "publish": f"tcp://127.0.0.1:{find_port()}"}}) as run:
        orphan = leave_orphan(run)
        with running(*collector("run", str(run.config))) as next_one:
            next_one.wait_line(r"a: .*in use.*; tried for [\d.]+ s")
            orphan.resume()
            next_one.wait_line("a: live")
            assert "started again" not in next_one.text()
            next_one.process.send_signal(signal.SIGINT)
            assert next_one.wait_exit() == 0
        run.wait_gone()


def test_a_stopped_orphan_does_not_keep_the_next_collector_from_its_own_directory() -> None:
    with collected() as run:
        orphan = leave_orphan(run)
        with running(*collector("run", str(run.config))) as next_one:
            next_one.wait_line("a: live")
            assert "in use" not in next_one.text()
            orphan.resume()
            run.wait_gone()
            with subscribed(f"ipc://{run.runtime_dir}/a.pub") as subscriber:  # the orphan has not taken it along
                subscriber.wait_for("deribit.quote.", type="quote")
            next_one.process.send_signal(signal.SIGINT)
            assert next_one.wait_exit() == 0


def test_a_worker_that_was_stopped_while_its_supervisor_died_ends_when_it_goes_on() -> None:
    with collected() as run:
        leave_orphan(run).resume()
        run.wait_gone()


@pytest.mark.parametrize("first", ["", "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)"])
def test_workers_outlive_the_forkserver_and_the_next_is_started_from_a_new_one(first: str) -> None:
    with collected(first=first) as run:  # some programs have those that they start ignore SIGCHLD
        before = run.wait_state("a")
        forkserver = run.find_process("a").parent()
        assert forkserver is not None
        forkserver.kill()
        wait_until(lambda: not is_alive(forkserver), "the end of the forkserver")
        messages = run.get_state("a")["messages"]
        state = wait_until(lambda: (s := run.get_state("a"))["messages"] > messages + 10 and s, "data all the same")
        assert (state["pid"], state["restarts"]) == (before["pid"], 0)
        psutil.Process(before["pid"]).kill()
        run.wait_state("a", restarts=1)
        run.program.wait_line(r"a: ended for an unknown reason \(the forkserver was gone\)", stream="err")


def test_signals_that_were_blocked_at_its_start_stop_it_and_hide_no_exit_code() -> None:
    first = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())"
    with collected(first=first) as run:
        run.wait_state("a")
        run.find_process("a").terminate()
        run.program.wait_line("supervisor: a: stopped in order; started again in", stream="err")
        run.wait_state("a", restarts=1)
        assert run.stop(signal.SIGTERM) == 0
        run.wait_gone()


def test_it_runs_also_where_stdin_stdout_and_stderr_are_closed() -> None:
    """What is opened next is not taken for one of them, as the forkserver took it."""
    with short_directory() as directory:
        command = collector("run", str(write_config(directory, {"a": QUICK}, exchange={})))
        with running("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command) as program:
            control = f"ipc://{directory}/run/control"
            wait_until(lambda: ask(control, "get_state", connection="a")["state"] == "live", "a live connection")
            program.process.terminate()
            assert program.wait_exit() == 0


def stop_forkserver(run: Collected) -> psutil.Process:
    """Stop the forkserver, and kill a worker: the next one cannot be started."""
    worker = run.find_process("a")
    forkserver = worker.parent()
    assert forkserver is not None
    forkserver.suspend()
    wait_until(lambda: forkserver.status() == psutil.STATUS_STOPPED, "its stop")
    worker.kill()
    run.wait_state("a", "starting", pid=None)
    return forkserver


def test_a_forkserver_that_hangs_does_not_keep_the_collector_from_stopping() -> None:
    with collected() as run:
        run.wait_state("a")
        forkserver = stop_forkserver(run)
        assert run.stop(signal.SIGTERM) == 0, run.program.text()
        run.program.wait_line(r"a: was not started in [\d.]+ s: the forkserver does not answer, and is killed")
        assert not is_alive(forkserver)
        run.wait_gone()


def test_a_worker_that_comes_to_life_during_a_stop_is_killed_at_once() -> None:
    with collected() as run:
        run.wait_state("a")
        forkserver = stop_forkserver(run)
        run.find_processes()
        run.program.process.send_signal(signal.SIGTERM)
        run.program.wait_line("SIGTERM: stopping")
        forkserver.resume()
        assert run.program.wait_exit() == 0, run.program.text()
        assert "did not stop" not in run.program.text()
        run.wait_gone()


@pytest.mark.parametrize("exchange", [None, {}])
def test_a_stop_while_the_forkserver_is_loaded_starts_no_other(tmp_path: Path, exchange: dict[str, Any] | None) -> None:
    loaded = tmp_path / "loaded"
    (tmp_path / "slow.py").write_text(f"import time\nopen({str(loaded)!r}, 'a').write('x')\ntime.sleep(60)\n")
    first = "from collector.supervisor import process; process.PRELOAD = ('slow',)"
    env = {"PYTHONPATH": str(tmp_path)}
    with collected(dict.fromkeys("abcd", DEAD), exchange=exchange, first=first, env=env) as run:
        run.program.wait_line("control on")
        wait_until(loaded.exists, "the forkserver")
        assert run.stop(signal.SIGTERM) == 0, run.program.text()
        run.program.wait_line(r"was not started in [\d.]+ s: the forkserver does not answer, and is killed")
        assert loaded.read_text() == "x"
        run.wait_gone()


def test_a_forkserver_that_hangs_is_replaced() -> None:
    # With nothing to load a new one is there in a small part of that time, also on a busy machine.
    first = "from collector.supervisor import keeper, process; keeper.SPAWN_TIMEOUT = 6.0; process.PRELOAD = ()"
    with collected(first=first) as run:
        run.wait_state("a")
        forkserver = stop_forkserver(run)
        run.program.wait_line("a: was not started in 6 s: the forkserver does not answer, and is killed")
        run.wait_state("a")
        assert not is_alive(forkserver)


@pytest.mark.parametrize("lost", ["", "pymp-*", "pymp-*/*"])
def test_a_forkserver_whose_socket_was_removed_is_replaced(lost: str) -> None:
    with short_directory() as short:
        (place := short / "tmp").mkdir()
        with collected(env={"TMPDIR": str(place)}) as run:
            run.wait_state("a")
            forkserver = run.find_process("a").parent()
            assert forkserver is not None
            for path in short.glob(f"tmp/{lost}"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            run.find_process("a").kill()
            run.program.wait_line("a: cannot be started: the socket of the forkserver was removed")
            run.wait_state("a")
            assert not is_alive(forkserver)


@pytest.mark.parametrize(("name", "length"), [("TMPDIR", 75), ("TMPDIR", 76), ("TMPDIR", 200), ("TMP", 200)])
def test_workers_are_started_however_long_the_name_of_the_temporary_directory_is(name: str, length: int) -> None:
    with short_directory() as short:
        place = short / ("t" * (length - len(f"{short}/")))
        place.mkdir()
        with collected(env={"TMPDIR": "", name: str(place)}) as run:
            run.wait_state("a")
            assert ([path.name[:5] for path in place.iterdir()] == ["pymp-"]) == (length == 75)


def test_workers_are_started_though_the_working_directory_was_removed(tmp_path: Path) -> None:
    (release := tmp_path / "release").mkdir()
    with collected(cwd=release) as run:
        run.wait_state("a")
        release.rmdir()
        run.find_process("a").kill()
        run.wait_state("a", restarts=1)


def test_a_restarted_exchange_keeps_its_port() -> None:
    with collected({"a": {**QUICK, "retry_count": 1000}}) as run:
        before = run.wait_state("a")
        run.find_process("exchange").kill()
        wait_until(lambda: run.get_state("a")["reconnects"] > 0, "the loss of the connection")
        after = run.wait_state("a")
        assert after["url"] == before["url"]


def test_a_second_collector_on_the_same_directory_is_refused() -> None:
    with collected() as run:
        run.wait_state("a")
        with running(*collector("run", str(run.config))) as second:
            assert second.wait_exit() == 1
            assert f"(pid {run.program.pid})" in second.text()
            assert second.err[-1].startswith("collector: ")
        assert run.get_state("a")["restarts"] == 0


def test_refused_credentials_end_with_3_and_are_never_shown() -> None:
    secrets = {"KEY_CLIENT_ID": "nobody-1234", "KEY_CLIENT_SECRET": "hunter2-hunter2"}
    with collected({"a": {**QUICK, "credentials": "KEY"}}, env=secrets) as run:
        assert run.program.wait_exit() == 3, run.program.text()
        run.program.wait_line("the exchange refused the credentials", stream="err")
        assert "hunter2" not in run.program.text()


def test_a_connection_that_fails_for_good_leaves_the_others_running() -> None:
    secrets = {"KEY_CLIENT_ID": "nobody-1234", "KEY_CLIENT_SECRET": "hunter2-hunter2"}
    with collected({"a": QUICK, "b": {**QUICK, "credentials": "KEY", "channels": []}}, env=secrets) as run:
        failed = run.wait_state("b", "failed")
        assert failed["last_error"]["code"] == 13004
        assert run.wait_state("a")["restarts"] == 0
        assert run.refuse("send", connection="b", method="public/test").code == "not_connected"
        refused = run.refuse("subscribe", connection="b", channels=["quote.ETH-PERPETUAL"])
        assert (refused.code, "has ended for good (failed)" in refused.message) == ("not_connected", True)
        assert run.ask("close", connection="b")["state"] == "failed"
        assert list(run.ask("get_state")) == ["a"]
        refused = run.refuse("connect", connection={**QUICK, "name": "b", "credentials": "KEY", "channels": []})
        words = "b: the exchange refused the credentials: 13004 invalid_credentials"
        assert (refused.code, refused.message, refused.data["code"]) == ("exchange_error", words, 13004)


def test_secrets_are_in_no_process_but_those_that_need_them() -> None:
    secrets = {"KEY_CLIENT_ID": "practice", "KEY_CLIENT_SECRET": "practice", "OTHER_CLIENT_SECRET": "hunter2-hunter2"}
    with collected({"a": {**QUICK, "credentials": "KEY", "channels": ["quote.BTC-PERPETUAL"]}}, env=secrets) as run:
        assert run.wait_state("a")["authenticated"] is True
        children = [process for process in run.find_processes() if process.pid != run.program.pid]
        assert len(children) >= 3
        for process in children:
            assert not [name for name in process.environ() if "CLIENT" in name]
            assert "hunter2" not in " ".join(process.cmdline())
        assert "hunter2" not in str(run.ask("get_state"))


def test_a_key_that_is_corrected_in_its_file_is_taken_without_a_new_start(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("an old one\n")
    secrets = {"KEY_CLIENT_ID": "practice", "KEY_CLIENT_SECRET_FILE": str(secret)}
    table = QUICK | {"credentials": "KEY", "channels": ["quote.ETH-PERPETUAL"]}
    with collected({"a": QUICK, "b": table}, env=secrets) as run:
        run.program.wait_line("b: the exchange refused the credentials: not started again")
        table = table | {"name": "b"}
        secret.unlink()
        assert "KEY_CLIENT_SECRET_FILE names a file" in run.refuse("connect", connection=table).message
        secret.write_text("practice\n")
        assert run.ask("connect", connection=table)["authenticated"] is True
        secret.unlink()  # the key of before is used
        os.kill(run.get_state("b")["pid"], signal.SIGKILL)
        run.program.wait_line("b: KEY_CLIENT_SECRET_FILE names a file that cannot be read")
        run.wait_state("b", restarts=1, authenticated=True)


def test_one_that_was_never_live_is_given_up_after_five_restarts() -> None:
    with collected({"a": DEAD}, exchange=None) as run:
        assert run.program.wait_exit() == 1
        run.program.wait_line(r"a: gave up after retry_count attempts: never live in 6 starts, given up", stream="err")
        run.wait_gone()


@pytest.mark.parametrize(("change", "code"), [(DEAD, 1), ({"credentials": "KEY"}, 3)])
def test_it_ends_when_one_added_at_run_time_fails_after_those_of_the_file(change: dict[str, Any], code: int) -> None:
    secrets = {"KEY_CLIENT_ID": "nobody-1234", "KEY_CLIENT_SECRET": "hunter2-hunter2"}
    with collected({"a": QUICK | change}, env=secrets) as run:
        # More attempts, further apart: it is still tried when `a` has failed.
        table = DEAD | {"name": "b", "channels": [], "retry_count": 3, "retry_delay": 0.2}
        run.program.wait_line("control on")
        while "b" not in run.ask("get_state"):  # a slow machine may take longer than the deadline
            with suppress(ControlError):
                run.ask("connect", connection=table, deadline=time.time_ns() + 200_000_000)
        run.program.wait_line("a: .*(given up|not started again)")
        assert run.get_state("a")["state"] == "failed"
        assert run.program.wait_exit(60) == code, run.program.text()
        run.program.wait_line("b: gave up after retry_count attempts: never live in 6 starts")
        run.wait_gone()


def test_an_endpoint_that_is_bound_already_ends_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with collected({"a": {**QUICK, "publish": endpoint}}) as run:
            assert run.program.wait_exit() == 1
            run.program.wait_line(rf"a: cannot start: .*in use.*{endpoint}.*; write another endpoint", stream="err")
            assert "cannot run as configured: not started again" in run.program.text()
        with short_directory() as directory:
            config = write_config(directory, {"a": QUICK}, exchange={"port": taken.getsockname()[1]})
            with running(*collector("run", str(config))) as program:
                assert program.wait_exit() == 1
                program.wait_line("the practice exchange cannot run: .*in use", stream="err")


@pytest.mark.parametrize(
    ("limit", "words"),
    [(resource.RLIMIT_AS, "the ledger cannot be mapped"), (resource.RLIMIT_FSIZE, "no room for the ledger")],
)
def test_a_worker_for_whose_ledger_there_is_no_room_at_first_is_started_again(limit: int, words: str) -> None:
    with collected() as run:
        run.wait_state("a")
        forkserver = run.find_process("a").parent()
        assert forkserver is not None
        before = resource.prlimit(forkserver.pid, limit)
        # Of memory enough for some threads, but not for the ledger; of files for all but that.
        room = forkserver.memory_info().vms + (48 << 20) if limit == resource.RLIMIT_AS else 4096
        resource.prlimit(forkserver.pid, limit, (room, before[1]))
        table = QUICK | {"name": "b", "channels": ["quote.ETH-PERPETUAL"], "retry_delay": 0.5}
        assert run.refuse("connect", connection=table, deadline=time.time_ns() + 500_000_000).code == "timeout"
        run.program.wait_line(f"b: cannot start just now: .*{words}: .*'{run.runtime_dir}/b.ledger'")
        resource.prlimit(forkserver.pid, limit, before)
        assert run.wait_state("b")["restarts"] > 0


def binds(end: socket.socket, port: int) -> bool:
    """Whether the socket can be bound to the port; then it is."""
    with suppress(OSError):
        end.bind(("127.0.0.1", port))
        return True
    return False


def test_one_that_was_live_is_tried_again_until_its_endpoint_is_free() -> None:
    port = find_port()
    with collected({"a": {**QUICK, "retry_delay": 1, "publish": f"tcp://127.0.0.1:{port}"}}) as run:
        worker = psutil.Process(run.wait_state("a")["pid"])
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            worker.kill()
            wait_until(lambda: binds(taken, port), "the end of the worker")
            taken.listen()
            run.program.wait_line(r"a: cannot run as configured; started again in", stream="err")
            assert "in use" in run.get_state("a")["last_error"]["message"]
        wait_until(lambda: run.get_state("a")["state"] == "live", "the connection back")


def test_a_control_endpoint_that_is_bound_already_ends_it_at_once() -> None:
    with short_directory() as directory, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        config = write_config(directory, {"a": DEAD})
        config.write_text(config.read_text().replace("[collector]", f'[collector]\ncontrol = "{endpoint}"'))
        with running(*collector("run", str(config))) as program:
            assert program.wait_exit() == 1
            assert f"control {endpoint} cannot be bound" in program.err[-1]


@contextmanager
def served(path: Path, kind: socket.SocketKind) -> Iterator[None]:
    """The Unix socket of another program. It must still be there, and served, at the end."""
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(path))
        if kind == socket.SOCK_STREAM:
            other.listen()
        yield
        with socket.socket(socket.AF_UNIX, kind) as client:
            client.connect(str(path))


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize("key", ["publish", "control"])
def test_the_socket_of_another_program_is_left_to_it(key: str, kind: socket.SocketKind) -> None:
    with short_directory() as directory, served(directory / "other", kind):
        endpoint = f"ipc://{directory}/other"
        config = write_config(directory, {"a": DEAD | ({"publish": endpoint} if key == "publish" else {})})
        if key == "control":
            config.write_text(config.read_text().replace("[collector]", f'[collector]\ncontrol = "{endpoint}"'))
        with running(*collector("run", str(config))) as program:
            assert program.wait_exit() == 1
            program.wait_line(rf"(a: cannot start|control {endpoint} cannot be bound): .*in use", stream="err")


@pytest.mark.parametrize("name", ["a.pub", "control"])
def test_what_is_no_socket_is_not_said_to_listen(name: str) -> None:
    with short_directory() as directory:
        (directory / "run").mkdir(mode=0o700)
        (directory / "run" / name).write_text("mine")
        with running(*collector("run", str(write_config(directory, {"a": DEAD})))) as program:
            assert program.wait_exit() == 1
            program.wait_line(
                "File exists.*; (remove|write another endpoint, or remove) what is no socket", stream="err"
            )
            assert "in use" not in program.text()
        assert (directory / "run" / name).read_text() == "mine"


@pytest.mark.parametrize("key", ["control", "publish"])
def test_an_endpoint_in_a_directory_that_is_closed_to_us_is_said_to_be_that(key: str) -> None:
    with short_directory() as directory:
        (directory / "closed").mkdir(mode=0o555)
        config = write_config(directory, {"a": DEAD})
        line = f'{key} = "ipc://{directory}/closed/a.pub"\n'
        head = "[collector]\n" if key == "control" else "[[connection]]\n"
        config.write_text(config.read_text().replace(head, head + line))
        with running(*as_no_root(*collector("run", str(config)))) as program:
            assert program.wait_exit() == 1
            program.wait_line("Permission denied.*; write another endpoint, or open the place to", stream="err")
            assert "listens there" not in program.text()


def test_the_socket_of_another_program_is_left_to_it_at_run_time_too() -> None:
    with collected() as run, served(run.directory / "other", socket.SOCK_STREAM):
        run.wait_state("a")
        table = {**QUICK, "name": "b", "channels": [], "publish": f"ipc://{run.directory}/other"}
        refused = run.refuse("connect", connection=table, deadline=time.time_ns() + 20_000_000_000)
        assert (refused.code, "in use" in refused.message) == ("bad_request", True)


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    "wrong", [{"url": "nonsense"}, {"publish": "ipc://HERE/run/lock"}, {"publish": "ipc://HERE/no/x"}]
)
def test_a_wrong_configuration_ends_with_2_before_anything_starts(wrong: dict[str, str], command: str) -> None:
    with short_directory() as directory:
        table = DEAD | {key: value.replace("HERE", str(directory)) for key, value in wrong.items()}
        config = write_config(directory, {"a": table}, exchange={})
        with running(*collector(command, str(config))) as program:
            assert program.wait_exit() == 2
            assert len(program.err) == 1
            assert program.err[0].startswith(f"collector: {config}: [[connection]] a: {next(iter(wrong))} ")
        assert not (directory / "run").exists()


@pytest.mark.parametrize(
    ("mode", "is_link", "words"),
    [
        (0o755, False, "is open to others (mode 755); if it is yours alone, close it (chmod 700), else write another"),
        (0o700, True, "cannot be used (it is a symbolic link)"),
    ],
)
def test_a_runtime_directory_that_others_could_reach_is_refused(mode: int, is_link: bool, words: str) -> None:
    with short_directory() as directory:
        real = directory / ("elsewhere" if is_link else "run")
        real.mkdir()
        real.chmod(mode)
        if is_link:
            (directory / "run").symlink_to(real)
        config = write_config(directory, {"a": DEAD})
        for command in ("run", "plan"):
            with running(*collector(command, str(config))) as program:
                assert program.wait_exit() == 2
                place = f"collector: {config}: [collector]: runtime_dir {directory}/run"
                assert program.err[-1].startswith(f"{place} {words}")
                assert "write another directory, for example" in program.err[-1]


def test_in_the_place_of_the_default_directory_another_one_is_named() -> None:
    user = 1_000_000 + os.getpid()  # a user of ours alone, with a default of its own
    become = ["unshare", "-r", f"--map-user={user}"]
    if subprocess.run([*become, "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody be another user")
    default = Path(f"/tmp/collector-{user}")
    with short_directory() as directory:
        config = write_config(directory, {"a": DEAD})
        config.write_text(config.read_text().replace(f"{directory}/run", str(default)))
        default.mkdir()
        try:
            default.chmod(0o755)
            command = [*become, *collector("plan", str(config))]
            said = subprocess.run(command, capture_output=True, text=True, timeout=60).stderr
        finally:
            default.rmdir()
    assert f"{default} is open to others" in said
    assert said.endswith(f'else write another directory, for example "{default}-2"\n')


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [("mkdir", "rw", "(Is a directory); remove it, or write"), ("touch", "ro", "(Read-only file system); write")],
)
def test_a_lock_is_to_be_removed_only_where_that_helps(make: str, options: str, said: str) -> None:
    with short_directory() as directory:
        place = directory / "run"
        place.mkdir(mode=0o700)
        command = collector("run", str(write_config(directory, {"a": DEAD})))
        mount = 'mount -t tmpfs -o mode=700 tmpfs "$0"'
        script = f'{mount} && {make} "$0/lock" && mount -o remount,{options} "$0" && exec "$@"'
        mounting = ["unshare", "-rm", "sh", "-c"]
        if subprocess.run([*mounting, mount, str(place)], capture_output=True).returncode:
            pytest.skip("this system lets nobody mount a disk")
        done = subprocess.run([*mounting, script, str(place), *command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, f"{place}/lock cannot be opened {said}" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("options", "name", "said"),
    [
        ("nr_inodes=1", "run/deeper", "/run/deeper cannot be made .*; make room, or set another runtime_dir"),
        ("nr_inodes=1", "run", "/run/lock cannot be made .*; make room, or set another runtime_dir"),
        ("size=4k", "run", "/run/lock cannot be written .*; make room, or set another runtime_dir"),
        ("nr_inodes=2", "run", "control ipc:.* cannot be bound: .*; write another endpoint, or make room"),
    ],
)
def test_a_disk_without_room_for_the_runtime_directory_is_no_wrong_configuration(
    options: str, name: str, said: str
) -> None:
    """Its exit code is not the one after which nobody tries again."""
    with short_directory() as directory:
        (directory / "run").mkdir(mode=0o700)
        config = write_config(directory, {"a": DEAD})
        config.write_text(config.read_text().replace(f'{directory}/run"', f'{directory}/{name}"'))
        script = f'mount -t tmpfs -o mode=700,{options} tmpfs "$0" && {{ [ size=4k != {options} ] || echo > "$0/x"; }}'
        mounting = ["unshare", "-rm", "sh", "-c"]
        if subprocess.run([*mounting, script, str(directory / "run")], capture_output=True).returncode:
            pytest.skip("this system lets nobody mount a disk")
        command = [*mounting, f'{script} && exec "$@"', str(directory / "run"), *collector("run", str(config))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert re.search(f"^collector: .*{said}\n$", done.stderr)


def test_a_runtime_directory_whose_name_is_too_long_is_a_wrong_configuration(tmp_path: Path) -> None:
    """Where no socket of it is too long first."""
    control, publish = (f"tcp://127.0.0.1:{find_port()}" for _ in range(2))
    config = write_config(tmp_path, {"a": {**DEAD, "publish": publish}})
    config.write_text(config.read_text().replace(f'{tmp_path}/run"', f'/tmp/{"x" * 256}"\ncontrol = "{control}"'))
    with running(*collector("run", str(config))) as program:
        assert program.wait_exit() == 2, program.text()
        (line,) = program.err
        assert "x cannot be used (File name too long); write another directory" in line


def test_a_runtime_directory_that_cannot_be_made_is_a_wrong_configuration() -> None:
    with short_directory() as directory:
        (directory / "run").write_text("a file stands here")
        config = write_config(directory, {"a": DEAD})
        for command in ("run", "plan"):
            with running(*collector(command, str(config))) as program:
                assert program.wait_exit() == 2
                place = f"collector: {config}: [collector]: runtime_dir {directory}/run"
                assert program.err[-1].startswith(f"{place} cannot be used (File exists); write")
                assert len(program.err) == 1


def test_what_cannot_be_removed_holds_up_neither_the_start_nor_the_end() -> None:
    with short_directory() as directory:
        for name in ("a.ledger", "credits-1"):
            (directory / "run" / name).mkdir(mode=0o700, parents=True)
        (directory / "run").chmod(0o700)
        with running(*collector("run", str(write_config(directory, {"a": DEAD})))) as program:
            assert program.wait_exit() == 1, program.text()
            for name in ("a.ledger", "credits-1"):
                program.wait_line(rf"{directory}/run/{name} cannot be removed: Is a directory", stream="err")
            program.wait_line("no connection is left", stream="err")
            assert "Traceback" not in program.text()


def test_a_runtime_directory_that_takes_no_data_is_refused() -> None:
    with short_directory() as directory:
        command = collector("run", str(write_config(directory, {"a": DEAD})))
        with running("bash", "-c", 'ulimit -f 0; exec "$@"', "bash", *command) as program:  # as if the disk were full
            assert program.wait_exit() == 1
            assert re.fullmatch("collector: .*/run/lock cannot be written .*; set another runtime_dir", program.err[-1])
            assert len(program.err) == 1


def set_files(soft: int, hard: int) -> str:
    return f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))"


def test_no_more_than_65536_files_are_allowed_to_be_open() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    code = (
        f"{set_files(300, hard)}; from collector.supervisor.runtime import allow_files; allow_files(1); "
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(done.stdout) == (65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536))


def test_too_few_open_files_for_the_connections_are_told_before_anything_starts() -> None:
    workers = 11 + 1
    needed = FILES + FILES_EACH * workers
    tables = {f"c{number}": {**QUICK, "channels": [f"other.channel.{number}"]} for number in range(11)}
    with collected(tables, first=set_files(20, needed - 1)) as run:
        assert run.program.wait_exit() == 1
        assert run.program.err == [
            f"collector: a collector with {workers} workers needs {needed} open files, and only {needed - 1} are "
            "allowed; allow more (ulimit -n, or LimitNOFILE of a systemd unit), or run fewer connections"
        ]
    with collected(tables, first=set_files(20, FILES)) as run:
        assert run.program.wait_exit() == 1
        assert run.program.err[-1].endswith("(ulimit -n, or LimitNOFILE of a systemd unit)")  # no number would be few
    with collected(tables, first=set_files(20, needed)) as run:
        for name in tables:
            run.wait_state(name, restarts=0)
        assert f"c0: ready, pid {run.get_state('c0')['pid']}" in run.program.text()


def test_a_runtime_directory_that_is_removed_is_made_again_and_nothing_is_lost_unsaid() -> None:
    with collected() as run, subscribed(f"ipc://{run.runtime_dir}/a.pub") as early:
        epoch = run.wait_state("a")["epoch"]
        early.wait_for("deribit.quote.", type="quote")
        shutil.rmtree(run.runtime_dir)
        run.program.wait_line(rf"{run.runtime_dir} was removed, or its lock: made again", stream="err")
        for name in ("control", "a.pub", "a.ledger"):
            run.program.wait_line(rf"{run.runtime_dir}/{name} was removed: ", stream="err")
        assert run.get_state("a")["epoch"] == epoch
        with subscribed(f"ipc://{run.runtime_dir}/a.pub") as late:
            late.wait_for("deribit.quote.", type="quote")
        assert stat.S_IMODE(run.runtime_dir.stat().st_mode) == 0o700
        with running(*collector("run", str(run.config))) as second:
            assert second.wait_exit() == 1
            assert f"(pid {run.program.pid})" in second.text()

        psutil.Process(run.get_state("a")["pid"]).kill()
        gap = early.wait_for("deribit.quote.", type="gap")
        assert (gap["reason"], gap["epoch"] > epoch) == ("restart", True)
        assert early.find("deribit.quote.", seq=gap["seq"], epoch=gap["epoch"]) == [gap]
        assert run.stop() == 0
        assert [path.name for path in run.runtime_dir.iterdir()] == ["lock"]


def test_a_runtime_directory_that_another_collector_has_taken_is_left_to_it() -> None:
    with collected() as run:
        before = run.wait_state("a")
        run.program.process.send_signal(signal.SIGSTOP)  # or it would take the directory back before the other comes
        shutil.rmtree(run.runtime_dir)
        other = run.directory / "other.toml"
        other.write_text(run.config.read_text().replace('name = "a"', 'name = "b"'))
        with running(*collector("run", str(other))) as second:
            second.wait_line("b: ready")
            run.program.process.send_signal(signal.SIGCONT)
            words = rf"files were removed and cannot be made again: a collector runs on .* \(pid {second.pid}\)"
            run.program.wait_line(words, stream="err")
            assert list(run.ask("get_state")) == ["b"], "the first one answers in place of the second"
            assert psutil.pid_exists(before["pid"])
            second.process.send_signal(signal.SIGINT)
            assert second.wait_exit() == 0
        run.program.wait_line("was removed, or its lock: made again", stream="err")
        assert run.wait_state("a")["pid"] == before["pid"]


def test_that_the_directory_of_an_endpoint_is_gone_is_told_and_the_ledger_is_kept_all_the_same() -> None:
    with collected() as run:
        elsewhere = run.directory / "elsewhere"
        elsewhere.mkdir()
        table = {**QUICK, "name": "b", "channels": [], "publish": f"ipc://{elsewhere}/b.pub"}
        run.ask("connect", connection=table, deadline=time.time_ns() + 20_000_000_000)
        shutil.rmtree(elsewhere)
        (run.runtime_dir / "b.ledger").unlink()
        run.program.wait_line(r"b\.ledger was removed: written again", stream="err")
        run.program.wait_line("a file was removed and cannot be made again: .*No such file", stream="err")
        elsewhere.mkdir()
        run.program.wait_line(r"b\.pub was removed: listens there again", stream="err")


def test_what_it_says_is_newer_than_what_was_said_before_the_clock_was_set_back() -> None:
    """Else readers that lived on would pass it over."""
    with collected() as run:
        run.wait_state("a")
        assert run.stop() == 0
        ahead = time.time_ns() + 3600_000_000_000
        with (run.runtime_dir / "lock").open("r+") as lock:  # as it was left when the clock was an hour ahead
            lock.seek(EPOCH_AT)
            lock.write(f"{ahead}\n")
        with running(*collector("run", str(run.config))) as next_one:
            next_one.wait_line("a: live")
            before = run.get_state("a")
            assert before["epoch"] > ahead
            with subscribed(before["publish"]) as reader:
                run.ask("subscribe", connection="a", channels=["quote.ETH-PERPETUAL"])
                taken_up = reader.wait_for("deribit.quote.ETH-PERPETUAL.")
                assert taken_up["epoch"] > before["epoch"]
                reader.check()
            psutil.Process(before["pid"]).kill()
            assert run.wait_state("a", restarts=1)["epoch"] > taken_up["epoch"]
            next_one.process.send_signal(signal.SIGINT)
            assert next_one.wait_exit() == 0


def test_the_newest_epoch_is_noted_in_a_lock_that_is_made_again(tmp_path: Path) -> None:
    directory = RuntimeDir(tmp_path / "run", "here")
    epoch = directory.begin_epoch()
    shutil.rmtree(tmp_path / "run")
    directory.restore()
    assert (tmp_path / "run" / "lock").read_text().split() == [str(os.getpid()), str(epoch)]


def test_what_lies_in_the_runtime_directory_does_not_grow_old(tmp_path: Path) -> None:
    directory = RuntimeDir(tmp_path / "run", "here")
    files = [tmp_path / "run" / name for name in ("lock", "a.ledger")]
    files[1].touch()
    for path in files:
        os.utime(path, (1, 1))
    directory.refresh()
    assert min(path.stat().st_mtime for path in files) > time.time() - 60


def test_a_look_at_the_runtime_directory_without_a_descriptor_is_left_out(tmp_path: Path) -> None:
    directory = RuntimeDir(tmp_path / "run", "here")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.listdir(tmp_path)
        directory.refresh()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("first", ["from collector.cli import run; run.REFRESH = 0",
                                   "from collector.supervisor import supervisor; supervisor.TICK = None"])  # fmt: skip
def test_what_goes_on_without_end_ends_the_collector_if_it_ends_by_a_fault(first: str) -> None:
    with collected(first=first) as run:
        assert run.program.wait_exit() == 1
        run.program.wait_line("CRITICAL supervisor: a fault of the supervisor itself")
        run.wait_gone()


def test_a_fault_of_the_watch_ends_the_collector_also_with_a_worker_that_does_not_stop() -> None:
    first = (
        "from collector.supervisor.keeper import Keeper; watch = Keeper.watch; Keeper.watch = "
        "lambda self, now, pause: (watch(self, now, pause), self._heard_at and 1 / (now < self._heard_at + 2))"
    )
    with collected(first=first) as run:
        run.wait_state("a")
        worker = psutil.Process(run.get_state("a")["pid"])
        worker.suspend()
        assert run.program.wait_exit() == 1
        run.program.wait_line("ZeroDivisionError")
        wait_until(lambda: not worker.is_running(), "the end of the worker")


def test_its_files_are_touched_from_time_to_time() -> None:
    with collected(first="import collector.cli.run; collector.cli.run.REFRESH = 1") as run:
        run.wait_state("a")
        os.utime(run.runtime_dir / "lock", (1, 1))
        wait_until(lambda: (run.runtime_dir / "lock").stat().st_mtime > 1, "its look at them")


def test_what_it_makes_is_for_its_owner_alone() -> None:
    with collected() as run:
        run.wait_state("a")
        assert stat.S_IMODE(run.runtime_dir.stat().st_mode) == 0o700
        for name in ("control", "lock"):
            assert stat.S_IMODE((run.runtime_dir / name).stat().st_mode) & 0o077 == 0


def test_a_umask_that_closes_its_own_files_to_it_does_not_hinder_it() -> None:
    with short_directory() as directory:
        config = write_config(directory, {"a": QUICK}, exchange={})
        command = as_no_root("sh", "-c", 'umask 777; exec "$@"', "sh", *collector("run", str(config)))
        with running(*command, env={"TMPDIR": str(directory)}) as program:
            program.wait_line("a: ready")
            assert ask(f"ipc://{directory}/run/control", "close", connection="a")["state"] == "closed"
            program.process.send_signal(signal.SIGTERM)
            assert program.wait_exit() == 0
        made = [path.stat().st_mode for path in (directory / "run", directory / "run" / "lock")]
        assert [stat.S_IMODE(mode) for mode in made] == [0o700, 0o600]


def test_a_worker_that_does_not_stop_is_killed_and_the_stop_stays_in_order() -> None:
    with collected() as run:
        psutil.Process(run.wait_state("a")["pid"]).suspend()
        assert run.stop() == 0
        run.program.wait_line(r"a: pid \d+ did not stop in [\d.]+ s: killed", stream="err")
        run.wait_gone()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_forces_the_end(number: signal.Signals) -> None:
    with collected() as run:
        psutil.Process(run.wait_state("a")["pid"]).suspend()  # else it would be over before the second one comes
        run.find_processes()
        run.program.process.send_signal(signal.SIGINT)
        run.program.wait_line("SIGINT: stopping")
        asked = time.monotonic()
        wait_until(lambda: time.monotonic() - asked > ONE_WISH, "the end of the time in which it is the same wish")
        run.program.process.send_signal(number)
        assert run.program.wait_exit() == 128 + number
        run.wait_gone()
        assert [path.name for path in run.runtime_dir.iterdir()] == ["lock"]


def test_two_signals_at_once_are_one_wish() -> None:
    with collected() as run:
        psutil.Process(run.wait_state("a")["pid"]).suspend()  # else it would be over before the second one is seen
        run.find_processes()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            run.program.process.send_signal(number)
        assert run.program.wait_exit() == 0, run.program.text()
        assert "forced" not in run.program.text()
        run.wait_gone()


def test_workers_come_from_a_forkserver_that_has_all_loaded_and_never_import_the_program_again() -> None:
    with short_directory() as directory:
        marker, script = directory / "imported", directory / "main.py"
        script.write_text(
            f"open({str(marker)!r}, 'a').write('x')\n"
            "from collector.cli import main\n"
            "if __name__ == '__main__': main()\n"
        )
        config = write_config(directory, {"a": QUICK, "b": {**QUICK, "channels": []}}, exchange={})
        program = Program(sys.executable, str(script), "run", str(config))
        try:
            program.wait_line("a: ready")
            program.wait_line("b: ready")
            worker = next(p for p in psutil.Process(program.pid).children(True) if p.cmdline()[:1] == ["collector: a"])
            forkserver = worker.parent()
            assert forkserver is not None
            assert forkserver.pid != program.pid
            for module in (
                "aiohttp",
                "uvloop",
                "msgspec",
            ):  # their shared objects are mapped where it was forked
                assert any(module in Path(each.path).parts for each in forkserver.memory_maps()), module
            assert marker.read_text() == "x"
        finally:
            program.process.send_signal(signal.SIGINT)
            assert program.wait_exit() == 0


def test_a_directory_with_another_workers_package_does_not_stand_in_the_way() -> None:
    with short_directory() as directory:
        (directory / "workers").mkdir()
        (directory / "workers" / "__init__.py").write_text("raise SystemExit('the wrong package')\n")
        config = write_config(directory, {"a": QUICK}, exchange={})
        command = str(Path(sys.executable).parent / "collector")
        program = Program(command, "run", str(config), cwd=directory)
        try:
            program.wait_line("a: live")
        finally:
            program.process.send_signal(signal.SIGINT)
            assert program.wait_exit() == 0, program.text()


def test_watch_shows_readable_messages_and_ends_with_the_rest() -> None:
    with collected(None, "--watch") as run:
        run.program.wait_line(r"quote\s+BTC-PERPETUAL", stream="out")
        assert run.stop() == 0
        run.wait_gone()


def test_watch_whose_reader_has_gone_ends_with_0() -> None:
    with short_directory() as directory:
        config = write_config(directory, {"a": QUICK}, exchange={})
        command = 'set -o pipefail; "$@" | sed -u "/quote  *BTC/q"'
        program = collector("run", str(config), "--watch")
        with running("bash", "-c", command, "bash", *program, env={"PYTHONUNBUFFERED": ""}) as shell:
            shell.wait_line("quote +BTC-PERPETUAL", stream="out")
            worker = psutil.Process(int(shell.wait_line(r"a: ready, pid (\d+)")[1]))

            def count_ends() -> int:
                return sum(str(each.laddr).endswith("/a.pub") for each in worker.net_connections("unix"))

            wait_until(lambda: count_ends() == 1, "the end of the view: only who listens is left")
            os.kill(int(shell.wait_line(r"SIGTERM to pid (\d+)")[1]), signal.SIGINT)
            assert shell.wait_exit() == 0, shell.text()


def test_watch_whose_output_cannot_be_written_says_so_and_the_collector_goes_on() -> None:
    with short_directory() as directory:
        config = write_config(directory, {"a": QUICK}, exchange={})
        with running("bash", "-c", '"$@" >/dev/full', "bash", *collector("run", str(config), "--watch")) as shell:
            shell.wait_line("ERROR .*the view has ended, its output cannot be written: No space left on device")
            state = ask(f"ipc://{directory}/run/control", "get_state", connection="a")
            assert state["name"] == "a"
            os.kill(int(shell.wait_line(r"SIGTERM to pid (\d+)")[1]), signal.SIGINT)
            assert shell.wait_exit() == 0, shell.text()
        assert shell.text().count("the view has ended") == 1
        assert "Traceback" not in shell.text()
