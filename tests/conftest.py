"""Fixtures that several files of tests use."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.exchange_client import exchange
from workers.deribit.publishing.ledger import Ledger
from workers.deribit.publishing.streams import Topics

# A job that a shell runs in the background has SIGINT ignored, one under nohup SIGHUP, and hands that down: the
# programs under test would never see a Ctrl-C, and heed what nohup means.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


LONG = ("test_watch_program.py", "test_network.py")
"""Files whose tests wait for a minute and more, for times of the product."""

# No test fails because the machine is slow.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that wait longest: whatever is long at the end holds three idle processes up."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture
def topics(tmp_path: Path) -> Iterator[Topics]:
    """The streams of a worker's first life."""
    ledger = Ledger(tmp_path / "ledger", fresh=True)
    yield Topics(1, ledger)
    ledger.close()


@pytest.fixture(scope="session")
def practice() -> Iterator[str]:
    """The URL of a practice exchange that is busy enough for every channel to speak soon."""
    with exchange("--rate", "1500", "--faults", "connections:0") as (url, _):
        yield url
