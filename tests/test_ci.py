"""The script that decides whether a change is good, with programs in the place of the tools that only pass or fail."""

import shutil
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.collected import is_alive
from tests.support import REPOSITORY, running, wait_until

FAILS_ONCE = """#!/bin/sh
printf '%s\\n' "$*" >> calls
test -e failed || {{ touch failed; echo '{}'; exit {}; }}
"""

FAILED = "FAILED tests/test_a.py::test_b - assert 0"
ALL, AGAIN = "-n 6 --dist worksteal", "--last-failed --last-failed-no-failures none"


@pytest.mark.parametrize(
    ("failing", "said", "code", "is_good", "calls"),
    [
        ("", FAILED, 1, True, [ALL, AGAIN]),
        ("", "ERROR tests/test_a.py::test_b - the exchange did not start", 1, True, [ALL, AGAIN]),
        ("", "__________ ERROR at teardown of test_b __________", 1, False, [ALL]),  # it may be any test of the file
        ("", FAILED, 2, False, [ALL]),  # interrupted: most were not run
        ("", FAILED, 3, False, [ALL]),
        ("ruff", "", 1, False, []),
        ("mypy", "", 1, False, []),
    ],
    ids=["test", "setup", "teardown", "interrupted", "internal error", "ruff", "mypy"],
)
def test_only_failed_tests_get_another_chance(
    tmp_path: Path, failing: str, said: str, code: int, is_good: bool, calls: list[str]
) -> None:
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", ".ci/run"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    for name in ("pyproject.toml", ".venv/.ready", ".venv/.test"):  # in this order: nothing is to be installed
        (tmp_path / name).touch()
    for name in ("ruff", "mypy"):
        (tmp_path / ".venv" / "bin" / name).symlink_to(str(shutil.which("false" if name == failing else "true")))
    runner = tmp_path / ".venv" / "bin" / "pytest"
    runner.write_text(FAILS_ONCE.format(said, code))
    runner.chmod(0o755)
    done = subprocess.run([".ci/run"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) == is_good, done
    assert not is_good or done.stdout.endswith(f"only at the second time:\n{said}\n")
    made = tmp_path / "calls"
    assert (made.read_text().splitlines() if made.exists() else []) == calls


def test_a_program_of_a_test_goes_with_all_that_it_has_started() -> None:
    with running("sh", "-c", "sleep 1000 & echo $!; wait") as shell:
        child = psutil.Process(int(shell.wait_line(r"^\d+$")[0]))
    wait_until(lambda: not is_alive(child), "the end of what the shell runs")
