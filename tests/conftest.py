"""Fixtures that several files of tests use."""

import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.exchange_client import exchange

# A job that a shell runs in the background has SIGINT ignored, one under nohup SIGHUP, and hands that down: the
# programs under test would never see a Ctrl-C, and heed what nohup means.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


# No test fails because the machine is slow.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def practice() -> Iterator[str]:
    """The URL of a practice exchange that is busy enough for every channel to speak soon."""
    with exchange("--rate", "1500", "--faults", "connections:0") as (url, _):
        yield url
