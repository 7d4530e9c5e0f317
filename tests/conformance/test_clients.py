"""The practice exchange against clients of Deribit that others wrote: nothing is changed in them but the address.

They live in an environment of their own (make conformance), whose Python COLLECTOR_CONFORMANCE names.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.certificate import HAS_OPENSSL, make_certificate
from tests.exchange_client import exchange
from tests.support import running

PYTHON = os.environ.get("COLLECTOR_CONFORMANCE", "")

pytestmark = pytest.mark.skipif(not PYTHON, reason="COLLECTOR_CONFORMANCE names no Python with the clients")


def run_client(name: str, url: str, **env: str) -> dict[str, Any]:
    """Run one client until it has received all that it asked for; return what it printed."""
    script = Path(__file__).with_name(f"client_{name}.py")
    with running(PYTHON, str(script), url.split("/")[2], env=env) as program:
        assert program.wait_exit(60) == 0, program.text()
        received: dict[str, Any] = json.loads(program.out[-1])
        return received


def test_ccxt() -> None:
    with exchange(own_credits=False) as (url, _):
        got = run_client("ccxt", url)
    assert got["markets"] > 100
    assert got["book"]["bid"] < got["book"]["ask"]
    assert got["book"]["levels"] > 20
    assert got["trade"]["side"] in ("buy", "sell")
    assert got["ticker"]["bid"] < got["ticker"]["ask"]


def test_typed_deribit() -> None:
    with exchange(own_credits=False) as (url, _):
        got = run_client("typed_deribit", url)
    assert got["markets"] > 10
    first, *changes = got["book"]
    assert first["type"] == "snapshot"
    assert "prev_change_id" not in first
    ids = [update["change_id"] for update in got["book"]]
    assert [change["prev_change_id"] for change in changes] == ids[:-1]
    assert {trade["instrument_name"] for trade in got["trades"]} == {"BTC-PERPETUAL"}
    assert got["ticker"]["best_bid_price"] < got["ticker"]["best_ask_price"]


@pytest.mark.skipif(not HAS_OPENSSL, reason="no openssl here to make a certificate with")
def test_cryptofeed(tmp_path: Path) -> None:
    own = make_certificate(tmp_path)
    keys = {"CLIENT_ID": "practice", "CLIENT_SECRET": "practice"}
    with exchange("--certificate", own, own_credits=False) as (url, _):
        got = run_client("cryptofeed", url, SSL_CERT_FILE=own, REQUESTS_CA_BUNDLE=own, **keys)
    assert got["snapshots"] == 1
    assert got["l2_book"]["book"]["bid"] > 10
    assert got["l1_book"]["bid_price"] < got["l1_book"]["ask_price"]
    assert got["ticker"]["bid"] < got["ticker"]["ask"]
    assert got["trades"]["side"] in ("buy", "sell")
