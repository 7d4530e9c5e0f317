"""A small share of `make faults`: whatever is lost on the way is announced, and nothing else is."""

import pytest

from tests.certificate import HAS_OPENSSL
from tests.faults.programs import SCENARIOS, run_round
from tests.faults.pure import run_case

SEEDS, CHUNK = 240, 40


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_seeded_cases_account_for_every_trade_and_book(first: int) -> None:
    failed = {seed: found for seed in range(first, first + CHUNK) if (found := run_case(seed))}
    assert not failed, f"python -m tests.faults --only {min(failed)}: {failed[min(failed)][:3]}"


def test_a_new_count_that_the_history_shows_late_is_found_on_a_channel_of_many() -> None:
    """What has been fetched by time says nothing of the trade before the hole: that one is asked for by number."""
    assert not run_case(5000035)


def test_a_trade_before_a_loss_that_the_exchange_has_not_shown_again_stays_in_doubt() -> None:
    """It was reset twice, and nothing was traded before the second loss had been looked into."""
    assert not run_case(7001478)


def test_a_hole_that_late_trades_filled_is_not_closed_before_it_is_seen_whether_a_new_count_lies_in_it() -> None:
    """The exchange wanted to be asked later, and in the meantime nothing of this hole had to be asked for."""
    assert not run_case(77923)


def test_a_new_count_that_is_told_twice_has_trades_that_the_reader_knows_by_their_ids() -> None:
    """They came fetched before the worker was killed, and by themselves after that."""
    assert not run_case(6130314)


NO_OPENSSL = pytest.mark.skipif(not HAS_OPENSSL, reason="no openssl here to make a certificate with")


@pytest.mark.parametrize("tls", [False, pytest.param(True, marks=NO_OPENSSL)])
def test_whole_programs_account_for_every_trade_and_book(tls: bool) -> None:
    found = run_round(1, tls=tls)
    assert found.keys() == {scenario.name for scenario in SCENARIOS}
    assert not {name: complaints[:3] for name, complaints in found.items() if complaints}
