"""Option prices and greeks after Black (1976), per unit of the underlying. No clock, no random."""

import math
from typing import NamedTuple

YEAR_MS = 365.25 * 86_400_000.0
_SQRT_2PI = math.sqrt(2.0 * math.pi)


class Valuation(NamedTuple):
    """What a model says of one option: price in the quote currency; vega and rho per 1 %, theta per day, as Deribit."""

    price: float
    delta: float
    gamma: float
    vega: float
    theta: float
    rho: float


def value_option(call: bool, forward: float, strike: float, years: float, volatility: float) -> Valuation:
    """Value a European option on a forward; at or after expiry (years <= 0) it is its intrinsic value."""
    if years <= 0.0:
        intrinsic = max(0.0, forward - strike if call else strike - forward)
        delta = (1.0 if call else -1.0) if intrinsic else 0.0
        return Valuation(intrinsic, delta, 0.0, 0.0, 0.0, 0.0)
    root = volatility * math.sqrt(years)
    d1 = math.log(forward / strike) / root + root / 2.0
    density = math.exp(-d1 * d1 / 2.0) / _SQRT_2PI
    below1, below2 = _normal(d1), _normal(d1 - root)
    if call:
        price, delta = forward * below1 - strike * below2, below1
    else:
        price, delta = strike * (1.0 - below2) - forward * (1.0 - below1), below1 - 1.0
    price = max(price, 0.0)
    vega = forward * density * math.sqrt(years) / 100.0
    theta = -forward * density * volatility / (2.0 * math.sqrt(years)) / 365.25
    return Valuation(price, delta, density / (forward * root), vega, theta, -years * price / 100.0)


def smile(base: float, forward: float, strike: float, years: float) -> float:
    """Implied volatility (a fraction) of a strike: higher in the wings, more so near expiry."""
    moneyness = math.log(strike / forward) / math.sqrt(max(years, 0.01))
    return min(3.0, max(0.15, base * (1.0 - 0.08 * moneyness + 0.12 * moneyness * moneyness)))


def imply_volatility(call: bool, forward: float, strike: float, years: float, price: float) -> float:
    """Volatility (a fraction) at which the option is worth `price`; 0 below its intrinsic value, at most 5."""
    low, high = 0.0, 5.0
    if price <= max(0.0, forward - strike if call else strike - forward) or years <= 0.0:
        return 0.0
    for _ in range(18):
        middle = (low + high) / 2.0
        if value_option(call, forward, strike, years, middle).price < price:
            low = middle
        else:
            high = middle
    return high


def _normal(x: float) -> float:
    return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))
