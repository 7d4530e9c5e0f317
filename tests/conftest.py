"""Fixtures that several files of tests use."""

from collections.abc import Iterator

import pytest

from tests.exchange_client import exchange


@pytest.fixture(scope="session")
def practice() -> Iterator[str]:
    """The URL of a practice exchange that is busy enough for every channel to speak soon."""
    with exchange("--rate", "1500", "--faults", "connections:0") as (url, _):
        yield url
