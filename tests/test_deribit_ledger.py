"""What a later life is told by an earlier one: all of it, however many topics there are; and what a full disk does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from collector.messages import Topic
from tests.pipeline import short_directory, write_config
from tests.support import REPOSITORY, collector
from workers.deribit.publishing.ledger import (
    EPOCH,
    FIRST,
    LAST_ID,
    LAST_TS,
    LAYOUT,
    LENGTH,
    MAX_NAMES,
    NAME_AT,
    RECORD,
    ROOM,
    SIZE,
    STEP,
    SUBSCRIPTIONS,
    Ledger,
)
from workers.deribit.publishing.payloads import Trade
from workers.deribit.publishing.publisher import Publisher
from workers.deribit.publishing.streams import Topics

ON_SMALL_DISK = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
"""Runs a shell that may mount what only it sees."""


def name_topic(number: int) -> str:
    return str(Topic("deribit", "trade", f"BTC-{number}", "100ms"))


def fill(ledger: Ledger, numbers: range) -> list[int]:
    """Say something on so many topics; return their slots."""
    slots = [ledger.find_slot(name_topic(number)) for number in numbers]
    for number, slot in zip(numbers, slots, strict=True):
        ledger.cells[slot + LAST_TS], ledger.cells[slot + LAST_ID] = number, 2 * number
    return slots


def test_it_grows_with_its_topics_and_all_are_read_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.ledger", fresh=True)
    assert ledger.earlier == []
    numbers = range(1, 3 * STEP)
    slots = fill(ledger, numbers)
    assert len(set(slots)) == len(numbers)
    ledger.close()
    again = Ledger(tmp_path / "a.ledger", fresh=False)
    assert [entry.topic for entry in again.earlier] == [name_topic(number) for number in numbers]
    assert [(entry.last_ts, entry.last_id) for entry in again.earlier] == [(number, 2 * number) for number in numbers]
    assert again.find_slot(name_topic(7)) == slots[6]
    assert again.find_slot(name_topic(0)) not in slots
    again.close()
    fresh = Ledger(tmp_path / "a.ledger", fresh=True)
    assert fresh.earlier == []
    fresh.close()


def test_the_first_data_of_a_topic_are_noted_before_they_are_sent(tmp_path: Path) -> None:
    """A worker may be killed between the two: on a topic of which its successor knows nothing it tells no gap."""
    ledger = Ledger(tmp_path / "a.ledger", fresh=True)
    publisher = Publisher("", 1000, ledger)
    stream = Topics(1, ledger).find("quote", "BTC-PERPETUAL", "raw")
    with publisher.gather():
        publisher.publish([(stream, {"receive_ts": 7})], 7)
        assert (publisher.published, stream.seq) == (0, 0)
        later = Ledger(tmp_path / "a.ledger", fresh=False)
        assert [(entry.topic, entry.last_ts) for entry in later.earlier] == [("deribit.quote.BTC-PERPETUAL.raw", 7)]
        later.close()
        trade = Trade("deribit", "BTC-PERPETUAL", 1, 0, 8, 8, 1.5, 10.0, "buy", "1", 250_000_000)
        publisher.publish([(Topics(1, ledger).find("trade", "BTC-PERPETUAL", "100ms"), trade)], 8)
        later = Ledger(tmp_path / "a.ledger", fresh=False)
        assert (later.earlier[-1].last_ts, later.earlier[-1].last_id) == (8, 250_000_000)  # fetched from there on
        later.close()
    publisher.close()
    ledger.close()


def test_it_is_small_on_the_disk_as_long_as_it_is_little_used(tmp_path: Path) -> None:
    path = tmp_path / "a.ledger"
    ledger = Ledger(path, fresh=True)
    fill(ledger, range(1, 100))
    assert path.stat().st_blocks * 512 <= 256 * 1024
    path.unlink()
    ledger.restore()
    assert path.stat().st_blocks * 512 <= 256 * 1024
    ledger.close()


@pytest.mark.parametrize(
    ("place", "size"),
    [(0, SIZE), (0, RECORD), (RECORD, RECORD), (RECORD + 8 * LENGTH, 8), (8 * ROOM, 8), (8 * LAYOUT, 8)],
)
def test_what_is_no_ledger_of_a_worker_is_told_and_not_taken_for_an_empty_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: int, size: int
) -> None:
    """Its length is right; something else is all of it, or its header, a record, the length of a name, its room, or
    the number of its layout.
    """
    path = tmp_path / "a.ledger"
    ledger = Ledger(path, fresh=True)
    fill(ledger, range(1, 10))
    ledger.close()
    again = Ledger(path, fresh=False)
    assert (len(again.earlier), caplog.text) == (9, "")
    again.close()
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\x7b" * size)
    later = Ledger(path, fresh=False)
    assert "a.ledger is gone: nothing is known of earlier lives" in caplog.text
    assert later.earlier == []
    fill(later, range(1, 3))
    later.close()
    last = Ledger(path, fresh=False)
    assert len(last.earlier) == 2
    last.close()


@pytest.mark.parametrize("size", [0, SIZE - 8, SIZE + 8])
def test_a_file_of_another_length_is_no_ledger(tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int) -> None:
    path = tmp_path / "a.ledger"
    ledger = Ledger(path, fresh=True)
    fill(ledger, range(1, 10))
    ledger.close()
    os.truncate(path, size)
    later = Ledger(path, fresh=False)
    assert "a.ledger is gone: nothing is known of earlier lives" in caplog.text
    assert (later.earlier, path.stat().st_size) == ([], SIZE)
    later.close()


def test_a_name_that_is_too_long_has_no_place_and_the_longest_leaves_the_next_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.ledger", fresh=True)
    names = ["x" * (RECORD - NAME_AT), name_topic(1)]
    for name in names:
        ledger.cells[ledger.find_slot(name) + LAST_TS] = 7
        assert ledger.find_slot("y" * (RECORD - NAME_AT + 1)) == 0
    ledger.close()
    again = Ledger(tmp_path / "a.ledger", fresh=False)
    assert [(entry.topic, entry.last_ts) for entry in again.earlier] == [(name, 7) for name in names]
    again.close()


def test_a_place_that_was_freed_in_an_earlier_life_serves_another(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.ledger", fresh=True)
    slots = first, *_ = fill(ledger, range(1, 10))
    for word in set(range(EPOCH + 1)) - {LENGTH}:
        ledger.cells[first + word] = 7
    ledger.free_slot(name_topic(1))
    ledger.close()
    again = Ledger(tmp_path / "a.ledger", fresh=False)
    assert [entry.last_ts for entry in again.earlier] == list(range(2, 10))
    assert name_topic(1) not in again._slots
    assert again.find_slot(name_topic(100)) == first
    assert not any(again.cells[first + word] for word in range(EPOCH + 1) if word != LENGTH)
    assert again.find_slot(name_topic(101)) not in slots
    again.close()


def test_who_is_spoken_of_again_has_not_the_place_that_was_freed_for_another(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.ledger", fresh=True)
    slots = fill(ledger, range(1, 3))
    ledger.free_slot(name_topic(1))
    ledger.free_slot("that never had one")
    assert ledger.find_slot(name_topic(3)) == slots[0]
    assert ledger.find_slot(name_topic(1)) not in (0, *slots)
    ledger.close()


def test_a_name_that_a_killed_life_had_half_written_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.ledger"
    ledger = Ledger(path, fresh=True)
    fill(ledger, range(1, 3))
    ledger.close()
    with path.open("r+b") as file:
        file.seek(RECORD + NAME_AT)
        file.write(b"\xff")
    later = Ledger(path, fresh=False)
    assert [entry.topic for entry in later.earlier] == ["\ufffd" + name_topic(1)[1:], name_topic(2)]
    later.close()


def test_the_least_value_of_a_word_is_kept_where_there_is_a_place(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.ledger", fresh=True)
    slot = ledger.find_slot(name_topic(1))
    assert [ledger.lower(slot, FIRST, value) for value in (5, 7, 3)] == [5, 5, 3]
    assert ledger.cells[slot + FIRST] == 3
    assert [ledger.lower(0, FIRST, value) for value in (5, 7)] == [5, 7]
    ledger.close()


def test_a_place_of_which_nothing_is_known_serves_another_in_the_next_life(tmp_path: Path) -> None:
    """Of a topic that was left, or on which nothing was said, before its life was killed."""
    ledger = Ledger(tmp_path / "a.ledger", fresh=True)
    topics = Topics(1, ledger)
    left, silent = (topics.find("trade", name, "100ms") for name in ("BTC-6NOV26", "BTC-7NOV26"))
    kept, *_ = fill(ledger, range(1, 2))
    ledger.cells[left.slot + LAST_TS] = 5
    topics.leave(left, 10)
    topics.forget_left(10 + 60 * 1_000_000_000)
    ledger.close()
    again = Ledger(tmp_path / "a.ledger", fresh=False)
    assert {again.find_slot(name_topic(number)) for number in range(10, 12)} == {left.slot, silent.slot}
    assert again.find_slot(name_topic(1)) == kept
    again.close()


def test_more_topics_than_it_holds_have_no_place_and_harm_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(tmp_path / "a.ledger", fresh=True)
    for number in range(MAX_NAMES):
        assert ledger.find_slot(name_topic(number))
    assert ledger.find_slot(name_topic(MAX_NAMES)) == 0
    assert ledger.find_slot(name_topic(MAX_NAMES + 1)) == 0
    assert caplog.text.count("no room for more topics in the ledger") == 1
    ledger.cells[SUBSCRIPTIONS] = 6
    fill(ledger, range(MAX_NAMES, MAX_NAMES + 1))
    ledger.clear(0)
    assert ledger.cells[SUBSCRIPTIONS] == 6
    ledger.cells[ledger.find_slot(name_topic(0)) + LAST_TS] = 7
    ledger.close()
    again = Ledger(tmp_path / "a.ledger", fresh=False)
    assert [entry.last_ts for entry in again.earlier] == [7]
    again.close()


def test_a_fresh_one_leaves_the_old_one_alone_for_who_has_it_still(tmp_path: Path) -> None:
    """The worker of a supervisor that was killed lives on for seconds."""
    old = Ledger(tmp_path / "a.ledger", fresh=True)
    slots = fill(old, range(1, 10))
    fresh = Ledger(tmp_path / "a.ledger", fresh=True)
    assert [old.cells[slot + LAST_TS] for slot in slots] == list(range(1, 10))
    old.cells[fresh.find_slot(name_topic(1)) + LAST_TS] = 77
    assert fresh.cells[fresh.find_slot(name_topic(1)) + LAST_TS] == 0
    fresh.close()
    old.close()


def test_a_fresh_one_takes_the_old_one_s_place_only_once_it_is_whole(tmp_path: Path) -> None:
    """Where nothing lies meanwhile, an orphan that still has the old one would put it there again."""
    fill(Ledger(tmp_path / "a.ledger", fresh=True), range(1, 10))
    (tmp_path / "a.ledger.new").mkdir()
    with pytest.raises(OSError, match=r"a\.ledger\.new"):
        Ledger(tmp_path / "a.ledger", fresh=True)
    assert len(Ledger(tmp_path / "a.ledger", fresh=False).earlier) == 9
    (tmp_path / "a.ledger.new").rmdir()
    (tmp_path / "a.ledger.new").write_text("left by one that was killed")
    assert Ledger(tmp_path / "a.ledger", fresh=True).earlier == []


def test_what_is_removed_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "a.ledger"
    ledger = Ledger(path, fresh=True)
    fill(ledger, range(1, 2 * STEP))
    path.unlink()
    ledger.restore()
    assert len(list(tmp_path.iterdir())) == 1
    place = path.stat().st_ino
    ledger.restore()
    assert path.stat().st_ino == place
    fill(ledger, range(2 * STEP, 2 * STEP + 5))
    ledger.close()
    again = Ledger(path, fresh=False)
    assert [entry.last_ts for entry in again.earlier] == list(range(1, 2 * STEP + 5))
    again.close()


def test_the_ledger_of_a_new_collector_is_left_alone_by_an_orphan_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "a.ledger"
    orphan = Ledger(path, fresh=True)
    fill(orphan, range(1, 3))
    new = Ledger(path, fresh=True)
    fill(new, range(1, 5))
    orphan.restore()
    for ledger in (orphan, new):
        ledger.close()
    again = Ledger(path, fresh=False)
    assert [entry.last_ts for entry in again.earlier] == [1, 2, 3, 4]
    again.close()


def count_open(path: Path) -> int:
    """How often this process has a file open, or one that lay there and was removed."""
    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(str(link).startswith(str(path)) for link in links)


@pytest.mark.parametrize("size", [SIZE, SIZE - 8])
def test_what_was_removed_or_is_no_ledger_does_not_stay_open(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.ledger"
    ledger = Ledger(path, fresh=True)
    held = count_open(path)
    path.unlink()
    ledger.restore()
    assert count_open(path) == held
    ledger.close()
    assert count_open(path) == 0
    path.write_bytes(b"\x7b" * size)
    later = Ledger(path, fresh=False)
    assert count_open(path) == held
    later.close()


# -- a full disk ------------------------------------------------------------------------------------------------------

GROWTH = STEP * RECORD >> 10
"""KiB by which a ledger grows."""


def run_on_small_disk(place: Path, size: int, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run a program while a disk of so many KiB is mounted at a place."""
    script = f'mount -t tmpfs -o size={size}k,mode=700 tmpfs "$1" && shift && exec "$@"'
    command = [*ON_SMALL_DISK, script, "sh", str(place), *argv]
    if subprocess.run([*ON_SMALL_DISK, 'mount -t tmpfs tmpfs "$1"', "sh", str(place)], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a small disk")
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)


def test_a_worker_that_was_never_live_is_started_again_on_a_full_disk_and_says_why() -> None:
    with short_directory() as directory:
        disk = directory / "run"
        disk.mkdir()
        table = {"url": "ws://127.0.0.1:9/ws/api/v2", "channels": ["quote.BTC-PERPETUAL"], "retry_delay": 0.02}
        config = write_config(directory, {"w": table})
        done = run_on_small_disk(disk, GROWTH // 2, *collector("run", str(config)))
    assert done.returncode == 1, done.stderr
    assert "w: cannot start just now: [Errno 28] no room for the ledger: No space left on device: " in done.stderr
    assert str(disk / "w.ledger") in done.stderr
    assert "w: crashed (see its log): never live in 6 starts, given up" in done.stderr
    assert "no connection is left" in done.stderr


GROW = """
import sys
from pathlib import Path
from workers.deribit.publishing.ledger import LAST_TS, STEP, Ledger
ledger = Ledger(Path(sys.argv[1]) / "a.ledger", fresh=True)
slots = [ledger.find_slot(f"t{number}") for number in range(3 * STEP)]
for slot in slots:
    ledger.cells[slot + LAST_TS] = 1
print(sum(slot > 0 for slot in slots))
ledger.close()
print(len(Ledger(Path(sys.argv[1]) / "a.ledger", fresh=False).earlier))
"""


def test_a_ledger_that_cannot_grow_keeps_what_it_has(tmp_path: Path) -> None:
    done = run_on_small_disk(tmp_path, GROWTH * 3 // 2, sys.executable, "-c", GROW, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(STEP - 1)] * 2
    assert done.stderr.count("no room for more topics in the ledger") == 1


RESTORE = """
import sys
from pathlib import Path
from workers.deribit.publishing.ledger import LAST_TS, RECORD, STEP, Ledger
disk = Path(sys.argv[1])
ledger = Ledger(disk / "a.ledger", fresh=True)
ledger.cells[ledger.find_slot("t") + LAST_TS] = 1
(disk / "a.ledger").unlink()
(disk / "other").write_bytes(bytes(STEP * RECORD // 2))
for _ in range(2):
    try:
        ledger.restore()
    except OSError as error:
        print(error.strerror, [path.name for path in disk.iterdir()])
(disk / "other").unlink()
ledger.restore()
ledger.close()
print(len(Ledger(disk / "a.ledger", fresh=False).earlier))
"""


def test_one_that_was_removed_is_written_again_once_the_disk_has_room(tmp_path: Path) -> None:
    done = run_on_small_disk(tmp_path, GROWTH * 9 // 4, sys.executable, "-c", RESTORE, str(tmp_path))
    assert done.returncode == 0, done.stderr
    full = "no room for the ledger: No space left on device ['other']"
    assert done.stdout.splitlines() == [full, full, "1"]
