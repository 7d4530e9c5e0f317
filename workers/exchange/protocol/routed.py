"""What the fault `routed_spot` takes away: spot pairs are matched at Coinbase, and nothing is told of their trades.

As docs.deribit.com has it (spot trading venues, 2026), but that here all spot pairs are. Pure.
"""

from typing import Any

from workers.exchange.market.instruments import Catalogue

MARKS = {"is_csr": True, "is_cbe_routed": True}
"""What the row of such a pair has in the list of instruments."""

_LISTS = ("public/get_instruments", "public/get_instrument")
_OF_CURRENCY = "public/get_last_trades_by_currency"
_OF_INSTRUMENT = "public/get_last_trades_by_instrument"


def leaves_out(channel: str, catalogue: Catalogue) -> bool:
    """Whether a channel is left out: it has trades, or candles, of such a pair among others."""
    match channel.split("."):
        case ["trades", kind, currency, _]:
            return _has_pair(catalogue, kind, currency)
        case ["trades", name, _] | ["chart", "trades", name, _]:
            return _is_pair(catalogue, name)
    return False


def refuses(method: str, params: dict[str, Any], catalogue: Catalogue) -> bool:
    """Whether a request is answered with 11060: it asks for trades of such a pair among others."""
    if method.startswith(_OF_CURRENCY):
        return _has_pair(catalogue, params.get("kind", "any"), params.get("currency", ""))
    return method.startswith(_OF_INSTRUMENT) and _is_pair(catalogue, params.get("instrument_name"))


def mark_rows(method: str, result: Any) -> Any:
    """The rows of instruments with the marks of such pairs; all other results as they are."""
    if method not in _LISTS:
        return result
    if isinstance(result, list):
        return [mark_rows(method, row) for row in result]
    return result | MARKS if result["kind"] == "spot" else result


def _has_pair(catalogue: Catalogue, kind: str, currency: str) -> bool:
    return any(of.kind == "spot" and of.matches(kind, currency) for of in catalogue.by_name.values())


def _is_pair(catalogue: Catalogue, name: Any) -> bool:
    of = catalogue.by_name.get(str(name))
    return of is not None and of.kind == "spot"
