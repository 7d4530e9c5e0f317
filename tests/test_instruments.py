"""What is known of the instruments: by looks at the whole list that come late or lack some, and by what is told."""

from dataclasses import replace
from typing import Any

import pytest

from collector.config.patterns import SETTLING, Instrument
from collector.planning.instruments import Instruments

NOW = 1_800_000_000_000
A, B = Instrument("BTC-A", "option", expiry=NOW + 1000), Instrument("BTC-B", "option")


def list_all(*instruments: Instrument) -> dict[str, Instrument]:
    return {each.name: each for each in instruments}


def tell(instrument: Instrument, **members: Any) -> dict[str, Any]:
    return {"instrument_name": instrument.name, **members}


def test_what_a_look_misses_is_gone_if_the_next_one_misses_it_too() -> None:
    known = Instruments(list_all(A, B))
    for _ in range(2):
        assert known.take_list(list_all(B), NOW), "another look is due"
        assert known.known == list_all(A, B)
        assert not known.take_list(list_all(A, B), NOW), "it was there again"
    assert known.take_list(list_all(B), NOW)
    assert not known.take_list(list_all(B), NOW)
    assert known.known == list_all(B)


def test_what_had_to_expire_is_gone_as_soon_as_a_look_misses_it() -> None:
    known = Instruments(list_all(A, B))
    assert not known.take_list(list_all(B), A.expiry + SETTLING)
    assert known.known == list_all(B)


@pytest.mark.parametrize("is_told_before", [False, True])
def test_of_what_is_told_while_the_list_comes_the_list_may_be_too_old(is_told_before: bool) -> None:
    known = Instruments(list_all(A))
    if not is_told_before:
        known.begin_look()
    assert not known.take_rows([tell(A, state="delivered"), tell(B, state="open", kind="option")])
    told = list_all(replace(A, state="delivered"), B)
    assert known.known == told
    if is_told_before:
        known.begin_look()
    assert known.take_list(list_all(A), NOW) == is_told_before, "only what a look should have found is looked for"
    assert known.known == (list_all(A, B) if is_told_before else told)


def test_who_ends_during_a_look_is_not_wanted_though_only_the_older_list_ever_told_of_it() -> None:
    known = Instruments(list_all(A))
    known.begin_look()
    assert not known.take_rows([tell(B, state="delivered")])
    assert not known.take_list(list_all(A, B), NOW)
    assert known.known == list_all(A)
    known.begin_look()
    assert not known.take_list(list_all(A, B), NOW), "what a later list has is there"
    assert known.known == list_all(A, B)


def test_only_for_an_instrument_whose_listing_nobody_told_a_look_is_needed() -> None:
    known = Instruments({})
    assert not known.take_rows([tell(A, state="open"), tell(A, state="preopen", kind="option")])
    assert known.known[A.name].state == "open"
    assert not known.take_rows([tell(B, state="delivered")])
    assert known.take_rows([tell(B, state="delivered"), tell(B, state="open"), tell(B, state="delivered")])
    assert known.take_rows([tell(B, state="open")])
    assert list(known.known) == [A.name]


def test_an_end_that_is_told_after_a_new_listing_is_that_of_before() -> None:
    known = Instruments(list_all(A, B))
    assert not known.take_rows([tell(A, state="open", timestamp=7)])
    assert not known.take_rows([tell(A, state="closed", timestamp=5), tell(B, state="closed", timestamp=5)])
    assert known.known == list_all(A, replace(B, state="closed"))
    again = tell(B, state="open", timestamp=7, kind="option")
    assert not known.take_rows([tell(B, state="closed", timestamp=5), again])
    assert known.known == list_all(A, B)
    assert not known.take_rows([tell(A, state="closed", timestamp=8), tell(B, state="closed")])
    assert known.known == list_all(replace(A, state="closed"), replace(B, state="closed"))


def test_an_end_that_is_told_after_a_new_listing_and_a_look_is_that_of_before_too() -> None:
    known = Instruments(list_all(A))
    assert not known.take_rows([tell(A, state="open", timestamp=7)])
    known.begin_look()
    assert not known.take_rows([tell(A, state="closed", timestamp=5)])
    assert not known.take_list(list_all(A), NOW)
    assert not known.take_rows([tell(A, state="closed", timestamp=6)])
    assert known.known == list_all(A)


def test_what_came_without_a_time_does_not_make_an_old_end_new() -> None:
    known = Instruments(list_all(A))
    assert not known.take_rows([tell(A, state="open", timestamp=7), tell(A, state="open")])
    assert not known.take_rows([tell(A, state="closed", timestamp=5)])
    assert known.known == list_all(A)


def test_a_state_that_is_no_word_changes_nothing() -> None:
    known = Instruments(list_all(A))
    assert known.take_rows([tell(A, state=1), tell(A)])
    assert known.known == list_all(A)
