"""Topics over months: what expired is forgotten, in memory and in the ledger, and its place serves another."""

from pathlib import Path

from collector.channels import guess_expiry
from workers.deribit.publishing.ledger import Ledger
from workers.deribit.publishing.streams import DAY, Topics

EXPIRY = 1_793_952_000 * 1_000_000_000
"""2026-11-06 08:00 UTC."""


def test_the_name_of_an_instrument_tells_its_expiry() -> None:
    assert guess_expiry("BTC-6NOV26-100000-C") == guess_expiry("ETH-6NOV26") == EXPIRY
    assert guess_expiry("XRP_USDC-6NOV26-0d625-P") == EXPIRY
    assert guess_expiry("BTC-CS-6NOV26-70000_75000") == EXPIRY
    for name in ("BTC-PERPETUAL", "BTC_USDC", "BTC-31FEB26", "BTC-6XYZ26-1-C", "btc_usd"):
        assert guess_expiry(name) is None


def test_expired_topics_are_forgotten_and_their_places_reused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.ledger", fresh=True)
    topics = Topics(1, ledger)
    old = topics.find("trade", "BTC-6NOV26-100000-C", "100ms")
    kept = topics.find("trade", "BTC-6NOV26-90000-C", "100ms")
    young = topics.find("trade", "BTC-PERPETUAL", "100ms")
    for stream in (old, kept, young):
        stream.seq, ledger.cells[stream.slot] = 1, 5
    assert topics.forget_expired(EXPIRY + DAY - 1, ()) == []
    assert topics.forget_expired(EXPIRY + DAY + 1, {kept}) == [old]
    assert topics.match(b"") == [kept, young]
    assert topics.find("trade", "BTC-27NOV26", "100ms").slot == old.slot
    ledger.close()
    names = {entry.topic.split(".")[2] for entry in Ledger(tmp_path / "a.ledger", fresh=False).earlier}
    assert names == {kept.instrument, young.instrument}
